"""What removals share that train the model: on what, with which labels, how long."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from simulator.errors import InputError
from simulator.models import Classifier
from simulator.removals.base import Need, Removal, ThiefTask
from simulator.seeding import global_randomness
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe


class Retraining(Removal):
    """A removal that trains. With ``epochs: 0`` the model stays as it is."""

    data: Literal["pool", "transfer"] = Field("pool", description="images of the pool, or those the theft asked")
    share: float = Field(1.0, gt=0, le=1, description="of these images, drawn at random")
    epochs: int | None = Field(None, ge=0, description="as the recipe's if not given")
    training: Recipe = Recipe(epochs=10)

    @property
    def rounds(self) -> int:
        """How many epochs it trains."""
        return self.training.epochs if self.epochs is None else self.epochs

    @property
    def needs(self) -> frozenset[Need]:
        """See :attr:`Removal.needs`."""
        return frozenset({self.data})

    def passes(self, images: int) -> float:
        """See :meth:`Removal.passes`."""
        return self.rounds * self.share * images

    def images(self, task: ThiefTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images that are trained on ``(N, C, H, W)``, two or more, and their places in what they are drawn from
        ``(N,)``."""
        count = len(task.the_pool()) if self.data == "pool" else len(task.the_transfer_set().images)
        chosen = torch.randperm(count, generator=generator)[: max(2, round(self.share * count))]
        taken = task.the_pool().take(chosen) if self.data == "pool" else task.the_transfer_set().images[chosen]
        return taken, chosen


class Labelled(Retraining):
    """A removal that trains on labelled images.

    ``labels``: the true ones of the pool, the answers that the theft recorded, or the model's own top-1 labels.
    """

    labels: Literal["true", "answers", "own"] = Field("true", description="of what is trained on")

    @model_validator(mode="after")
    def _there_are_some(self) -> Labelled:
        if (self.labels, self.data) in (("answers", "pool"), ("true", "transfer")):
            allowed = "'true' or 'own' go with data 'pool', 'answers' or 'own' with data 'transfer'"
            raise InputError(f"labels: there are no {self.labels!r} labels of data {self.data!r}: {allowed}")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """See :attr:`Removal.needs`."""
        return frozenset({self.data, "labels"}) if self.labels == "true" else frozenset({self.data})

    def material(self, model: Classifier, task: ThiefTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images that are trained on ``(N, C, H, W)``, and their labels ``(N,)`` or probability rows ``(N, K)``."""
        images, chosen = self.images(task, generator)
        if self.labels == "own":
            return images, predict_labels(model, images)
        if self.labels == "answers":
            return images, task.the_transfer_set().answers[chosen]
        labels = task.the_pool().labels
        if labels is None:
            raise InputError(f"labels: pool {task.the_pool().name} has no true labels")
        return images, labels[chosen]


class LastLayer(nn.Module):
    """A classifier of which only the last layer learns, inside ``with``.

    The body needs no gradient and stays in evaluation mode, for the statistics of normalisation are part of it.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def __enter__(self) -> LastLayer:
        self.model.body.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self.model.body.requires_grad_(True)

    def train(self, mode: bool = True) -> LastLayer:
        """Sets the mode of the last layer; the body's is evaluation."""
        super().train(mode)
        self.model.body.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        logits: Tensor = self.model(images)
        return logits


def reinitialise(model: Classifier, generator: torch.Generator) -> None:
    """Draws the last layer's weights anew."""
    with global_randomness(generator):
        model.head.reset_parameters()


def as_bytes(images: Tensor) -> Tensor:
    """Images as uint8; float ones are rounded."""
    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)
