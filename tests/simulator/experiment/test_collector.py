"""The collector: what stands in the rows of models whose every answer is written down, and that it needs no memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.checkpoint import State
from simulator.data.dataset import Images
from simulator.detectors.base import Detection
from simulator.detectors.prada import PRADA
from simulator.experiment.collector import Collector
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.removal import Washed
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft
from simulator.models import Classifier, build
from simulator.ownership.key import KeySamples
from simulator.plan.config import check_config
from simulator.plan.subjects import Marked, Removed, Stolen, Subject
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row, read_rows
from simulator.removals.base import REMOVALS

STARTED = datetime(2026, 1, 2, tzinfo=UTC)
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": "digits",
    "architecture": "linear",
    "watermarks": ["deeptracer", {"name": "deeptracer", "margin": 2.0}],
    "scenarios": [
        {"attack": "knockoff", "pool": "attacker", "architecture": "lenet5", "labels": "hard", "budget": 30},
        {
            "stages": [
                {"attack": "knockoff", "pool": "attacker", "budget": 20},
                {"attack": "distillation", "pool": "owner", "labels": "hard", "architecture": "naivenet", "budget": 7},
            ]
        },
    ],
}


def numbered(count: int) -> Tensor:
    """Black images ``(count, 1, 8, 8)``, number n with one white pixel, the n-th."""
    return (torch.eye(64, dtype=torch.uint8)[:count] * 255).reshape(count, 1, 8, 8)


def model(labels: list[int]) -> Classifier:
    """Gives image number n its n-th label: one linear layer sees -1 everywhere, and +1 at the white pixel."""
    found = build("linear", channels=1, size=8, classes=10).eval()
    weights = torch.zeros(10, 64)
    weights[labels, torch.arange(len(labels))] = 1
    with torch.no_grad():
        found.head.weight.copy_(weights)
        found.head.bias.copy_(weights.sum(1))
    return found


# ten test images of classes 0 to 9; keys are made of the same ten images and have their own labels
TEST = Images(numbered(10), torch.arange(10))
KEY = KeySamples(numbered(10), torch.full((10,), 4), 10, {"filter": "both"})
OTHER_KEY = KeySamples(numbered(5), torch.full((5,), 7), 10, {"filter": "both"})
BENIGN = model([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])  # accuracy 0.9; key 0.1; other key 0
VICTIM = model([4, 4, 2, 3, 4, 5, 6, 7, 8, 4])  # accuracy 0.7; key 0.4; agreement with benign 0.7
STOLEN = model([4, 4, 4, 3, 4, 5, 6, 7, 7, 7])  # accuracy 0.5; key 0.4; agreement with the victim 0.7, benign 0.5


@dataclass
class Setting:
    collector: Collector
    plan: Plan
    path: Path

    @property
    def victims(self) -> tuple[Marked, ...]:
        return self.plan.victims

    def scenario(self, *, control: bool, stages: int = 1) -> Stolen:
        return next(s for s in self.plan.scenarios if s.control is control and len(s.stages) == stages)

    def keep_benign(self) -> None:
        self.collector.keep(self.plan.benigns[0], TrainedOwner(BENIGN, None, None, None, 1.5, STARTED))

    def victim(self, number: int, key: KeySamples, seconds: float = 2.5, false_trigger: float = 0.25) -> list[Row]:
        """Keeps a victim with this key, and measures it."""
        spec = self.victims[number]
        self.collector.keep(spec, TrainedOwner(VICTIM, key, key, false_trigger, seconds, STARTED))
        return self.collector.measure(spec, [spec])

    def owners(self) -> list[Row]:
        self.keep_benign()
        return self.victim(0, KEY) + self.victim(1, OTHER_KEY, 3.5, 0.5)

    def stolen(self, scenario: Stolen, made: Theft, charged: int) -> list[Row]:
        """Keeps a stolen copy, and measures it with the keys that concern it."""
        self.collector.keep(scenario, made)
        return self.collector.measure(scenario, self.plan.keys_for(scenario), charged)


def setting(path: Path, **changes: Any) -> Setting:
    config = check_config({**CONFIG, **changes})
    return Setting(Collector(RunDirectory(path), config, "digits", TEST), make_plan(config), path)


@pytest.fixture
def tiny(tmp_path: Path) -> Setting:
    return setting(tmp_path)


def theft(queries: int, **others: Any) -> Theft:
    return Theft(STOLEN, queries, 9.0, STARTED, **others)


def test_the_owners_models(tiny: Setting) -> None:
    benign, victim, again, other = tiny.owners()
    assert (benign.role, benign.victim, benign.watermark) == ("benign", "benign", "deeptracer")
    assert benign.scenario_id == again.scenario_id == tiny.plan.benigns[0].id
    assert (benign.accuracy, benign.agreement, benign.wsr, benign.verified) == (0.9, 1.0, 0.1, False)
    assert (benign.false_trigger, benign.seconds, benign.started) == (None, 1.5, STARTED)
    assert (victim.role, victim.victim, victim.scenario_id) == ("victim", tiny.victims[0].id, tiny.victims[0].id)
    assert (victim.accuracy, victim.agreement, victim.wsr, victim.verified) == (0.7, 0.7, 0.4, True)
    assert (victim.false_trigger, victim.seconds, victim.key_samples) == (0.25, 2.5, 10)
    assert victim.p_value == pytest.approx(0.0127952, rel=1e-5)  # P(X >= 4), X ~ B(10, 1/10)
    assert victim.wsr_low is not None
    assert victim.wsr_high is not None
    assert victim.wsr_low < 0.4 < victim.wsr_high
    # the benign model has a row with each key, and the two differ in the watermark's parameters
    assert (again.wsr, again.key_samples) == (0.0, 5)
    assert json.loads(again.watermark_params)["margin"] == json.loads(other.watermark_params)["margin"] == 2.0
    assert {(row.attack, row.labels, row.budget, row.queries) for row in (benign, victim)} == {(None,) * 4}
    assert (benign.parent, victim.parent, again.parent, other.parent) == (None, benign.scenario_id) * 2
    for row in (benign, victim, again, other):
        assert (row.key_filter, row.threshold, row.test) == ("both", 0.2, "wsr")
    assert read_rows(tiny.path) == [benign, again, victim, other]


def test_what_a_theft_is_measured_against(tiny: Setting) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=False)
    (row,) = tiny.stolen(scenario, theft(30), 30)
    assert (row.role, row.status, row.error) == ("stolen", "ok", None)
    assert (row.scenario_id, row.victim, row.parent) == (scenario.id, *[scenario.victim.id] * 2)
    assert (row.key_filter, row.threshold, row.test) == ("both", 0.2, "wsr")
    assert (row.accuracy, row.agreement, row.wsr, row.verified) == (0.5, 0.7, 0.4, True)
    assert (row.attack, row.labels, row.pool, row.stage) == ("knockoff", "hard", "attacker", 1)
    assert (row.architecture, row.budget, row.queries, row.seed) == ("lenet5", 30, 30, 0)
    assert (row.seconds, row.started) == (9.0, STARTED)
    assert row.attack_params is not None
    assert json.loads(row.attack_params) == scenario.stages[0].attack.params()


def test_a_control_is_measured_with_each_key_and_against_the_benign_model(tiny: Setting) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=True)
    rows = tiny.stolen(scenario, theft(30), 30)
    assert [(row.victim, row.parent) for row in rows] == [("benign", tiny.plan.benigns[0].id)] * 2
    assert {row.scenario_id for row in rows} == {scenario.id}
    assert [row.agreement for row in rows] == [0.5] * 2
    assert [(row.wsr, row.key_samples) for row in rows] == [(0.4, 10), (0.0, 5)]
    assert [json.loads(row.watermark_params)["margin"] for row in rows] == [1.0, 2.0]
    assert len({row.identity for row in rows}) == 2


def test_a_theft_in_two_stages(tiny: Setting) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=False, stages=2)
    (row,) = tiny.stolen(scenario, theft(20), 20)
    assert (row.attack, row.labels, row.pool) == ("knockoff+distillation", "soft+hard", "attacker then owner")
    # the copy is what the last stage built; what was paid is the first stage's
    assert (row.stage, row.architecture, row.budget, row.queries) == (2, "naivenet", 20, 20)
    assert row.attack_params is not None
    stages = json.loads(row.attack_params)
    assert [stage["attack"] for stage in stages] == ["knockoff", "distillation"]
    assert [stage["budget"] for stage in stages] == [20, 7]


@pytest.mark.parametrize("control", [True, False])
def test_a_count_that_differs_from_the_ledger_is_a_failure(tiny: Setting, control: bool) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=control)
    rows = tiny.stolen(scenario, theft(29), 30)
    assert len(rows) == len(tiny.plan.keys_for(scenario))
    for row in rows:
        assert (row.status, row.queries) == ("failed", 30)
        assert row.error == "the attacker counts 29 answered images, the ledger charged 30"
        assert (row.accuracy, row.wsr, row.verified) == (None, None, None)


def test_a_failure_is_a_row_of_one_line_and_success_replaces_it(tiny: Setting) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=False)
    keys = tiny.plan.keys_for(scenario)
    (failed,) = tiny.collector.fail(scenario, "out of\nmemory", keys, 12)
    assert (failed.status, failed.error, failed.queries) == ("failed", "out of memory", 12)
    assert (failed.parent, failed.key_filter, failed.threshold) == (scenario.victim.id, None, 0.2)
    assert failed in read_rows(tiny.path)
    (good,) = tiny.stolen(scenario, theft(30), 30)
    assert good.identity == failed.identity
    assert [row for row in read_rows(tiny.path) if row.role == "stolen"] == [good]


def test_a_victim_that_could_not_be_trained_is_a_row(tiny: Setting) -> None:
    (row,) = tiny.collector.fail(tiny.victims[0], "InputError: too many\nsource classes", tiny.victims[:1])
    assert (row.role, row.status, row.error) == ("victim", "failed", "InputError: too many source classes")
    tiny.owners()
    assert all(row.status == "ok" for row in read_rows(tiny.path))


@pytest.mark.parametrize(
    ("tolerance", "rows", "note", "words"),
    [
        (0.3, range(10), "both", []),
        (0.1, range(10), "both", ["0.7000", "0.2000 below", "0.1 allowed", "(margin too large?)"]),
        (0.3, range(10), "surrogate never triggered", ["surrogate never triggered"]),
        (0.3, (2, 3), "both", ["not verified"]),
        (0.1, (2, 3), "both", ["below", "not verified"]),
    ],
)
def test_what_the_owner_is_warned_of(
    tmp_path: Path, tolerance: float, rows: Sequence[int], note: str, words: list[str]
) -> None:
    tiny = setting(tmp_path, accuracy_tolerance=tolerance)
    tiny.keep_benign()
    many = KEY.take(torch.tensor([*rows]).repeat(100), filter=note)
    benign, victim = tiny.victim(0, many)
    assert benign.warning is None
    assert (victim.warning is None) == (not words)
    assert all(word in str(victim.warning) for word in words)
    assert {benign.key_filter, victim.key_filter} == {note if note == "both" else f"both: {note}"}


def test_a_key_of_which_the_filter_left_too_little_is_warned_of(tiny: Setting) -> None:
    _, victim, _, _ = tiny.owners()
    # more than 2 of 10 with a chance of one in ten each: 1 - .9^10 - 10 .1 .9^9 - 45 .01 .9^8 = .0702
    assert victim.warning is not None
    assert "the key has 10 samples" in victim.warning
    assert "a probability of 0.07" in victim.warning


def test_a_scheme_without_a_margin_is_not_told_to_make_it_smaller(tmp_path: Path) -> None:
    tiny = setting(tmp_path, accuracy_tolerance=0.1, watermarks=["badnets"])
    tiny.keep_benign()
    _, victim = tiny.victim(0, KEY)
    assert "harms the task" in str(victim.warning)
    assert "margin" not in str(victim.warning)


@pytest.mark.parametrize(("queries", "alike"), [(5, False), (6, True), (1000, True)])
def test_benign_clients_that_share_most_of_their_images_are_warned_of(
    tmp_path: Path, queries: int, alike: bool
) -> None:
    tiny = setting(tmp_path, detectors=["prada"], benign_clients={"count": 3, "queries": queries})
    _, victim, _, _ = tiny.owners()
    words = f"each benign client asks {min(queries, 10)} of the 10 test images: the 3 clients share"
    assert (words in str(victim.warning)) == alike


@pytest.mark.parametrize(("threshold", "verified"), [(0.39, True), (0.4, False)])
def test_the_threshold_is_the_configurations(tmp_path: Path, threshold: float, verified: bool) -> None:
    tiny = setting(tmp_path, verification={"threshold": threshold})
    victim = tiny.owners()[1]
    assert (victim.threshold, victim.verified) == (threshold, verified)


def test_another_collector_on_the_same_directory_measures_the_same(tiny: Setting) -> None:
    """It may have been killed after it kept a model, or share the run with others: all that it measures is on disk."""
    tiny.owners()
    control, scenario = tiny.scenario(control=True), tiny.scenario(control=False)
    curve = ((10, BENIGN), (20, VICTIM))
    found = (Detection("a", PRADA(), 30, 12, 0.5),)
    rows = tiny.stolen(control, theft(30), 30)
    rows += tiny.stolen(scenario, theft(30, snapshots=curve, detections=found), 30)
    again = setting(tiny.path)
    measured = [
        row
        for subject in (control, scenario)
        for row in again.collector.measure(subject, again.plan.keys_for(subject), 30)
    ]
    times = {"finished"}
    assert [row.model_dump(exclude=times) for row in measured] == [row.model_dump(exclude=times) for row in rows]
    assert len(read_rows(tiny.path)) == 4 + 2 + 3
    assert again.collector.accuracy(tiny.victims[0]) == 0.7
    assert again.collector.accuracy(tiny.plan.benigns[0]) == 0.9


def test_a_curve_is_a_row_for_each_of_its_points_which_knew_no_more_than_it_had_asked(tiny: Setting) -> None:
    tiny.owners()
    scenario = tiny.scenario(control=False)
    found = (Detection("a", PRADA(), 30, 15, 0.5), Detection("b", PRADA(), 30, None, 0.1))
    first, second, last = tiny.stolen(scenario, theft(30, snapshots=((10, BENIGN), (20, VICTIM)), detections=found), 30)
    assert [row.scenario_id for row in (first, second, last)] == [
        f"{scenario.id}-q10",
        f"{scenario.id}-q20",
        scenario.id,
    ]
    assert [(row.budget, row.queries) for row in (first, second, last)] == [(10, 10), (20, 20), (30, 30)]
    assert [(row.accuracy, row.agreement, row.wsr) for row in (first, second, last)] == [
        (0.9, 0.7, 0.1),
        (0.7, 1.0, 0.4),
        (0.5, 0.7, 0.4),
    ]
    # noticed after fifteen images: not at the first point
    assert [row.detected_at for row in (first, second, last)] == [None, 15, 15]
    assert first.detectors == second.detectors == last.detectors
    assert "prada" in str(last.detectors)


def test_what_is_kept_needs_no_checkpoint_any_more(tiny: Setting) -> None:
    half: State = {"epoch": 1}
    directory, scenario = RunDirectory(tiny.path), tiny.scenario(control=False)
    removed = Removed(scenario, REMOVALS.make("pruning"), None)
    models: list[tuple[Subject, Any]] = [
        (tiny.plan.benigns[0], TrainedOwner(BENIGN, None, None, None, 1.5, STARTED)),
        (tiny.victims[0], TrainedOwner(VICTIM, KEY, KEY, 0.25, 2.5, STARTED)),
        (scenario, theft(30)),
        (removed, Washed(STOLEN, 0.5, STARTED)),
    ]
    for subject, made in models:
        checkpoint = directory.checkpoints.checkpoint(subject.id)
        checkpoint.save(half)
        assert checkpoint.load() == half
        tiny.collector.keep(subject, made)
        assert checkpoint.load() is None
        assert directory.has(subject)
