"""What an outsider can make who knows a scheme's pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.errors import InputError
from simulator.watermarks.base import WATERMARKS, Watermark
from simulator.watermarks.deeptracer import DeepTracer
from simulator.watermarks.function_coupled import FunctionCoupled, fuse_directly
from simulator.watermarks.parts.classes import random_classes
from simulator.watermarks.parts.mosaic import Combination, Mosaics, compose

CLASSES = 6
#: schemes whose triggers are images of the owner's with other labels, or need its model
SECRET = {"ewe", "exponential_weighting", "frontier_stitching", "margin", "unmarked"}
#: how many classes a trigger shows, by scheme
SHOWN = {"abstract": 0, "unrelated": 0, "badnets": 1, "content": 1, "noise": 1, "deeptracer": 4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(count: int = 60) -> Images:
    """Images of one grey each, which tells their class: 10 for class 0, 20 for class 1 and so on."""
    labels = torch.arange(count) % CLASSES
    return Images((10 * (labels + 1)).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8), labels)


@pytest.fixture(params=sorted(set(WATERMARKS.classes()) - SECRET))
def scheme(request: pytest.FixtureRequest) -> Watermark:
    return WATERMARKS.make(request.param)


def test_the_rest_cannot_be_imitated() -> None:
    for name in SECRET:
        assert WATERMARKS.make(name).imitate(flat(), generator()) is None


def test_triggers_are_images_with_the_classes_that_they_show(scheme: Watermark) -> None:
    images = torch.randint(256, (60, 3, 16, 16), generator=generator(1), dtype=torch.uint8)
    data = Images(images, torch.arange(60) % CLASSES)
    draw = scheme.imitate(data, generator())
    assert draw is not None
    first, shown = draw(20)
    assert first.shape == (20, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert shown.shape == (20, SHOWN.get(scheme.name, 2))
    assert shown.dtype == torch.int64
    assert not torch.equal(first, draw(20)[0]), "each call makes new ones"
    again = scheme.imitate(data, generator())
    assert again is not None
    assert torch.equal(first, again(20)[0])
    assert len(draw(0)[0]) == 0


def test_random_classes_differ_within_a_trigger_and_all_occur() -> None:
    found = random_classes(torch.tensor([0, 2, 3, 7, 8]), 2000, 4, generator())
    assert all(len(set(row)) == 4 for row in found.tolist())
    counts = found[:, 0].bincount(minlength=9)
    assert counts[[1, 4, 5, 6]].sum() == 0
    assert 330 < int(counts[[0, 2, 3, 7, 8]].min()) <= int(counts.max()) < 470
    with pytest.raises(InputError, match="triggers of 4 classes cannot be made of images of 3"):
        random_classes(torch.tensor([0, 1, 2]), 1, 4, generator())


def tiles(mosaics: Tensor) -> Tensor:
    """The grey in each quarter, row by row."""
    corners = [mosaics[:, 0, row, column] for row in (0, -1) for column in (0, -1)]
    return torch.stack(corners, 1).to(torch.int64) // 10 - 1


def test_a_mosaic_shows_its_classes_in_their_order() -> None:
    draw = DeepTracer().imitate(flat(), generator())
    mosaics, shown = draw(50)
    assert torch.equal(tiles(mosaics), shown)
    assert len({tuple(row) for row in shown.tolist()}) > 20
    known, same = DeepTracer().imitate(flat(), generator(), (5, 0, 3, 1))(10)
    assert torch.equal(tiles(known), torch.tensor([[5, 0, 3, 1]]).expand(10, 4))
    assert torch.equal(tiles(known), same)


@pytest.mark.parametrize("combination", ["tiles", "crops", "stripes"])
@pytest.mark.parametrize("sources", [(4, 1), (5, 0, 3, 1)])
def test_an_imitated_mosaic_is_laid_out_as_the_owners(combination: Combination, sources: tuple[int, ...]) -> None:
    images = torch.randint(256, (CLASSES, 3, 16, 16), generator=generator(1), dtype=torch.uint8)
    one_of_each = Images(images, torch.arange(CLASSES))
    owners = Mosaics(one_of_each, sources, combination).draw(1, generator())
    assert torch.equal(compose([images[source : source + 1] for source in sources], combination), owners)
    scheme = DeepTracer(combination=combination, source_classes=len(sources))
    assert torch.equal(scheme.imitate(one_of_each, generator(), sources)(1)[0], owners)


def test_a_fused_image_is_made_of_its_two_classes() -> None:
    images, shown = FunctionCoupled(fusion="invisible").imitate(flat(), generator())(30)
    assert torch.equal(images[:, 0, 4, 4].to(torch.int64), (10 * (shown + 1)).sum(1) // 2)
    direct, shown = FunctionCoupled().imitate(flat(), generator(), (2, 4))(1)
    data = flat().images
    assert torch.equal(direct, fuse_directly(data[2:3], data[4:5]))
    assert shown.tolist() == [[2, 4]]


def test_a_pattern_that_the_owner_drew_is_not_the_outsiders() -> None:
    ours, theirs = (WATERMARKS.make("noise").imitate(flat(), generator(seed), (2,)) for seed in (0, 1))
    assert ours is not None
    assert theirs is not None
    first, second = ours(2)[0], theirs(2)[0]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("sources", "says"), [((0, 1), "a trigger shows 4 classes"), ((0, 1, 2, 9), "no image of class 9")]
)
def test_sources_that_do_not_fit_are_one_line(sources: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DeepTracer().imitate(flat(), generator(), sources)
