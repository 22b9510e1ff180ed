"""Magnitude pruning: closed forms, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.context import Context
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.removals.base import REMOVALS
from simulator.removals.pruning import prune
from simulator.watermarks.parts.reparametrised import layer_weights


def model(architecture: str = "naivenet") -> Classifier:
    return build(architecture, channels=1, size=8, classes=10, generator=torch.Generator().manual_seed(1)).eval()


def pruned(found: Classifier, **settings: Any) -> Classifier:
    removal = REMOVALS.make({"name": "pruning", **settings})
    return removal.remove(found, None, Context(torch.Generator()))


def after(fraction: float, *weights: Any) -> list[Any]:
    """The weights after pruning, as nested lists."""
    tensors = [torch.tensor(weight) for weight in weights]
    prune(tensors, fraction)
    return [tensor.tolist() for tensor in tensors]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


MATRIX = [[4.0, -3.0, 1.0], [-2.0, 6.0, -5.0]]


@pytest.mark.parametrize(
    ("fraction", "left"),
    [
        (0.0, MATRIX),
        (1 / 6, [[4.0, -3.0, 0.0], [-2.0, 6.0, -5.0]]),
        (0.5, [[4.0, 0.0, 0.0], [0.0, 6.0, -5.0]]),
        (5 / 6, [[0.0, 0.0, 0.0], [0.0, 6.0, 0.0]]),
        (1.0, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        # round(0.4 * 6) = 2 and round(0.05 * 6) = 0
        (0.4, [[4.0, -3.0, 0.0], [0.0, 6.0, -5.0]]),
        (0.05, MATRIX),
    ],
)
def test_a_known_matrix(fraction: float, left: list[list[float]]) -> None:
    assert after(fraction, MATRIX) == [left]


def test_the_example_of_the_docstring() -> None:
    assert after(0.5, [1.0, -5.0, 3.0, -2.0]) == [[0.0, -5.0, 3.0, 0.0]]


def test_of_equal_magnitudes_the_first_go() -> None:
    assert after(0.5, [2.0, -2.0, 2.0, -2.0]) == [[0.0, 0.0, 2.0, -2.0]]
    assert after(0.5, [-2.0, 2.0], [2.0, -2.0]) == [[0.0, 0.0], [2.0, -2.0]]
    assert after(0.75, [3.0, 2.0], [2.0, 2.0]) == [[3.0, 0.0], [0.0, 0.0]]


def test_the_smallest_of_all_layers_or_of_each() -> None:
    small, large = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    assert after(0.5, small, large) == [[0.0] * 4, large]
    assert [after(0.5, one)[0][:2] for one in (small, large)] == [[0.0, 0.0]] * 2


def test_the_scope_is_that_of_the_setting() -> None:
    weights = {name: value.detach().clone() for name, value in layer_weights(model()).items()}
    for name, value in layer_weights(pruned(model(), fraction=0.3, scope="layer")).items():
        cut = weights[name].abs().flatten().sort().values[round(0.3 * value.numel()) - 1]
        assert torch.equal(value, torch.where(weights[name].abs() <= cut, 0, weights[name]))
    everything = torch.cat([value.abs().flatten() for value in weights.values()])
    cut = everything.sort().values[round(0.3 * len(everything)) - 1]
    found = layer_weights(pruned(model(), fraction=0.3))
    for name, value in found.items():
        assert torch.equal(value, torch.where(weights[name].abs() <= cut, 0, weights[name]))
    # the layers have weights of different sizes, so the two are not the same
    shares = [float((value == 0).double().mean()) for value in found.values()]
    assert max(shares) - min(shares) > 0.1


FLOATS = st.floats(-4, 4, width=32, allow_subnormal=False).map(lambda value: round(value, 1))


@given(
    weights=st.lists(st.lists(FLOATS, min_size=1, max_size=12), min_size=1, max_size=4),
    fraction=st.floats(0, 1),
)
def test_as_many_as_are_said_go_and_no_larger_one_than_any_that_stays(
    weights: list[list[float]], fraction: float
) -> None:
    before = torch.tensor([value for weight in weights for value in weight])
    found = torch.tensor([value for weight in after(fraction, *weights) for value in weight])
    count = round(fraction * len(before))
    gone = torch.zeros(len(before), dtype=torch.bool)
    by_size = sorted(range(len(before)), key=lambda at: (abs(float(before[at])), at))  # the first of equals go
    gone[by_size[:count]] = True
    assert bits(found) == bits(torch.where(gone, 0.0, before))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("architecture", ["linear", "naivenet", "resnet18"])
def test_none_is_all_as_it_was_to_the_last_bit(architecture: str, scope: str) -> None:
    before = model(architecture).state_dict()
    for name, value in pruned(model(architecture), fraction=0.0, scope=scope).state_dict().items():
        assert bits(value) == bits(before[name])


def test_none_leaves_even_what_is_no_number() -> None:
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45, -1.0])
    before = bits(odd)
    prune([odd], 0.0)
    assert bits(odd) == before


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("architecture", ["linear", "naivenet", "resnet18"])
def test_all_leaves_biases_and_normalisation_alone(architecture: str, scope: str) -> None:
    before, found = model(architecture), pruned(model(architecture), fraction=1.0, scope=scope)
    weights = layer_weights(before)
    assert weights
    for name, value in found.state_dict().items():
        assert bits(value) == bits(torch.zeros_like(value) if name in weights else before.state_dict()[name])
    # nothing of the image is left in the answer
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    answers = found(images)
    assert torch.equal(answers, answers[:1].expand(6, -1))
    assert torch.equal(answers[0], found.head.bias)


def test_all_is_zero_whatever_it_was() -> None:
    odd = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan"), -1.0])
    prune([odd], 1.0)
    assert bits(odd) == bits(torch.zeros(5))


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_pruning_what_is_pruned_goes_on_from_there(fraction: float) -> None:
    """The zeros of before are the smallest of after: more of them go only where there are more to go."""
    once = pruned(model(), fraction=0.5)
    twice = pruned(pruned(model(), fraction=0.5), fraction=fraction)
    for name, value in twice.state_dict().items():
        wanted = once if fraction < 0.5 else pruned(model(), fraction=fraction)
        assert torch.equal(value, wanted.state_dict()[name])


def test_it_trains_on_nothing() -> None:
    assert REMOVALS.make("pruning").passes(10_000) == 0
    assert REMOVALS.make("pruning").needs == frozenset()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": -0.1}, "fraction: Input should be greater than or equal to 0, found -0.1"),
        ({"fraction": 1.01}, "fraction: Input should be less than or equal to 1, found 1.01"),
        ({"fraction": float("nan")}, "fraction: Input should be a finite number"),
        ({"fraction": "half"}, "fraction: Input should be a valid number, found 'half'"),
        ({"fraction": None}, "fraction: Input should be a valid number, found None"),
        ({"scope": "model"}, "scope: Input should be 'global' or 'layer', found 'model'"),
        ({"share": 0.5}, "share: no such setting; 'share' is not one of name, fraction, scope"),
    ],
)
def test_a_bad_setting_is_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        REMOVALS.make({"name": "pruning", **settings})
    assert str(caught.value).startswith("pruning: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
