"""``exsim sweep``: reads, checks, runs, reports. Its exit statuses are those of ``exsim run``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from actors.cluster import connected
from actors.layout import lay_out
from simulator.cli import terminal
from simulator.errors import InputError
from simulator.experiment.display import Display
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.world import World
from simulator.records.provenance import collect_provenance, write_run_info
from tuning.config import SweepConfig, read_sweep
from tuning.proposals import Learned, Listed
from tuning.report import print_sweep, write_sweep_report
from tuning.sweep import Sweep, create, prepare_sweep, resume


def run_sweep(
    source: str,
    overrides: Sequence[str],
    data: Path | None,
    out: Path | None,
    earlier: Path | None,
    address: str | None,
    console: Console,
) -> int:
    """Runs a sweep, or finishes an ``earlier`` one. Returns the exit status.

    Raises:
        InputError: bad input, in one line.
    """
    if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise InputError(f"{address}: Tune runs on a node of its cluster; allowed here: HOST:PORT, auto")
    if earlier is not None:
        directory, config = resume(earlier)
        world, proposals = prepare_sweep(config, data)
    else:
        config = read_sweep(source, overrides)
        world, proposals = prepare_sweep(config, data)
        directory = create(config, out)
    with directory.held():
        return _run_in(directory, config, world, proposals, address, console, new=earlier is None)


def _run_in(
    directory: RunDirectory,
    config: SweepConfig,
    world: World,
    proposals: Listed | Learned,
    address: str | None,
    console: Console,
    *,
    new: bool,
) -> int:
    """Runs in a locked directory, then reports."""
    info = collect_provenance(sys.argv, name=config.name, mode="ray", seeds=config.seeds, config_yaml=config.to_yaml())
    info = info.model_copy(update={"account": directory.account_head()})
    write_run_info(directory.path, info)
    display = Display(console, total=proposals.total, noun="trials ended")
    state, status = "failed", 1
    try:
        with display, connected(address, directory.path / "logs"):
            layout = lay_out(config.base, proposals.total * config.attacks() * len(config.seeds))
            found = Sweep(config, proposals, world, directory, display, layout).run()
        status = 1 if found.failed or found.winner.error or found.default.error else 0
        state = "failed" if status else "done"
    except InputError:
        if new:
            directory.discard()
        raise
    except KeyboardInterrupt:
        state = "interrupted"
    finally:
        if directory.path.exists():
            update = {"status": state, "finished": datetime.now(UTC), "account": directory.settled_head()}
            write_run_info(directory.path, info.model_copy(update=update))
    if state == "interrupted":
        again = f"exsim sweep --resume {terminal.shown(directory.path)}"
        console.print(f"interrupted; what was measured is kept. Go on with: {again}", soft_wrap=True)
        return terminal.INTERRUPTED
    page = write_sweep_report(directory.path)
    print_sweep(directory.path, console)
    console.print(
        f"trials: {terminal.shown(directory.path / 'sweep' / 'trials.parquet')}   best: "
        f"{terminal.shown(directory.path / 'best.yaml')}   report: {terminal.shown(page)}",
        soft_wrap=True,
    )
    return status
