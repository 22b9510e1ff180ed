import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from simulator.context import Context
from simulator.models import Classifier, build
from simulator.seeding import generator_for, global_randomness
from simulator.training.fit import Hooks, fit
from simulator.training.predict import (
    PREDICT_BATCH,
    choose_device,
    predict,
    predict_features,
    predict_labels,
    predict_logits,
    to_input,
)
from simulator.training.recipe import Loss, Recipe, loss_function, recipe_objective

FAST = Recipe(epochs=3, batch_size=16, learning_rate=0.01)


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """A linearly separable task of three classes: the brightest row of a noisy 4x4 image says which."""
    generator = generator_for("stripes", count)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator)
    images[torch.arange(count), 0, labels] += 120
    return images.to(torch.uint8), labels


def linear() -> Classifier:
    return build("linear", channels=1, size=4, classes=3, generator=generator_for("weights"))


class Dropping(nn.Module):
    """A model with what behaves otherwise in training: dropout and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(16, 3)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.drop(self.norm(images).flatten(1))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def state(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]


# -- the schedule ---------------------------------------------------------------------------------------------------


def test_the_default_schedule_is_halved_every_ten_epochs() -> None:
    recipe = Recipe()
    assert (recipe.optimizer, recipe.learning_rate, recipe.epochs) == ("adam", 1e-3, 100)
    assert [recipe.rate(epoch, 100) for epoch in (0, 9, 10, 19, 20, 99)] == [
        1e-3,
        1e-3,
        5e-4,
        5e-4,
        2.5e-4,
        1e-3 * 0.5**9,
    ]


def test_a_schedule_at_fractions_keeps_its_shape_when_it_is_shortened() -> None:
    recipe = Recipe(learning_rate=1.0, decay_at=(0.5, 0.75), decay_factor=0.1)
    for epochs in (4, 8, 100):
        steps = [round(-math.log10(recipe.rate(epoch, epochs))) for epoch in range(epochs)]
        assert steps == [0] * (epochs // 2) + [1] * (epochs // 4) + [2] * (epochs // 4)


@given(
    epochs=st.integers(1, 60),
    every=st.integers(1, 70),
    factor=st.floats(0.1, 1),
    at=st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=3).map(sorted).map(tuple),
)
def test_the_rate_never_rises_and_has_its_closed_form(
    epochs: int, every: int, factor: float, at: tuple[float, ...]
) -> None:
    recipe = Recipe(learning_rate=0.5, decay_every=every, decay_at=at, decay_factor=factor)
    rates = [recipe.rate(epoch, epochs) for epoch in range(epochs)]
    assert rates == sorted(rates, reverse=True)
    passed = sum(epochs - 1 >= fraction * epochs for fraction in at) if at else (epochs - 1) // every
    assert rates[-1] == pytest.approx(0.5 * factor**passed)


def test_the_optimiser_gets_the_rate_of_its_epoch() -> None:
    """One step of SGD without momentum moves a weight of gradient 1 by exactly the rate."""
    moved = []

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    def note(phase: str, done: int, total: int) -> None:
        moved.append(model.weight.item())

    model = Weight()
    recipe = Recipe(
        epochs=4, batch_size=8, learning_rate=1.0, optimizer="sgd", momentum=0.0, decay_at=(0.5,), decay_factor=0.25
    )
    fit(model, *stripes(8), recipe, Context(generator_for(0), progress=note), objective=lambda m, *_: m.weight)
    assert moved == [-1.0, -2.0, -2.25, -2.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"optimizer": "adamw"},
        {"momentum": 1.0},
        {"decay_factor": 0.0},
        {"weight_decay": -1.0},
        {"lr": 0.1},
    ],
)
def test_impossible_recipes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(wrong)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad", "adamax", "rmsprop"])
def test_every_optimiser_learns_a_separable_set(optimizer: str) -> None:
    recipe = Recipe.model_validate({"epochs": 20, "batch_size": 32, "learning_rate": 0.02, "optimizer": optimizer})
    model = fit(linear(), *stripes(240), recipe, Context(generator_for("fit")))
    images, labels = stripes(300)
    assert not model.training
    assert (predict_labels(model, images) == labels).double().mean() > 0.97


def test_probability_rows_are_targets_too() -> None:
    images, labels = stripes(240)
    soft = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    hard = fit(linear(), images, labels, FAST, Context(generator_for("fit")))
    one_hot = fit(linear(), images, F.one_hot(labels, 3).float(), FAST, Context(generator_for("fit")))
    softened = fit(linear(), images, soft, FAST, Context(generator_for("fit")))
    torch.testing.assert_close(predict(hard, images), predict(one_hot, images))
    assert not torch.allclose(predict(hard, images), predict(softened, images))


@pytest.mark.parametrize("make", [linear, Dropping])
def test_training_depends_on_its_generator_alone(make: Callable[[], nn.Module]) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(state(fit(make(), *stripes(50), FAST, Context(generator_for("fit")))))
    assert runs[0] == runs[1]
    assert state(fit(make(), *stripes(50), FAST, Context(generator_for("other")))) != runs[0]


def test_training_leaves_the_global_generator_as_it_was() -> None:
    model = Dropping()
    before = torch.get_rng_state()
    fit(model, *stripes(50), FAST, Context(generator_for("fit")))
    assert torch.equal(torch.get_rng_state(), before)

    def interrupt(phase: str, done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(model, *stripes(50), FAST, Context(generator_for("fit"), progress=interrupt))
    assert torch.equal(torch.get_rng_state(), before)


def test_uint8_and_the_same_images_as_floats_train_the_same() -> None:
    images, labels = stripes(60)
    one = fit(linear(), images, labels, FAST, Context(generator_for("fit")))
    other = fit(linear(), images.float() / 255, labels, FAST, Context(generator_for("fit")))
    assert state(one) == state(other)


LOSSES: tuple[Loss, ...] = get_args(Loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_labels_or_rows_and_is_least_where_it_should_be(loss: Loss) -> None:
    function, labels = loss_function(loss), torch.tensor([0, 2])
    rows = F.one_hot(labels, 3).float()
    good, bad = rows * 20 - 10, rows.flip(1) * 20 - 10
    assert function(good, labels).shape == ()
    torch.testing.assert_close(function(good, labels), function(good, rows))
    assert function(good, rows) < 1e-3 < function(bad, rows)


def test_losses_by_hand() -> None:
    """Two classes, logits 0: the softmax is one half everywhere, and p is (1, 0)."""
    logits, labels, half = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), 0.5
    by_hand: dict[Loss, float] = {
        "cross_entropy": math.log(2),
        "nll": math.log(2),
        "kl": math.log(2),
        "bce": 2 * math.log(2),
        "mse": 2 * half**2,
        "l1": 2 * half,
        "smooth_l1": 2 * half**2 / 2,
        "hinge": half,  # (1 - 0 + 0) over two classes
    }
    assert set(by_hand) == set(LOSSES)
    for loss, value in by_hand.items():
        assert loss_function(loss)(logits, labels).item() == pytest.approx(value), loss


@pytest.mark.parametrize("changes", [*({"loss": loss} for loss in LOSSES), {"adversarial_epsilon": 0.02}])
def test_every_recipe_learns_a_separable_set(changes: dict[str, object]) -> None:
    recipe = Recipe.model_validate({"epochs": 20, "batch_size": 32, "learning_rate": 0.02} | changes)
    model = fit(linear(), *stripes(240), recipe, Context(generator_for("fit")))
    images, labels = stripes(300)
    assert (predict_labels(model, images) == labels).double().mean() > 0.95


def test_adversarial_examples_are_the_worst_within_their_distance() -> None:
    """Of a linear model the loss at the FGSM example is the largest of all images that near."""
    images, labels = stripes(8)
    inputs, model = images.float() / 255, linear()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    recipe_objective(Recipe(adversarial_epsilon=0.01))(model, inputs, labels)
    clean, worst = seen
    assert torch.equal(clean, inputs)
    assert (worst - inputs).abs().max() <= 0.01 + 1e-6
    assert worst.min() >= 0
    assert worst.max() <= 1
    noise = torch.rand(50, *inputs.shape, generator=generator_for("near")) * 0.02 - 0.01
    highest = max(F.cross_entropy(model((inputs + step).clamp(0, 1)), labels).item() for step in noise)
    assert F.cross_entropy(model(worst), labels).item() >= highest


def test_every_image_is_seen_once_an_epoch_and_a_single_one_left_over_is_skipped() -> None:
    images = torch.arange(33, dtype=torch.uint8).reshape(33, 1, 1, 1)
    seen: list[list[int]] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    def watch(model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
        assert model.training
        values = (batch.flatten() * 255).round().int().tolist()
        assert values == targets.tolist()
        seen.append(values)
        return next(model.parameters()) * 1.0

    phases: list[tuple[str, int, int]] = []
    fit(
        Watching(),
        images,
        torch.arange(33),
        FAST,
        Context(generator_for("fit"), progress=lambda *step: phases.append(step)),
        objective=watch,
        epochs=2,
        phase="again",
    )
    assert [len(batch) for batch in seen] == [16, 16] * 2
    first, second = [*seen[0], *seen[1]], [*seen[2], *seen[3]]
    assert len(set(first)) == len(set(second)) == 32
    assert first != second
    assert phases == [("again", 1, 2), ("again", 2, 2)]


def test_companions_are_learned_beside_the_model() -> None:
    extra = nn.ParameterList([torch.zeros(3)])

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(images) + extra[0], targets)

    fit(linear(), *stripes(50), FAST, Context(generator_for(0)), objective=objective, companions={"extra": extra})
    assert (extra[0] != 0).all()


def test_hooks_stand_around_epochs_and_steps() -> None:
    order: list[str] = []

    @contextmanager
    def note(what: str) -> Iterator[None]:
        order.append(f"{what} begins")
        yield
        order.append(f"{what} ends")

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        order.append(f"loss of {len(images)}")
        return F.cross_entropy(model(images), targets)

    hooks = Hooks(around_epoch=lambda: note("epoch"), around_step=lambda: note("step"), least_batch=1)
    fit(linear(), *stripes(17), FAST, Context(generator_for(0)), objective=objective, epochs=2, hooks=hooks)
    step = ["step begins", "step ends"]
    assert order == 2 * ["epoch begins", "loss of 16", *step, "loss of 1", *step, "epoch ends"]


def test_an_epoch_of_its_own_seeds_dropout_itself() -> None:
    """The draws are those of the epoch's own context, whatever torch's global generator held before."""
    results, drawn = [], []
    for start in (1, 2):
        generator = generator_for("fit")
        drawn.append(generator)
        hooks = Hooks(around_epoch=lambda generator=generator: global_randomness(generator))  # type: ignore[misc]
        torch.manual_seed(start)
        results.append(state(fit(Dropping(), *stripes(50), FAST, Context(generator), hooks=hooks)))
        assert torch.initial_seed() == start
    torch.manual_seed(0)
    # one seed and one order an epoch, and none for the whole
    expected = generator_for("fit")
    for _ in range(FAST.epochs):
        torch.randint(2**62, (), generator=expected)
        torch.randperm(50, generator=expected)
    assert torch.equal(expected.get_state(), drawn[0].get_state())
    assert results[0][-1] == results[1][-1]


# -- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [predict, predict_logits, predict_features, predict_labels])
def test_prediction_does_not_depend_on_the_models_mode_and_keeps_it(function: Callable[..., Tensor]) -> None:
    model, (images, _) = Dropping(), stripes(20)
    buffers = state(model)
    trained = function(model.train(), images)
    assert model.training
    assert torch.equal(function(model.eval(), images), trained)
    assert not model.training
    assert state(model) == buffers, "batch statistics must not move"


def test_predictions_are_probability_rows_of_the_logits() -> None:
    images, _ = stripes(2 * PREDICT_BATCH + 3)
    model = linear()
    rows, logits = predict(model, images), predict_logits(model, images)
    assert (rows.shape, rows.dtype, rows.requires_grad) == ((len(images), 3), torch.float32, False)
    torch.testing.assert_close(rows, logits.softmax(1))
    assert torch.equal(predict_labels(model, images), logits.argmax(1))
    assert torch.equal(predict_logits(model, images.float() / 255), logits)
    torch.testing.assert_close(predict(model, images, batch=7), rows)
    assert predict(model, images[:0]).shape == (0, 3)


def test_inputs_are_floats_in_zero_to_one_and_the_images_stay_as_they_are() -> None:
    images, _ = stripes(4)
    before = images.clone()
    batch = to_input(images, torch.device("cpu"))
    assert torch.equal(batch, before.float() / 255)
    assert torch.equal(images, before)
    floats = images.float() / 255
    assert torch.equal(to_input(floats, torch.device("cpu")), floats)


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
