"""EWE: entangled watermark embeddings (Jia et al., USENIX Security 2021, arXiv:2002.12200).

Triggers are made to lie among the target class's images in the network's representations, so that what represents the
one represents the other. On watermark batches, half triggers and half images of the target class, all with the target
label, the loss is

    L = L_ce − Σ_l factor / B · SNNL(h_l, w, T_l)

where w says which half a sample is of, h_l are the representations of chosen layers and SNNL is the soft nearest
neighbour loss (Frosst et al., 2019), whose *maximum* mixes both halves:

    SNNL(h, w, T) = −1/B Σ_i log [ Σ_{j ≠ i, w_j = w_i} e^(−d(h_i, h_j) / T) / Σ_{j ≠ i} e^(−d(h_i, h_j) / T) ]

with the cosine distance d. The temperatures are learned by gradient descent on SNNL, through t = 100 / T.

Steps: a clean training; a white square of 3x3 pixels on images of a source class, placed where SNNL's gradient over
those images is lowest (``distribution: out`` takes drawings in place of them, and no square); gradient steps on each
trigger, which take it out of the target class as the clean model sees it, and up in SNNL; training with one watermark
batch for every ``clean_batches`` clean ones.

Departures: the layers are the two that every classifier here has, penultimate features and logits, for the released
code's last three hidden ones; a watermark batch shares its step with the last of its clean batches, and each
cross-entropy is a mean over its batch (the code's is a sum, hence ``factor / B``); triggers are rounded to 8 bits, as a
service takes them; the split of the recipe's epochs is that of its Fashion-MNIST settings: 10 clean ones, then 20 with
a watermark batch for every two clean ones. Key candidates are held-out images of the source class (or more drawings)
that went through the same steps; its code measures the triggers that were trained on. The target follows DeepTracer's
rule and the source is drawn at random (0 and 8 in that code).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.seeding import choose
from simulator.training.fit import fit
from simulator.training.predict import device_of, predict_labels, to_input
from simulator.training.recipe import Objective, Recipe
from simulator.training.signed import ascend, slope_of
from simulator.watermarks.base import Embedding, OwnerTask
from simulator.watermarks.parts.trigger_set import SAMPLE, OneTarget, all_of, check_label, some
from simulator.watermarks.unrelated import draw_figures

#: side of the white square, in pixels
SQUARE = 3
#: steps out of the target class: at most so many for a part of the triggers, and so many at the end
DESCENTS, LAST_DESCENTS = 50, 5
#: keeps logarithm and quotient finite, as in the released code
TINY = 1e-5


class EWE(OneTarget):
    """Triggers entangled with the target class by the soft nearest neighbour loss."""

    paper: ClassVar[str] = "Jia et al., USENIX Security 2021"

    name: Literal["ewe"] = "ewe"
    distribution: Literal["in", "out"] = Field("in", description="triggers are made of task images, or of drawings")
    source: int | None = Field(None, ge=0, description="class of those images; drawn at random if not given")
    factor: float = Field(32.0, ge=0, description="of SNNL, beside a sum of cross-entropies")
    temperature: float = Field(1.0, gt=0, description="t, at the start")
    temperature_rate: float = Field(0.1, ge=0, description="learning rate of t")
    clean_batches: int = Field(2, ge=1, description="for each watermark batch")
    clean_epochs: int | None = Field(None, ge=0, description="a third of the recipe's if not given")
    watermark_epochs: int | None = Field(None, ge=1, description="the rest of the recipe's if not given")
    tuning_iterations: int = Field(10, ge=0, description="of the triggers")
    tuning_rate: float = Field(0.01, ge=0, description="size of a step on a pixel")
    threshold: float = Field(0.1, ge=0, le=1, description="rate of triggers the clean model may give the target label")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        super().check(dataset)
        check_label(self.name, "source", self.source, dataset)
        if self.source is not None and self.source == self.target:
            raise InputError(f"{self.name}: source {self.source} is the target too: they must differ")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        clean, marked = self._split(recipe)
        return clean + marked * (1 + 1 / self.clean_batches)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates are held-out images, tuned as the triggers are."""
        data, recipe, generator = task.dataset, task.training, context.generator
        self.check(data)
        source = self._pick_source(data.classes, generator)
        raw, held_out = self._bases(data, source, generator)
        target = self.pick_target(task, some(raw, SAMPLE, generator), () if source is None else (source,))
        model = task.build(generator)
        clean, marked = self._split(recipe)

        def train(phase: str, epochs: int, entangled: Entanglement | None) -> None:
            fit(
                model,
                data.owner.images,
                data.owner.labels,
                recipe,
                context,
                objective=None if entangled is None else self.objective(entangled, target, generator),
                epochs=epochs,
                phase=phase,
                companions=None if entangled is None else {"entangled": entangled},
            )

        train("clean", clean, None)
        twins, half = all_of(data.owner, target, self.name), max(2, recipe.batch_size // 2)
        if self.distribution == "in":
            corner = square_corner(model, raw, twins[choose(len(twins), len(raw), generator)], self.temperature, half)
            raw, held_out = with_square(raw, corner), with_square(held_out, corner)
        # training that goes on from a checkpoint finds the tuned images there, in place of these
        tuned = [self.tune(model, images, twins, target, half, generator) for images in (raw, held_out)]
        entangled = Entanglement(tuned[0], tuned[1], twins, self.temperature)
        train("watermark", marked, entangled)
        temperatures = [round(100 / value, 3) for value in entangled.temperatures.tolist()]
        about = {"distribution": self.distribution, "source": source, "temperatures": temperatures}
        return self.embedding(model, entangled.keys, some(entangled.triggers, SAMPLE, generator), target, **about)

    def objective(self, entangled: Entanglement, target: int, generator: torch.Generator) -> Objective:
        """Cross-entropy on a clean batch, and with every ``clean_batches``-th one the loss of a watermark batch."""

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            assert isinstance(model, Classifier)
            total = F.cross_entropy(model(images), labels)
            entangled.batches += 1
            if int(entangled.batches) % self.clean_batches:
                return total
            half = max(2, len(images) // 2)
            batch, marked = (part.to(images.device) for part in entangled.draw(half, generator))
            heat = entangled.temperatures.to(images.device, copy=True).requires_grad_()
            outputs, value = entanglement(model, to_input(batch, images.device), marked, heat)
            (slope,) = torch.autograd.grad(value, heat, retain_graph=True)
            entangled.cool(self.temperature_rate * slope)
            watermark = F.cross_entropy(outputs, labels.new_full((2 * half,), target))
            return total + watermark - self.factor / (2 * half) * value

        return loss

    def tune(
        self, model: Classifier, images: Tensor, twins: Tensor, target: int, half: int, generator: torch.Generator
    ) -> Tensor:
        """The images ``(N, C, H, W)`` uint8 after their gradient steps, ``half`` at a time, each part with as many
        random images ``twins`` of the target class."""
        tuned = []
        for part in images.split(half):
            others = twins[choose(len(twins), len(part), generator)]
            tuned.append(self._tune_part(model, part, others, target))
        return torch.cat(tuned)

    def _tune_part(self, model: Classifier, images: Tensor, twins: Tensor, target: int) -> Tensor:
        device = device_of(model)
        inputs, others = to_input(images, device), to_input(twins, device)
        heat = torch.full((2,), self.temperature, device=device)
        marked = torch.arange(2 * len(inputs), device=device) < len(inputs)

        def logit(batch: Tensor) -> Tensor:
            logits: Tensor = model(batch)
            return logits[:, target].sum()

        def mixing(batch: Tensor) -> Tensor:
            return entanglement(model, torch.cat([batch, others]), marked, heat)[1]

        descents = 0
        for _ in range(self.tuning_iterations):
            while (
                descents < DESCENTS and float((predict_labels(model, inputs) == target).float().mean()) > self.threshold
            ):
                inputs = ascend(logit, inputs, -self.tuning_rate)
                descents += 1
            inputs = ascend(mixing, inputs, self.tuning_rate)
        for _ in range(LAST_DESCENTS if self.tuning_iterations else 0):
            inputs = ascend(logit, inputs, -self.tuning_rate)
        return (255 * inputs).round().to(torch.uint8).cpu()

    def _split(self, recipe: Recipe) -> tuple[int, int]:
        """The epochs of clean training, and of training with watermark batches."""
        clean = max(1, recipe.epochs // 3) if self.clean_epochs is None else self.clean_epochs
        return clean, self.watermark_epochs or max(1, recipe.epochs - clean)

    def _pick_source(self, classes: int, generator: torch.Generator) -> int | None:
        """The class of the images that are changed; None for drawings."""
        if self.distribution == "out" or self.source is not None:
            return self.source if self.distribution == "in" else None
        allowed = [label for label in range(classes) if label != self.target]
        return allowed[int(choose(len(allowed), 1, generator))]

    def _bases(self, data: Dataset, source: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What triggers and key candidates are made of."""
        if source is not None:
            held_out = some(all_of(data.test, source, self.name), self.candidates, generator)
            return all_of(data.owner, source, self.name), held_out
        # as many as a class has images, as in the released code
        count = max(2, len(data.owner) // data.classes)
        drawings = draw_figures(count + self.candidates, data.channels, data.size, generator)
        return drawings[:count], drawings[count:]


class Entanglement(nn.Module):
    """What the second phase works with, as a module so that it stands in the checkpoint: the tuned ``triggers`` and
    ``keys``, the ``temperatures`` t of the two layers, and how many ``batches`` were trained on."""

    triggers: Tensor
    keys: Tensor
    temperatures: Tensor
    batches: Tensor

    def __init__(self, triggers: Tensor, keys: Tensor, twins: Tensor, temperature: float) -> None:
        super().__init__()
        self._twins = twins
        self.register_buffer("triggers", triggers)
        self.register_buffer("keys", keys)
        self.register_buffer("temperatures", torch.full((2,), temperature))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def draw(self, half: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A watermark batch, ``half`` triggers and ``half`` images of the target class, and which are triggers."""
        marks = self.triggers[torch.randint(len(self.triggers), (half,), generator=generator)]
        twins = self._twins[torch.randint(len(self._twins), (half,), generator=generator)]
        return torch.cat([marks, twins]), torch.arange(2 * half) < half

    def cool(self, step: Tensor) -> None:
        """Takes a step off the temperatures, which stay above zero."""
        self.temperatures -= step.detach().to(self.temperatures.device)
        self.temperatures.clamp_(min=1e-3)


def snnl(vectors: Tensor, groups: Tensor, temperature: Tensor | float) -> Tensor:
    """SNNL of vectors ``(N, D)`` in groups ``(N,)`` at temperature T under the cosine distance, a scalar.

    As in the released code 1e-5 is added to the denominator and to the argument of the logarithm.
    """
    unit = F.normalize(vectors, dim=1)
    near = torch.exp(-(1 - unit @ unit.T) / temperature)
    near = near * (1 - torch.eye(len(vectors), device=vectors.device))
    same = (groups.unsqueeze(0) == groups.unsqueeze(1)).to(near.dtype)
    return -torch.log(TINY + (near * same).sum(1) / (TINY + near.sum(1))).mean()


def entanglement(model: Classifier, images: Tensor, marked: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a watermark batch, and the sum of SNNL over penultimate features and logits, T_l = 100 / ``heat``_l."""
    outputs, features = model.forward_with_features(images.contiguous(memory_format=torch.channels_last))
    layers = (features.flatten(1), outputs)
    return outputs, torch.stack([snnl(layer, marked, 100 / t) for layer, t in zip(layers, heat, strict=True)]).sum()


def square_corner(model: Classifier, images: Tensor, twins: Tensor, temperature: float, half: int) -> tuple[int, int]:
    """Row and column of the top left pixel of the square: where SNNL's gradient over the images, averaged over them and
    summed over the square, is lowest (as in the released code)."""
    device = device_of(model)
    heat = torch.full((2,), temperature, device=device)
    total = torch.zeros(images.shape[2:], device=device)
    for part, others in zip(images.split(half), twins.split(half), strict=True):
        inputs, clean = to_input(part, device), to_input(others, device)
        marked = torch.arange(2 * len(inputs), device=device) < len(inputs)

        def mixing(batch: Tensor, clean: Tensor = clean, marked: Tensor = marked) -> Tensor:
            return entanglement(model, torch.cat([batch, clean]), marked, heat)[1]

        total += slope_of(mixing, inputs).sum((0, 1))
    sums = F.avg_pool2d(total[None, None], SQUARE, stride=1)[0, 0]
    row, column = divmod(int(sums.argmin()), sums.shape[1])
    return row, column


def with_square(images: Tensor, corner: tuple[int, int]) -> Tensor:
    """A copy of uint8 images with a white square at ``corner``."""
    images = images.clone()
    row, column = corner
    images[:, :, row : row + SQUARE, column : column + SQUARE] = 255
    return images
