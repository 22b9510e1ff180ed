"""Runs histories, or one again.

python -m benchmarks.simulation --histories 1000000 --report FILE     (make simulate)
python -m benchmarks.simulation --seed N --trace                      a history again, line by line
python -m benchmarks.simulation --plants                              how soon planted bugs are found
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from benchmarks.measure import machine
from benchmarks.simulation.faults import KINDS
from benchmarks.simulation.history import Result, run
from benchmarks.simulation.plants import PLANTS

#: histories that a process plays before it reports
PIECE = 500
#: histories after which a planted bug counts as not found
HOPE = 20_000


@dataclass
class Total:
    """What many histories were."""

    histories: int = 0
    images: int = 0
    hours: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    workloads: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Total) -> None:
        """Adds others."""
        self.histories += other.histories
        self.images += other.images
        self.hours += other.hours
        self.faults += other.faults
        self.workloads += other.workloads
        self.bad += other.bad

    def take(self, result: Result) -> None:
        """Adds one."""
        self.histories += 1
        self.images += result.images
        self.hours += result.seconds / 3600
        self.faults.update(result.happened)
        self.workloads.update(result.workloads)
        if result.violation:
            self.bad.append((result.seed, result.violation))


def play(first: int, count: int) -> Total:
    """So many histories, from a seed on."""
    total = Total()
    gc.disable()  # a history makes circles, which are looked for from time to time
    for seed in range(first, first + count):
        total.take(run(seed))
        if seed % 100 == 0:
            gc.collect()
    gc.enable()
    return total


def play_all(first: int, count: int, processes: int) -> Total:
    """The same on several processes."""
    total = Total()
    pieces = [(at, min(PIECE, first + count - at)) for at in range(first, first + count, PIECE)]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        for part in pool.map(play, *zip(*pieces, strict=True)):
            total.add(part)
            if sys.stderr.isatty():
                print(f"\r{total.histories} of {count}, {len(total.bad)} bad", end="", file=sys.stderr)
    return total


def search(name: str) -> tuple[int, str]:
    """How many histories it takes to find a planted bug, and what was found; 0 where it was not."""
    parts, replaced = PLANTS[name]
    with replaced():
        for seed in range(HOPE):
            if found := run(seed, parts).violation:
                return seed + 1, found
    return 0, "not found"


def lines(total: Total, seconds: float, processes: int) -> list[str]:
    """The report of many histories."""
    rows = [f"| {kind} | {total.faults[kind]:,} |" for kind in KINDS]
    return [
        f"{total.histories:,} histories, {total.images:,} charged images, {total.hours:,.0f} hours of virtual time, "
        f"{sum(total.faults.values()):,} faults; {len(total.bad)} violations. "
        f"{seconds / 60:.1f} minutes on {processes} processes.",
        "",
        f"Clients' workloads: {', '.join(f'{count:,} {name}' for name, count in sorted(total.workloads.items()))}.",
        "",
        "| fault | how often |",
        "|---|---|",
        *rows,
        *(f"\nseed {seed}: {why}\n(python -m benchmarks.simulation --seed {seed} --trace)" for seed, why in total.bad),
    ]


def plant_lines() -> list[str]:
    """The table of the planted bugs."""
    table = ["| planted bug | histories until it was found | what was found |", "|---|---|---|"]
    for name in PLANTS:
        count, found = search(name)
        table.append(f"| {name} | {count or f'not in {HOPE:,}'} | {found[:160]} |")
    return table


def main(argv: list[str] | None = None) -> int:
    """``make simulate``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="play this one history")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    parser.add_argument("--plants", action="store_true", help="look for the planted bugs, too")
    parser.add_argument("--report", type=Path, help="write the report there, too")
    options = parser.parse_args(argv)
    if options.seed is not None:
        result = run(options.seed, trace=options.trace)
        print("\n".join([*result.lines, f"seed {options.seed}: {result.violation or 'good'}"]))
        return 1 if result.violation else 0
    begun = time.monotonic()
    total = play_all(options.first, options.histories, options.processes)
    said = lines(total, time.monotonic() - begun, options.processes)
    if options.plants:
        said += ["", *plant_lines()]
    print("\n".join(said))
    if options.report:
        options.report.write_text("\n".join(["# Simulated histories", "", machine(), "", *said, ""]))
    return 1 if total.bad else 0


if __name__ == "__main__":
    sys.exit(main())
