"""What every registered evasion keeps to. They are found in the registry: a new evasion needs no edit here."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.analysis.roc import roc_auc
from simulator.context import Context
from simulator.data.dataset import DataConfig, Dataset, load
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.evasions.base import EVASIONS, Evasion, Guard
from simulator.evasions.filters import Filter
from simulator.evasions.outliers import Outliers
from simulator.models import Classifier, build
from simulator.ownership.suspect import suspect_of
from simulator.service.oracle import BudgetExhausted, ModelOracle, Oracle
from simulator.training.fit import fit
from simulator.training.recipe import Recipe
from simulator.transforms.base import TRANSFORMS

#: evasions that do nothing
IDLE: list[dict[str, Any]] = [
    {"name": "outliers", "flag_rate": 0.0},
    *(
        {"name": "filter", "transform": {"name": name, **settings}}
        for name, settings in {
            "blur": {"sigma": 0.0},
            "noise": {"sigma": 0.0},
            "quantise": {"levels": 0},
            "crop": {"fraction": 1.0},
        }.items()
    ),
]
#: every evasion as it comes, every filter and every kind of outlier
EVERY: list[dict[str, Any]] = [
    *({"name": name} for name in EVASIONS.classes()),
    *({"name": "filter", "transform": name} for name in TRANSFORMS.classes()),
    *(
        {"name": "outliers", "detector": detector, "features": features, "flag_rate": 0.05}
        for detector in ("lof", "isolation_forest")
        for features in ("pixels", "penultimate", "logits")
    ),
]


@cache
def digits() -> Dataset:
    return load(DataConfig(name="digits", size=8))


@cache
def model() -> Classifier:
    data = digits()
    drawn = torch.Generator().manual_seed(0)
    made = build("naivenet", channels=1, size=8, classes=10, mean=data.mean, std=data.std, generator=drawn)
    fit(made, data.owner.images, data.owner.labels, Recipe(epochs=5, batch_size=64, learning_rate=2e-3), Context(drawn))
    return made


def pool() -> Pool:
    return Pool("attacker", digits().attacker.images, digits().attacker.labels)


def oracle(labels: str = "hard", budget: int = 10_000) -> ModelOracle:
    return ModelOracle(model(), labels=labels, classes=10, shape=(1, 8, 8), budget=budget)


def guard(evasion: Evasion, behind: Oracle, seed: int = 0) -> Guard:
    return evasion.guard(
        behind, model(), None if evasion.data_free else pool(), Context(torch.Generator().manual_seed(seed))
    )


@pytest.fixture(params=EVERY, ids=lambda each: "-".join(map(str, each.values())))
def evasion(request: pytest.FixtureRequest) -> Evasion:
    return EVASIONS.make(request.param)


@pytest.mark.parametrize("settings", IDLE, ids=lambda each: str(each.get("transform", each)))
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_of_strength_zero_the_answers_are_equal_to_the_bit(settings: dict[str, Any], labels: str) -> None:
    asked = guard(EVASIONS.make(settings), oracle(labels))
    for images in (digits().test.images, torch.rand(20, 1, 8, 8), digits().test.images[:0]):
        assert torch.equal(asked.query(images), oracle(labels).query(images))


def test_every_evasion_has_a_strength_of_zero_here() -> None:
    assert {each["name"] for each in IDLE} == set(EVASIONS.classes())
    assert {each["transform"]["name"] for each in IDLE if "transform" in each} == set(TRANSFORMS.classes())


def test_budget_and_shape_of_the_oracle_pass_through(evasion: Evasion) -> None:
    behind = oracle("soft", budget=30)
    asked = guard(evasion, behind)
    assert isinstance(asked, Oracle)
    assert (asked.labels, asked.classes, asked.shape, asked.remaining) == ("soft", 10, (1, 8, 8), 30)
    answers = asked.query(digits().test.images[:20])
    assert answers.shape == (20, 10)
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers.sum(1), torch.ones(20))
    assert asked.remaining == behind.remaining == 10
    with pytest.raises(BudgetExhausted):
        asked.query(digits().test.images[:11])
    assert asked.remaining == 10


def test_an_image_has_one_answer_in_any_batch_and_of_either_type(evasion: Evasion) -> None:
    images = torch.cat([digits().test.images[:40], 255 - digits().test.images[:40]])
    found = guard(evasion, oracle()).query(images)
    again = guard(evasion, oracle())
    assert torch.equal(found, torch.cat([again.query(part) for part in images.split(7)]))
    assert torch.equal(found, again.query(images / 255))
    assert torch.equal(found.flip(0), again.query(images.flip(0)))


def test_it_leaves_model_and_images_as_they_are_and_draws_from_its_context_alone(evasion: Evasion) -> None:
    kept = {name: value.clone() for name, value in model().state_dict().items()}
    before, images = torch.get_rng_state(), digits().test.images.clone()
    guard(evasion, oracle()).query(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, digits().test.images)
    assert all(torch.equal(value, kept[name]) for name, value in model().state_dict().items())
    assert not model().training


def test_it_is_handed_no_key(evasion: Evasion) -> None:
    """The contract's words: an oracle, the suspect's model and images, and a context. None of them holds a key."""
    assert list(inspect.signature(evasion.guard).parameters) == ["oracle", "model", "pool", "context"]


def test_it_stands_in_a_configuration_as_itself(evasion: Evasion) -> None:
    assert EVASIONS.make(evasion.model_dump(mode="json")) == evasion
    assert evasion.paper


@pytest.mark.parametrize("detector", ["lof", "isolation_forest"])
def test_a_planted_outlier_is_flagged_and_few_clean_images_are(detector: str) -> None:
    asked = guard(EVASIONS.make({"name": "outliers", "detector": detector, "flag_rate": 0.05}), oracle())
    planted = 255 - digits().test.images
    clean, found = asked.flags(digits().test.images), asked.flags(planted)
    assert clean is not None
    assert found is not None
    assert float(found.float().mean()) > 0.95
    assert float(clean.float().mean()) < 0.15
    scores = [asked.suspicion(images) for images in (digits().test.images, planted)]
    assert isinstance(scores[0], Tensor)
    assert isinstance(scores[1], Tensor)
    assert roc_auc(scores[0], scores[1]) > 0.95


def test_flagged_images_get_uniform_labels_that_only_the_suspect_can_foretell() -> None:
    lying = Outliers(flag_rate=0.05)
    planted = torch.randint(256, (2000, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    first, second = (guard(lying, oracle("soft"), seed).query(planted) for seed in (0, 1))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    counts = first.argmax(1).bincount(minlength=10)
    assert 140 < int(counts.min()) <= int(counts.max()) < 260
    assert 0.05 < float((first.argmax(1) == second.argmax(1)).float().mean()) < 0.15


def test_at_most_the_flag_rate_of_the_held_out_images_is_flagged() -> None:
    for rate in (0.001, 0.02, 0.5):
        asked = guard(Outliers(flag_rate=rate, held_out=0.99, neighbours=2), oracle())
        flags = asked.flags(pool().images)
        assert flags is not None
        assert float(flags.float().mean()) <= rate + 0.02


def test_a_filter_asks_the_changed_images() -> None:
    class Echo:
        labels, classes, shape, remaining = "soft", 64, (1, 8, 8), 100

        def query(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    levels = EVASIONS.make({"name": "filter", "transform": {"name": "quantise", "levels": 2}})
    found = guard(levels, Echo()).query(digits().test.images[:5])
    assert set(found.unique().tolist()) == {0.25, 0.75}
    noisy = guard(Filter(transform=TRANSFORMS.make("noise")), Echo()).query(digits().test.images[:5])
    assert not torch.equal(noisy[0], noisy[1])


def test_guards_stand_before_guards() -> None:
    inner = guard(Outliers(flag_rate=0.05), suspect_of(model(), 100))
    outer = guard(Filter(), inner)
    assert outer.query(digits().test.images[:10]).shape == (10, 10)
    assert outer.remaining == 90


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"name": "outliers", "detector": "svm"}, "'lof' or 'isolation_forest'"),
        ({"name": "filter", "transform": {"name": "blur", "sigma": -1}}, "sigma"),
        ({"name": "outliers", "flag_rate": 1.0}, "flag_rate"),
        ("hide", "'hide' is not one of"),
    ],
)
def test_bad_settings_are_one_line(bad: object, says: str) -> None:
    with pytest.raises(InputError) as caught:
        EVASIONS.make(bad)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputError, match="25 images are too few: 5 set the threshold and 20 are fitted"):
        Outliers().check(25)
    Outliers().check(26)
    Outliers(detector="isolation_forest").check(3)


def test_the_area_under_the_curve_counts_ties_half() -> None:
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert (roc_auc(low, high), roc_auc(high, low), roc_auc(low, low)) == (1.0, 0.0, 0.5)
    assert roc_auc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([2.0])) == 0.5
