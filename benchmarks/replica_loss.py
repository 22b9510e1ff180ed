"""How long attackers wait when one of two replicas is lost.

    python -m benchmarks.replica_loss [--signal STOP] [--report FILE]

Eight attackers, each a process, ask one query after the other. One of the two replicas is killed in the middle, or
stopped: it then keeps its connections and answers nothing. Each loss is preceded and followed by a calm time. The
account has to add up: every answer is charged once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.transport import ServeTransport
from benchmarks.measure import machine
from benchmarks.query_path import TOKEN, served
from simulator.models import build, to_bytes
from simulator.service.query import Query
from simulator.training.predict import use_one_thread

ATTACKERS, BUDGET = 8, 10**9
#: a query's beginning and its end, by the clock
Span = tuple[float, float]


class Asker:
    """An attacker that asks 16 images of 64 pixels, waits, and asks the next."""

    def __init__(self, handle: Any, account: str) -> None:
        use_one_thread()
        self._transport, self._account, self._key = ServeTransport(handle), account, 0
        self._images = np.zeros((16, 1, 8, 8), np.uint8)

    def ask(self, end: float) -> list[Span]:
        """Asks until a moment."""
        spans = []
        while (begun := time.time()) < end:
            self._transport.send_all([Query(self._account, TOKEN, self._key, self._images)])
            self._key += 1
            spans.append((begun, time.time()))
        return spans


@dataclass(frozen=True)
class Loss:
    """What one loss cost, in seconds."""

    longest_before: float
    p99_before: float
    longest_after: float
    p99_after: float
    queries: int


def measure(losses: int, calm: float, how: signal.Signals) -> list[Loss]:
    """Loses a replica so many times, and lets Serve replace it in between."""
    model = to_bytes(build("linear", channels=1, size=8, classes=10).eval())
    names = [f"attacker-{number}" for number in range(ATTACKERS)]
    found, answered = [], 0
    with served(model, dict.fromkeys(names, BUDGET), cpus=4, replicas=2) as (handle, ledger, app):
        kind = ray.remote(num_cpus=0)(Asker)
        askers: list[Any] = [kind.remote(handle, name) for name in names]
        warm = ray.get([each.ask.remote(time.time() + 5) for each in askers])
        answered += sum(map(len, warm))
        for _ in range(losses):
            begun = time.time()
            asked = [each.ask.remote(begun + 2 * calm) for each in askers]
            time.sleep(calm)
            os.kill(_replicas(app)[0], how)
            lost = time.time()
            spans = [span for part in ray.get(asked) for span in part]
            answered += len(spans)
            before = [end - start for start, end in spans if end < lost]
            after = [end - start for start, end in spans if end >= lost]
            found.append(Loss(max(before), _p99(before), max(after), _p99(after), len(spans)))
            _wait_for_two(app)
        charged = sum(ray.get(ledger.all_spent.remote()).values())
        for each in askers:
            ray.kill(each)
    assert charged == 16 * answered, f"charged {charged}, answered {16 * answered}"
    return found


def _p99(seconds: list[float]) -> float:
    return float(np.quantile(seconds, 0.99))


def _replicas(app: str) -> list[int]:
    """The processes of an application's replicas that answer."""
    named = [each for each in ray.util.list_named_actors(all_namespaces=True) if f"::{app}#" in each["name"]]
    calls = [ray.get_actor(each["name"], each["namespace"]).__ray_call__ for each in named]
    ready, _ = ray.wait([call.remote(lambda _: os.getpid()) for call in calls], num_returns=len(calls), timeout=5)
    pids: list[int] = ray.get(ready)
    return pids


def _wait_for_two(app: str) -> None:
    deadline = time.monotonic() + 180
    while len(_replicas(app)) < 2 and time.monotonic() < deadline:
        time.sleep(1)


def lines(found: list[Loss], how: str) -> list[str]:
    """The table."""
    rows = [
        f"| {how} | {number} | {loss.queries:,} | {loss.p99_before * 1e3:.0f} | {loss.longest_before:.2f} | "
        f"{loss.p99_after * 1e3:.0f} | {loss.longest_after:.2f} |"
        for number, loss in enumerate(found, start=1)
    ]
    return [
        "| signal | loss | queries | p99 before, ms | longest before, s | p99 after, ms | longest after, s |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=3)
    parser.add_argument("--calm", type=float, default=20.0, help="seconds before and after each loss")
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--report", type=Path, help="write the table there, too")
    options = parser.parse_args(argv)
    found = measure(options.losses, options.calm, signal.Signals[f"SIG{options.signal}"])
    said = "\n".join(lines(found, options.signal))
    print(said)
    if options.report:
        options.report.write_text(f"{machine()}\n\n{said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
