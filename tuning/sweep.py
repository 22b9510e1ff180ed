"""A sweep from beginning to end: check, search, confirm, recommend."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster import here
from actors.crew import Crew
from actors.layout import Layout
from simulator.errors import InputError, RunFailed, one_line
from simulator.experiment.display import Display
from simulator.experiment.preflight import architectures_fit, labels_fit, load_world, pools_fit, prepare, watermarks_fit
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.world import World
from simulator.files import write_atomically
from simulator.plan.config import check_config
from simulator.plan.tree import make_plan
from tuning.config import SweepConfig, read_sweep
from tuning.halving import Halving
from tuning.loggers import callbacks
from tuning.proposals import Learned, Listed, proposals
from tuning.recommend import Confirmation, Recommendation, recommend
from tuning.records import TrialRecord, record, write_trials
from tuning.space import Setting, applied, check_space, setting_id
from tuning.trial import Trial
from tuning.tuner import Course, Feeder, Rungs, Watch
from tuning.workshop import WorkshopActor, idle

#: seconds between two refreshes of the display
REFRESH = 0.5
#: how often a trial whose process died starts again
ATTEMPTS = 3


def prepare_sweep(config: SweepConfig, data_dir: Path | None = None) -> tuple[World, Listed | Learned]:
    """Loads the images of a sweep and makes its proposals. All that can be checked before anything runs is checked.

    Raises:
        InputError: the space, a data set, a pool or an architecture does not fit.
    """
    everything = config.run_config("holdout")
    variants = list(check_space(config.base, config.space))
    _, world = prepare(everything, data_dir)
    foreign = dict(world.foreign)
    for variant in variants:
        plan = make_plan(variant)
        watermarks_fit(plan, world.dataset)
        architectures_fit(plan, world.dataset)
        labels_fit(plan, world.dataset)
        if not _foreign(variant) <= _foreign(everything):
            foreign |= load_world(variant, plan, data_dir).foreign
        pools_fit(variant, plan, World(world.dataset, foreign))
    return World(world.dataset, foreign), proposals(config)


def _foreign(config: Any) -> set[str]:
    pools = [pool for scenario in make_plan(config).scenarios for stage in scenario.stages for pool in stage.pools]
    return {name for pool in (*pools, config.key_filter.pool) for name in pool.parts}


def create(config: SweepConfig, out: Path | None) -> RunDirectory:
    """Makes a sweep's directory. ``config.yaml`` holds the run configuration of the default setting's trial,
    ``sweep/config.yaml`` that of the sweep.

    Raises:
        InputError: it exists and is not empty, or cannot be written.
    """
    named = check_config({**_plain(config.run_config("search")), "name": config.name})
    directory = RunDirectory.create(named, out)
    write_atomically(directory.path / "sweep" / "config.yaml", config.to_yaml().encode())
    return directory


def resume(path: Path) -> tuple[RunDirectory, SweepConfig]:
    """An earlier sweep's directory and configuration.

    Raises:
        InputError: it is no sweep's directory, or not writable.
    """
    if not (path / "sweep" / "config.yaml").is_file():
        raise InputError(f"{path}: not a sweep's directory (it has no sweep/config.yaml)")
    directory, _ = RunDirectory.resume(path)
    return directory, read_sweep(str(path / "sweep" / "config.yaml"))


def _plain(config: Any) -> dict[str, Any]:
    data: dict[str, Any] = config.model_dump(mode="json")
    return data


class Sweep:
    """One sweep on the connected cluster. :meth:`run` does all work that is not done yet."""

    def __init__(
        self,
        config: SweepConfig,
        found: Listed | Learned,
        world: World,
        directory: RunDirectory,
        display: Display,
        layout: Layout,
    ) -> None:
        self._config, self._directory, self._display = config, directory, display
        self._proposals, self._yaml = found, config.to_yaml()
        concurrent = layout.trainers + layout.attackers if config.concurrent == "auto" else config.concurrent
        halving = Halving(config.rungs(), config.halving.bracket if config.halving else 2**31, found.total)
        self.course = Course(found, halving, concurrent)
        self.records: dict[int, TrialRecord] = {}
        self._crew = Crew.start(config.base, world, directory, layout)
        self._workshop: Any = None
        self._refreshed = 0.0
        self._asked: Any = None

    def run(self) -> Recommendation:
        """Searches, confirms, and writes the table of trials, ``best.yaml`` and the recommendation.

        Raises:
            InputError: no trial ran to its end.
        """
        try:
            self._crew.serve({})
            options: Any = WorkshopActor.options(scheduling_strategy=here())
            self._workshop = options.remote(str(self._directory.path), self._config, self._crew)
            ray.get(self._workshop.open.remote())
            begun = time.monotonic()
            self._search()
            seconds, spans = time.monotonic() - begun, ray.get(self._workshop.spans.remote())
            chosen = recommend(self._config, self._sorted(), self._confirm)
        finally:
            if self._workshop is not None:
                ray.kill(self._workshop)
            self._crew.dismiss()
            self._directory.clear_test()
        chosen = chosen.model_copy(update={"search_seconds": seconds, "idle_seconds": idle(spans)})
        sweep = self._directory.path / "sweep"
        write_atomically(sweep / "recommendation.json", chosen.model_dump_json(indent=2).encode())
        write_atomically(self._directory.path / "best.yaml", self._best(chosen.winner.setting).encode())
        return chosen

    def _best(self, setting: Mapping[str, Any]) -> str:
        """The winner's run configuration for ``exsim run``, with the attacks and seeds that confirmed it."""
        best = _plain(applied(self._config.run_config("holdout"), dict(setting)))
        best |= {"name": f"{self._config.base.name}-best", "controls": self._config.base.controls}
        return f"# the setting that {self._config.name} recommends\n" + check_config(best).to_yaml()

    def _search(self) -> None:
        config, course = self._config, self.course
        trainable = tune.with_parameters(
            Trial,
            workshop=self._workshop,
            stages=tuple(config.stages()),
            objective=config.objective,
            attacks=config.attacks(),
        )
        storage, name = self._storage()
        with _quiet_tune():
            tuner = tune.Tuner(
                tune.with_resources(trainable, tune.PlacementGroupFactory([_a_place_here()])),
                tune_config=tune.TuneConfig(
                    search_alg=Feeder(course), scheduler=Rungs(course), num_samples=-1, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=storage,
                    callbacks=[*callbacks(config.loggers), Watch(self._turn, self._ended)],
                    failure_config=tune.FailureConfig(max_failures=ATTEMPTS),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial has nothing to keep
                    verbose=0,
                ),
            )
            tuner.fit()

    def _storage(self) -> tuple[str, str]:
        """Where Tune writes, and under which name. A foreign place gets a new name at each start."""
        if self._config.storage_path is not None:
            return self._config.storage_path, f"{self._directory.path.name}-{secrets.token_hex(3)}"
        shutil.rmtree(self._directory.path / "sweep" / "tune", ignore_errors=True)  # Tune writes all of it again
        return str(self._directory.path / "sweep"), "tune"

    def _ended(self, number: int) -> None:
        course = self.course
        setting = course.settings[number]
        status = "failed" if number in course.failed else "stopped" if number in course.stopped else "done"
        report = course.reports.get(number, {})
        if status == "failed" and not report.get("error"):  # Tune gave it up without an error of its own
            report = {**report, "error": f"its process died or failed {ATTEMPTS + 1} times: error.txt in sweep/tune"}
        data = record(number, setting_id(setting), setting, report, status)
        costs = course.costs[number]
        data |= {f"{part}_seconds": seconds for part, seconds in asdict(costs).items()}
        data["overhead_seconds"] = costs.overhead
        self.records[number] = found = TrialRecord.model_validate_json(json.dumps(data))
        write_trials(self._directory.path / "sweep" / "trials.parquet", self._sorted(), self._yaml)
        self._display.finished += 1
        if status == "failed":
            self._display.failures += 1
            self._display.note(f"failed: trial {number}, {shown(setting)}: {found.error}", "bold red")

    def _sorted(self) -> list[TrialRecord]:
        return [self.records[number] for number in sorted(self.records)]

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._refreshed < REFRESH:
            return
        self._refreshed = now
        self._look()

    def _look(self) -> None:
        """Refreshes the display. It asks the workshop at one call and takes the answer at a later one, so that Tune's
        loop never waits."""
        if self._asked is None:
            self._asked = self._workshop.glance.remote()
        if not ray.wait([self._asked], timeout=0)[0]:
            return
        asked, self._asked = self._asked, None
        try:
            tasks, rows = ray.get(asked)
        except RayTaskError:  # the board or the ledger restarts; the last picture stays
            return
        except RayActorError as error:
            again = f"exsim sweep --resume {self._directory.path}"
            raise RunFailed(f"the sweep's workshop died; what was measured is kept, go on with: {again}") from error
        for row in rows:
            if row.status == "failed":
                self._display.note(f"failed: {row.attack or 'training'} on {row.victim}: {row.error}", "bold red")
        self._display.replace_all(tasks, f"{len(self.course.stopped)} stopped early")

    def _confirm(self, settings: Mapping[str, Setting]) -> dict[str, Confirmation]:
        """Measures settings on the fresh seeds and with the attacks that the search did not see, side by side."""
        self._display.note(f"confirming on fresh seeds and attacks: {', '.join(settings)}")
        references = {name: self._workshop.confirm.remote(setting) for name, setting in settings.items()}
        while ray.wait(list(references.values()), num_returns=len(references), timeout=REFRESH)[1]:
            self._look()
        found = {}
        for name, reference in references.items():
            try:
                reply = ray.get(reference)
            except RayError as error:
                reply = {"found": [], "error": one_line(error)}
            data = {"setting": settings[name], "found": reply["found"], "error": reply["error"]}
            found[name] = Confirmation.model_validate_json(json.dumps(data))
        return found


def _a_place_here() -> dict[str, float]:
    """The resources of a trial's process. It computes nothing and needs no CPU, but Tune demands that it asks for
    something. So it asks for a little of the resource that every node has under its own name."""
    here_ = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (node,) = (node for node in nodes if node["NodeID"] == here_)
    return {f"node:{node['NodeManagerAddress']}": 0.001}


@contextmanager
def _quiet_tune() -> Any:
    """Keeps Tune from printing tables, from choosing loggers, and from handling Ctrl-C, after which it would call the
    sweep done."""
    wanted = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def shown(setting: Setting) -> str:
    """A setting in one line, e.g. ``margin 2, epochs 10``: fields are named by the last part of their path."""
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in setting.items())
