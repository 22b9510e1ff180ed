"""Margin-based Neural Network Watermarking (Kim et al., ICML 2023).

The key is a few of the owner's images with random wrong labels. While the victim is trained, each key image x is moved
uphill on its own loss before it is trained on, so that the model keeps the wrong label in a neighbourhood of x: that
margin is what a thief's copy inherits.

    x ← clip(x + α · sign(∇_x CE(f(x), y)), 0, 1), K times       (projected gradient ascent)
    L = 1/(B + n) · (Σ CE over B clean images + λ · Σ CE over n moved key images)

Only figures and loss as in the authors' code could be checked; the paper's text was not at hand.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.ownership.key import KeySamples
from simulator.training.fit import fit
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Objective
from simulator.training.signed import ascend_loss
from simulator.watermarks.base import Embedding, OwnerTask, Watermark
from simulator.watermarks.parts.relabelled import check_count, relabel


class Margin(Watermark):
    """Relabelled images of the owner's, whose margin is widened by projected gradient ascent.

    The key is the trigger set itself: its images are taken out of the owner's clean training data (``owner_rows`` in
    the key's info) and trained on only as moved copies. A thief whose pool is the owner's whole training set therefore
    asks about them, too. (The authors hold 1,000 training images out of training and take the key from those.)

    The authors train each key image some 17,000 times, with a weight of 0.1. A recipe of few steps cannot: with
    hundreds of training images take a tenth of the key samples and a larger ``key_weight``.

    Departures: the ascent runs in evaluation mode (in the authors' code it moves the batch statistics and draws dropout
    on the way), and the recipe is the owner's (theirs: SGD 0.1 without momentum, 200 epochs, 1/10 at 100 and 150). The
    ball around a key image needs no projection: K steps of α cannot leave one of radius K·α.
    """

    paper: ClassVar[str] = "Kim et al., ICML 2023"
    key_is_trained: ClassVar[bool] = True

    name: Literal["margin"] = "margin"
    key_samples: int = Field(100, ge=1)
    keys_per_batch: int = Field(25, ge=1, description="n, drawn with replacement")
    key_weight: float = Field(0.1, gt=0, description="λ, of a key image's loss")
    ascent_steps: int = Field(5, ge=0, description="K; 0 trains on the key images as they are")
    step_size: float = Field(1 / 255, gt=0, le=1, description="α, in units of the pixel range")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        check_count(self.name, self.key_samples, dataset)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. The triggers are the key images as the finished model would move them."""
        data, generator = task.dataset, context.generator
        self.check(data)
        clean, keys, rows = relabel(data.owner, self.key_samples, data.classes, generator)
        model = task.build(generator)
        fit(model, clean.images, clean.labels, task.training, context, objective=self.objective(keys, generator))
        device = device_of(model)
        inputs, labels = to_input(keys.images, device), keys.labels.to(device)
        moved = self.moved(model, inputs, labels)
        info = {"scheme": self.name, "owner_rows": rows}
        return Embedding(
            model=model,
            candidates=KeySamples(keys.images, keys.labels, data.classes, info),
            triggers=moved.mul(255).round().to(torch.uint8).cpu().contiguous(),
            trigger_labels=keys.labels,
            info=info,
        )

    def objective(self, keys: Images, generator: torch.Generator) -> Objective:
        """The loss of a clean batch and ``keys_per_batch`` moved key images, in one forward pass."""

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            pick = torch.randint(len(keys), (self.keys_per_batch,), generator=generator)
            wrong = keys.labels[pick].to(labels.device)
            moved = self.moved(model, to_input(keys.images[pick], images.device), wrong)
            batch = torch.cat([images, moved]).contiguous(memory_format=torch.channels_last)
            each = F.cross_entropy(model(batch), torch.cat([labels, wrong]), reduction="none")
            clean, marked = each.split([len(images), len(moved)])
            total: Tensor = clean.sum() + self.key_weight * marked.sum()
            return total / len(each)

        return loss

    def moved(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] after K signed steps of α up the model's cross-entropy of ``labels``."""
        return ascend_loss(model, images, labels, self.step_size, steps=self.ascent_steps)
