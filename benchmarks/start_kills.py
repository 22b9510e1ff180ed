"""Runs of which each kind of actor is killed while it starts (``benchmarks.chaos --faults start``).

A process is killed as soon as it bears the actor's name, which is before its constructor has ended; and so are the next
ones of its kind, as often as is said. The run has to end as an undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from benchmarks import chaos
from benchmarks.rpc_faults import Disturbed, disturb, lines_of
from simulator.experiment.local import run_config
from simulator.plan.config import RunConfig

#: how many processes of a kind are killed in one run
KILLS = 2


class Killer:
    """Kills the first processes of a kind."""

    def __init__(self, kind: str) -> None:
        self._prefixes = tuple(prefix for prefix, name in chaos.KINDS.items() if name == kind)
        self.killed: set[int] = set()

    def __call__(self, mark: str) -> None:
        """Looks at the processes of a run."""
        if len(self.killed) >= KILLS:
            return
        for pid, title in chaos.marked(mark).items():
            if title.startswith(self._prefixes) and pid not in self.killed and len(self.killed) < KILLS:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed.add(pid)


def table(config: RunConfig) -> tuple[list[str], bool]:
    """Every kind's line, and whether all runs were equal to the undisturbed one."""
    config = config.model_copy(update={"save_transfer_sets": True})
    with tempfile.TemporaryDirectory(prefix="exsim-start-") as folder:
        reference = Path(folder) / "reference"
        run_config(config, reference)
        found = [disturb(config, Path(folder) / "calm", reference, "nobody")]
        for kind in dict.fromkeys(chaos.KINDS.values()):
            killer, out = Killer(kind), Path(folder) / kind
            run = disturb(config, out, reference, kind, meddle=killer)
            faults = [*run.faults, *(["none was killed"] if not killer.killed else [])]
            found.append(Disturbed(f"{kind}, {len(killer.killed)} x", run.seconds, run.resumes, faults))
            print(f"{found[-1].name}: {run.seconds:.0f} s, {faults[:3] or 'equal'}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    return lines_of(found, found[0].seconds), not any(run.faults for run in found)
