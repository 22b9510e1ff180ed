"""What Tune's hooks decide, without Tune: where a trial's seconds go, and who waits for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tuning import tuner
from tuning.halving import Halving
from tuning.proposals import Listed
from tuning.trial import NEXT
from tuning.tuner import Costs, Course, Feeder, Rungs


def course(settings: int, *, concurrent: int = 4, bracket: int = 2) -> Course:
    halving = Halving({"victim": 0.5}, bracket, settings)
    return Course(Listed([{"x": number} for number in range(settings)]), halving, concurrent)


def report(stage: str, value: float, began: float = 0.0, ended: float = 0.0, busy: float = 0.0) -> dict[str, Any]:
    seconds = {"work_seconds": 2 * busy, "wait_seconds": busy / 2, "busy_seconds": busy}
    return {"stage": stage, "value": value, "training_iteration": 2, "began": began, "ended": ended, **seconds}


class Controller:
    """Tune's, as far as a scheduler needs it."""

    def __init__(self) -> None:
        self.paused: list[tuple[int, bool]] = []
        self.stopped: list[int] = []

    def pause_trial(self, trial: Any, should_checkpoint: bool) -> None:
        trial.status = "PAUSED"
        self.paused.append((trial.config["number"], should_checkpoint))

    def stop_trial(self, trial: Any) -> None:
        trial.status = "TERMINATED"
        self.stopped.append(trial.config["number"])


def started(feeder: Feeder, rungs: Rungs, controller: Controller, count: int) -> list[Any]:
    """Trials as Tune makes them of what the searcher suggests."""
    trials = []
    for number in range(count):
        trial = SimpleNamespace(config=feeder.suggest(str(number)), status="RUNNING", placement_group_factory=None)
        trial.set_config = lambda config, of=trial: setattr(of, "config", config)
        rungs.on_trial_add(controller, trial)
        trials.append(trial)
    return trials


def test_the_parts_of_a_trials_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tuner, "time", SimpleNamespace(time=lambda: now[0]))
    found = course(1)
    found.enter(0)
    found.tell(0, report("phase 1", 0.0, began=103, ended=110, busy=5))  # a process took 3 s to come
    found.tell(0, report("victim", 0.0, began=111, ended=121, busy=10))  # 1 s until the next stage
    now[0] = 121.5
    found.leave(0)
    found.leave(0)  # it waits at a rung, which costs nothing
    now[0] = 500.0
    found.enter(0)
    found.tell(0, report("attack 1", 0.0, began=500.25, ended=501.25, busy=1))
    now[0] = 501.25
    found.leave(0)
    assert found.costs[0] == Costs(work=32, wait=8, busy=16, start=3.25, call=2, report=1.5)
    assert found.costs[0].overhead == 3.25 + 2 + 1.5


def test_a_trial_waits_without_a_checkpoint_or_a_process_and_goes_on_with_its_next_stage() -> None:
    shared, controller = course(2, concurrent=1), Controller()
    feeder, rungs = Feeder(shared), Rungs(shared)
    (first,) = started(feeder, rungs, controller, 1)
    assert feeder.suggest("1") is None, "there is room for one"
    assert rungs.on_trial_result(controller, first, report("victim", 0.9)) == Rungs.NOOP
    assert first.config[NEXT] == 2
    assert rungs.choose_trial_to_run(controller) is None
    assert controller.paused == [(0, False)]
    second = SimpleNamespace(config=feeder.suggest("1"), status="RUNNING", placement_group_factory=None)
    rungs.on_trial_add(controller, second)
    assert rungs.on_trial_result(controller, second, report("victim", 0.1)) == Rungs.STOP
    feeder.on_trial_complete("1")
    assert rungs.choose_trial_to_run(controller) is first
    assert shared.stopped == {1}


def test_a_trial_that_waits_keeps_its_process_while_another_starts() -> None:
    shared, controller = course(2, concurrent=2), Controller()
    feeder, rungs = Feeder(shared), Rungs(shared)
    first, second = started(feeder, rungs, controller, 2)
    second.status = "PENDING"
    assert rungs.on_trial_result(controller, first, report("victim", 0.9)) == Rungs.NOOP
    rungs.choose_trial_to_run(controller)
    assert controller.paused == []
    assert not shared.room, "its process is not free"
    second.status = "RUNNING"
    rungs.choose_trial_to_run(controller)
    assert controller.paused == [(0, False)]
    assert shared.room


def test_a_trial_whose_process_dies_while_it_waits_is_not_let_past_its_rung() -> None:
    shared, controller = course(3, bracket=3), Controller()
    feeder, rungs = Feeder(shared), Rungs(shared)
    first, second, third = started(feeder, rungs, controller, 3)
    third.status = "PENDING"
    assert rungs.on_trial_result(controller, first, report("victim", 0.9)) == Rungs.NOOP
    assert rungs.on_trial_result(controller, second, report("victim", 0.1)) == Rungs.NOOP
    assert shared.held == {0, 1}
    # Tune has started the first again, which begins the stage after its rung; the second it gave up
    assert rungs.on_trial_result(controller, first, report("attack 1", 0.9)) == Rungs.NOOP
    assert shared.reports[0]["stage"] == "victim"
    rungs.on_trial_error(controller, second)
    second.status = "ERROR"
    feeder.on_trial_complete("1", error=True)
    third.status = "RUNNING"
    assert rungs.choose_trial_to_run(controller) is None
    assert controller.paused == [(0, False)]
    assert rungs.on_trial_result(controller, third, report("victim", 0.5)) == Rungs.STOP
    feeder.on_trial_complete("2")
    assert rungs.choose_trial_to_run(controller) is first


def test_a_bracket_waits_for_a_trial_whose_process_died_until_tune_gives_it_up() -> None:
    shared, controller = course(3, bracket=3), Controller()
    feeder, rungs = Feeder(shared), Rungs(shared)
    trials = started(feeder, rungs, controller, 3)
    for number, value in ((0, 0.2), (1, 0.4)):
        assert rungs.on_trial_result(controller, trials[number], report("victim", value)) == Rungs.NOOP
    rungs.on_trial_error(controller, trials[2])  # Tune starts it again
    assert rungs.choose_trial_to_run(controller) is None
    assert controller.stopped == []
    rungs.on_trial_error(controller, trials[2])
    feeder.on_trial_complete("2", error=True)
    assert rungs.choose_trial_to_run(controller) is trials[1]
    assert controller.stopped == [0]
    assert shared.failed == {2}


def test_a_trial_that_was_started_again_is_judged_as_any_other() -> None:
    shared, controller = course(2), Controller()
    feeder, rungs = Feeder(shared), Rungs(shared)
    trials = started(feeder, rungs, controller, 2)
    rungs.on_trial_error(controller, trials[1])
    rungs.on_trial_add(controller, trials[1])
    assert rungs.on_trial_result(controller, trials[0], report("victim", 0.2)) == Rungs.NOOP
    assert rungs.on_trial_result(controller, trials[1], report("victim", 0.7)) == Rungs.CONTINUE
    assert rungs.choose_trial_to_run(controller) is None
    assert controller.stopped == [0]
