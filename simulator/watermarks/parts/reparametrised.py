"""A model as a function of other weights than its own, for schemes that train through a change of the weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's convolutions and linear layers, by their parameter names; no biases."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


class Reparametrised(nn.Module):
    """``model`` with ``change(name, weight)`` in place of each weight of a convolution or linear layer.

    Gradients reach the weights themselves, through ``change``. Biases and normalisation are used as they are.
    """

    def __init__(self, model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._change = change

    def forward(self, images: Tensor) -> Tensor:
        """What the model would answer with the changed weights."""
        used = {name: self._change(name, weight) for name, weight in layer_weights(self.model).items()}
        outputs: Tensor = functional_call(self.model, used, (images,))
        return outputs
