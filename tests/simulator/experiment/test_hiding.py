"""A served model behind an evasion: what ``--evasion`` says, and what the service then answers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simulator.context import Context
from simulator.data.dataset import training_images
from simulator.errors import InputError
from simulator.evasions.filters import Filter
from simulator.evasions.hiding import Hiding, oracle_over
from simulator.evasions.outliers import Outliers
from simulator.experiment.guarding import read_hiding
from simulator.models import Classifier, build
from simulator.seeding import generator_for
from simulator.service.query import Query
from simulator.service.victim import VictimService
from simulator.training.fit import fit
from simulator.training.predict import predict
from simulator.training.recipe import Recipe
from simulator.transforms.quantise import Quantise

DIGITS = training_images("digits", size=8)


@pytest.fixture(scope="module")
def model() -> Classifier:
    made = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("model"))
    recipe = Recipe(epochs=3, batch_size=64, learning_rate=2e-3)
    fit(made, DIGITS.images, DIGITS.labels, recipe, Context(generator_for("training")))
    return made


def answers(service: VictimService, images: torch.Tensor, labels: str = "soft", key: int = 0) -> NDArray[np.float32]:
    return service.answer("v", labels, Query("a", "t", key, images.numpy()))


def served(model: Classifier, hiding: Hiding | None) -> VictimService:
    service = VictimService(torch.device("cpu"), hide=hiding)
    service.add("v", model)
    return service


def test_the_words_of_the_option_make_an_evasion(model: Classifier) -> None:
    levels = read_hiding("filter:transform=quantise,transform.levels=2", None, model.spec, "w")
    assert levels.evasion == Filter(transform=Quantise(levels=2))
    assert levels.pool is None
    lying = read_hiding("outliers:features=logits,flag_rate=0.1", "digits", model.spec, "w")
    assert lying.evasion == Outliers(features="logits", flag_rate=0.1)
    assert lying.pool is not None
    assert lying.pool.images.shape == (len(DIGITS), 1, 8, 8)
    assert torch.equal(lying.pool.images, read_hiding("outliers", "digits", model.spec, "w").pool.images)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "images", "says"),
    [
        ("outlier", "digits", "did you mean 'outliers'?"),
        ("outliers", None, "needs images: --evasion-images"),
        ("filter", "digits", "needs no images: leave out --evasion-images"),
        ("outliers:features", "digits", "wanted key=value"),
        ("outliers:features=words", "digits", "'pixels', 'penultimate' or 'logits'"),
        ("outliers:neighbours=5000", "digits", "images are too few"),
        ("filter:transform=blur,transform.sigma=-1", None, "sigma"),
    ],
)
def test_what_it_cannot_be_is_one_line(model: Classifier, text: str, images: str | None, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_hiding(text, images, model.spec, "w")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_service_answers_through_it_in_any_batch_and_after_a_journey(model: Classifier) -> None:
    hiding = read_hiding("outliers:flag_rate=0.1", "digits", model.spec, "w")
    images = torch.cat([DIGITS.images[:30], 255 - DIGITS.images[:30]])
    found = answers(served(model, hiding), images)
    assert np.array_equal(found, hiding.guard(model).query(images).numpy())
    assert set(found[30:].max(1).tolist()) == {1.0}, "planted outliers get one label each"
    elsewhere = served(model, copy.deepcopy(hiding))
    assert np.array_equal(found[25:40], answers(elsewhere, images[25:40], key=7))
    hard = answers(elsewhere, images, "hard")
    assert np.array_equal(hard.argmax(1), found.argmax(1))


@pytest.mark.parametrize("text", ["outliers:flag_rate=0", "filter:transform=noise,transform.sigma=0"])
def test_of_strength_zero_it_answers_as_the_open_model(model: Classifier, text: str) -> None:
    hiding = read_hiding(text, "digits" if text.startswith("outliers") else None, model.spec, "w")
    images = DIGITS.images[:50]
    for how in (hiding, None):
        assert np.array_equal(answers(served(model, how), images), predict(model, images).numpy())


def test_a_victim_that_is_dropped_takes_its_evasion_along(model: Classifier) -> None:
    service = VictimService(torch.device("cpu"), room=1, hide=Hiding(Filter(), None, "w"))
    service.add("first", model)
    service.add("v", model)
    assert "first" not in service
    assert answers(service, DIGITS.images[:3]).shape == (3, 10)
    assert len(service._hidden) == 1


def test_an_oracle_in_memory_has_no_end(model: Classifier) -> None:
    assert oracle_over(model, "hard").remaining > 10**18


def test_images_of_another_size_are_made_to_fit(model: Classifier, tmp_path: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=large, y_train=np.arange(60) % 10, x_test=large[:5], y_test=np.arange(5))
    hiding = read_hiding("outliers", str(tmp_path / "own.npz"), model.spec, "w")
    assert hiding.pool is not None
    assert hiding.pool.images.shape == (60, 1, 8, 8)
