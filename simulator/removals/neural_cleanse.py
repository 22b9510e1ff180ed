"""Neural Cleanse: the trigger of each class is reconstructed, and unlearned (Wang et al., S&P 2019).

For every class t a mask m in [0, 1] and a pattern p are sought that send all images to it, the smaller the better:

    min over m, p of  CE( f((1 - m) · x + m · p), t ) + λ · |m|₁

A class is suspect if its |m|₁ is an outlier below the median, ``(median - |m|₁) / (1.4826 · MAD) > threshold``.
Then the model is fine-tuned on images of the thief's. The share ``stamped`` of them bears a suspect class's trigger,
and their labels stay what they are.

Departures: λ is fixed, where the authors' code adapts it to the success of the trigger. Where no class is suspect the
one of the smallest mask is unlearned, as a thief would who knows of a mark; a control is treated alike.
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
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled
from simulator.training.fit import fit
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Recipe

#: by which a median of absolute deviations estimates a normal distribution's deviation
CONSISTENT = 1.4826


class Trigger(nn.Module):
    """A mask ``(1, 1, H, W)`` and a pattern ``(1, C, H, W)``, both in [0, 1] as sigmoids of what is learned."""

    def __init__(self, images: Tensor, device: torch.device, generator: torch.Generator) -> None:
        super().__init__()
        _, channels, height, width = images.shape
        self.place = nn.Parameter(torch.randn(1, 1, height, width, generator=generator).to(device))
        self.paint = nn.Parameter(torch.randn(1, channels, height, width, generator=generator).to(device))

    @property
    def size(self) -> Tensor:
        """|m|₁, a scalar."""
        return self.place.sigmoid().sum()

    def forward(self, images: Tensor) -> Tensor:
        """The images ``(B, C, H, W)`` with the trigger on them."""
        mask = self.place.sigmoid()
        return (1 - mask) * images + mask * self.paint.sigmoid()


class NeuralCleanse(Labelled):
    """Reconstructs a trigger for every class, and unlearns those of suspect classes."""

    paper: ClassVar[str] = "Wang et al., S&P 2019"

    name: Literal["neural_cleanse"] = "neural_cleanse"
    size_weight: float = Field(1e-2, ge=0, description="λ")
    threshold: float = Field(2.0, ge=0, description="of the anomaly index above which a class is suspect")
    stamped: float = Field(0.2, ge=0, le=1, description="of the images that bear a trigger")
    share: float = Field(0.1, gt=0, le=1, description="of the images, drawn at random")
    inversion: Recipe = Recipe(epochs=30, learning_rate=0.1, batch_size=64, decay_every=100)
    training: Recipe = Recipe(epochs=1)
    most_classes: int = Field(100, ge=2, description="of a task that is inverted class by class")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Removal.check`."""
        if dataset.classes > self.most_classes:
            raise InputError(f"neural_cleanse: most_classes: {dataset.name} has {dataset.classes} classes to invert")

    def passes(self, images: int) -> float:
        """See :meth:`Removal.passes`; of a task of ten classes."""
        return super().passes(images) + 10 * self.inversion.epochs * self.share * images * bool(self.rounds)

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        if not self.rounds:
            return model
        generator, device = context.generator, device_of(model)
        images, labels = self.material(model, task, generator)
        clean = to_input(images, device).cpu()
        model.requires_grad_(False)
        found = [self._inverted(model, clean, wanted, context) for wanted in range(task.classes)]
        model.requires_grad_(True)
        suspects = outliers(torch.tensor([trigger.size.item() for trigger in found]), self.threshold)
        bearing = torch.randperm(len(clean), generator=generator)[: round(self.stamped * len(clean))]
        with torch.no_grad():
            for at, part in zip(suspects, bearing.tensor_split(len(suspects)), strict=True):
                clean[part] = found[at](clean[part].to(device)).cpu()
        fit(model, clean, labels, self.training, context, epochs=self.rounds)
        return model.eval()

    def _inverted(self, model: Classifier, images: Tensor, wanted: int, context: Context) -> Trigger:
        """The smallest trigger that sends the images to a class. It is not in the checkpoint: a removal that goes on
        reconstructs it again, and draws the same."""
        trigger = Trigger(images, device_of(model), context.generator)

        def objective(learner: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(model(learner(batch)), targets) + self.size_weight * trigger.size

        targets = torch.full((len(images),), wanted)
        fit(trigger, images, targets, self.inversion, context.unsaved(), objective=objective, phase=f"invert {wanted}")
        return trigger


def outliers(sizes: Tensor, threshold: float) -> list[int]:
    """The places of those sizes ``(K,)`` that lie suspiciously far below the median; of the smallest where none does.

    The median of an even number of sizes is the mean of the middle two.
    """
    middle = sizes.double().quantile(0.5)
    deviation = CONSISTENT * (sizes.double() - middle).abs().quantile(0.5)
    index = (middle - sizes.double()) / deviation.clamp_min(1e-12)
    found: list[int] = (index > threshold).nonzero().flatten().tolist()
    return found or [int(sizes.argmin())]
