"""Outlier detection: the suspect takes what is unlike its own images for the owner's queries, and lies about it.

A detector is fitted to the suspect's images, in pixels, penultimate features or logits. DeepTracer (Yang et al., AAAI
2026, Tables 9 and 10) tries Local Outlier Factor and Isolation Forest. The paper names neither the features nor the
threshold, nor what a flagged query is answered. A random label is what MEA-Defender's authors do (Lv et al., IEEE S&P
2024, App. C), and what the table's rates agree with: of a WSR w and a flag rate d is left w (1 - d) + d / K.

The threshold comes from a part of the suspect's images that the detector has not seen: ``flag_rate`` of those are
flagged, at most.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.evasions.base import Evasion, Guard, as_floats, digests
from simulator.models import Classifier
from simulator.seeding import draw_seed, seed_of
from simulator.service.oracle import Oracle
from simulator.training.predict import predict_features, predict_logits


class Outliers(Evasion):
    """Queries unlike the suspect's own images are answered with a random label."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026"

    name: Literal["outliers"] = "outliers"
    detector: Literal["lof", "isolation_forest"] = "lof"
    features: Literal["pixels", "penultimate", "logits"] = "pixels"
    flag_rate: float = Field(0.005, ge=0, lt=1, description="share of held-out images that is flagged; 0 flags nothing")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the images that sets the threshold")
    neighbours: int = Field(20, ge=1, description="of the local outlier factor")
    trees: int = Field(100, ge=1, description="of the isolation forest")

    def check(self, images: int) -> None:
        """See :meth:`Evasion.check`."""
        held_out = self._held_out(images)
        fitted, least = images - held_out, self.neighbours + 1 if self.detector == "lof" else 2
        if not held_out or fitted < least:
            raise InputError(
                f"outliers: {images} images are too few: {held_out} set the threshold and {fitted} are fitted; "
                f"allowed: 1 and {least}, or more"
            )

    def guard(self, oracle: Oracle, model: Classifier, pool: Pool | None, context: Context) -> Guard:
        """See :meth:`Evasion.guard`."""
        assert pool is not None
        self.check(len(pool))
        secret, order = draw_seed(context.generator), torch.randperm(len(pool), generator=context.generator)
        held_out, fitted = order.split([self._held_out(len(pool)), len(pool) - self._held_out(len(pool))])
        detector = self._detector(secret).fit(self.vectors(model, pool.take(fitted)))
        guard = OutlierGuard(oracle, model, self, detector, secret)
        guard.threshold = self._threshold(guard.suspicion(pool.take(held_out)))
        return guard

    def vectors(self, model: Classifier, images: Tensor) -> NDArray[np.float64]:
        """What the detector sees of images, ``(N, D)``."""
        match self.features:
            case "pixels":
                found = as_floats(images).flatten(1)
            case "penultimate":
                found = predict_features(model, images)
            case "logits":
                found = predict_logits(model, images)
        vectors: NDArray[np.float64] = found.double().numpy()
        return vectors

    def _held_out(self, images: int) -> int:
        return round(self.held_out * images)

    def _detector(self, seed: int) -> Any:
        from sklearn.ensemble import IsolationForest  # a second of a processor's time, which others need not spend
        from sklearn.neighbors import LocalOutlierFactor

        if self.detector == "lof":
            return LocalOutlierFactor(n_neighbors=self.neighbours, novelty=True)
        return IsolationForest(n_estimators=self.trees, random_state=seed % 2**32)

    def _threshold(self, suspicion: Tensor) -> float:
        """The suspicion above which ``flag_rate`` of the held-out images lie, at most."""
        if self.flag_rate == 0:
            return math.inf
        return float(suspicion.sort(descending=True).values[math.floor(self.flag_rate * len(suspicion))])


class OutlierGuard(Guard):
    """Answers flagged images with a label that their pixels and a secret of the suspect's decide."""

    def __init__(self, oracle: Oracle, model: Classifier, evasion: Outliers, detector: Any, secret: int) -> None:
        super().__init__(oracle)
        self._model, self._evasion, self._detector, self._secret = model, evasion, detector, secret

    def query(self, images: Tensor) -> Tensor:
        """See :meth:`Guard.query`. The oracle behind is asked every image, flagged ones too: all cost the same."""
        answers = self._oracle.query(images)
        if self.threshold == math.inf or not len(images):
            return answers
        flagged = (self.suspicion(images) > self.threshold).nonzero().squeeze(1)
        if not len(flagged):
            return answers
        drawn = [seed_of("lie", self._secret, digest) % self.classes for digest in digests(as_floats(images[flagged]))]
        lies = F.one_hot(torch.tensor(drawn), self.classes).to(answers.dtype)
        return answers.index_copy(0, flagged, lies)

    def suspicion(self, images: Tensor) -> Tensor:
        """See :meth:`Guard.suspicion`: the detector's score with its sign turned, so that outliers are large."""
        if not len(images):
            return torch.empty(0, dtype=torch.float64)
        return torch.from_numpy(-self._detector.score_samples(self._evasion.vectors(self._model, images)))
