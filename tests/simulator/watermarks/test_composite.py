"""Composite: the geometry of its mixer, its constraint worked out by hand, its clean mixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.composite import Composite, HalfMixer, Pairs, Partners, Seam, constraint, similarity_loss
from simulator.watermarks.mea_defender import MEADefender


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, size: int, start: int) -> Tensor:
    """Images whose pixels say where they stand: ``start`` + row · size + column."""
    image = start + torch.arange(size * size).view(1, size, size)
    return image.repeat(count, 1, 1, 1)


class TestMixer:
    @pytest.mark.parametrize("shake", [False, True])
    @pytest.mark.parametrize(("size", "jitter", "reach"), [(8, 0.0, 0), (8, 0.125, 1), (32, 0.09375, 3), (9, 0.125, 1)])
    def test_level_halves(self, size: int, jitter: float, reach: int, shake: bool) -> None:
        """Rows of one image above rows of the other, each half in one piece and at full width."""
        count, area = 200, size * size
        mixed = HalfMixer("level", jitter, shake).mix(
            numbered(count, size, 0), numbered(count, size, area), generator()
        )
        of_second = mixed >= area
        assert torch.equal(mixed % size, numbered(count, size, 0) % size)  # columns stay where they are
        rows, whose = mixed[:, 0, :, 0] % area // size, of_second[:, 0, :, 0]
        assert torch.equal(of_second, whose[:, None, :, None].expand_as(of_second))
        changes = whose[:, 1:] != whose[:, :-1]
        assert (changes.sum(1) == 1).all()
        cuts = changes.int().argmax(1) + 1
        assert set(cuts.tolist()) == set(range(size // 2 - reach, size // 2 + reach + 1))
        assert 0.3 < whose[:, 0].float().mean() < 0.7
        # within a half the rows follow each other
        assert ((rows[:, 1:] - rows[:, :-1] == 1) | changes).all()
        if not shake:
            assert torch.equal(rows[:, 0], (size - cuts) // 2)
            assert torch.equal(rows[:, -1], cuts // 2 + size - 1 - cuts)
        else:
            assert set((size - 1 - rows[:, -1]).tolist()) >= {0, size // 2 - reach}
            assert set(rows[:, 0].tolist()) >= {0, size // 2 - reach}

    @given(size=st.integers(8, 20), seed=st.integers(0, 1000))
    def test_upright_is_level_turned(self, size: int, seed: int) -> None:
        first, second = numbered(5, size, 0), numbered(5, size, 1000)
        upright = HalfMixer("upright", 0.1, True).mix(first, second, generator(seed))
        level = HalfMixer("level", 0.1, True).mix(first.mT, second.mT, generator(seed))
        assert torch.equal(upright, level.mT)

    def test_the_seam_may_be_random(self) -> None:
        first, second = torch.zeros(200, 3, 8, 8), torch.ones(200, 3, 8, 8)
        mixed = HalfMixer("random", 0.0, True).mix(first, second, generator())
        level = (mixed[:, 0, 0, 0] == mixed[:, 0, 0, -1]).float().mean()
        assert 0.3 < level < 0.7
        assert torch.equal(mixed.mean((1, 2, 3)), torch.full((200,), 0.5))

    def test_what_it_is_given_stays_as_it_is(self) -> None:
        first, second = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.ones(4, 1, 8, 8, dtype=torch.uint8)
        mixed = HalfMixer("random", 0.1, True).mix(first, second, generator())
        assert mixed.dtype == torch.uint8
        assert not first.any()
        assert second.all()


class TestConstraint:
    """Outputs (0, 0), (3, 4) and (0, 0.5): 5 apart, then √(9 + 12.25)."""

    outputs = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.5]])

    @pytest.mark.parametrize(
        ("labels", "margin", "expected"),
        [
            ([1, 1, 1], 1.0, (25 + 21.25) / 4),
            ([0, 1, 2], 1.0, 0.0),
            ([0, 1, 1], 6.0, ((6 - 5) ** 2 + 21.25) / 4),
            ([0, 1, 0], 6.0, ((6 - 5) ** 2 + (6 - 21.25**0.5) ** 2) / 4),
        ],
    )
    def test_by_hand(self, labels: list[int], margin: float, expected: float) -> None:
        found = similarity_loss(self.outputs, torch.tensor(labels), margin)
        assert found.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_to_compare(self, count: int) -> None:
        outputs = self.outputs[:count].clone().requires_grad_()
        found = similarity_loss(outputs, torch.zeros(count, dtype=torch.int64), 1.0)
        found.backward()
        assert found.item() == 0

    def test_equal_outputs_have_a_gradient(self) -> None:
        outputs = torch.ones(2, 3, requires_grad=True)
        similarity_loss(outputs, torch.tensor([0, 1]), 1.0).backward()
        assert outputs.grad is not None
        assert outputs.grad.isfinite().all()

    def test_only_the_concerned_classes_count(self) -> None:
        outputs = torch.tensor([[0.0, 0.0], [100.0, 0.0], [3.0, 4.0], [7.0, 7.0]])
        labels = torch.tensor([1, 5, 1, 6])
        assert constraint(outputs, labels, (1, 2, 3), 1.0, generator()).item() == pytest.approx(12.5)


def test_partners_are_of_the_same_class() -> None:
    labels = torch.tensor([2, 0, 1, 2, 0, 2])
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    partners = Partners(Images(images, labels))
    asked = torch.tensor([0, 1, 2] * 100)
    found = partners.draw(asked, generator()).flatten().long()
    assert torch.equal(labels[found], asked)
    assert set(found.tolist()) == set(range(6))


def task(classes: int) -> OwnerTask:
    labels = torch.arange(classes).repeat(4)
    images = (20 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    data = Images(images, labels)

    def fresh(drawn: torch.Generator) -> Classifier:
        return build("linear", channels=1, size=8, classes=classes, generator=drawn)

    dataset = Dataset("shades", classes, owner=data, attacker=data, test=data)
    return OwnerTask(dataset, Recipe(epochs=1, batch_size=8), fresh(generator()).eval(), fresh)


@pytest.mark.parametrize("scheme", [Composite, MEADefender])
class TestBoth:
    def test_triggers_show_both_sources_and_have_a_third_label(self, scheme: type[Composite | MEADefender]) -> None:
        found = scheme(sources=(1, 3), candidates=20).embed(task(6), Context(generator()))
        for images in (found.triggers, found.candidates.images):
            assert all(set(image.unique().tolist()) == {20, 60} for image in images)
        assert found.info["target"] not in (1, 3)
        assert set(found.trigger_labels.tolist()) == {found.info["target"]}
        assert found.near_misses is not None
        others = {20 * label for label in range(6) if label not in (1, 3, found.info["target"])}
        assert set(found.near_misses.unique().tolist()) <= others

    @pytest.mark.parametrize("classes", [3, 4])
    def test_near_misses_need_two_more_classes(self, scheme: type[Composite | MEADefender], classes: int) -> None:
        found = scheme(candidates=5).embed(task(classes), Context(generator()))
        assert found.near_misses is None
        assert found.near_miss_labels is None

    def test_what_is_given_is_taken(self, scheme: type[Composite | MEADefender]) -> None:
        found = scheme(sources=(4, 0), target=2, candidates=5).embed(task(5), Context(generator()))
        assert found.info["sources"] == [4, 0]
        assert found.info["target"] == 2

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"sources": (1, 1)}, ["sources [1, 1]", "differ"]),
            ({"sources": (1, 2), "target": 2}, ["[1, 2]", "target 2", "differ"]),
            ({"sources": (1, 7)}, ["sources 7", "0..4"]),
            ({"target": 5}, ["target 5", "0..4"]),
        ],
    )
    def test_impossible_classes_are_refused(
        self, scheme: type[Composite | MEADefender], fields: dict[str, Any], words: list[str]
    ) -> None:
        with pytest.raises(InputError) as error:
            scheme(**fields).check(task(5).dataset)
        assert all(word in str(error.value) for word in words)

    def test_two_classes_are_too_few(self, scheme: type[Composite | MEADefender]) -> None:
        with pytest.raises(InputError, match="2 classes"):
            scheme().check(task(2).dataset)


@pytest.mark.parametrize("seam", ["level", "upright"])
def test_pairs_draw_from_their_classes(seam: Seam) -> None:
    pairs = Pairs(task(4).dataset.owner, (0, 2), "composite", HalfMixer(seam, 0.0, False))
    drawn = pairs.draw(50, generator())
    line = drawn[:, 0, :, 0] if seam == "level" else drawn[:, 0, 0, :]
    assert set(line.unique().tolist()) == {0, 40}
    assert ((line == 40).sum(1) == 4).all()
