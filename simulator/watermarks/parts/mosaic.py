"""Composite images: one image of each source class, made small and laid out as tiles (DeepTracer, Fig. 2 and 20).

The paper compares its tiles with two other ways of combining (Fig. 15 and 16), "image cropping and pasting" and "stripe
area combination", which keep a part of each image in place of all of it made small. The text says no more of them than
that; how they are laid out here is this module's choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.data.dataset import Images

#: rows and columns of the tiles, by number of source classes
GRIDS: dict[int, tuple[int, int]] = {2: (1, 2), 4: (2, 2), 6: (2, 3), 8: (2, 4)}

#: stripes that each source class has, where the image is high enough
STRIPES = 2

Combination = Literal["tiles", "crops", "stripes"]
#: rows and columns
Area = tuple[slice, slice]


class Mosaics:
    """Draws mosaics of given source classes from a set of images, which keep their size.

    ``tiles``
        Tile k (row by row, from the top left) shows all of an image of source class k, shrunk by averaging areas, once,
        when the object is made.
    ``crops``
        Tile k shows the part of an image of class k that lies there: of two classes, a left and a right half.
    ``stripes``
        Horizontal stripes that show what lies there of one image of each class in turn, two stripes a class.

    Args:
        data: images ``(N, C, H, W)`` uint8 with labels.
        sources: 2, 4, 6 or 8 classes, one for each tile.
        combination: one of the above.
    """

    def __init__(self, data: Images, sources: Sequence[int], combination: Combination = "tiles") -> None:
        self.sources = tuple(sources)
        height, width = data.images.shape[2:]
        self._shape = data.images.shape[1:]
        areas = (
            _stripes(len(self.sources), height)
            if combination == "stripes"
            else _tiles(len(self.sources), height, width)
        )
        self._parts: list[tuple[list[Area], Tensor, bool]] = []
        for source, places in zip(self.sources, areas, strict=True):
            images = data.images[data.labels == source]
            if combination == "tiles":
                images = _shrunk(images, places[0])
            self._parts.append((places, images, combination == "tiles"))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` mosaics ``(count, C, H, W)`` uint8; every source shows a random image of its class."""
        mosaics = torch.empty((count, *self._shape), dtype=torch.uint8)
        for places, images, small in self._parts:
            picked = images[torch.randint(len(images), (count,), generator=generator)]
            for rows, columns in places:
                mosaics[:, :, rows, columns] = picked if small else picked[:, :, rows, columns]
        return mosaics


def compose(pictures: Sequence[Tensor], combination: Combination = "tiles") -> Tensor:
    """Mosaics ``(B, C, H, W)`` uint8 of one picture for each place, each ``(B, C, H, W)`` uint8; as :class:`Mosaics`
    lays them out."""
    height, width = pictures[0].shape[2:]
    areas = _stripes(len(pictures), height) if combination == "stripes" else _tiles(len(pictures), height, width)
    mosaics = torch.empty_like(pictures[0])
    for picture, places in zip(pictures, areas, strict=True):
        for area in places:
            shown = _shrunk(picture, area) if combination == "tiles" else picture[:, :, area[0], area[1]]
            mosaics[:, :, area[0], area[1]] = shown
    return mosaics


def _tiles(count: int, height: int, width: int) -> list[list[Area]]:
    """The one area of each source, row by row."""
    rows, columns = GRIDS[count]
    return [[(row, column)] for row in _bands(rows, height) for column in _bands(columns, width)]


def _stripes(count: int, height: int) -> list[list[Area]]:
    """The areas of each source, over the whole width."""
    bands = _bands(min(STRIPES * count, height), height)
    return [[(band, slice(None)) for band in bands[source::count]] for source in range(count)]


def _bands(count: int, length: int) -> list[slice]:
    """``length`` pixels in ``count`` parts that are as equal as can be."""
    edges = [round(i * length / count) for i in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


def _shrunk(images: Tensor, area: Area) -> Tensor:
    """The images in the size of an area."""
    rows, columns = area
    size = (rows.stop - rows.start, columns.stop - columns.start)
    return F.adaptive_avg_pool2d(images.to(torch.float32), size).round_().to(torch.uint8)
