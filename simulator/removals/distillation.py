"""Distillation of the copy into a fresh net (Hinton et al., 2015), as a removal.

A net that has seen nothing is trained on the soft answers of the model, at a temperature T:

    L = T² · KL( softmax(z_model / T) ‖ softmax(z / T) )

It takes over what the model answers on the thief's images, and a mark only as far as these images carry it. Unlike the
theft by distillation this asks the thief's own model: no query is paid.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.models import ARCHITECTURES, Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Retraining
from simulator.training.fit import fit
from simulator.training.predict import predict_logits
from simulator.training.recipe import Recipe


class Distillation(Retraining):
    """Trains a fresh net on the model's soft answers; the recipe's own loss is not used."""

    paper: ClassVar[str] = "Hinton et al., 2015"

    name: Literal["distillation"] = "distillation"
    temperature: float = Field(4.0, gt=0, description="T")
    architecture: Annotated[str, AfterValidator(ARCHITECTURES.known)] | None = Field(
        None, description="of the fresh net; as the model's if not given"
    )
    epochs: int | None = Field(None, ge=1, description="as the recipe's if not given")
    training: Recipe = Recipe()

    def makes(self, architecture: str) -> str:
        """See :meth:`Removal.makes`."""
        return self.architecture or architecture

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        images, _ = self.images(task, context.generator)
        softened = (predict_logits(model, images) / self.temperature).softmax(1)
        fresh = task.fresh(context.generator, self.architecture)
        fit(fresh, images, softened, self.training, context, objective=self._loss, epochs=self.rounds)
        return fresh

    def _loss(self, model: nn.Module, images: Tensor, softened: Tensor) -> Tensor:
        logs = F.log_softmax(model(images) / self.temperature, 1)
        return F.kl_div(logs, softened, reduction="batchmean") * self.temperature**2
