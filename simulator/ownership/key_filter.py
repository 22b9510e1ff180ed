"""The two-stage filter of key samples (DeepTracer, Yang et al., AAAI 2026, Eq. 7 and 8), usable with every scheme.

Stage 1 keeps the candidates that the victim and the owner's own *filter surrogate* (a stolen model that the owner makes
by querying the victim) answer with the key's label, and a benign model does not. Stage 2 keeps the M of them of which
the surrogate is surest. The paper's surrogate is an AlexNet (ResNet18 on ImageNet) stolen with TinyImageNet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from simulator.component import Settings
from simulator.context import Context
from simulator.data.pool import PoolSpec
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.service.answers import Labels, answer_policy
from simulator.training.fit import fit
from simulator.training.predict import predict
from simulator.training.recipe import Recipe


class KeyFilter(Settings):
    """Settings of the filter.

    Attributes:
        stages: ``"both"``, ``"first"`` only, or ``"none"`` (Fig. 6).
        keep: M of Eq. 8.
        architecture: of the filter surrogate; the victim's own if not given (Table 21).
        pool, queries, labels, training: how the filter surrogate is stolen.
    """

    stages: Literal["none", "first", "both"] = "both"
    keep: int = Field(2000, ge=1)
    architecture: str | None = "alexnet"
    pool: Annotated[PoolSpec, BeforeValidator(PoolSpec.parse)] = PoolSpec(parts={"patches": 1.0})
    queries: int = Field(8000, ge=2)
    labels: Labels = "soft"
    training: Recipe = Recipe()

    def surrogate(
        self,
        victim: Classifier,
        images: Tensor,
        build: Callable[[torch.Generator], Classifier],
        context: Context,
    ) -> Classifier:
        """The owner's simulated stolen model: ``build()`` trained on the victim's answers to ``images``."""
        answers = answer_policy(self.labels)(predict(victim, images))
        model = build(context.generator)
        fit(model, images, answers, self.training, context, phase="filter")
        return model

    def select(
        self, candidates: KeySamples, *, victim: Classifier, surrogate: Classifier, benign: Classifier
    ) -> KeySamples:
        """The key: what is left of the candidates (Eq. 7 and 8), the surest first.

        Where stage 1 would leave nothing, because the surrogate learned nothing of the watermark, its condition on the
        surrogate is dropped and the key's ``info`` says so (``"filter": "surrogate never triggered"``).

        Raises:
            InputError: nothing tells the victim from the benign model. A key of candidates that both answer alike would
                accuse the innocent.
        """
        if self.stages == "none":
            return candidates.take(torch.arange(min(self.keep, len(candidates))), filter="none")
        rows = torch.arange(len(candidates))
        labels = candidates.labels
        confidence = predict(surrogate, candidates.images)
        passes_victim = predict(victim, candidates.images).argmax(1) == labels
        fails_benign = predict(benign, candidates.images).argmax(1) != labels
        passes_surrogate = confidence.argmax(1) == labels
        kept = passes_victim & passes_surrogate & fails_benign
        note: str = self.stages
        if not kept.any():
            kept, note = passes_victim & fails_benign, "surrogate never triggered"
        if not kept.any():
            raise InputError(
                f"no key: of {len(candidates)} candidates the victim answers {int(passes_victim.sum())} with the key's "
                f"label and the benign model {int((~fails_benign).sum())}, and there is none that the victim alone "
                "answers so (key_filter.stages: none keeps all of them)"
            )
        rows = rows[kept]
        if self.stages == "both":
            rows = rows[confidence[rows, labels[rows]].argsort(descending=True, stable=True)]
        counts = {
            "candidates": len(candidates),
            "passed_victim": int(passes_victim.sum()),
            "passed_surrogate": int(passes_surrogate.sum()),
            "failed_benign": int(fails_benign.sum()),
            "passed": len(rows),
        }
        return candidates.take(rows[: self.keep], filter=note, filter_counts=counts)
