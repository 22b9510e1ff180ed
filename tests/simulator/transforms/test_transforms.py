"""Transforms: the contract over the registry, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simulator.errors import InputError
from simulator.transforms.base import TRANSFORMS, Transform
from simulator.transforms.blur import Blur, kernel
from simulator.transforms.crop import Crop
from simulator.transforms.noise import GaussianNoise
from simulator.transforms.quantise import Quantise

#: settings, by transform, at which it does nothing
IDLE = {"blur": {"sigma": 0.0}, "noise": {"sigma": 0.0}, "quantise": {"levels": 0}, "crop": {"fraction": 1.0}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 5, channels: int = 3, size: int = 9) -> Tensor:
    return torch.rand(count, channels, size, size, generator=generator(7))


@pytest.fixture(params=list(TRANSFORMS.classes()))
def transform(request: pytest.FixtureRequest) -> Transform:
    return TRANSFORMS.make(request.param)


def test_images_stay_images_and_the_input_stays_as_it_is(transform: Transform) -> None:
    before = images()
    given = before.clone()
    found = transform.apply(given, generator())
    assert found.shape == before.shape
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(given, before)
    assert not torch.equal(found, before)


def test_the_generator_decides_all_that_is_random(transform: Transform) -> None:
    first, second, other = (transform.apply(images(), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first, other) == (not transform.random)


def test_an_image_is_changed_by_itself(transform: Transform) -> None:
    if not transform.random:
        alone = torch.cat([transform.apply(image, generator()) for image in images().split(1)])
        torch.testing.assert_close(alone, transform.apply(images(), generator()))


@pytest.mark.parametrize("name", list(TRANSFORMS.classes()))
def test_of_strength_zero_it_gives_the_images_back(name: str) -> None:
    idle = TRANSFORMS.make({"name": name, **IDLE[name]})
    assert idle.idle
    assert torch.equal(idle.apply(images(), generator()), images())
    assert not TRANSFORMS.make(name).idle


@pytest.mark.parametrize(("sigma", "size"), [(0.5, 5), (0.6, 5), (0.7, 7), (1.0, 7), (3.0, 19)])
def test_the_kernel_is_the_smallest_odd_one_of_six_sigma_and_one(sigma: float, size: int) -> None:
    weights = kernel(sigma)
    assert len(weights) == size >= 6 * sigma + 1 > size - 2
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[size // 2 + 1] / weights[size // 2]) == pytest.approx(math.exp(-1 / (2 * sigma**2)), rel=1e-5)


def test_a_blurred_point_is_the_kernel_and_a_white_image_darkens_at_the_edge() -> None:
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    weights = kernel(0.5)
    torch.testing.assert_close(Blur(sigma=0.5).apply(point, generator())[0, 0, 2:7, 2:7], torch.outer(weights, weights))
    white = Blur(sigma=0.5).apply(torch.ones(1, 1, 9, 9), generator())[0, 0]
    assert float(white[4, 4]) == pytest.approx(1)
    assert float(white[0, 4]) == pytest.approx(float(weights[2:].sum()))


def test_noise_has_its_deviation_and_is_clipped() -> None:
    grey = torch.full((100, 1, 28, 28), 0.5)
    assert float((GaussianNoise(sigma=0.05).apply(grey, generator()) - 0.5).std()) == pytest.approx(0.05, rel=0.02)
    assert set(GaussianNoise(sigma=10).apply(grey, generator()).unique().tolist()) >= {0.0, 1.0}


def test_levels_are_the_middles_of_their_bins() -> None:
    ramp = torch.tensor([0.0, 0.1, 0.49, 0.5, 0.9, 1.0]).view(1, 1, 1, -1)
    assert Quantise(levels=2).apply(ramp, generator()).flatten().tolist() == [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]
    assert Quantise(levels=1).apply(ramp, generator()).unique().tolist() == [0.5]
    assert len(Quantise(levels=10).apply(images(), generator()).unique()) == 10


def test_a_crop_keeps_the_middle() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6) / 36
    black = Crop(fraction=0.34, outside="black").apply(image, generator())
    assert torch.equal(black[:, :, 2:4, 2:4], image[:, :, 2:4, 2:4])
    assert int((black > 0).sum()) == 4
    flat = torch.zeros(1, 1, 6, 6)
    flat[:, :, 1:5, 1:5] = 1
    assert torch.equal(Crop(fraction=0.67).apply(flat, generator()), torch.ones(1, 1, 6, 6)), "the frame is gone"
    corner = Crop(fraction=0.5).apply(image, generator())
    assert float(corner[0, 0, 0, 0]) == pytest.approx(float(image[0, 0, 1, 1]), abs=1e-6)
    assert float(corner[0, 0, -1, -1]) == pytest.approx(float(image[0, 0, 3, 3]), abs=1e-6)


@pytest.mark.parametrize("bad", [{"name": "blur", "sigma": -1.0}, {"name": "crop", "fraction": 0.0}, "sharpen"])
def test_bad_settings_are_one_line(bad: object) -> None:
    with pytest.raises(InputError) as caught:
        TRANSFORMS.make(bad)
    assert "\n" not in str(caught.value)
