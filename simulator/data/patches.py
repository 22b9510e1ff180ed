"""Patches: random crops of two photographs. They stand in for "any natural images" and need no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.data.dataset import Images
from simulator.data.images import LUMINANCE

#: the largest crop of a photograph, in pixels, for images up to half that size
PATCH_SIDE = 200


#: how many sides between the smallest and the largest crop
PATCH_LEVELS = 32


#: scales told apart in the groups of patches, for each photograph
PATCH_SCALES = 4


#: a crop whose brightest and darkest values are nearer than this is flat: stretching it would show only noise
FLAT_RANGE = 8


def patches(count: int, channels: int, size: int, generator: torch.Generator) -> Images:
    """Random crops of the two photographs that scikit-learn ships (a temple, a flower; 427x640 pixels).

    A crop is square. Its side has one of 32 levels, log-uniform between ``size`` and 200 pixels (twice ``size`` if that
    is more). The crop is resized with antialiasing, flipped with probability one half, and its contrast is stretched to
    the full range 0..255 over all its channels. A flat crop, of a range below 8, is not stretched.

    Args:
        count: how many.
        channels: 1 (grey) or 3.
        size: side of the result, in pixels.
        generator: the only source of randomness.

    Returns:
        uint8 ``(count, channels, size, size)``; the labels are 0..7: photograph times 4 plus the quarter of the
        logarithmic scale range, finest detail first.
    """
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(np.array(array)).permute(2, 0, 1).float() for array in load_sample_images().images]
    if channels == 1:
        weights = torch.tensor(LUMINANCE).reshape(3, 1, 1)
        photographs = [(photograph * weights).sum(dim=0, keepdim=True) for photograph in photographs]
    sides = _patch_sides(size, min(photograph.shape[-2] for photograph in photographs))
    photograph_of = torch.randint(len(photographs), (count,), generator=generator)
    level_of = torch.randint(len(sides), (count,), generator=generator)
    corners = torch.rand((count, 2), generator=generator, dtype=torch.float64)
    flipped = torch.rand(count, generator=generator) < 0.5
    result = torch.empty((count, channels, size, size), dtype=torch.uint8)
    for level, side in enumerate(sides):
        for number, photograph in enumerate(photographs):
            chosen = ((photograph_of == number) & (level_of == level)).nonzero().squeeze(1)
            if len(chosen):
                crops = _crops(photograph, side, size, corners[chosen])
                flip = flipped[chosen]
                crops[flip] = crops[flip].flip(-1)
                result[chosen] = _stretched(crops)
    scale_of = level_of * PATCH_SCALES // len(sides)
    return Images(result, photograph_of * PATCH_SCALES + scale_of)


def _patch_sides(size: int, shortest: int) -> Sequence[float]:
    """The sides of the crops in pixels, evenly spaced in the logarithm."""
    largest = min(max(PATCH_SIDE, 2 * size), shortest)
    smallest = min(size, largest / 2)
    return [smallest * (largest / smallest) ** (level / (PATCH_LEVELS - 1)) for level in range(PATCH_LEVELS)]


def _crops(photograph: Tensor, side: float, size: int, corners: Tensor) -> Tensor:
    """Square crops of ``side`` pixels of a photograph ``(C, H, W)``, resized: float ``(M, C, size, size)``.

    The photograph is scaled once, and the crops are cut out of the result. That costs a hundredth of resizing each crop
    and gives the same pixels; only the rim of a crop differs. ``corners`` are the places of the crops, ``(M, 2)`` in
    [0, 1).
    """
    height, width = (max(size, round(length * size / side)) for length in photograph.shape[-2:])
    scaled = F.interpolate(
        photograph[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]
    windows = scaled.unfold(1, size, 1).unfold(2, size, 1)
    rows = (corners[:, 0] * windows.shape[1]).long()
    columns = (corners[:, 1] * windows.shape[2]).long()
    return windows[:, rows, columns].transpose(0, 1).clone()


def _stretched(crops: Tensor) -> Tensor:
    """uint8 crops whose darkest value is 0 and brightest 255; flat ones as they are."""
    darkest = crops.amin(dim=(1, 2, 3), keepdim=True)
    spread = crops.amax(dim=(1, 2, 3), keepdim=True) - darkest
    full = (crops - darkest) * (255 / spread.clamp(min=FLAT_RANGE))
    return torch.where(spread < FLAT_RANGE, crops, full).round().clamp(0, 255).to(torch.uint8)
