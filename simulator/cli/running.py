"""``exsim run``: checks everything that can be checked beforehand, runs, reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from simulator.cli import terminal
from simulator.errors import InputError, RunFailed

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.experiment.display import Display
    from simulator.experiment.rundir import RunDirectory
    from simulator.experiment.world import World
    from simulator.plan.config import RunConfig
    from simulator.plan.tree import Plan


@dataclass(frozen=True)
class Place:
    """Where a run computes: in this process, or on the Ray cluster at ``address`` (None: a local cluster). The run
    waits ``wait`` seconds at most for the cluster to grow."""

    local: bool
    address: str | None
    wait: float


def run_new(config: RunConfig, data: Path | None, out: Path | None, place: Place) -> int:
    """Runs a configuration in a new directory; returns the exit status.

    Raises:
        InputError: bad input, in one line. The directory is removed, unless it holds a model or a row.
    """
    from simulator.experiment.rundir import RunDirectory

    directory = RunDirectory.create(config, out)
    with directory.held():
        try:
            return _run_in(directory, config, data, place)
        except InputError:
            directory.discard()
            raise


def run_again(earlier: Path, data: Path | None, place: Place) -> int:
    """Finishes the run of a directory; returns the exit status.

    Raises:
        InputError: bad input, in one line; the directory stays as it is.
    """
    from simulator.experiment.rundir import RunDirectory

    directory, config = RunDirectory.resume(earlier)
    with directory.held():
        return _run_in(directory, config, data, place)


def _run_in(directory: RunDirectory, config: RunConfig, data: Path | None, place: Place) -> int:
    """Runs in a locked directory, then reports."""
    console = terminal.console()
    try:
        if place.local:
            state = _in_this_process(directory, config, data, console)
        else:
            state = _on_ray(directory, config, data, place, console)
    except KeyboardInterrupt:
        state = "interrupted"
    except RunFailed as failed:
        again = f"exsim run --resume {terminal.shown(directory.path)}"
        raise RunFailed(f"{failed}; Ray's lines are in logs/. What was done is kept, go on with: {again}") from failed
    rows = directory.rows()
    shown = terminal.shown(directory.path)
    if state == "interrupted":
        console.print(f"interrupted; {len(rows)} rows are kept. Go on with: exsim run --resume {shown}", soft_wrap=True)
        return terminal.INTERRUPTED
    from simulator.report.account import audit_run
    from simulator.report.table import render_table, write_report

    console.print(render_table(rows, width=console.width))
    account = audit_run(directory.path)
    page = write_report(directory.path, account)
    console.print(account.line(), soft_wrap=True, highlight=False, markup=False)
    console.print(f"results: {shown}   report: {terminal.shown(page)}", soft_wrap=True)
    return 0 if state == "done" and account.agrees else 1


def _in_this_process(directory: RunDirectory, config: RunConfig, data: Path | None, console: Console) -> str:
    """The run step by step; returns how it ended."""
    import torch

    from simulator.experiment.local import LocalRun

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda demands a GPU and torch finds none here; allowed: auto, cpu")
    plan, world = _prepare(config, data)
    directory.check_owners(plan)
    with _recorded(directory, config, plan, "local", console) as record:
        record.good = LocalRun(config, plan, world, directory, record.display).run()
    return record.state


def _on_ray(directory: RunDirectory, config: RunConfig, data: Path | None, place: Place, console: Console) -> str:
    """The run on a cluster; returns how it ended."""
    from actors.cluster import connected
    from actors.layout import grow, lay_out
    from actors.runner import (
        RayRun,
    )  # imports Serve, which then sends its log lines to the terminal: `connected` ends that

    try:
        # a local cluster takes seconds to start, mostly idle: meanwhile a thread imports torch and loads the data
        with ThreadPoolExecutor(1) as aside:
            prepared = aside.submit(_prepare, config, data)
            with connected(place.address, directory.path / "logs"):
                plan, world = prepared.result()
                directory.check_owners(plan)
                with _recorded(directory, config, plan, "ray", console) as record:
                    if place.wait:
                        grow(config, len(plan.scenarios), place.wait)
                    layout = lay_out(config, len(plan.scenarios))
                    record.good = RayRun(config, plan, world, directory, record.display, layout).run()
    finally:
        directory.clear_test()  # also after an interruption at any point
    return record.state


def _prepare(config: RunConfig, data: Path | None) -> tuple[Plan, World]:
    from simulator.experiment.preflight import prepare

    return prepare(config, data)


@dataclass
class _Record:
    """A run under way: its display, whether every row is good, and how it ended."""

    display: Display
    good: bool = False
    state: str = "failed"


@contextmanager
def _recorded(
    directory: RunDirectory, config: RunConfig, plan: Plan, mode: Literal["ray", "local"], console: Console
) -> Iterator[_Record]:
    """Shows a run inside the block. Writes ``run.json`` before it, and how the run ended after it."""
    from simulator.experiment.display import Display
    from simulator.records.provenance import collect_provenance, write_run_info

    info = collect_provenance(sys.argv, name=config.name, mode=mode, seeds=config.seeds, config_yaml=config.to_yaml())
    info = info.model_copy(update={"account": directory.account_head()})  # a run that is killed keeps the one before
    write_run_info(directory.path, info)
    record = _Record(Display(console, total=len(plan.victims) + len(directory.open_copies(plan))))
    try:
        with record.display:
            yield record
        record.state = "done" if record.good else "failed"
    except KeyboardInterrupt:
        record.state = "interrupted"
        raise
    finally:
        warnings = [f"{row.victim}: {row.warning}" for row in directory.rows() if row.warning]
        update = {"status": record.state, "finished": datetime.now(UTC), "warnings": warnings}
        update["account"] = directory.settled_head() or info.account
        write_run_info(directory.path, info.model_copy(update=update))
