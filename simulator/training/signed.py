"""Steps of images in [0, 1] along the sign of a gradient (FGSM; Goodfellow et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: from images ``(B, C, H, W)`` to a scalar
Score = Callable[[Tensor], Tensor]


def slope_of(score: Score, images: Tensor) -> Tensor:
    """The gradient of a score with respect to its images, of their shape."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(score(images), images)[0]


def ascend(score: Score, images: Tensor, step: float, *, steps: int = 1, clip: bool = True) -> Tensor:
    """The images after ``x ← clip(x + step · sign(∇_x score(x)), 0, 1)``, ``steps`` times.

    Parameters keep their gradients. Where the score is a sum over images that do not touch each other, such as a
    model's in evaluation mode, each image moves along a slope of its own.

    Args:
        images: ``(B, C, H, W)`` float.
        step: in units of the pixel range; below 0 it goes down.
        clip: whether to stay in [0, 1].
    """
    for _ in range(steps):
        images = _moved(images, slope_of(score, images), step, clip)
    return images.detach()


def ascend_loss(model: nn.Module, images: Tensor, labels: Tensor, step: float, *, steps: int = 1) -> Tensor:
    """:func:`ascend` up the model's cross-entropy of ``labels`` ``(B,)``, in evaluation mode."""
    training = model.training
    model.eval()
    moved = ascend(lambda batch: F.cross_entropy(model(batch), labels, reduction="sum"), images, step, steps=steps)
    model.train(training)
    return moved


def adversarial_mean(loss: Score, images: Tensor, epsilon: float) -> Tensor:
    """The mean of a loss on images and of that on FGSM examples of them, ``clip(x + ε · sign(∇_x loss(x)))``, a scalar
    with a graph; with ``epsilon`` 0 the loss on the images alone."""
    if not epsilon:
        return loss(images)
    images = images.detach().requires_grad_()
    clean = loss(images)
    (slope,) = torch.autograd.grad(clean, images, retain_graph=True)
    return (clean + loss(_moved(images, slope, epsilon))) / 2


def _moved(images: Tensor, slope: Tensor, step: float, clip: bool = True) -> Tensor:
    moved = images.detach() + step * slope.sign()
    return moved.clamp_(0, 1) if clip else moved
