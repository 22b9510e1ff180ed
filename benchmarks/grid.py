"""The query path over its whole range: 1, 8 and 64 attackers, each asking 1 to 1,024 images at a time.

Every attacker asks, waits for the answer and asks again, as an attack does whose next images depend on the last answer;
nothing is asked ahead. The limit is one thread that checks and answers batches of 256 in its own process, with nothing
else running: it is measured before and after every cell, a cell's ratio is to the mean of the two, and the cells take
turns, so that a busy minute of the machine falls on all of them.

Attackers are threads, up to eight in a process: a process with torch for each of 64 would measure the memory of the
machine. Beside each rate stand the CPU milliseconds that a query costs the replica beyond the limit's time for its
images: what the path costs even where other work on the machine takes the clock's part.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from actors.transport import ServeTransport
from benchmarks.measure import Line, Outcome, Spread, Target
from benchmarks.query_path import CLASSES, SHAPE, TOKEN, Limit, Rate, cpu_seconds, images, replica_of, served
from simulator.models import build, to_bytes
from simulator.service.oracle import CHUNK, ServiceOracle
from simulator.training.predict import use_one_thread

ATTACKERS, BATCHES = (1, 8, 64), (1, 16, 64, 256, 1024)
TARGETS = {(8, 256): Target("at least", 0.9), (8, 64): Target("at least", 0.5)}
#: attackers in one process
THREADS = 8
#: more than can be asked in a benchmark
BUDGET = 10**9


class Crowd:
    """Attackers of one process, each a thread with an account of its own."""

    def __init__(self, handle: Any, accounts: Sequence[str]) -> None:
        use_one_thread()
        self._images = torch.from_numpy(images(0))
        self._threads = ThreadPoolExecutor(len(accounts))
        self._oracles = [
            ServiceOracle(
                ServeTransport(handle), name, TOKEN, labels="soft", classes=CLASSES, shape=SHAPE, budget=BUDGET
            )
            for name in accounts
        ]

    def ask(self, attackers: int, batch: int, start: float, end: float) -> list[int]:
        """Has the first ``attackers`` ask from one moment to another; returns the images that each was answered in
        time."""
        return list(self._threads.map(lambda oracle: self._ask(oracle, batch, start, end), self._oracles[:attackers]))

    def _ask(self, oracle: ServiceOracle, batch: int, start: float, end: float) -> int:
        time.sleep(max(0.0, start - time.time()))
        answered = 0
        for number in itertools.count():
            first = number * batch % len(self._images)
            oracle.query(self._images[first : first + batch])
            if time.time() > end:
                return answered
            answered += batch
        raise AssertionError

    def asked(self) -> dict[str, int]:
        """Images that each account was answered, by its own count."""
        return {oracle.account: oracle.asked for oracle in self._oracles}


@dataclass
class Cell:
    """What was measured of one number of attackers at one batch: a figure a round."""

    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)


def run(
    rounds: int = 5,
    seconds: float = 3.0,
    limit_batches: int = 30,
    attackers: Sequence[int] = ATTACKERS,
    batches: Sequence[int] = BATCHES,
) -> Outcome:
    """Measures every cell in every round.

    Args:
        rounds: how often.
        seconds: that a cell is measured for in a round, and at least three times what its attackers' batches take.
        limit_batches: that the in-process limit answers between two cells.
        attackers, batches: of the cells.
    """
    model = to_bytes(build("naivenet", channels=SHAPE[0], size=SHAPE[1], classes=CLASSES).eval())
    limit = Limit(model)
    names = [f"attacker-{number}" for number in range(max(attackers))]
    # with few attackers each is a process, as in a run
    processes = min(len(names), THREADS)
    crowds = [names[first::processes] for first in range(processes)]
    cells = {(many, batch): Cell() for batch in batches for many in attackers}
    limits = []
    with served(model, dict.fromkeys(names, BUDGET), cpus=processes + 2) as (handle, ledger, app):
        kind = ray.remote(num_cpus=0)(Crowd)
        actors: list[Any] = [kind.remote(handle, crowd) for crowd in crowds]
        try:
            replica = replica_of(app)
            _ask(actors, len(names), CHUNK, seconds)  # connections, caches
            limit.rate(limit_batches)
            for _ in range(rounds):
                before = limit.rate(limit_batches)
                for (many, batch), cell in cells.items():
                    spent = cpu_seconds([replica])[0]
                    lasting = max(seconds, 3 * many * batch / before.clock)
                    answered = _ask(actors, many, batch, lasting)
                    spent = cpu_seconds([replica])[0] - spent
                    after = limit.rate(limit_batches)
                    _note(cell, batch, answered, lasting, spent, before, after)
                    limits.append(after)
                    before = after
            asked: dict[str, int] = {}
            for counts in ray.get([actor.asked.remote() for actor in actors]):
                asked |= counts
            assert ray.get(ledger.all_spent.remote()) == asked, "answered is not charged"
        finally:
            for actor in actors:
                ray.kill(actor)
    lines = [Line("in process, one thread", Spread.of([each.clock for each in limits]))]
    for (many, batch), cell in cells.items():
        name = f"{many} x {batch} (+{Spread.of(cell.overheads).median:.2f} ms)"
        lines.append(Line(name, Spread.of(cell.rates), Spread.of(cell.ratios), TARGETS.get((many, batch))))
    share = Spread.of([each.clock / each.cpu for each in limits])
    return Outcome(
        title="Query path: naivenet 28x28 uint8, attackers x images asked at a time",
        unit="images a second",
        rounds=rounds,
        lines=tuple(lines),
        note=f"Every attacker waits for each answer; answered = charged at all {len(names)} accounts. In brackets the "
        f"replica's CPU time a query beyond the limit's. The limit's thread had {share} of a core: below 1, other work "
        "took part of the machine.",
    )


def _note(cell: Cell, batch: int, answered: int, seconds: float, spent: float, before: Rate, after: Rate) -> None:
    cell.rates.append(answered / seconds)
    cell.ratios.append(2 * cell.rates[-1] / (before.clock + after.clock))
    queries = max(1, answered / batch)
    cell.overheads.append(1000 * (spent / queries - 2 * batch / (before.cpu + after.cpu)))


def _ask(actors: list[Any], attackers: int, batch: int, seconds: float) -> int:
    """Images that ``attackers`` attackers, spread over the processes, were answered in so many seconds."""
    start = time.time() + 0.1
    shares = [len(range(first, attackers, len(actors))) for first in range(len(actors))]
    asked = [
        actor.ask.remote(share, batch, start, start + seconds)
        for actor, share in zip(actors, shares, strict=True)
        if share
    ]
    answers: list[list[int]] = ray.get(asked)
    return sum(map(sum, answers))
