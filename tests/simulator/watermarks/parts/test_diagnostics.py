"""Diagnostics of the coupling loss, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from simulator.checkpoint import pack, unpack
from simulator.watermarks.parts.diagnostics import EVERY, Course, geometry


class Two(nn.Module):
    """Parameters (3, 4) and one that no term knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.other = nn.Parameter(torch.tensor(1.0))


def test_gradients_are_measured_over_all_parameters() -> None:
    model, course = Two(), Course(2)
    # of 2|w|²/2: 2w, of length 10; of the sum of w: (1, 1); of a constant: none
    terms = {"primary": model.weight.square().sum(), "intra": model.weight.sum(), "inter": torch.tensor(3.0)}
    course.note(1, model, terms, 0.25)
    course.note(1, model, {"primary": 3 * terms["primary"], "intra": terms["intra"]}, 0.75)
    found = course.summary()
    assert set(found) == {"phase 2"}
    root = math.sqrt(2)
    wanted = {"primary": 20.0, "watermark": 0.0, "intra": root, "inter": 0.0}
    assert found["phase 2"]["gradient"] == pytest.approx(wanted, rel=1e-3)
    assert found["phase 2"]["share"] == pytest.approx({k: v / (20 + root) for k, v in wanted.items()}, rel=1e-3)
    assert found["phase 2"]["within_margin"] == 0.5
    # the step that follows goes on with the same graph
    terms["primary"].backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [6.0, 8.0]
    assert model.other.grad is None


def test_one_step_in_a_hundred_is_measured_in_each_phase() -> None:
    course = Course(2)
    first = [step for step in range(3 * EVERY) if course.due(0)]
    assert first == [25, 125, 225]
    assert [step for step in range(30) if course.due(1)] == [25]
    assert course.step == 330


def test_notes_stand_in_a_checkpoint() -> None:
    model, course = Two(), Course(2)
    for _ in range(40):
        course.due(0)
    course.note(0, model, {"primary": model.weight.sum()}, 0.5)
    again = Course(2)
    unpack(pack(course=course), course=again)
    assert again.step == 40
    assert again.summary() == course.summary() != {}


def test_distances_between_centroids_and_to_the_own() -> None:
    outputs = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [5.0, 0.0]])
    # centroids (1, 0), (1, 3), (5, 0); of class 3 there is no image
    found = geometry(outputs, torch.tensor([0, 0, 1, 2]), 4)
    assert found == {"least": 3.0, "median": 4.0, "largest": 5.0, "own": 0.5}
