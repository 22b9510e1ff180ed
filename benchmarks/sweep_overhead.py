"""What a sweep costs beyond training, stealing and measuring: seconds of each trial, side by side with its work.

    python -m benchmarks sweep                                            (12 trials on digits, two of each worker)
    python -m benchmarks.sweep_overhead [--config digits] [--set KEY=VALUE]... [--cores 2]

The sweep is started as a user would start it, held on so many cores, and its own table of trials is read. A trial's
*work* is what trainers, attackers and the collector did for it; *waiting* is for one of them to be free, for there are
more trials under way than workers. *Overhead* is the rest of the time in which the trial had a process or was to get
one: Tune, the trial's process and the workshop. Waiting at a rung for the others of its bracket is neither.

On a busy machine wall times say little. The CPU seconds of the processes, read from /proc, are given beside them:
those of the trials' processes with their imports, of the workshop and of the driver are what Tune costs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.measure import Line, Outcome, Spread, Target, machine
from benchmarks.whole_run import Profile, watch
from tuning.records import TrialRecord, read_trials

#: seconds of overhead that a trial may have
ALLOWED = 1.5
TARGET = Target("at most", 1.0)
WORK, OVERHEAD = "work: training, stealing, measuring", "overhead: all the rest"
#: trials that run to their end, on one seed, and hardly anything to confirm: their overhead is what is measured
SMALL = ("trials=12", "seeds=[0]", "halving.bracket=6", "holdout.seeds=[100]", "holdout.scenarios=[]")
#: processes that a sweep has beside those that work: as Ray and :mod:`benchmarks.whole_run` call them
TUNES = {"trials' processes": ("Trial", "ResourceTrainable"), "workshop": ("Workshop",), "driver": ("driver",)}


def outcome(config: str, records: Sequence[TrialRecord], profile: Profile) -> Outcome:
    """The table of a sweep's trials; a round is a trial."""
    begun = [one for one in records if one.busy_seconds > 0]
    work = [one.work_seconds for one in begun]

    def line(name: str, seconds: Sequence[float], target: Target | None = None) -> Line:
        base = [ALLOWED] * len(begun) if target else work
        ratios = [mine / other for mine, other in zip(seconds, base, strict=True) if other > 0]
        return Line(name, Spread.of(seconds), Spread.of(ratios), target)

    overhead = [one.overhead_seconds for one in begun]
    lines = (
        Line(WORK, Spread.of(work)),
        line("waiting for a worker", [one.wait_seconds for one in begun]),
        line(OVERHEAD, overhead),
        line("  until a process has the trial", [one.start_seconds for one in begun]),
        line("  its process and the workshop", [one.call_seconds for one in begun]),
        line("  until Tune has a stage's result", [one.report_seconds for one in begun]),
        line(f"overhead, of the {ALLOWED:g} s allowed", overhead, TARGET),
    )
    kinds = {shown: [of for of in profile.processes.values() if of.name in names] for shown, names in TUNES.items()}
    parts = [f"{shown} {sum(one.cpu for one in of) / len(begun):.2f} ({len(of)})" for shown, of in kinds.items()]
    stopped = sum(one.status == "stopped" for one in begun)
    idle = sum(one.name == "worker without a task" for one in profile.processes.values())
    note = (
        f"A round is a trial; {stopped} stopped early. Overhead {sum(overhead) / len(begun):.3g} s on average, the "
        f"processes' start with it. CPU seconds a trial, start-up included (processes): "
        f"{', '.join(parts)}, all {profile.cpu / len(begun):.2f}; {idle} more processes had nothing to do."
    )
    return Outcome(f"Overhead of a sweep's trials, {config}", "seconds a trial", len(begun), lines, note)


def measure(config: str, overrides: Sequence[str], cores: int) -> Outcome:
    """Runs a sweep and gives its table."""
    changes = [word for each in overrides for word in ("--set", each)]
    held = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryDirectory(prefix="exsim-sweep-") as folder:
        out = Path(folder) / "out"
        profile = watch([sys.executable, "-m", "simulator", "sweep", config, *changes, "--out", str(out)], held)
        return outcome(config, read_trials(out / "sweep" / "trials.parquet"), profile)


def run(config: str = "digits", overrides: Sequence[str] = SMALL) -> Outcome:
    """The benchmark of ``python -m benchmarks sweep``."""
    return measure(config, overrides, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; a missed target is shown, not an error: the machine may be busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args(argv)
    console = Console()
    console.print(machine(), highlight=False)
    console.print(measure(options.config, options.overrides, options.cores).table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
