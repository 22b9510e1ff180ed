"""MEA-Defender: the combination loss and the balance of gradients by hand, and the wrong mixes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.data.dataset import Images
from simulator.models import build
from simulator.watermarks.composite import HalfMixer, Pairs
from simulator.watermarks.mea_defender import MEADefender, Shape, ShapeMixer, balance, combination_loss, shortest


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).log()


class TestCombinationLoss:
    def test_by_hand(self) -> None:
        marked = logits((0.5, 0.25, 0.25), (0.2, 0.2, 0.6))
        first = logits((0.25, 0.5, 0.25), (0.2, 0.2, 0.6))
        second = logits((0.5, 0.25, 0.25), (0.1, 0.1, 0.8))
        # KL of the first row from A: .5 log 2 + .25 log ½; of the second from B: .4 log 2 + .6 log ¾
        expected = (0.25 * math.log(2) + 0.4 * math.log(2) + 0.6 * math.log(0.75)) / 2
        assert combination_loss(marked, first, second).item() == pytest.approx(expected, rel=1e-5)

    def test_it_is_least_between_the_two(self) -> None:
        """The minimum over p of KL(p ‖ a) + KL(p ‖ b) lies at p ∝ √(a b)."""
        first, second = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
        marked = ((first * second).sqrt()).log().requires_grad_()
        combination_loss(marked, first.log(), second.log()).backward()
        assert marked.grad is not None
        torch.testing.assert_close(marked.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)

    def test_the_gradient_goes_to_the_triggers_only(self) -> None:
        rows = [torch.randn(4, 3, generator=generator(i)).requires_grad_() for i in range(3)]
        combination_loss(*rows).backward()
        assert rows[0].grad is not None
        assert rows[1].grad is None
        assert rows[2].grad is None


class TestBalance:
    @pytest.mark.parametrize(
        ("first", "second", "share"),
        [
            ((1.0, 0.0), (0.0, 1.0), 0.5),
            ((2.0, 0.0), (0.0, 1.0), 0.8),  # 4 / (4 + 1)
            ((1.0, 0.0), (3.0, 0.0), 0.0),  # the shorter one alone
            ((3.0, 0.0), (1.0, 0.0), 1.0),
            ((1.0, 0.0), (-1.0, 0.0), 0.5),
            ((1.0, 1.0), (1.0, 1.0), 0.0),  # any share would do
        ],
    )
    def test_the_shortest_sum(self, first: tuple[float, ...], second: tuple[float, ...], share: float) -> None:
        assert shortest(torch.tensor(first), torch.tensor(second)).item() == pytest.approx(share)

    @given(st.integers(0, 10_000))
    def test_no_other_share_is_better(self, seed: int) -> None:
        first, second = torch.randn(2, 5, generator=generator(seed), dtype=torch.float64)
        shares = torch.linspace(0, 1, 21, dtype=torch.float64).unsqueeze(1)
        best = shortest(first, second)
        lengths = ((1 - shares) * first + shares * second).norm(dim=1)
        assert ((1 - best) * first + best * second).norm() <= lengths.min() + 1e-9

    def test_gradients_are_divided_by_loss_and_norm(self) -> None:
        model = build("linear", channels=1, size=8, classes=2, generator=generator())
        weight = model.head.weight[0]
        first, second = 2 * weight[0] + 1 - 2 * weight[0].detach(), weight[1] + 4 - weight[1].detach()
        # losses 1 and 4, gradients 2 e_0 and e_1: divided by 2 and 4 they are e_0 and e_1 / 4
        share = balance(model, first, second)
        assert share.item() == pytest.approx(1 / (1 + 1 / 16))


class TestWrongMixes:
    @pytest.mark.parametrize(
        ("shape", "share"),
        # below the antidiagonal 28 of 64 pixels; rows and columns 1 to 5: 25; rows 2 to 5: 32
        [("diagonal", 28 / 64), ("box", 25 / 64), ("band", 32 / 64)],
    )
    def test_a_part_is_the_other_image(self, shape: Shape, share: float) -> None:
        first, second = torch.zeros(100, 3, 8, 8), torch.ones(100, 3, 8, 8)
        mixed = ShapeMixer(shape).mix(first, second, generator()).mean((1, 2, 3))
        assert set(mixed.tolist()) == {share, 1 - share}

    def test_corner_and_middle(self) -> None:
        first, second = torch.zeros(50, 1, 8, 8), torch.ones(50, 1, 8, 8)
        mixed = {shape: ShapeMixer(shape).mix(first, second, generator()) for shape in ("diagonal", "box", "band")}
        corner = {shape: images[:, 0, 0, 0] for shape, images in mixed.items()}
        assert (mixed["diagonal"][:, 0, -1, -1] != corner["diagonal"]).all()
        assert (mixed["box"][:, 0, 3, 3] != corner["box"]).all()
        assert (mixed["box"][:, 0, 3, 0] == corner["box"]).all()
        assert (mixed["band"][:, 0, 3, 0] != corner["band"]).all()
        assert (mixed["band"][:, 0, -1, 0] == corner["band"]).all()

    def test_no_wrong_mix_is_a_trigger(self) -> None:
        images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        pairs = Pairs(Images(images, torch.tensor([0, 1])), (0, 1), "mea_defender", HalfMixer("level", 0.1, True))
        triggers = {image.numpy().tobytes() for image in pairs.draw(200, generator())}
        for wrong in MEADefender().wrong_mixers(pairs):
            # a band is two rows of halves more than a trigger has
            assert triggers.isdisjoint({image.numpy().tobytes() for image in wrong.draw(200, generator())})
