"""The adaptive attacker: what it draws, and that it unlearns a mark whose pattern it knows."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import DataConfig, Dataset, Images, load
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.ownership.key import KeySamples
from simulator.ownership.suspect import verify_model
from simulator.ownership.wsr import Wsr
from simulator.removals.adaptive import Adaptive, random_labels
from simulator.removals.base import REMOVALS, ThiefTask
from simulator.training.fit import fit
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.deeptracer import DeepTracer

TRAINING = Recipe(epochs=12, batch_size=64, learning_rate=2e-3, decay_at=(0.3333, 0.6667))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> Dataset:
    return load(DataConfig(name="digits", size=8))


def fresh(drawn: torch.Generator, _: str | None = None) -> Classifier:
    data = digits()
    return build("naivenet", channels=1, size=8, classes=10, mean=data.mean, std=data.std, generator=drawn)


@cache
def marked() -> tuple[Classifier, KeySamples]:
    owner = digits().owner
    benign = fresh(generator())
    fit(benign, owner.images, owner.labels, TRAINING, Context(generator()))
    task = OwnerTask(digits(), TRAINING, benign, fresh)
    found = DeepTracer(first_epochs=6, second_epochs=6, candidates=300).embed(task, Context(generator(1)))
    return found.model, found.candidates


def task() -> ThiefTask:
    attacker = digits().attacker
    return ThiefTask(10, fresh, Pool("attacker", attacker.images, attacker.labels, labels=attacker.labels))


def washed(**settings: Any) -> Classifier:
    removal = REMOVALS.make(
        {"name": "adaptive", "training": {"epochs": 10, "batch_size": 64}, "labels": "own", **settings}
    )
    return removal.remove(copy.deepcopy(marked()[0]), task(), Context(generator(2)))


def wsr(model: Classifier) -> float:
    return verify_model(model, marked()[1], Wsr()).statistic


def score(model: Classifier) -> float:
    return float((predict_labels(model, digits().test.images) == digits().test.labels).float().mean())


def test_who_knows_the_sources_unlearns_the_mark_and_keeps_the_task() -> None:
    before, key = marked()
    assert wsr(before) > 0.95
    sources = tuple(key.info["sources"])
    for settings in (
        {"sources": sources},
        {"sources": sources, "fresh": False},
        {"sources": sources, "labels": "true"},
    ):
        after = washed(**settings)
        assert wsr(after) < 0.6
        assert score(after) > score(before) - 0.05


def test_without_triggers_it_is_plain_fine_tuning() -> None:
    control = washed(ratio=0.0)
    plain = REMOVALS.make({"name": "fine_tuning", "training": {"epochs": 10, "batch_size": 64}, "labels": "own"})
    other = plain.remove(copy.deepcopy(marked()[0]), task(), Context(generator(2)))
    assert wsr(control) > 0.9
    assert wsr(other) > 0.9
    assert abs(score(control) - score(other)) < 0.03


def test_labels_are_uniform_and_none_of_those_excluded() -> None:
    excluded = torch.tensor([[0, 3]]).expand(4000, 2)
    counts = random_labels(excluded, 5, generator()).bincount(minlength=5)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert int(counts[[1, 2, 4]].min()) > 1200
    counts = random_labels(excluded[:, :0], 5, generator()).bincount(minlength=5)
    assert 700 < int(counts.min()) <= int(counts.max()) < 900
    with pytest.raises(InputError, match="leave no other label"):
        random_labels(torch.zeros(1, 2, dtype=torch.int64), 2, generator())


def test_a_batch_has_the_share_of_triggers_and_either_kind_of_label() -> None:
    held = Images(digits().attacker.images, digits().attacker.labels)
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(tuple(images.shape))
            return torch.zeros(len(images), 10, requires_grad=True)

    for settings, labels in (
        ({}, torch.arange(40) % 10),
        ({"data": "transfer", "labels": "answers"}, torch.rand(40, 10)),
    ):
        removal = Adaptive(**{"ratio": 0.25, **settings})
        objective = removal.objective(removal.draw(held, 10, generator()))
        assert torch.isfinite(objective(Spy(), torch.rand(40, 1, 8, 8), labels))
    assert seen == [(50, 1, 8, 8)] * 2


def test_a_kept_set_keeps_its_labels_and_a_fresh_one_does_not() -> None:
    held = Images(digits().attacker.images, digits().attacker.labels)
    triggers, labels = Adaptive(fresh=False, ratio=0.02).draw(held, 10, generator())(500)
    known: dict[bytes, set[int]] = {}
    for image, label in zip(triggers.numpy(), labels.tolist(), strict=True):
        known.setdefault(image.tobytes(), set()).add(label)
    assert len(known) == round(0.02 * len(held))
    assert all(len(found) == 1 for found in known.values())
    anew = Adaptive(ratio=0.02).draw(held, 10, generator())(500)[0]
    assert len({image.tobytes() for image in anew.numpy()}) > 450


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"scheme": {"name": "margin"}}, "cannot make triggers of margin"), ({"sources": [0, 1]}, "shows 4 classes")],
)
def test_what_cannot_be_imitated_is_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        washed(**settings)


def test_a_source_that_is_no_class_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"sources 12 is no class of digits: 0\.\.9"):
        Adaptive(sources=(0, 1, 2, 12)).check(digits())
