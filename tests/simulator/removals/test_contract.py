"""What every registered removal keeps to. They are found in the registry: a new removal needs no edit here."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.context import Context
from simulator.data.pool import Pool
from simulator.models import Classifier, build
from simulator.plan.config import check_config
from simulator.removals.base import REMOVALS, Removal
from simulator.training.recipe import Recipe

NAMES = list(REMOVALS.classes())
#: one of plain layers, one with batch normalisation
ARCHITECTURES = ["naivenet", "resnet18"]

#: words in the names of settings that say how strong a removal is; it changes nothing where all of them are 0
STRENGTHS = ("fraction", "ratio", "share", "strength")
#: settings, by removal, with which it changes nothing, where that is not said by a strength
NOTHING: dict[str, dict[str, Any]] = {}
#: words in the names of whole-number settings that say how long a removal works
LENGTHS = ("epochs", "steps", "iterations", "rounds")


def quick(name: str, **others: Any) -> Removal:
    """The removal with every recipe and length cut to two."""
    fields: dict[str, Any] = {}
    for field, info in REMOVALS.classes()[name].model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, Recipe):
            fields[field] = {**default.model_dump(mode="json"), "epochs": 2, "batch_size": 16}
        elif type(default) is int and any(word in field for word in LENGTHS):
            fields[field] = min(default, 2)
    return REMOVALS.make({"name": name, **fields, **others})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(architecture: str, seed: int = 1) -> Classifier:
    return build(architecture, channels=1, size=8, classes=5, generator=generator(seed)).eval()


def pool_for(removal: Removal) -> Pool | None:
    if removal.data_free:
        return None
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator(7))
    return Pool("noise", images, torch.arange(60) % 5)


def washed(removal: Removal, architecture: str, seed: int = 3) -> Classifier:
    return removal.remove(model(architecture), pool_for(removal), Context(generator(seed)))


def state(found: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.state_dict().items()}


def same(one: Classifier, other: Classifier) -> bool:
    """Whether all weights and buffers are equal, to the last bit."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    return all(value.numpy().tobytes() == second[name].numpy().tobytes() for name, value in first.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_without_strength_it_changes_nothing(name: str, architecture: str) -> None:
    fields = REMOVALS.classes()[name].model_fields
    strengths = {field: 0 for field in fields if any(word in field for word in STRENGTHS)}
    settings = {**strengths, **NOTHING.get(name, {})}
    assert settings, "which of its settings is its strength?"
    assert same(washed(quick(name, **settings), architecture), model(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_as_it_is_published_it_changes_the_model_and_leaves_a_model(name: str, architecture: str) -> None:
    found = washed(quick(name), architecture)
    assert isinstance(found, Classifier)
    assert found.spec == model(architecture).spec
    assert not same(found, model(architecture))
    assert all(value.isfinite().all() for value in state(found).values())
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator(5))
    assert found(images).shape == (4, 5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_returns_is_in_evaluation_mode(name: str, architecture: str) -> None:
    removal = quick(name)
    target = model(architecture).train()
    found = removal.remove(target, pool_for(removal), Context(generator(3)))
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_everything(name: str, architecture: str) -> None:
    before = torch.get_rng_state()
    first = washed(quick(name), architecture)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(washed(quick(name), architecture), first)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_given_a_model_and_a_pool_and_sees_neither_a_key_nor_a_test_image(name: str) -> None:
    """There is no other way in: what a thief has is what :meth:`Removal.remove` is given."""
    cls = REMOVALS.classes()[name]
    assert list(inspect.signature(cls.remove).parameters) == ["self", "model", "pool", "context"]
    assert not {"key", "keys", "test", "dataset", "world"} & set(cls.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_the_pool_stays_as_it_is_and_one_that_needs_none_does_without(name: str) -> None:
    removal = quick(name)
    pool = pool_for(removal)
    before = None if pool is None else pool.source.clone()
    removal.remove(model("naivenet"), pool, Context(generator(3)))
    assert (pool is None) == removal.data_free
    if pool is not None and before is not None:
        assert torch.equal(pool.source, before)


@pytest.mark.parametrize("name", NAMES)
def test_its_cost_is_a_number_of_passes_that_an_empty_pool_does_not_need(name: str) -> None:
    removal = quick(name)
    assert removal.passes(0) == 0
    assert 0 <= removal.passes(100) <= removal.passes(1000)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_written_in_a_configuration_and_a_row(name: str) -> None:
    removal = REMOVALS.make(name)
    assert REMOVALS.make({"name": name, **json.loads(removal.params_json())}) == removal
    config = {"name": "x", "dataset": "digits", "watermarks": ["badnets"], "scenarios": [{"then": [{"removal": name}]}]}
    assert check_config(config).scenarios[0].then[0].removal == (removal,)
    assert type(removal).__doc__
    assert removal.paper
