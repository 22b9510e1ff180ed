"""How much of a model's speed reaches its attackers: queries through Serve and the ledger against no service at all.

The limit is one thread that checks and answers batches in its own process, with nothing else running; it is measured
before and after every round of the service and the two are averaged. The service is all of what a run has: eight
attackers, each an actor with its own account, ask one replica, which has the ledger charge every batch on disk.

Beside the clock stand the CPU seconds of the replica, and of all actors on the path, against those of the limit: they
tell what the path costs even where other work on the machine takes the clock's part.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import serve

from actors.cluster import connected
from actors.devices import Placement
from actors.ledger import LedgerActor
from actors.replica import deploy
from actors.stores import ShelfActor
from actors.transport import ServeTransport
from benchmarks.measure import Line, Outcome, Spread, Target
from simulator.models import build, from_bytes, to_bytes
from simulator.service.ledger import Terms, hash_token
from simulator.service.oracle import CHUNK
from simulator.service.query import Query
from simulator.service.victim import VictimService
from simulator.training.predict import use_one_thread

#: of the whole query path against the in-process limit
TARGETS = {CHUNK: Target("at least", 0.9), 64: Target("at least", 0.5)}
VICTIM, TOKEN, CLASSES = "bench", "token", 10
#: images that one attacker asks again and again; every batch is charged, because every batch has a key of its own
POOL = 4 * CHUNK
SHAPE = (1, 28, 28)


def images(seed: int) -> NDArray[np.uint8]:
    """Noise in the format of Fashion-MNIST, ``(POOL, 1, 28, 28)``."""
    return np.random.default_rng(seed).integers(0, 256, (POOL, *SHAPE), dtype=np.uint8)


class Client:
    """An attacker that does nothing but ask."""

    def __init__(self, handle: Any, account: str, seed: int) -> None:
        use_one_thread()
        self._images, self._account, self._keys = images(seed), account, itertools.count()
        self._transport = ServeTransport(handle)

    def ask(self, batches: int, batch: int, start: float) -> float:
        """Waits for the moment ``start``, has so many batches answered, each under a key of its own, and returns when
        the last one was. All are known beforehand, as a transfer set's are, so the client sends them as it likes."""
        asked = np.split(self._images, POOL // batch)
        queries = [
            Query(self._account, TOKEN, next(self._keys), asked[number % len(asked)]) for number in range(batches)
        ]
        time.sleep(max(0.0, start - time.time()))
        self._transport.send_all(queries)
        return time.time()


@dataclass(frozen=True)
class Rate:
    """Images a second of the clock, and of CPU time."""

    clock: float
    cpu: float


class Limit:
    """The victim without a service."""

    def __init__(self, model: bytes) -> None:
        use_one_thread()
        self._service = VictimService(torch.device("cpu"))
        self._service.add(VICTIM, from_bytes(model))
        self._pool = np.split(images(0), POOL // CHUNK)

    def rate(self, batches: int) -> Rate:
        """Checks and answers ``batches`` batches."""
        start, cpu = time.perf_counter(), time.thread_time()
        for number in range(batches):
            query = Query("limit", TOKEN, number, self._pool[number % len(self._pool)])
            self._service.check(VICTIM, query.images)
            self._service.answer(VICTIM, "soft", query)
        count = batches * CHUNK
        return Rate(count / (time.perf_counter() - start), count / (time.thread_time() - cpu))


@contextmanager
def served(
    model: bytes, accounts: dict[str, int], cpus: int | None = None, replicas: int = 1
) -> Iterator[tuple[Any, Any, str]]:
    """A victim behind Serve and a ledger with these accounts (name to budget); gives the handle, the ledger and the
    application's name. ``cpus`` are Ray's logical ones, two more than accounts if not given."""
    with tempfile.TemporaryDirectory() as folder, connected(None, Path(folder), cpus=cpus or len(accounts) + 2):
        app = f"bench-{time.time_ns()}"
        shelved = Path(folder) / "models" / f"{VICTIM}.safetensors"
        shelved.parent.mkdir()
        shelved.write_bytes(model)
        ledger: Any = LedgerActor.remote(str(Path(folder) / "ledger.log"), False)
        shelf: Any = ShelfActor.remote(folder)
        terms = {name: Terms(VICTIM, "soft", budget, hash_token(TOKEN)) for name, budget in accounts.items()}
        ray.get(ledger.open.remote(terms))
        try:
            yield deploy(app, ledger, shelf, Placement(False, 1), replicas), ledger, app
        finally:
            for actor in (ledger, shelf):
                ray.kill(actor)
            serve.delete(app)


def run(rounds: int = 5, clients: int = 8, batches: int = 40, limit_batches: int = 80, batch: int = CHUNK) -> Outcome:
    """Alternates the two sides.

    Args:
        rounds: how often.
        clients: attackers at once.
        batches: that each attacker asks in a round.
        batch: images in each; the limit is always measured with batches of :data:`~simulator.service.oracle.CHUNK`.
        limit_batches: that the in-process limit answers before and after each round.
    """
    model = to_bytes(build("naivenet", channels=SHAPE[0], size=SHAPE[1], classes=CLASSES).eval())
    limit = Limit(model)
    budget = (rounds + 1) * batches * batch
    accounts = {f"attacker-{i}": budget for i in range(clients)}
    with served(model, accounts) as (handle, ledger, app):
        kind = ray.remote(num_cpus=0)(Client)
        actors: list[Any] = [kind.remote(handle, name, i) for i, name in enumerate(accounts)]
        path_actors = [replica_of(app), ledger, *actors]
        try:
            _ask(actors, batches, batch)  # connections, caches
            limit.rate(limit_batches)
            limits, clock, replica, everyone = [limit.rate(limit_batches)], [], [], []
            for _ in range(rounds):
                before = cpu_seconds(path_actors)
                clock.append(_ask(actors, batches, batch))
                spent = [after - start for after, start in zip(cpu_seconds(path_actors), before, strict=True)]
                replica.append(clients * batches * batch / spent[0])
                everyone.append(clients * batches * batch / sum(spent))
                limits.append(limit.rate(limit_batches))
            charged = ray.get(ledger.all_spent.remote())
        finally:
            for actor in actors:
                ray.kill(actor)
    assert charged == accounts
    pairs = list(itertools.pairwise(limits))
    by_clock = [(one.clock + other.clock) / 2 for one, other in pairs]
    by_cpu = [(one.cpu + other.cpu) / 2 for one, other in pairs]
    share = Spread.of([each.clock / each.cpu for each in limits])
    return Outcome(
        title=f"Query path: naivenet 28x28, batches of {batch} uint8 images, {clients} attackers",
        unit="images a second",
        rounds=rounds,
        lines=(
            Line("in process, one thread", Spread.of([each.clock for each in limits])),
            Line("Serve and ledger", Spread.of(clock), _ratios(clock, by_clock), TARGETS.get(batch)),
            Line("a CPU second of the replica", Spread.of(replica), _ratios(replica, by_cpu)),
            Line("a CPU second of all actors", Spread.of(everyone), _ratios(everyone, by_cpu)),
        ),
        note=f"The in-process thread had {share} of a core: below 1, other work took part of the machine.",
    )


def _ratios(rates: list[float], limits: list[float]) -> Spread:
    return Spread.of([rate / limit for rate, limit in zip(rates, limits, strict=True)])


def small_batches() -> Outcome:
    """The same with batches of 64, which an attack that asks so many at a time has."""
    return run(batches=160, batch=64)


def _ask(actors: list[Any], batches: int, batch: int) -> float:
    """Images a second that all attackers together are answered."""
    start = time.time() + 0.2
    ends: list[float] = ray.get([actor.ask.remote(batches, batch, start) for actor in actors])
    return len(actors) * batches * batch / (max(ends) - start)


def cpu_seconds(actors: list[Any]) -> list[float]:
    """CPU time of each actor's process so far."""
    seconds: list[float] = ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors])
    return seconds


def replica_of(app: str) -> Any:
    """The actor of the application's only replica."""
    (found,) = [each for each in ray.util.list_named_actors(all_namespaces=True) if f"::{app}#" in each["name"]]
    return ray.get_actor(found["name"], found["namespace"])
