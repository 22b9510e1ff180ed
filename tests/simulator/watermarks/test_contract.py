"""What every registered watermark scheme keeps to. They are found in the registry: a new scheme needs no edit here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.analysis.agreement import accuracy
from simulator.context import Context
from simulator.data.dataset import DataConfig, Dataset, load
from simulator.models import Classifier, build
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.ownership.key_filter import KeyFilter
from simulator.ownership.suspect import verify_model
from simulator.ownership.wsr import Wsr
from simulator.training.fit import fit
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe
from simulator.watermarks.base import WATERMARKS, Embedding, OwnerTask, Watermark

NAMES = list(WATERMARKS.classes())
#: those that mark their model; an unmarked victim has no key to speak of
MARKS = [name for name, cls in WATERMARKS.classes().items() if cls.marks]

#: words in the names of whole-number settings that say how long a scheme works
LENGTHS = ("epochs", "steps", "iterations", "rounds")
#: words in the names of those that say how many key samples it makes
COUNTS = ("candidates", "samples")
#: settings, by scheme, where making every length short is not enough or not allowed
SHORT: dict[str, dict[str, Any]] = {
    # a hundred relabelled images are too many for a thousand
    "margin": {"key_samples": 10, "key_weight": 0.3},
    "exponential_weighting": {"key_samples": 25},
    # random crops of half a digit are too hard for so few steps
    "composite": {"shake": False, "mix_ratio": 0.5},
    "mea_defender": {"shake": False},
}
#: the least WSR of the victim before any filter, by scheme, where 0.95 is too much to ask of a short training
LEAST_WSR: dict[str, float] = {"composite": 0.85, "ewe": 0.85, "mea_defender": 0.85}

TRAINING = Recipe(epochs=15, batch_size=64, learning_rate=2e-3, decay_at=(0.3333, 0.6667))


def shortened(name: str, epochs: int) -> Watermark:
    """The scheme with every recipe and length cut to ``epochs``, and 500 key candidates at most."""
    fields: dict[str, Any] = {}
    for field, info in WATERMARKS.classes()[name].model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, Recipe):
            fields[field] = TRAINING.model_copy(update={"epochs": epochs}).model_dump(mode="json")
        elif type(default) is int and any(word in field for word in LENGTHS):
            fields[field] = min(default, epochs)
        elif type(default) is int and any(word in field for word in COUNTS):
            fields[field] = min(default, 500)
    return WATERMARKS.make({"name": name, **fields, **SHORT.get(name, {})})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> Dataset:
    return load(DataConfig(name="digits", size=8))


def untrained(drawn: torch.Generator) -> Classifier:
    data = digits()
    return build("naivenet", channels=1, size=8, classes=10, mean=data.mean, std=data.std, generator=drawn)


@cache
def benign(seed: int) -> Classifier:
    model = untrained(generator(seed))
    fit(model, digits().owner.images, digits().owner.labels, TRAINING, Context(generator(seed)))
    return model


def embed(name: str, epochs: int, seed: int) -> Embedding:
    training = TRAINING.model_copy(update={"epochs": epochs})
    task = OwnerTask(digits(), training, benign(0), untrained)
    return shortened(name, epochs).embed(task, Context(generator(seed)))


@cache
def embedding(name: str) -> Embedding:
    """The one marked victim of a scheme that most tests look at."""
    return embed(name, epochs=10, seed=1)


def score(model: Classifier) -> float:
    return accuracy(predict_labels(model, digits().test.images), digits().test.labels)


def wsr(model: Classifier, key: KeySamples) -> float:
    return verify_model(model, key, Wsr()).statistic


def pixels(images: Tensor) -> set[bytes]:
    return {image.tobytes() for image in images.numpy()}


@pytest.mark.parametrize("name", MARKS)
def test_the_victim_carries_the_watermark(name: str) -> None:
    found = embedding(name)
    assert isinstance(found.model, Classifier)
    assert not any(module.training for module in found.model.modules())
    assert wsr(found.model, found.candidates) >= LEAST_WSR.get(name, 0.95)
    assert verify_model(found.model, found.candidates, Wsr()).verified


@pytest.mark.parametrize("name", NAMES)
def test_the_victim_keeps_the_task(name: str) -> None:
    assert score(benign(0)) > 0.9
    assert score(embedding(name).model) >= score(benign(0)) - 0.05


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("seed", [0, 5])  # the benign model that the scheme knew, and one that it never saw
def test_an_unmarked_model_is_never_accused(name: str, seed: int) -> None:
    candidates = embedding(name).candidates
    assert wsr(benign(seed), candidates) <= 0.2
    victim = embedding(name).model
    key = KeyFilter(keep=100).select(candidates, victim=victim, surrogate=victim, benign=benign(0))
    assert key.info["filter"] == "both"
    assert wsr(victim, key) == 1.0
    assert not verify_model(benign(seed), key, Wsr()).verified


@pytest.mark.parametrize("name", MARKS)
def test_no_key_sample_was_trained_on(name: str) -> None:
    if WATERMARKS.classes()[name].key_is_trained:
        return  # the scheme's own tests say that the key was taken out of clean training
    found = embedding(name)
    keys = pixels(found.candidates.images)
    assert keys.isdisjoint(pixels(digits().owner.images))
    assert keys.isdisjoint(pixels(found.triggers))
    assert len(keys) > len(found.candidates) / 2  # and they are not all one image


@pytest.mark.parametrize("name", MARKS)
def test_no_pool_of_a_thief_holds_a_key_sample(name: str) -> None:
    found = embedding(name)
    keys = pixels(found.candidates.images)
    assert keys.isdisjoint(pixels(digits().attacker.images))
    # relabelled images of the owner's are what these schemes are; a thief who has the owner's data has them, too
    shared = keys & pixels(digits().owner.images)
    assert bool(shared) == ("owner_rows" in found.info)
    if shared:
        rows = torch.tensor(found.info["owner_rows"])
        assert shared == keys == pixels(digits().owner.images[rows])


@pytest.mark.parametrize("name", MARKS)
def test_all_images_are_of_the_task(name: str) -> None:
    found = embedding(name)
    sets = [(found.candidates.images, found.candidates.labels), (found.triggers, found.trigger_labels)]
    assert (found.near_misses is None) == (found.near_miss_labels is None)
    if found.near_misses is not None and found.near_miss_labels is not None:
        sets.append((found.near_misses, found.near_miss_labels))
        assert pixels(found.near_misses).isdisjoint(pixels(found.candidates.images))
    for images, labels in sets:
        assert len(images) > 0
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.uint8 or (images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1)
        assert labels.shape == (len(images),)
        assert labels.dtype == torch.int64
        assert 0 <= labels.min() <= labels.max() < 10
    assert found.triggers.dtype == torch.uint8
    assert found.candidates.classes == 10


@pytest.mark.parametrize("name", MARKS)
def test_the_key_survives_the_disk(name: str, tmp_path: Path) -> None:
    found = embedding(name)
    save_key(found.candidates, tmp_path / "key.safetensors")
    loaded = load_key(tmp_path / "key.safetensors")
    assert torch.equal(loaded.images, found.candidates.images)
    assert torch.equal(loaded.labels, found.candidates.labels)
    assert loaded.classes == 10
    assert loaded.info == json.loads(json.dumps(dict(found.candidates.info)))
    json.dumps(dict(found.info))


def test_a_scheme_that_marks_nothing_has_no_key() -> None:
    assert set(NAMES) - set(MARKS) == {"unmarked"}
    found, test = embedding("unmarked"), digits().test.images
    assert len(found.candidates) == len(found.triggers) == len(found.trigger_labels) == 0
    assert not torch.equal(predict_labels(found.model, test), predict_labels(benign(1), test)), "a model of its own"


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_everything(name: str) -> None:
    before = torch.get_rng_state()
    first = embed(name, epochs=1, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = embed(name, epochs=1, seed=2)
    other = embed(name, epochs=1, seed=3)

    def everything(found: Embedding) -> list[Tensor]:
        return [
            *found.model.state_dict().values(),
            *(found.candidates.images, found.candidates.labels, found.triggers, found.trigger_labels),
            *(images for images in (found.near_misses, found.near_miss_labels) if images is not None),
        ]

    assert all(torch.equal(a, b) for a, b in zip(everything(first), everything(second), strict=True))
    assert first.info == second.info
    assert not torch.equal(everything(first)[0], everything(other)[0])


@pytest.mark.parametrize("name", NAMES)
def test_what_it_is_given_stays_as_it_is(name: str) -> None:
    kept = {part: value.clone() for part, value in benign(0).state_dict().items()}
    images = {part: pixels(getattr(digits(), part).images) for part in ("owner", "attacker", "test")}
    embed(name, epochs=1, seed=2)
    assert all(torch.equal(value, kept[part]) for part, value in benign(0).state_dict().items())
    assert not any(module.training for module in benign(0).modules())
    assert images == {part: pixels(getattr(digits(), part).images) for part in ("owner", "attacker", "test")}


@pytest.mark.parametrize("name", NAMES)
def test_a_listener_can_interrupt_it(name: str) -> None:
    class Stop(Exception):
        pass

    def listen(phase: str, done: int, total: int) -> None:
        assert phase
        assert 0 <= done <= total
        raise Stop

    task = OwnerTask(digits(), TRAINING, benign(0), untrained)
    with pytest.raises(Stop):
        shortened(name, epochs=1).embed(task, Context(generator(2), progress=listen))
