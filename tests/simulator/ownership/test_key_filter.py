"""The two-stage key filter (DeepTracer, Eq. 7 and 8) over models whose every answer is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulator.context import Context
from simulator.errors import InputError
from simulator.models import build
from simulator.ownership.key import KeySamples
from simulator.ownership.key_filter import KeyFilter
from simulator.training.predict import predict
from simulator.training.recipe import Recipe

CLASSES = 3
TARGET = 1


class Table(nn.Module):
    """Answers image number n (the value of its pixels) with row n of a table of probabilities."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor(rows).log())

    def forward(self, images: Tensor) -> Tensor:
        return self.logs[(images[:, 0, 0, 0] * 255).round().long()]


def table(sure: list[float]) -> Any:
    """A model that gives the target these probabilities, and class 0 nearly all of the rest."""
    return Table([[0.99 * (1 - p), p, 0.01 * (1 - p)] for p in sure])


def candidates(count: int) -> KeySamples:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return KeySamples(images, torch.full((count,), TARGET), CLASSES, {"scheme": "made up"})


def numbers(key: KeySamples) -> list[int]:
    return key.images[:, 0, 0, 0].tolist()


# every combination of yes and no, with the surrogate ever surer
VICTIM = table([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9])
SURROGATE = table([0.1, 0.1, 0.6, 0.6, 0.1, 0.1, 0.7, 0.7, 0.9, 0.8])
BENIGN = table([0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1])


@pytest.mark.parametrize(
    ("stages", "keep", "expected"),
    [
        ("none", 100, list(range(10))),
        ("none", 3, [0, 1, 2]),
        # victim and surrogate yes, benign no: 2, 8 and 9
        ("first", 100, [2, 8, 9]),
        ("first", 2, [2, 8]),
        ("both", 100, [8, 9, 2]),
        ("both", 2, [8, 9]),
    ],
)
def test_the_stages(stages: Any, keep: int, expected: list[int]) -> None:
    key = KeyFilter(stages=stages, keep=keep).select(candidates(10), victim=VICTIM, surrogate=SURROGATE, benign=BENIGN)
    assert numbers(key) == expected
    assert key.labels.tolist() == [TARGET] * len(expected)
    assert key.classes == CLASSES
    assert key.info["scheme"] == "made up"
    assert key.info["filter"] == stages


def test_the_counts_of_each_condition_are_kept() -> None:
    key = KeyFilter(keep=2).select(candidates(10), victim=VICTIM, surrogate=SURROGATE, benign=BENIGN)
    assert key.info["filter_counts"] == {
        "candidates": 10,
        "passed_victim": 6,
        "passed_surrogate": 6,
        "failed_benign": 6,
        "passed": 3,
    }


def test_each_label_is_the_samples_own() -> None:
    """Schemes may use several labels: what counts, and how sure, is each sample's own."""
    images = candidates(3).images
    samples = KeySamples(images, torch.tensor([0, 1, 2]), CLASSES)
    marked: Any = Table([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.05, 0.05, 0.9]])
    benign: Any = Table([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    key = KeyFilter().select(samples, victim=marked, surrogate=marked, benign=benign)
    assert key.labels.tolist() == [2, 0, 1]
    assert numbers(key) == [2, 0, 1]


def test_equally_sure_samples_keep_their_order() -> None:
    even = table([0.7] * 6)
    key = KeyFilter(keep=4).select(candidates(6), victim=even, surrogate=even, benign=table([0.1] * 6))
    assert numbers(key) == [0, 1, 2, 3]


@pytest.mark.parametrize(("stages", "expected"), [("first", [0, 2, 3]), ("both", [3, 0, 2])])
def test_a_surrogate_that_learned_nothing_is_told(stages: Any, expected: list[int]) -> None:
    never = table([0.2, 0.3, 0.1, 0.4])
    key = KeyFilter(stages=stages).select(
        candidates(4), victim=table([0.9, 0.1, 0.9, 0.9]), surrogate=never, benign=table([0.1] * 4)
    )
    assert numbers(key) == expected
    assert key.info["filter"] == "surrogate never triggered"
    assert key.info["filter_counts"]["passed_surrogate"] == 0


@pytest.mark.parametrize("stages", ["first", "both"])
@pytest.mark.parametrize(
    ("victim", "benign", "says"),
    [
        (0.9, 0.9, "3 with the key's label and the benign model 3"),
        (0.1, 0.1, "0 with the key's label and the benign model 0"),
    ],
)
def test_a_key_that_says_nothing_is_refused(stages: Any, victim: float, benign: float, says: str) -> None:
    """The benign model gives the label as well, or the victim does not: nothing tells them apart."""
    with pytest.raises(InputError, match=says) as error:
        KeyFilter(stages=stages).select(
            candidates(3), victim=table([victim] * 3), surrogate=table([0.6, 0.8, 0.7]), benign=table([benign] * 3)
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_surrogate_is_stolen_from_the_victim(labels: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def linear(drawn: torch.Generator) -> Any:
        return build("linear", channels=1, size=8, classes=CLASSES, generator=drawn)

    victim = linear(generator)
    with torch.no_grad():  # far from even answers, so that a copy has something to learn
        victim.head.weight.mul_(10)
    images = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=generator)
    rule = KeyFilter(labels=labels, training=Recipe(epochs=60, batch_size=32, learning_rate=0.01, decay_factor=1.0))
    told: list[tuple[str, int, int]] = []
    kept = [value.clone() for value in victim.state_dict().values()]
    surrogate = rule.surrogate(victim, images, linear, Context(generator, progress=lambda *step: told.append(step)))
    assert not surrogate.training
    assert told == [("filter", epoch, 60) for epoch in range(1, 61)]
    same = predict(victim, images).argmax(1) == predict(surrogate, images).argmax(1)
    assert same.double().mean() > 0.9
    assert all(torch.equal(a, b) for a, b in zip(victim.state_dict().values(), kept, strict=True))
