"""Mosaics: which pixel comes from which class, for every number of tiles and sizes that do not divide."""

from __future__ import annotations

import pytest
import torch

from simulator.data.dataset import Images
from simulator.watermarks.parts.mosaic import GRIDS, Combination, Mosaics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(classes: int, size: int, channels: int = 1, each: int = 1) -> Images:
    """``each`` images of every class, all pixels of which are ten times the class (plus the channel)."""
    labels = torch.arange(classes).repeat_interleave(each)
    shades = (10 * labels[:, None] + torch.arange(channels)).to(torch.uint8)
    return Images(shades[:, :, None, None].expand(-1, -1, size, size).contiguous(), labels)


def blocks(sources: tuple[int, ...], heights: list[int], widths: list[int]) -> torch.Tensor:
    """The mosaic of constant images, drawn tile by tile."""
    rows = torch.tensor(sources).reshape(len(heights), len(widths)) * 10
    tall = rows.repeat_interleave(torch.tensor(heights), 0)
    return tall.repeat_interleave(torch.tensor(widths), 1).to(torch.uint8)


@pytest.mark.parametrize(
    ("sources", "size", "heights", "widths"),
    [
        ((3, 1), 8, [8], [4, 4]),
        ((3, 1, 4, 2), 8, [4, 4], [4, 4]),
        ((3, 1, 4, 2, 5, 9), 28, [14, 14], [9, 10, 9]),
        ((3, 1, 4, 2, 5, 9), 8, [4, 4], [3, 2, 3]),
        ((3, 1, 4, 2, 5, 9, 7, 6), 28, [14, 14], [7, 7, 7, 7]),
        ((3, 1), 9, [9], [4, 5]),
    ],
)
def test_every_pixel_of_constant_images(
    sources: tuple[int, ...], size: int, heights: list[int], widths: list[int]
) -> None:
    drawn = Mosaics(constant(10, size), sources).draw(3, generator())
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, 1, size, size)
    assert all(torch.equal(mosaic[0], blocks(sources, heights, widths)) for mosaic in drawn)


@pytest.mark.parametrize("combination", ["tiles", "crops", "stripes"])
@pytest.mark.parametrize("count", GRIDS)
@pytest.mark.parametrize("size", [8, 13, 28, 33])
def test_every_tile_is_of_its_class_and_none_is_empty(count: int, size: int, combination: Combination) -> None:
    sources = tuple(range(10, 10 - count, -1))
    drawn = Mosaics(constant(11, size, channels=3, each=2), sources, combination).draw(4, generator())
    assert drawn.shape == (4, 3, size, size)
    shades, pixels = (drawn[:, 0] // 10).unique(return_counts=True)
    assert set(shades.tolist()) == set(sources)
    assert pixels.max() <= 2 * pixels.min()
    # the channels stay where they were
    assert torch.equal(drawn[:, 1], drawn[:, 0] + 1)
    assert torch.equal(drawn[:, 2], drawn[:, 0] + 2)


def test_images_are_shrunk_by_averaging() -> None:
    image = torch.tensor([[0, 4, 10, 10], [8, 4, 10, 10], [255, 255, 0, 1], [255, 255, 1, 0]], dtype=torch.uint8)
    other = torch.full((4, 4), 7, dtype=torch.uint8)
    data = Images(torch.stack([image, other])[:, None], torch.tensor([0, 1]))
    drawn = Mosaics(data, (0, 1, 1, 0)).draw(1, generator())[0, 0]
    # the means of the four quarters: 4, 10, 255 and 0.5, which rounds to the even 0
    assert drawn.tolist() == [[4, 10, 7, 7], [255, 0, 7, 7], [7, 7, 4, 10], [7, 7, 255, 0]]


def numbered() -> Images:
    """One image of each of two classes, whose pixels are their numbers, from 0 and from 100 on."""
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    return Images(torch.cat([pixels, pixels + 100]), torch.tensor([0, 1]))


def test_crops_show_the_part_that_lies_there() -> None:
    halves = Mosaics(numbered(), (0, 1), "crops").draw(1, generator())[0, 0]
    assert halves.tolist() == [[0, 1, 102, 103], [4, 5, 106, 107], [8, 9, 110, 111], [12, 13, 114, 115]]
    quarters = Mosaics(numbered(), (0, 1, 1, 0), "crops").draw(1, generator())[0, 0]
    assert quarters.tolist() == [[0, 1, 102, 103], [4, 5, 106, 107], [108, 109, 10, 11], [112, 113, 14, 15]]


def test_stripes_take_turns() -> None:
    drawn = Mosaics(numbered(), (1, 0), "stripes").draw(1, generator())[0, 0]
    assert drawn.tolist() == [[100, 101, 102, 103], [4, 5, 6, 7], [108, 109, 110, 111], [12, 13, 14, 15]]


def test_the_stripes_of_a_class_are_of_one_image() -> None:
    shades = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    drawn = Mosaics(Images(shades, torch.arange(40) % 2), (0, 1), "stripes").draw(50, generator())[:, 0]
    assert torch.equal(drawn[:, 0:2], drawn[:, 4:6])
    assert torch.equal(drawn[:, 2:4], drawn[:, 6:8])
    assert len(drawn[:, 0, 0].unique()) > 10


def test_tiles_are_drawn_independently_and_all_images_are_used() -> None:
    labels = torch.arange(12) % 4
    data = Images(torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)
    drawn = Mosaics(data, (0, 1, 2, 3)).draw(2000, generator())[:, 0, [0, 0, 4, 4], [0, 4, 0, 4]]
    for tile in range(4):
        values, counts = drawn[:, tile].unique(return_counts=True)
        assert values.tolist() == [tile, tile + 4, tile + 8]
        assert counts.min() > 2000 / 3 * 0.85
    # 3^4 combinations, each about 25 times
    assert len(drawn.unique(dim=0)) == 81


def test_the_generator_decides() -> None:
    mosaics = Mosaics(
        Images(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 4), (0, 1, 2, 3)
    )
    assert torch.equal(mosaics.draw(9, generator(1)), mosaics.draw(9, generator(1)))
    assert not torch.equal(mosaics.draw(9, generator(1)), mosaics.draw(9, generator(2)))
