"""What every registered removal keeps to. They are found in the registry: a new removal needs no edit here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, State
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.removals.base import REMOVALS, Removal, ThiefTask
from simulator.removals.retraining import Retraining
from simulator.service.recording import TransferSet
from simulator.training.predict import predict_labels

#: modes of a removal that the contract is checked for beside its defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "fine_tuning/last": {"depth": "last"},
    "fine_tuning/afresh": {"reinitialise": True, "labels": "own"},
    "fine_tuning/answers": {"data": "transfer", "labels": "answers", "epsilon": 0.1},
    "pruning/layer": {"scope": "layer"},
    "class_features/release": {"reading": "release"},
    "overwriting/triggers": {"how": "triggers", "clean_share": 0.5},
    "distillation/other": {"architecture": "lenet5"},
    "adaptive/kept": {"fresh": False, "other_classes": True},
    "adaptive/answers": {"data": "transfer", "labels": "answers"},
}
NAMES = [*REMOVALS.classes(), *VARIANTS]
#: settings that make a removal quick on a few images
QUICK: dict[str, dict[str, Any]] = {
    "class_features": {"share": 1.0},
    "neural_cleanse": {"share": 1.0, "inversion": {"epochs": 1, "batch_size": 16}},
    "fine_pruning": {"fraction": 0.5},
    "overwriting": {"watermark": {"name": "badnets"}},
    # an untrained target gives few classes, of which no mosaic can be made
    "adaptive": {"scheme": {"name": "badnets"}},
}
#: settings, by removal, with which it changes nothing, where that is not no epoch
NOTHING: dict[str, dict[str, Any]] = {"pruning": {"fraction": 0}, "fine_pruning": {"fraction": 0, "epochs": 0}}
#: removals that always change the model: a grid has points, and a fresh net is another one
ALWAYS = ("quantisation", "distillation")
CLASSES = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target(seed: int = 1) -> Classifier:
    return build("naivenet", channels=1, size=8, classes=CLASSES, generator=generator(seed)).eval()


def removal(name: str, **settings: Any) -> Removal:
    base = name.split("/")[0]
    short: dict[str, Any] = {"epochs": 2} if issubclass(REMOVALS.classes()[base], Retraining) else {}
    return REMOVALS.make({"name": base, **short, **QUICK.get(base, {}), **VARIANTS.get(name, {}), **settings})


def task_of(count: int = 40) -> ThiefTask:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(7))
    labels = torch.arange(count) % CLASSES
    answers = torch.rand(count, CLASSES, generator=generator(8)).softmax(1)
    return ThiefTask(
        CLASSES,
        lambda drawn, name: build(name or "naivenet", channels=1, size=8, classes=CLASSES, generator=drawn),
        Pool("attacker", images, labels, labels=labels),
        TransferSet(images.float() / 255, answers),
    )


def washed(name: str, *, checkpoint: Checkpoint = NO_CHECKPOINT, seed: int = 3, **settings: Any) -> Classifier:
    return removal(name, **settings).remove(target(), task_of(), Context(generator(seed), checkpoint=checkpoint))


def weights(model: Classifier) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def equal(first: Classifier, second: Classifier) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_washed_model_answers_the_same_task_in_evaluation_mode_and_is_made_alike_twice(name: str) -> None:
    before = torch.get_rng_state()
    model = washed(name)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.spec.classes == CLASSES
    assert model.spec.architecture == removal(name).makes("naivenet")
    assert predict_labels(model, task_of().the_pool().images).shape == (40,)
    assert equal(model, washed(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_does_something(name: str) -> None:
    if removal(name).makes("naivenet") == "naivenet":
        assert not equal(washed(name), target())


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[0] not in ALWAYS])
def test_without_strength_the_model_stays_what_it_is_to_the_last_bit(name: str) -> None:
    settings = NOTHING.get(name.split("/")[0], {"epochs": 0})
    assert equal(washed(name, **settings), target())
    assert removal(name, **settings).passes(1000) == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_what_it_says_that_it_needs_and_no_more(name: str) -> None:
    whole, needs = task_of(), removal(name).needs
    bare = ThiefTask(
        CLASSES,
        whole.fresh,
        whole.pool if "pool" in needs else None,
        whole.transfer if "transfer" in needs else None,
    )
    assert equal(removal(name).remove(target(), bare, Context(generator(3))), washed(name))
    if needs:
        nothing = ThiefTask(CLASSES, whole.fresh)
        with pytest.raises(InputError):
            removal(name).remove(target(), nothing, Context(generator(3)))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_setting_and_a_wrong_value_are_one_line(name: str) -> None:
    base = name.split("/")[0]
    with pytest.raises(InputError, match="no such setting") as failure:
        removal(name, stength=1)
    assert "\n" not in str(failure.value)
    field = next(field for field in REMOVALS.classes()[base].model_fields if field != "name")
    with pytest.raises(InputError, match=field) as failure:
        removal(name, **{field: {"a": 1}})
    assert "\n" not in str(failure.value)


class Interrupted(Exception):
    pass


class Memory:
    """A checkpoint that is always due, and ends the work when it has been written so often."""

    def __init__(self, writes: int) -> None:
        self.kept: State | None = None
        self._left = writes

    def load(self) -> State | None:
        return copy.deepcopy(self.kept)

    def due(self) -> bool:
        return True

    def save(self, state: State) -> None:
        self.kept = copy.deepcopy(state)
        self._left -= 1
        if self._left == 0:
            raise Interrupted


@pytest.mark.parametrize(
    "name", [name for name in NAMES if issubclass(REMOVALS.classes()[name.split("/")[0]], Retraining)]
)
def test_one_that_is_interrupted_after_an_epoch_and_goes_on_gives_what_an_unbroken_one_gives(name: str) -> None:
    memory = Memory(1)
    with pytest.raises(Interrupted):
        washed(name, checkpoint=memory)
    assert equal(washed(name, checkpoint=memory), washed(name))
    assert memory.kept is not None
