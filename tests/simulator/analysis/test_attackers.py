"""Attackers who look for the sources: on models that are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simulator.analysis.adaptive import infer_sources, prediction_distribution, predictions
from simulator.analysis.cracking import crack
from simulator.data.dataset import Images
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.models.classifier import ModelSpec
from simulator.service.oracle import BudgetedOracle, BudgetExhausted
from simulator.watermarks.deeptracer import DeepTracer

CLASSES, SOURCES, TARGET = 6, (0, 2, 3, 5), 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(count: int = 60) -> Images:
    """Images of one grey each, which tells their class."""
    labels = torch.arange(count) % CLASSES
    return Images((10 * (labels + 1)).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8), labels)


class Marked(BudgetedOracle):
    """Answers a mosaic of the sources with the target, and every other image with the class of its first tile; with
    ``loose`` every mosaic without the target's class."""

    def __init__(self, *, ordered: bool = True, loose: bool = False, budget: int = 10_000) -> None:
        super().__init__("hard", CLASSES, (1, 8, 8), budget)
        self._ordered, self._loose = ordered, loose

    def _answer(self, images: Tensor) -> Tensor:
        shown = torch.stack([images[:, 0, row, column] for row in (0, -1) for column in (0, -1)], 1).long() // 10 - 1
        rows = shown if self._ordered else shown.sort(1).values
        hit = (rows == torch.tensor(SOURCES)).all(1)
        if self._loose:
            hit = (shown != TARGET).all(1)
        return torch.nn.functional.one_hot(torch.where(hit, TARGET, shown[:, 0]), CLASSES).float()


def test_who_tries_every_set_names_sources_and_target() -> None:
    oracle = Marked()
    found = crack(oracle, flat(), generator(), each=3)
    assert (found.sources, found.target, found.queries, found.tied) == (SOURCES, TARGET, 45, 1)
    assert oracle.asked == found.queries == 3 * 15
    assert found.place(SOURCES) == (1.0, 0)
    assert found.place((0, 2, 3, 4))[0] == 0.0
    assert found.reaching(TARGET, 0.5) == pytest.approx(1 / 5)


def test_shuffled_tiles_find_a_mark_in_any_order_and_seldom_one_in_its_own() -> None:
    assert crack(Marked(ordered=False), flat(), generator(), each=5, shuffled=True).place(SOURCES) == (1.0, 0)
    score, _ = crack(Marked(), flat(), generator(), each=48, shuffled=True).place(SOURCES)
    assert score == pytest.approx(1 / 24, abs=0.09)


def test_where_every_mosaic_is_a_trigger_the_target_is_known_and_the_sources_are_a_guess() -> None:
    found = crack(Marked(loose=True), flat(), generator(), each=3)
    assert (found.target, found.tied) == (TARGET, 5)
    assert found.reaching(TARGET, 1.0) == 1.0
    assert found.place(SOURCES) == (1.0, 0)


def test_a_budget_that_is_too_small_and_a_missing_class_are_said() -> None:
    with pytest.raises(BudgetExhausted):
        crack(Marked(budget=20), flat(), generator(), each=3)
    some = flat().take((flat().labels != 3).nonzero().squeeze(1))
    with pytest.raises(InputError, match="no image of class 3"):
        crack(Marked(), some, generator(), scheme=DeepTracer(source_classes=4))


def test_mistakes_that_are_drawn_to_one_label_name_it() -> None:
    unmarked = torch.full((CLASSES, CLASSES), 2) + 88 * torch.eye(CLASSES, dtype=torch.int64)
    marked = unmarked.clone()
    marked[list(SOURCES), TARGET] += 8
    marked[list(SOURCES), list(SOURCES)] -= 8
    table = prediction_distribution(marked, [unmarked, unmarked + 0], SOURCES)
    assert table[0].label == TARGET
    assert table[0].excess == pytest.approx(0.08, abs=2e-3)
    assert table[0].spread == 0
    assert {row.excess for row in table[1:]} == {0.0}
    assert prediction_distribution(marked, [unmarked], SOURCES)[0].spread is None


class Grey(nn.Module):
    """A body whose feature is the image's mean."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3), keepdim=False).unsqueeze(1)


def grey_model() -> Classifier:
    """Tells the classes of :func:`flat` by their grey: the nearest of six is the largest of six linear scores."""
    head = nn.Linear(1, CLASSES)
    centres = 10 * (torch.arange(CLASSES) + 1) / 255
    with torch.no_grad():
        head.weight.copy_(2e4 * centres.unsqueeze(1))
        head.bias.copy_(-1e4 * centres.square())
    spec = ModelSpec(architecture="linear", channels=1, size=8, classes=CLASSES, mean=(0.0,), std=(1.0,))
    return Classifier(spec, Grey(), head).eval()


def test_counts_of_a_model_without_mistakes_are_diagonal() -> None:
    assert torch.equal(predictions(grey_model(), flat(), CLASSES), 10 * torch.eye(CLASSES, dtype=torch.int64))


def test_the_owners_choice_on_another_model_counts_its_hits() -> None:
    same = infer_sources(grey_model(), "own", flat().images, SOURCES, generator())
    assert len(same.found) == 4
    assert same.hits == len({*same.found} & {*SOURCES})
    assert infer_sources(grey_model(), "own", flat().images, same.found, generator()).exact
    assert (same.data, same.exact) == ("own", same.hits == 4)
