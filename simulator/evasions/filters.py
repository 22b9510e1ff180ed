"""Filtered inputs: the suspect changes every image before its model sees it.

DeepTracer (Yang et al., AAAI 2026, Fig. 9) asks a victim through Gaussian blur, Gaussian noise, quantised and cropped
inputs, clean images and key alike. The filters are :mod:`simulator.transforms`; their strengths are not stated there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from simulator.context import Context
from simulator.data.pool import Pool
from simulator.evasions.base import Evasion, Guard, as_floats, digests
from simulator.models import Classifier
from simulator.seeding import draw_seed, generator_for
from simulator.service.oracle import Oracle
from simulator.transforms.base import TRANSFORMS, Transform
from simulator.transforms.blur import Blur


class Filter(Evasion):
    """The model answers changed images: blurred, noisy, in few levels, or cropped."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026"
    data_free: ClassVar[bool] = True

    name: Literal["filter"] = "filter"
    transform: TRANSFORMS.field() = Blur()  # type: ignore[valid-type]

    def guard(self, oracle: Oracle, model: Classifier, pool: Pool | None, context: Context) -> Guard:
        """See :meth:`Evasion.guard`."""
        return FilterGuard(oracle, self.transform, draw_seed(context.generator))


class FilterGuard(Guard):
    """Asks the oracle behind it the changed images."""

    def __init__(self, oracle: Oracle, transform: Transform, secret: int) -> None:
        super().__init__(oracle)
        self._transform, self._secret = transform, secret

    def query(self, images: Tensor) -> Tensor:
        """See :meth:`Guard.query`."""
        return self._oracle.query(images if self._transform.idle or not len(images) else self._changed(images))

    def _changed(self, images: Tensor) -> Tensor:
        inputs = as_floats(images)
        if not self._transform.random:
            return self._transform.apply(inputs, torch.Generator())
        # each image has a generator of its own: asked again, in another batch, it is changed as before
        draws = [generator_for("filter", self._secret, digest) for digest in digests(inputs)]
        parts = [self._transform.apply(one, draw) for one, draw in zip(inputs.split(1), draws, strict=True)]
        return torch.cat(parts)
