"""Tune's hooks: the searcher that hands it settings, the scheduler that halves, and the callback for the display.

Tune runs the trials, keeps and restarts their processes, and writes the logs. :mod:`tuning.proposals` decides which
settings are tried, :mod:`tuning.halving` which of them go on. Their answers depend on results alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tuning.halving import Decision, Halving
from tuning.proposals import Learned, Listed
from tuning.space import setting_id
from tuning.trial import NEXT

log = logging.getLogger("ray.tune.exsim")


@dataclass
class Costs:
    """Where a trial's seconds went while it had, or waited for, a process. The last three are Tune's costs.

    Attributes:
        work: its work in a worker's hands, summed over the seeds.
        wait: its work waiting for a worker, summed over the seeds.
        busy: time in which any of its work was done or waited for a worker.
        start: from its permission to start or go on until a process had it.
        call: in its process and in the workshop, without the busy seconds.
        report: from a stage's end until Tune had its result and began the next stage or ended the trial.
    """

    work: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    start: float = 0.0
    call: float = 0.0
    report: float = 0.0

    @property
    def overhead(self) -> float:
        """The seconds in which it neither worked nor waited for a worker."""
        return self.start + self.call + self.report


class Course:
    """State that the hooks share: which trials are under way, and what each has reported.

    Attributes:
        active: numbers of the trials under way. The others wait at a rung or have ended.
        held: trials that wait at a rung and still hold a process (see :class:`Rungs`).
        costs: where the seconds of every trial went.
        reports: the last report of every trial.
        stopped: trials that a rung has ended.
        failed: trials that ended with an error.
        lost: trials that Tune gave up, and of which the halving has not been told yet.
    """

    def __init__(self, proposals: Listed | Learned, halving: Halving, concurrent: int) -> None:
        self.proposals, self.halving, self.concurrent = proposals, halving, concurrent
        self.settings: list[dict[str, Any]] = []
        self.active: set[int] = set()
        self.held: set[int] = set()
        self.costs: dict[int, Costs] = {}
        self.lost: list[int] = []
        self._since: dict[int, float] = {}
        self._under_way: set[int] = set()
        self.reports: dict[int, dict[str, Any]] = {}
        self.ended: set[int] = set()
        self.stopped: set[int] = set()
        self.failed: set[int] = set()

    @property
    def room(self) -> bool:
        """Whether another trial may start or go on."""
        return len(self.active) + len(self.held) < self.concurrent

    def enter(self, number: int) -> None:
        """Notes that a trial is to get a process."""
        self.active.add(number)
        self.costs.setdefault(number, Costs())
        self._since[number] = time.time()
        self._under_way.discard(number)

    def tell(self, number: int, report: dict[str, Any]) -> None:
        """Takes a trial's report of a stage. Its times compare with ours, because its process runs on this machine."""
        self.reports[number], costs = report, self.costs[number]
        before = max(0.0, report["began"] - self._since[number])
        if number in self._under_way:
            costs.report += before
        else:
            costs.start += before
        self._under_way.add(number)
        costs.work += report["work_seconds"]
        costs.wait += report["wait_seconds"]
        costs.busy += report["busy_seconds"]
        costs.call += max(0.0, report["ended"] - report["began"] - report["busy_seconds"])
        self._since[number] = report["ended"]

    def leave(self, number: int) -> None:
        """Notes that a trial is no longer under way: it has ended, or waits at a rung."""
        self.held.discard(number)
        if number in self.active:
            self.active.remove(number)
            self.costs[number].report += max(0.0, time.time() - self._since[number])


class Feeder(Searcher):
    """Gives Tune the next setting when there is room for it."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next setting with its number and id, None if no trial can start now, FINISHED after the last has
        ended."""
        course, number = self._course, len(self._course.settings)
        if len(course.ended) == course.proposals.total:
            return Searcher.FINISHED
        if number == course.proposals.total or not course.room or not course.proposals.ready(number):
            return None
        setting = course.proposals.propose(number)
        course.settings.append(setting)
        course.enter(number)
        self._numbers[trial_id] = number
        return {"number": number, "trial": setting_id(setting), "setting": setting, NEXT: 0}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Tells the proposals the result of a trial that ran to its end, was stopped or failed."""
        course, number = self._course, self._numbers[trial_id]
        course.leave(number)
        course.ended.add(number)
        if error:
            course.failed.add(number)
            course.lost.append(number)
        course.proposals.learn(number, None if number in course.failed else course.reports[number])

    def save(self, checkpoint_path: str) -> None:
        """Does nothing, because a restarted sweep proposes the same settings again."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing."""


class Rungs(TrialScheduler):
    """Pauses a trial at a rung until its bracket has arrived, then lets the best go on.

    A waiting trial keeps its process while Tune is starting one. If it gave its process back, Tune would use that for
    the trial with the new process and kill the new one. Sweeps whose stages are shorter than a start would then start
    processes all the time.
    """

    _supports_buffered_results = False

    def __init__(self, course: Course) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._course = course
        self._trials: dict[int, Any] = {}
        self._waiting: list[int] = []  # may go on once there is room
        self._doomed: set[int] = set()
        self._cache_is_wide = False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """There are no properties to set."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Takes note of the trial."""
        self._trials[trial.config["number"]] = trial
        if not self._cache_is_wide:
            self._cache_is_wide = True
            _keep_processes(tune_controller, trial, self._course.concurrent)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides on the trial, and on those that have waited for it."""
        number, course = trial.config["number"], self._course
        if number in course.held:  # its process died while it waited, and the new one ran a stage too early
            return self.NOOP
        course.tell(number, dict(result))
        decision = course.halving.arrive(number, result["stage"], result["value"])
        self._take(decision, number)
        if number in decision.stop:
            course.stopped.add(number)
            return self.STOP
        if number in decision.go:
            return self.CONTINUE
        trial.set_config({**trial.config, NEXT: result["training_iteration"]})
        course.leave(number)
        course.held.add(number)
        return self.NOOP

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has run to its end, or was stopped."""
        number = trial.config["number"]
        if number not in self._course.stopped:  # a stopped trial's result was told before the rung decided
            self._course.tell(number, dict(result))
        self._course.leave(number)
        if result.get("error"):
            self._course.failed.add(number)
        self._take(self._course.halving.end(number), number)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing when a trial's process dies, because Tune may start it again without a word. Trials that wait
        for it go on waiting until Tune tells the searcher that it gives the trial up."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing when a waiting trial is stopped."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Stops the waiting trials that were decided against, and returns the next one that may go on."""
        while self._course.lost:
            self._take(self._course.halving.end(self._course.lost.pop()), None)
        if not any(trial.status == "PENDING" for trial in self._trials.values()):
            for number in sorted(self._course.held):
                # No checkpoint is needed: a trial knows its next stage alone. A save would keep the process busy when
                # another trial already has room, and that trial would start a process of its own.
                tune_controller.pause_trial(self._trials[number], should_checkpoint=False)
                self._course.held.discard(number)
        for number in sorted(self._doomed):
            if self._trials[number].status == "PAUSED":
                self._doomed.discard(number)
                self._course.stopped.add(number)
                tune_controller.stop_trial(self._trials[number])
        for number in self._waiting if self._course.room else ():
            if self._trials[number].status == "PAUSED":
                self._waiting.remove(number)
                self._course.enter(number)
                return self._trials[number]
        return None

    def debug_string(self) -> str:
        """One line for Tune's own reports."""
        return f"synchronous halving: {len(self._course.stopped)} stopped"

    def _take(self, decision: Decision, current: int | None) -> None:
        self._waiting += [number for number in decision.go if number != current]
        self._waiting.sort()
        self._doomed |= {number for number in decision.stop if number != current}


def _keep_processes(tune_controller: Any, trial: Any, count: int) -> None:
    """Makes Tune keep as many idle processes as trials run at once. By default it keeps one and starts the others anew,
    a second or two each. Tune has no public setting for it. If this fails, a sweep is only slower."""
    try:
        tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=count)
    except (AttributeError, TypeError) as error:
        log.warning("trials' processes are not kept: %s", error)


class Watch(tune.Callback):
    """Tune's callback: calls ``turn`` at every turn of Tune's loop, and ``ended`` when a trial has ended."""

    def __init__(self, turn: Callable[[], None], ended: Callable[[int], None]) -> None:
        self._turn, self._ended = turn, ended

    def __getstate__(self) -> dict[str, Any]:
        """Saves nothing. Tune saves its callbacks for its own restart, which a sweep never uses."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called at each turn of Tune's loop."""
        self._turn()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has run to its end, or was stopped."""
        self._ended(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial has failed."""
        self._ended(trial.config["number"])
