"""A sweep that is killed half-way and resumed, beside one that nobody touched.

    python -m benchmarks.sweep_kill [CONFIG] [--set KEY=VALUE]... [--at 0.5]

Runs a sweep to its end; starts it again in another directory, kills its driver with SIGKILL once the given part of the
first one's rows is there, sees its processes gone, and resumes it. Then

- the trials are the same, in the same order: setting, status, stage at which they ended, and every figure;
- so are the recommendation and ``best.yaml``, the rows, the accounts (key by key), and every model, to the last bit;
- nothing that was there at the kill was computed again: those rows have the time at which they were first started.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import chaos
from benchmarks.measure import machine
from simulator.records.rows import Row, read_rows
from tuning.records import read_trials

#: what differs between equal trials
TIMES = ("work", "wait", "busy", "overhead", "start", "call", "report")
#: and between equal recommendations
SPANS = {"search_seconds", "idle_seconds"}
#: the default: two brackets of four on digits, one seed
SMALL = ("trials=8", "seeds=[0]", "halving.bracket=4", "holdout.seeds=[100]")
#: seconds between two looks at what is there
POLL = 0.2


@dataclass
class Report:
    """What was compared, and what differed."""

    trials: int = 0
    stopped: int = 0
    rows: int = 0
    ended_at_kill: int = 0
    rows_at_kill: int = 0
    again: int = 0
    models: int = 0
    charged: int = 0
    seconds: tuple[float, ...] = ()
    faults: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        whole, before, after = (f"{one:.0f}" for one in self.seconds)
        return [
            f"unbroken: {self.trials} trials ({self.stopped} stopped early), {self.rows} rows, {self.models} models, "
            f"{self.charged} images charged, {whole} s",
            f"SIGKILL after {before} s: {self.ended_at_kill} trials had ended, {self.rows_at_kill} rows were there; "
            f"resumed: {after} s",
            f"rows computed again: {self.again}; differences from the unbroken sweep: {len(self.faults)}",
            *self.faults,
        ]


def kill_and_resume(source: str, overrides: Sequence[str], part: float, folder: Path) -> Report:
    """Runs, kills, resumes and compares; see the module."""
    mark = f"{folder.name}-{time.time_ns()}"
    changes = [word for each in overrides for word in ("--set", each)]
    unbroken, broken = folder / "unbroken", folder / "broken"
    clock = [time.monotonic()]
    _finish(["sweep", source, *changes, "--out", str(unbroken)], mark, unbroken.with_suffix(".log"))
    clock.append(time.monotonic())
    count = len(_parts(unbroken))
    driver = chaos.start(["sweep", source, *changes, "--out", str(broken)], mark, broken.with_suffix(".log"))
    try:
        while driver.poll() is None and len(_parts(broken)) < part * count:
            time.sleep(POLL)
    finally:
        driver.kill()
        status = driver.wait()
        chaos.end_all(mark)
    clock.append(time.monotonic())
    rows = _rows(broken)
    report = Report(rows_at_kill=len(rows), ended_at_kill=_ended(broken))
    if status != -9:
        report.faults.append(f"the sweep ended by itself before the kill, with status {status}")
    _finish(["sweep", "--resume", str(broken)], mark, broken.with_suffix(".log"))
    clock.append(time.monotonic())
    report.seconds = tuple(later - earlier for earlier, later in itertools.pairwise(clock))
    compare(unbroken, broken, rows, report)
    return report


def compare(unbroken: Path, broken: Path, before: dict[Any, Row], report: Report) -> None:
    """Notes in the report what differs, and what of ``before`` was computed again."""
    records, others = (read_trials(path / "sweep" / "trials.parquet") for path in (unbroken, broken))
    report.trials, report.stopped = len(records), sum(one.status == "stopped" for one in records)
    hidden = {f"{name}_seconds" for name in TIMES}
    wanted, found = ([one.model_dump(mode="json", exclude=hidden) for one in each] for each in (records, others))
    report.faults += [
        f"trial {left['number']}: {right} after the kill, unbroken {left}"
        for left, right in zip(wanted, found, strict=False)
        if left != right
    ]
    if len(wanted) != len(found):
        report.faults.append(f"{len(found)} trials after the kill, unbroken {len(wanted)}")
    if _recommended(unbroken) != _recommended(broken):
        report.faults.append("another recommendation")
    if (unbroken / "best.yaml").read_bytes() != (broken / "best.yaml").read_bytes():
        report.faults.append("another best.yaml")
    audited = chaos.Outcome()
    chaos.audit(broken, unbroken, audited)
    report.rows, report.charged = audited.rows, audited.images
    report.models = len(list((unbroken / "models").glob("*.safetensors")))
    after = _rows(broken)
    again = [name for name, row in before.items() if after[name].started != row.started]
    report.again = len(again)
    report.faults += [*audited.faults, *(f"computed again: {name}" for name in again)]


def _finish(arguments: list[str], mark: str, log: Path) -> None:
    driver = chaos.start(arguments, mark, log)
    try:
        status = driver.wait()
    finally:
        driver.kill()
        chaos.end_all(mark)
    if status != 0:
        raise SystemExit(f"exsim {' '.join(arguments)}: status {status}")


def _parts(path: Path) -> list[Path]:
    return list((path / "results").glob("part-*.parquet"))


def _rows(path: Path) -> dict[Any, Row]:
    return {row.identity: row for row in read_rows(path)}


def _ended(path: Path) -> int:
    table = path / "sweep" / "trials.parquet"
    return len(read_trials(table)) if table.exists() else 0


def _recommended(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / "sweep" / "recommendation.json").read_text())
    return {name: value for name, value in data.items() if name not in SPANS}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where the resumed sweep differs from the unbroken one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="digits")
    parser.add_argument("--set", dest="overrides", action="append", metavar="KEY=VALUE")
    parser.add_argument("--at", type=float, default=0.5, help="part of the unbroken sweep's rows")
    options = parser.parse_args(argv)
    overrides = options.overrides or (SMALL if options.config == "digits" else ())
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="exsim-sweep-kill-") as folder:
        report = kill_and_resume(options.config, overrides, options.at, Path(folder))
    print("\n".join(report.lines()))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
