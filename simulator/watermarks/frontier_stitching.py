"""Adversarial Frontier Stitching (Le Merrer, Pérez and Trédan, Neural Comput. and Appl. 2020, arXiv 1711.01894).

The key lies on both sides of the decision frontier of a trained model f: images moved by one fast gradient sign step,

    x' = clip(x + ε · sign(∇_x CE(f(x), y)), 0, 1),

half of them *true adversaries* (f no longer answers y) and half *false adversaries* (f still does). All keep the label
y, and f is fine-tuned until it answers the true adversaries rightly, too: the frontier is stitched around them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Images
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.training.fit import fit
from simulator.training.predict import PREDICT_BATCH, device_of, predict_labels, to_input
from simulator.training.recipe import Recipe
from simulator.training.signed import ascend_loss
from simulator.watermarks.base import Embedding, OwnerTask, Watermark


class FrontierStitching(Watermark):
    """Adversarial examples of the owner's images, answered with their true labels.

    The victim is the benign model, fine-tuned on the owner's images and the adversaries. The key is the trigger set
    itself; its images are moved training images, so none of them equals one.

    The paper verifies with both halves: a model without the mark is taken to miss each sample with probability 1/2, and
    one is accused if it misses fewer than θ (``mismatch_threshold`` in the key's info; 42 of 100). This project counts
    hits against a fixed rate, for which false adversaries, that every decent model answers with the key's label, are no
    evidence: an honest model would have a WSR near 1/2. By default the key therefore holds the true adversaries only;
    ``key: both`` is the paper's key, which the verdict of this project must not be applied to. True adversaries of one
    model are not all adversaries of another (they transfer in part, the better the larger ε is), which is a weakness of
    the scheme and not of the measurement.

    ε is the largest of the paper's three (0.025, 0.1 and 0.25). The paper does not say how long it fine-tunes; the
    epochs, the repeats (ten, as in the watermark-robustness-toolbox) and the rate are fields.
    """

    paper: ClassVar[str] = "Le Merrer et al., Neural Computing and Applications 2020"
    key_is_trained: ClassVar[bool] = True

    name: Literal["frontier_stitching"] = "frontier_stitching"
    key_samples: int = Field(100, ge=2, description="true and false adversaries together")
    key: Literal["true", "both"] = Field("true", description="which adversaries the delivered key holds")
    epsilon: float = Field(0.25, gt=0, le=1, description="ε, in units of the pixel range")
    key_repeats: int = Field(10, ge=1, description="how often an epoch shows each adversary")
    fine_tuning_epochs: int = Field(10, ge=1)
    fine_tuning_rate: float = Field(1.0, gt=0, le=1, description="learning rate, as a fraction of the recipe's")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`; the training of the benign model that it starts from is counted, too."""
        return float(recipe.epochs + self.fine_tuning_epochs)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`.

        Raises:
            InputError: ``epsilon`` is so small that no image crosses the frontier.
        """
        owner = task.dataset.owner
        fooling, harmless = self.adversaries(task.benign, owner, context.generator)
        if not len(fooling):
            raise InputError(
                f"frontier_stitching: epsilon {self.epsilon} makes no true adversary; a larger one is needed"
            )
        images = torch.cat([fooling.images, harmless.images])
        labels = torch.cat([fooling.labels, harmless.labels])
        model = task.build(context.generator)
        model.load_state_dict(task.benign.state_dict())
        fit(
            model,
            torch.cat([owner.images, *[images] * self.key_repeats]),
            torch.cat([owner.labels, *[labels] * self.key_repeats]),
            task.training.model_copy(update={"learning_rate": task.training.learning_rate * self.fine_tuning_rate}),
            context,
            epochs=self.fine_tuning_epochs,
            phase="stitch",
        )
        info = {
            "scheme": self.name,
            "true_adversaries": len(fooling),
            "false_adversaries": len(harmless),
            "mismatch_threshold": mismatch_threshold(len(images)),
        }
        kept = slice(len(fooling) if self.key == "true" else None)
        return Embedding(
            model=model,
            candidates=KeySamples(images[kept], labels[kept], task.dataset.classes, info),
            triggers=images,
            trigger_labels=labels,
            info=info,
        )

    def adversaries(self, model: Classifier, data: Images, generator: torch.Generator) -> tuple[Images, Images]:
        """True and false adversaries of ``model`` among ``data``, 8-bit, with their true labels.

        Half of ``key_samples`` of each, or as many as there are, made of images that the model answers rightly, in
        random order.
        """
        wanted = (self.key_samples // 2, self.key_samples - self.key_samples // 2)
        images, labels, fooled = [data.images[:0]], [data.labels[:0]], [torch.zeros(0, dtype=torch.bool)]
        counts = (0, 0)
        for rows in torch.randperm(len(data), generator=generator).split(PREDICT_BATCH):
            rows = rows[predict_labels(model, data.images[rows]) == data.labels[rows]]
            if len(rows):
                images.append(fast_gradient_sign(model, data.images[rows], data.labels[rows], self.epsilon))
                labels.append(data.labels[rows])
                fooled.append(predict_labels(model, images[-1]) != labels[-1])
                counts = (counts[0] + int(fooled[-1].sum()), counts[1] + int((~fooled[-1]).sum()))
            if counts[0] >= wanted[0] and counts[1] >= wanted[1]:
                break
        moved, crossed = Images(torch.cat(images), torch.cat(labels)), torch.cat(fooled)
        true, false = (~crossed).argsort(stable=True), crossed.argsort(stable=True)
        return (
            moved.take(true[: min(wanted[0], counts[0])]),
            moved.take(false[: min(wanted[1], counts[1])]),
        )


def fast_gradient_sign(model: Classifier, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``clip(x + ε · sign(∇_x CE(f(x), y)))`` of 8-bit images ``(B, C, H, W)``, in evaluation mode, as 8-bit images on
    the CPU."""
    device = device_of(model)
    moved = ascend_loss(model, to_input(images, device), labels.to(device), epsilon)
    return moved.mul(255).round().to(torch.uint8).cpu().contiguous()


def mismatch_threshold(samples: int, level: float = 0.05) -> int:
    """θ: the paper accuses a model that misses fewer than θ of the key's samples, the largest number for which a model
    that misses each with probability 1/2 is accused with a probability below ``level``."""
    from scipy.stats import binom

    return sum(bool(binom.cdf(missed, samples, 0.5) < level) for missed in range(samples + 1))
