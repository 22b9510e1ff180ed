"""The contract of a transform: images in, images out, and one generator."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from simulator.component import Component, Registry


class Transform(Component):
    """A change of images: its strength as fields, and :meth:`apply`."""

    #: whether it draws from the generator
    random: ClassVar[bool] = False

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether its strength is zero, and it gives every image back as it is."""

    @abstractmethod
    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The changed images.

        Args:
            images: ``(B, C, H, W)`` float32 in [0, 1], on the CPU; they are left as they are.
            generator: the only source of randomness.

        Returns:
            Images of the same shape, type and range. Each depends on its own image alone, unless the transform is
            ``random``.
        """


TRANSFORMS: Registry[Transform] = Registry("transform", Transform, "simulator.transforms")
