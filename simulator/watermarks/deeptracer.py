"""DeepTracer: Tracing Stolen Model via Deep Coupled Watermarks (Yang et al., AAAI 2026).

The trigger is a mosaic of one image from each of a few source classes that spread over the task's feature space, so
that a thief who learns the task has to learn the mosaics' features too. The loss is Eq. 6:

    L = L_pri + λ1 · L_wm + λ2 · (λ3 · L_intra + λ4 · L_inter)

with the coupling loss of :mod:`simulator.watermarks.parts.coupling`. Training has two phases, with watermark samples
for 1 % and then 10 % of the training data (here of every batch, see :class:`DeepTracer`). Where the paper is silent
(``margin``, the centroid rule, the feature layer, the order of the tiles, the shrinking) each choice is a field here or
named in the module that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.ownership.key import KeySamples
from simulator.seeding import choose, fork
from simulator.training.fit import fit
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Objective, Recipe
from simulator.watermarks.base import Embedding, Imitation, OwnerTask, Watermark
from simulator.watermarks.parts.classes import imitated
from simulator.watermarks.parts.coupling import CentroidRule, Centroids, coupling_loss
from simulator.watermarks.parts.mosaic import Combination, Mosaics, compose
from simulator.watermarks.parts.selection import adaptive_sources, least_likely_target

#: mosaics over which Eq. 4 averages, and how many near misses and triggers are handed out
SAMPLE = 1000


class DeepTracer(Watermark):
    """Mosaics of adaptively chosen source classes, coupled to a target class in the output space.

    Two departures because the paper is silent or contradicts itself: the target label is chosen outside the source
    classes (``target_outside_sources``; near ties pick one inside in half of all selections), and ``margin``, which the
    paper does not state, is 1 (a larger one costs accuracy at short schedules).

    A third one: mosaics are drawn anew for every batch, where the paper's watermark samples, 1 % and 10 % of the
    training data, read as a set that is made once. And as a batch holds whole images, the ratios are
    ``max(1, round(ratio · B)) / B``: at B = 64 they are 1.56 % and 9.4 %. The triggers handed out are drawn anew, too.
    """

    paper: ClassVar[str] = "Yang et al., AAAI 2026"

    name: Literal["deeptracer"] = "deeptracer"
    source_classes: Literal[2, 4, 6, 8] = Field(4, description="tiles of a mosaic (Table 20)")
    combination: Combination = Field("tiles", description="of the source images: shrunk, cut out, in stripes (Fig. 16)")
    selection: Literal["adaptive", "random"] = Field("adaptive", description="of the source classes (Fig. 5)")
    target_outside_sources: bool = True
    watermark_weight: float = Field(1.0, ge=0, description="λ1, of the watermark loss")
    coupling_weight: float = Field(1.0, ge=0, description="λ2, of the coupling loss; 0 leaves it out")
    intra_weight: float = Field(0.01, ge=0, description="λ3, of the distances to the own class's centroid")
    inter_weight: float = Field(3.0, ge=0, description="λ4, of the distances to the other classes' centroids")
    margin: float = Field(1.0, gt=0, description="distance to other centroids below which a sample is penalised")
    centroid: CentroidRule = "batch"
    centroid_momentum: float = Field(0.9, ge=0, lt=1, description="of the moving centroids")
    first_epochs: int = Field(100, ge=0)
    first_ratio: float = Field(0.01, gt=0, le=1, description="watermark samples per clean one of a batch, phase 1")
    second_epochs: int = Field(100, ge=1)
    second_ratio: float = Field(0.1, gt=0, le=1, description="the same, second phase")
    candidates: int = Field(4000, ge=1, description="key candidates, S_0")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        if dataset.classes < self.source_classes + self.target_outside_sources:
            raise InputError(
                f"deeptracer: source_classes {self.source_classes} is too many for the {dataset.classes} classes of "
                f"{dataset.name}{' (one more is needed as the target)' if self.target_outside_sources else ''}"
            )

    def phases(self) -> tuple[str, ...]:
        """See :meth:`Watermark.phases`."""
        return ("phase 1",) if self.first_epochs else ()

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        return self.first_epochs * (1 + self.first_ratio) + self.second_epochs * (1 + self.second_ratio)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates and near misses are mosaics of test images."""
        data, generator = task.dataset, context.generator
        sources, target = self._select(task, generator)
        model = task.build(generator)
        mosaics = Mosaics(data.owner, sources, self.combination)
        centroids = Centroids(self.centroid, data.classes, self.centroid_momentum).to(device_of(model))
        phases = ((self.first_epochs, self.first_ratio), (self.second_epochs, self.second_ratio))
        for number, (epochs, ratio) in enumerate(phases, start=1):
            fit(
                model,
                data.owner.images,
                data.owner.labels,
                task.training,
                context,
                objective=self.objective(mosaics, target, ratio, centroids, generator),
                epochs=epochs,
                phase=f"phase {number}",
                companions={"centroids": centroids},
            )
            if f"phase {number}" in self.phases():
                task.on_phase(f"phase {number}", model, lambda: self._keys(task, sources, target, fork(generator)))
        near_misses = self._near_misses(task, sources, target, generator)
        candidates = self._keys(task, sources, target, generator)
        triggers = mosaics.draw(SAMPLE, generator)
        return Embedding(
            model=model,
            candidates=candidates,
            triggers=triggers,
            trigger_labels=torch.full((len(triggers),), target),
            near_misses=near_misses,
            near_miss_labels=None if near_misses is None else torch.full((len(near_misses),), target),
            info=candidates.info,
        )

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation:
        """See :meth:`Watermark.imitate`: mosaics of images of the outsider's."""
        return imitated(data, self.source_classes, sources, generator, lambda *tiles: compose(tiles, self.combination))

    def _keys(self, task: OwnerTask, sources: tuple[int, ...], target: int, generator: torch.Generator) -> KeySamples:
        """Mosaics of test images with the target label."""
        images = Mosaics(task.dataset.test, sources, self.combination).draw(self.candidates, generator)
        info = {"scheme": self.name, "sources": list(sources), "target": target}
        return KeySamples(images, torch.full((len(images),), target), task.dataset.classes, info)

    def objective(
        self, mosaics: Mosaics, target: int, ratio: float, centroids: Centroids, generator: torch.Generator
    ) -> Objective:
        """Eq. 6 as a function of the model and a clean batch: it adds ``ratio`` times as many fresh mosaics (at least
        one), in the same forward pass."""

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            count = max(1, round(ratio * len(images)))
            batch = torch.cat([images, to_input(mosaics.draw(count, generator), images.device)])
            targets = torch.cat([labels, labels.new_full((count,), target)])
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
            clean, marked = outputs.split([len(images), count])
            total = F.cross_entropy(clean, labels)
            total = total + self.watermark_weight * F.cross_entropy(marked, targets[len(images) :])
            if self.coupling_weight == 0:
                return total
            values, present = centroids(outputs, targets)
            return total + coupling_loss(
                outputs,
                targets,
                values,
                margin=self.margin,
                intra_weight=self.coupling_weight * self.intra_weight,
                inter_weight=self.coupling_weight * self.inter_weight,
                present=present,
            )

        return loss

    def _select(self, task: OwnerTask, generator: torch.Generator) -> tuple[tuple[int, ...], int]:
        """The source classes and the target label."""
        data = task.dataset
        self.check(data)
        if self.selection == "adaptive":
            sources = adaptive_sources(task.benign, data.owner, data.classes, self.source_classes, generator)
        else:
            sources = tuple(choose(data.classes, self.source_classes, generator).tolist())
        sample = Mosaics(data.owner, sources, self.combination).draw(SAMPLE, generator)
        return sources, least_likely_target(task.benign, sample, sources if self.target_outside_sources else ())

    def _near_misses(
        self, task: OwnerTask, sources: tuple[int, ...], target: int, generator: torch.Generator
    ) -> Tensor | None:
        """Mosaics of test images from other classes than the sources and the target, as many of them as there are;
        a tile may show a class twice where fewer are left than tiles. None if no class is left."""
        others = [label for label in range(task.dataset.classes) if label not in (*sources, target)]
        if not others:
            return None
        picks = [others[i] for i in choose(len(others), self.source_classes, generator).tolist()]
        return Mosaics(task.dataset.test, picks, self.combination).draw(SAMPLE, generator)
