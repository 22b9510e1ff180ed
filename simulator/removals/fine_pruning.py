"""Fine-pruning: the least active units of a late convolution go, and the model is trained on (Liu et al., RAID 2018).

With a_c the mean over the images of a channel's positive part, ``max(0, output)`` after the normalisation that follows,
the ``round(fraction · C)`` channels of least a_c are silenced: their weights, and those of their normalisation, become
zero and stay zero while the rest is fine-tuned. Marks are said to lie in units that clean images leave alone.

Neither watermark paper has this; Lukas et al. (S&P 2022) run it with 96 % of one late layer, ten epochs in batches of
64, and the model's own labels. In a residual network the last convolution is a branch, and the sum keeps the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled
from simulator.training.fit import Hooks, fit
from simulator.training.predict import predict_logits
from simulator.training.recipe import Recipe


class FinePruning(Labelled):
    """Silences the least active channels of a convolution, then trains on."""

    paper: ClassVar[str] = "Liu et al., RAID 2018; Lukas et al., S&P 2022"

    name: Literal["fine_pruning"] = "fine_pruning"
    fraction: float = Field(0.96, ge=0, le=1, description="of the channels that are silenced")
    layer: int = Field(-1, le=-1, description="which convolution, counted from the last")
    labels: Literal["true", "answers", "own"] = Field("own", description="of what is trained on")
    training: Recipe = Recipe(epochs=10, batch_size=64)

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        images, labels = self.material(model, task, context.generator)
        convolution, outermost = unit_layers(model, self.layer)
        activity = mean_activity(model, outermost, images)
        silent = activity.argsort(stable=True)[: round(self.fraction * len(activity))]
        layers = [convolution, outermost]

        @contextmanager
        def silenced() -> Iterator[None]:
            yield
            silence(layers, silent)

        silence(layers, silent)
        if self.rounds:
            fit(model, images, labels, self.training, context, epochs=self.rounds, hooks=Hooks(around_step=silenced))
        return model.eval()


def unit_layers(model: Classifier, place: int) -> tuple[nn.Module, nn.Module]:
    """A convolution, counted from the last one, and the normalisation right behind it, or itself where there is none.

    Raises:
        InputError: the body has not so many convolutions.
    """
    layers = [each for each in model.body.modules() if not any(each.children())]
    places = [at for at, each in enumerate(layers) if isinstance(each, nn.Conv2d)]
    if len(places) < -place:
        raise InputError(f"fine_pruning: layer: {place}, but {model.spec.architecture} has {len(places)} convolutions")
    at = places[place]
    convolution, behind = layers[at], layers[at + 1] if at + 1 < len(layers) else None
    assert isinstance(convolution, nn.Conv2d)
    matches = isinstance(behind, nn.BatchNorm2d) and behind.num_features == convolution.out_channels
    return convolution, behind if matches and behind is not None else convolution


def mean_activity(model: Classifier, layer: nn.Module, images: Tensor) -> Tensor:
    """The mean positive part of each channel of a layer's output over images, ``(C,)`` float64."""
    sums: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda _, __, output: sums.append(output.double().clamp_min(0).mean((2, 3)).sum(0).cpu())
    )
    predict_logits(model, images)
    hook.remove()
    return torch.stack(sums).sum(0) / len(images)


def silence(layers: list[nn.Module], channels: Tensor) -> None:
    """Sets the weights and biases of some output channels to zero, in place."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter[channels.to(parameter.device)] = 0
