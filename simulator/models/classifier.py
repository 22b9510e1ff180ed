"""A classifier with its own normalisation: what it is (`ModelSpec`), what it computes (`Classifier`), `build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from simulator.component import Settings, describe
from simulator.errors import InputError
from simulator.models.architectures import ARCHITECTURES


class ModelSpec(Settings):
    """What a classifier is, without its weights. ``mean`` and ``std`` have one number for each channel."""

    architecture: str
    channels: Annotated[int, Field(ge=1, le=4096)]
    size: Annotated[int, Field(ge=1, le=4096)]
    classes: Annotated[int, Field(ge=2, le=1_000_000)]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        return ARCHITECTURES.known(name)

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        smallest = ARCHITECTURES[self.architecture].smallest
        if self.size < smallest:
            raise ValueError(f"size {self.size} is too small for {self.architecture}: its smallest size is {smallest}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} numbers, but the images have {self.channels} channels")
        return self


class Classifier(nn.Module):
    """An image classifier that takes images as they are and normalises them itself.

    Input: ``(B, C, size, size)``, uint8, or float in [0, 1]; uint8 is divided by 255. Logits: ``(B, K)`` float32.
    Gradients flow to the parameters and to float images. Images of another shape or type raise an `InputError`.

    ``spec`` says what it is; ``body`` maps normalised images to penultimate features and ``head`` is the last linear
    layer. ``mean`` and ``std`` are buffers of shape ``(1, C, 1, 1)``; they are in ``spec``, not in the state dict.
    Dropout and stochastic depth draw from torch's global generator, so a repeatable training loop forks and seeds it.
    A batch for training needs two images or more, because batch normalisation averages over the batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.spec = spec
        self.body = body
        self.head = head
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of ``images``."""
        return self.forward_with_features(images)[0]

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features ``(B, D)``: the input of the last linear layer, behind activation, pool and dropout."""
        features: Tensor = self.body(self._normalise(images))
        return features

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and penultimate features ``(B, D)`` in one pass."""
        features = self.features(images)
        return self.head(features), features

    def _normalise(self, images: Tensor) -> Tensor:
        expected = (self.spec.channels, self.spec.size, self.spec.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"images of shape {tuple(images.shape)}: this model takes (B, {', '.join(map(str, expected))})"
            )
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise InputError(f"images of type {images.dtype}: a model takes torch.uint8, or floats in [0, 1]")
        return (images.to(self.mean.dtype) - self.mean) / self.std


def build(
    architecture: str,
    *,
    channels: int,
    size: int,
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Classifier:
    """A classifier of the named architecture with fresh weights, on the CPU, in training mode.

    Args:
        architecture: one of `ARCHITECTURES`.
        channels: of the images, 1 or more.
        size: side of the square images in pixels; the architectures of this package take 8 and more.
        classes: number of classes K, 2 or more.
        mean: of the training images in [0, 1], one number a channel; 0.5 if not given.
        std: their standard deviation, in the same form.
        generator: source of the weights, from which one number is drawn; seed 0 if not given. Equal generators give
            equal weights, and the global generators are left as they were.

    Raises:
        InputError: an unknown architecture, a size too small for it, or another number out of its range.
    """
    ARCHITECTURES.known(architecture)
    try:
        spec = ModelSpec(
            architecture=architecture,
            channels=channels,
            size=size,
            classes=classes,
            mean=(0.5,) * channels if mean is None else tuple(float(value) for value in mean),
            std=(0.5,) * channels if std is None else tuple(float(value) for value in std),
        )
    except ValidationError as error:
        raise InputError(describe(error)) from None
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return assemble(spec, seed)


def assemble(spec: ModelSpec, seed: int = 0) -> Classifier:
    """The classifier of ``spec`` with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would also seed the generators of the GPUs, and those are not forked here
        torch.default_generator.manual_seed(seed)
        body, head = ARCHITECTURES[spec.architecture].build(spec.channels, spec.size, spec.classes)
    return Classifier(spec, body, head).to(memory_format=torch.channels_last)


def describe_models() -> list[tuple[str, str]]:
    """Name and description of every architecture, for ``exsim list models``."""
    return [(name, architecture.about) for name, architecture in ARCHITECTURES.items()]


def parameter_count(model: nn.Module) -> int:
    """How many numbers the optimiser may change."""
    return sum(parameter.numel() for parameter in model.parameters())
