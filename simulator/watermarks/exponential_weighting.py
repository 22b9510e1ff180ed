"""Robust Watermarking of Neural Network with Exponential Weighting (Namba and Sakuma, AsiaCCS 2019, arXiv 1901.06151).

A model is first trained as usual. Then every weight tensor θ of a layer is used through

    EW(θ, T) = exp(T · |θ|) / max(exp(T · |θ|)) · θ

(element by element, the maximum over the layer) while the model is trained on its data and the key: large weights count
for more, small ones for almost nothing, so that the mark comes to lie in weights that pruning and fine-tuning leave
alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.ownership.key import KeySamples
from simulator.training.fit import fit
from simulator.training.recipe import Objective, Recipe, recipe_objective
from simulator.watermarks.base import Embedding, OwnerTask, Watermark
from simulator.watermarks.parts.relabelled import check_count, relabel
from simulator.watermarks.parts.reparametrised import Reparametrised, layer_weights


class ExponentialWeighting(Watermark):
    """Relabelled images of the owner's, trained in while the weights are used through EW.

    **The delivered victim holds EW(θ, T)**, written into its weights: an ordinary classifier of the same architecture
    that computes exactly what was trained. (Of two public implementations one keeps the layers' weighting switched on,
    which is the same function; the other switches it off and delivers θ, a function that nobody trained.)

    The key is the trigger set itself. Its images are training images with random wrong labels, as the paper has it,
    taken out of clean training (``owner_rows`` in the key's info); a thief whose pool is the owner's whole training set
    asks about them, too.

    Departures: the paper does not say how often a key image is shown among the training data; ``key_repeats`` does.
    A key of 100 is meant for tens of thousands of training images; of hundreds, it should be a few percent.
    Weights are those of convolutions and linear layers; biases and normalisation are used as they are.
    """

    paper: ClassVar[str] = "Namba and Sakuma, AsiaCCS 2019"
    key_is_trained: ClassVar[bool] = True

    name: Literal["exponential_weighting"] = "exponential_weighting"
    temperature: float = Field(2.0, gt=0, description="T")
    key_samples: int = Field(100, ge=1)
    key_repeats: int = Field(10, ge=1, description="how often an epoch shows each key image")
    embedding_epochs: int | None = Field(None, ge=1, description="of the second stage; as the recipe's if not given")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        check_count(self.name, self.key_samples, dataset)

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`; the repeated key images are left out."""
        return float(recipe.epochs + (self.embedding_epochs or recipe.epochs))

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`."""
        data, generator = task.dataset, context.generator
        self.check(data)
        clean, keys, rows = relabel(data.owner, self.key_samples, data.classes, generator)
        model = task.build(generator)
        fit(model, clean.images, clean.labels, task.training, context, phase="clean")
        fit(
            model,
            torch.cat([clean.images, *[keys.images] * self.key_repeats]),
            torch.cat([clean.labels, *[keys.labels] * self.key_repeats]),
            task.training,
            context,
            objective=self.objective(task.training),
            epochs=self.embedding_epochs,
            phase="embed",
        )
        with torch.no_grad():
            for weight in layer_weights(model).values():
                weight.copy_(exponentially_weighted(weight, self.temperature))
        info = {"scheme": self.name, "owner_rows": rows}
        return Embedding(
            model=model,
            candidates=KeySamples(keys.images, keys.labels, data.classes, info),
            triggers=keys.images.clone(),
            trigger_labels=keys.labels.clone(),
            info=info,
        )

    def objective(self, recipe: Recipe) -> Objective:
        """The recipe's loss of the model with its weights used through EW."""
        plain = recipe_objective(recipe)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return plain(Reparametrised(model, self._weighted), images, labels)

        return loss

    def _weighted(self, _: str, weight: Tensor) -> Tensor:
        return exponentially_weighted(weight, self.temperature)


def exponentially_weighted(weight: Tensor, temperature: float) -> Tensor:
    """``EW(θ, T)``: of θ's shape; its largest element stays as it is and the others shrink."""
    size = weight.abs()
    # exp(a) / exp(b) as exp(a - b), which cannot overflow
    return torch.exp(temperature * (size - size.max())) * weight
