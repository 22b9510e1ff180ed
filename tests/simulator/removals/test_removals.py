"""Closed forms of the removals: what one of them does to a model that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.context import Context
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.removals.base import REMOVALS, ThiefTask
from simulator.removals.class_features import relabelled
from simulator.removals.fine_pruning import mean_activity, unit_layers
from simulator.removals.neural_cleanse import outliers
from simulator.removals.pruning import prune
from simulator.removals.quantisation import quantised
from simulator.removals.transfer_learning import TransferLearning
from simulator.service.recording import TransferSet
from simulator.training.predict import predict_labels, predict_logits

CLASSES = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(architecture: str = "naivenet", seed: int = 1) -> Classifier:
    return build(architecture, channels=1, size=8, classes=CLASSES, generator=generator(seed)).eval()


def images(count: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(5))


def task(**settings: Any) -> ThiefTask:
    labels = torch.arange(32) % CLASSES
    held = {"pool": Pool("attacker", images(), labels, labels=labels), **settings}
    return ThiefTask(CLASSES, lambda _, name: model(name or "naivenet", 9), **held)


def washed(target: Classifier, name: str, **settings: Any) -> Classifier:
    return REMOVALS.make({"name": name, **settings}).remove(target, task(), Context(generator(3)))


# -- quantisation ------------------------------------------------------------------------------------------------------


def test_a_value_between_two_points_of_the_grid_becomes_their_middle_and_one_on_a_point_stays() -> None:
    values = torch.tensor([0.0, 0.2, 1.0, 1.999, 2.0, 2.9, 3.0])
    assert quantised(values, 2).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_no_value_moves_by_more_than_half_a_step_and_there_are_no_more_values_than_points_and_cells(bits: int) -> None:
    values = torch.randn(4000, generator=generator())
    result, step = quantised(values, bits), (values.max() - values.min()) / (2**bits - 1)
    assert (result - values).abs().max() <= step / 2 * (1 + 1e-3)
    assert len(result.unique()) <= 2 * 2**bits - 1
    assert (result.min(), result.max()) == (values.min(), values.max())


def test_values_that_are_all_equal_stay() -> None:
    assert quantised(torch.full((3,), 0.7), 4).tolist() == torch.full((3,), 0.7).tolist()


def test_one_bit_makes_the_answers_constant() -> None:
    answers = predict_labels(washed(model("vgglike"), "quantisation", bits=1), images())
    assert len(answers.unique()) == 1


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_the_smallest_of_a_known_matrix_go() -> None:
    first, second = torch.tensor([[0.1, -0.5], [0.3, -0.2]]), torch.tensor([5.0, -0.05])
    prune([first, second], 0.5)
    assert (first.tolist(), second.tolist()) == (
        torch.tensor([[0.0, -0.5], [0.3, 0.0]]).tolist(),
        torch.tensor([5.0, 0.0]).tolist(),
    )


def test_a_layer_of_small_weights_goes_first_where_all_layers_are_one_and_not_where_each_is_its_own() -> None:
    def shares(scope: str) -> list[float]:
        target = model()
        with torch.no_grad():
            target.head.weight.mul_(1e-6)
        result = washed(target, "pruning", fraction=0.3, scope=scope)
        found = [part.weight for part in result.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
        return [round(float((weight == 0).double().mean()), 2) for weight in found]

    assert shares("global")[-1] == 1.0
    assert shares("layer") == pytest.approx([0.3] * len(shares("layer")), abs=0.03)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reinitialise", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_where_the_last_layer_learns_alone_the_body_is_untouched_to_the_bit(reinitialise: bool, epsilon: float) -> None:
    target, before = model("resnet18"), model("resnet18")  # its normalisation has statistics
    settings = {"depth": "last", "reinitialise": reinitialise, "epsilon": epsilon}
    result = washed(target, "fine_tuning", epochs=2, **settings)
    for (name, now), then in zip(result.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then) != name.startswith("head."), name


def test_all_layers_learn_otherwise() -> None:
    result = washed(model(), "fine_tuning", epochs=2)
    changed = [not torch.equal(a, b) for a, b in zip(result.parameters(), model().parameters(), strict=True)]
    assert all(changed)


def test_a_fresh_last_layer_is_another_than_the_old_one() -> None:
    slow = {"epochs": 1, "training": {"learning_rate": 1e-12}}
    kept, fresh = (washed(model(), "fine_tuning", reinitialise=r, **slow) for r in (False, True))
    assert torch.allclose(kept.head.weight, model().head.weight, atol=1e-6)
    assert not torch.allclose(fresh.head.weight, model().head.weight, atol=1e-3)


def test_the_labels_are_the_true_ones_the_recorded_answers_or_its_own() -> None:
    target = model()
    answers = torch.rand(32, CLASSES, generator=generator(2)).softmax(1)
    held = task(transfer=TransferSet(images(), answers))

    def material(**settings: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = REMOVALS.make({"name": "fine_tuning", **settings}).material(  # type: ignore[attr-defined]
            target, held, generator(3)
        )
        return found

    order = torch.randperm(32, generator=generator(3))
    assert torch.equal(material()[1], (torch.arange(32) % CLASSES)[order])
    asked, rows = material(data="transfer", labels="answers")
    assert torch.equal(rows, answers[order])
    assert torch.equal(asked, images()[order])
    assert torch.equal(material(labels="own")[1], predict_labels(target, images())[order])
    assert len(material(share=0.25)[0]) == 8


@pytest.mark.parametrize(("data", "labels"), [("pool", "answers"), ("transfer", "true")])
def test_labels_that_nobody_has_are_refused(data: str, labels: str) -> None:
    with pytest.raises(InputError, match=f"there are no '{labels}' labels of data '{data}'"):
        REMOVALS.make({"name": "fine_tuning", "data": data, "labels": labels})


# -- fine-pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["naivenet", "resnet18"])
def test_the_silenced_channels_are_the_least_active_and_stay_silent(architecture: str) -> None:
    before = model(architecture)
    activity = mean_activity(before, unit_layers(before, -1)[1], images())
    result = washed(model(architecture), "fine_pruning", fraction=0.5, epochs=2, labels="true")
    convolution, outermost = unit_layers(result, -1)
    silent = {at for at, kernel in enumerate(convolution.weight) if not kernel.any()}
    assert silent == set(activity.argsort(stable=True)[: len(activity) // 2].tolist())
    after = mean_activity(result, outermost, images())
    assert not after[sorted(silent)].any()


def test_a_layer_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="layer: -9, but naivenet has"):
        washed(model(), "fine_pruning", layer=-9)


# -- class features ----------------------------------------------------------------------------------------------------


def test_a_relabelled_image_never_keeps_its_class_and_gets_every_other_one_zero_too() -> None:
    labels = torch.arange(CLASSES).repeat(500)
    for first in (0, 1):
        found = relabelled(labels, CLASSES, generator(), first=first)
        assert not (found == labels).any()
        for label in range(CLASSES):
            allowed = sorted(set(range(first, CLASSES)) - {label})
            counts = found[labels == label].bincount(minlength=CLASSES)
            assert counts.nonzero().flatten().tolist() == allowed
            assert (counts[allowed] - 500 / len(allowed)).abs().max() < 90  # over four deviations


def test_the_new_last_layer_is_driven_away_from_the_old_one() -> None:
    def overlap(alpha: float) -> float:
        result = washed(model(), "class_features", alpha=alpha, share=1.0, samples=8)
        return (result.head.weight * model().head.weight).sum().item()

    assert overlap(0.1) < overlap(0.0)


# -- Neural Cleanse ----------------------------------------------------------------------------------------------------


def test_a_size_far_below_the_others_is_an_outlier_and_where_none_is_the_smallest_counts() -> None:
    assert outliers(torch.tensor([20.0, 21.0, 3.0, 22.0, 19.0, 60.0]), 2.0) == [2]
    assert outliers(torch.tensor([20.0, 21.0, 19.5, 20.5]), 2.0) == [2]


# -- distillation ------------------------------------------------------------------------------------------------------


def test_a_fresh_net_comes_to_answer_as_the_model_does() -> None:
    with torch.no_grad():
        target = model("linear")
        target.head.weight.mul_(5)
    whole = task()
    student = ThiefTask(CLASSES, lambda *_: model("linear", 9), whole.pool)
    removal = REMOVALS.make(
        {"name": "distillation", "epochs": 200, "training": {"learning_rate": 0.05, "decay_every": 100}}
    )
    answers = predict_logits(target, images()).softmax(1)
    result = removal.remove(target, student, Context(generator(3)))
    assert (predict_logits(result, images()).softmax(1) - answers).abs().max() < 0.05


# -- overwriting and transfer learning ---------------------------------------------------------------------------------


def test_triggers_alone_teach_their_label_and_clean_images_keep_the_rest() -> None:
    def answers(clean_share: float) -> Tensor:
        strong = {"training": {"learning_rate": 1e-2, "batch_size": 16}, "epochs": 20}
        settings = {"how": "triggers", "clean_share": clean_share, **strong}
        return predict_labels(washed(model(), "overwriting", **settings), images())

    assert len(answers(0.0).unique()) == 1
    assert len(answers(0.9).unique()) > 1


def test_a_foreign_set_is_learned_with_its_own_classes_as_many_as_the_task_has() -> None:
    groups = torch.arange(60) % 6
    pool = Pool("foreign", images(60), groups)
    found, labels = TransferLearning().material(model(), ThiefTask(CLASSES, lambda *_: model(), pool), generator())
    assert labels.unique().tolist() == list(range(CLASSES))
    assert len(found) == len(labels) == 40
