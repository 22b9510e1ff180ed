"""``exsim run``: checks everything that can be checked beforehand, runs, reports."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from simulator.cli import terminal
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.config import RunConfig
    from simulator.display import Display
    from simulator.plan import Plan
    from simulator.rundir import RunDirectory
    from simulator.simulate import World


@dataclass(frozen=True)
class Place:
    """Where a run computes: in this process, or on the Ray cluster at an address (None: one of its own), for whose
    nodes it waits so many seconds."""

    local: bool
    address: str | None
    wait: float


def run_new(config: RunConfig, data: Path | None, out: Path | None, place: Place) -> int:
    """Runs a configuration in a new directory; returns the exit status.

    Raises:
        InputError: bad input, in one line; then there is no directory.
    """
    from simulator.rundir import RunDirectory

    plan, world = _prepare(config, data, place)
    directory = RunDirectory.create(config, out)
    with directory.held():
        try:
            return _run_in(directory, config, plan, world, place)
        except InputError:
            shutil.rmtree(directory.path, ignore_errors=True)
            raise


def run_again(earlier: Path, data: Path | None, place: Place) -> int:
    """Finishes the run of a directory; returns the exit status.

    Raises:
        InputError: bad input, in one line; the directory stays as it is.
    """
    from simulator.rundir import RunDirectory

    directory, config = RunDirectory.resume(earlier)
    plan, world = _prepare(config, data, place)
    with directory.held():
        return _run_in(directory, config, plan, world, place)


def _prepare(config: RunConfig, data: Path | None, place: Place) -> tuple[Plan, World]:
    from simulator.preflight import prepare

    plan, world = prepare(config, data)
    if place.local and config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device: cuda demands a GPU and torch finds none here; allowed: auto, cpu")
    return plan, world


def _run_in(directory: RunDirectory, config: RunConfig, plan: Plan, world: World, place: Place) -> int:
    """Runs in a directory that no other process works in, then reports."""
    from simulator.display import Display
    from simulator.report import render_table, write_report
    from simulator.results import collect_provenance, write_run_info

    console = terminal.console()
    mode: Literal["ray", "local"] = "local" if place.local else "ray"
    info = collect_provenance(sys.argv, name=config.name, mode=mode, seeds=config.seeds, config_yaml=config.to_yaml())
    write_run_info(directory.path, info)
    display = Display(console, total=len(plan.victims) + len(directory.open_scenarios(plan)))
    state, good = "failed", False
    try:
        with display:
            good = _compute(directory, config, plan, world, display, place)
        state = "done" if good else "failed"
    except KeyboardInterrupt:
        state = "interrupted"
    finally:
        warnings = [f"{row.victim}: {row.warning}" for row in directory.rows() if row.warning]
        update = {"status": state, "finished": datetime.now(UTC), "warnings": warnings}
        write_run_info(directory.path, info.model_copy(update=update))
    rows = directory.rows()
    shown = terminal.shown(directory.path)
    if state == "interrupted":
        console.print(f"interrupted; {len(rows)} rows are kept. Go on with: exsim run --resume {shown}", soft_wrap=True)
        return terminal.INTERRUPTED
    console.print(render_table(rows, width=console.width))
    page = write_report(directory.path)
    console.print(f"results: {shown}   report: {terminal.shown(page)}", soft_wrap=True)
    return 0 if good else 1


def _compute(
    directory: RunDirectory, config: RunConfig, plan: Plan, world: World, display: Display, place: Place
) -> bool:
    """The run itself; whether every row is good."""
    if place.local:
        from simulator.local import LocalRun

        return LocalRun(config, plan, world, directory, display).run()
    from actors.cluster import connected, grow, lay_out
    from actors.runner import RayRun

    try:
        with connected(place.address, directory.path / "logs"):
            if place.wait:
                grow(config, len(plan.scenarios), place.wait)
            layout = lay_out(config, len(plan.scenarios))
            return RayRun(config, plan, world, directory, display, layout).run()
    finally:
        directory.clear_test()  # wherever it was interrupted
