"""``python -m benchmarks [NAME]...``: runs all benchmarks, or the named ones, and prints a table of each."""

from __future__ import annotations

import os
import sys
import time

# A cluster elsewhere would be compared with this machine; Ray reads these when it is imported.
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from collections.abc import Callable

from rich.console import Console

from benchmarks import accounts, coupling, data_free, grid, memory, query_path, schemes, sweep_overhead
from benchmarks.measure import Outcome, machine
from simulator.component import one_of
from simulator.training.predict import use_one_thread

#: :mod:`benchmarks.peers` is run by itself: it needs a peer installed
BENCHMARKS: dict[str, Callable[[], Outcome]] = {
    "coupling": coupling.run,
    "query_path": query_path.run,
    "small_batches": query_path.small_batches,
    "grid": grid.run,
    "ledger": accounts.ledger,
    "crowd": accounts.crowd,
    "memory": memory.run,
    "data_free": data_free.run,
    "schemes": schemes.run,
    "sweep": sweep_overhead.run,
}


def main(names: list[str]) -> int:
    """Returns 0, or 2 where a name is unknown. A missed target is shown, not an error: the machine may be busy."""
    console = Console()
    for name in names:
        if name not in BENCHMARKS:
            console.print(one_of(name, list(BENCHMARKS)), highlight=False, soft_wrap=True)
            return 2
    use_one_thread()
    console.print(machine(), highlight=False)
    for name in names or BENCHMARKS:
        start = time.monotonic()
        with console.status(f"measuring {name} ..."):
            outcome = BENCHMARKS[name]()
        console.print(outcome.table())
        console.print(f"{name}: {time.monotonic() - start:.0f} s\n", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
