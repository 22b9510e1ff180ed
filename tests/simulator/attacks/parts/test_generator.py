"""The image generator: any size, and the fast form of its convolutions is the plain one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from simulator.attacks.parts.generator import DoublingConvolution, ImageGenerator, to_images


@pytest.fixture(autouse=True)
def _same_weights() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (9, 9)])
def test_a_doubling_convolution_is_nearest_upsampling_and_a_convolution(height: int, width: int) -> None:
    layer = DoublingConvolution(5, 3, (2 * height, 2 * width))
    plain = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(5, 3, 3, padding=1))
    plain[1].load_state_dict(layer.state_dict())
    maps = torch.randn(4, 5, height, width, generator=seed(0))
    fast, slow = layer(maps), plain(maps)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    fast.square().sum().backward()
    slow.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[1].get_parameter(name).grad, rtol=1e-4, atol=1e-3)


def test_a_doubled_map_is_cut_to_an_odd_side() -> None:
    layer, cut = DoublingConvolution(2, 3, (8, 8)), DoublingConvolution(2, 3, (7, 7))
    cut.load_state_dict(layer.state_dict())
    maps = torch.randn(1, 2, 4, 4, generator=seed(0))
    assert torch.equal(cut(maps), layer(maps)[:, :, :7, :7])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", range(8, 65))
def test_every_size(size: int, channels: int) -> None:
    network = ImageGenerator((channels, size, size), latent=4, width=4)
    outputs = network(network.noise(2, seed(1)))
    assert outputs.shape == (2, channels, size, size)
    images = to_images(outputs)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_the_layers_are_the_papers() -> None:
    """z 256 -> 128 maps of a quarter of the side -> conv 128 -> conv 64 -> conv C; the last BN has no parameters."""
    shapes = {name: tuple(value.shape) for name, value in ImageGenerator((3, 32, 32)).named_parameters()}
    weights = [shape for shape in shapes.values() if len(shape) > 1]
    assert weights == [(128 * 8 * 8, 256), (128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]
    assert sum(len(shape) == 1 for shape in shapes.values()) == 4 + 3 * 2


def test_outputs_are_normalised_before_the_tanh() -> None:
    outputs = ImageGenerator((2, 12, 12))(torch.randn(16, 256, generator=seed(2)))
    torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.var((0, 2, 3), correction=0), torch.ones(2), atol=1e-3, rtol=0)
