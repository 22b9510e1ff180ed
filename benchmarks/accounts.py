"""The ledger under hundreds of attackers that compute nothing, and how evenly a replica serves them.

``ledger``: 500 accounts, each with a client that reserves, waits for the grant and reserves again, straight at the
ledger's actor. The base is the same ledger in this process, called 500 requests at a time: what is left is the cost of
reaching an actor. ``crowd``: 500 clients ask a victim of one pixel through the whole path, one image at a time, while a
greedy one keeps as many messages under way as it can. Reported are the rate, the ledger's memory, Jain's fairness index
(Jain et al., 1984: ``(Σx)² / (n Σx²)``, 1 where all get the same) of the modest clients, and the greedy one's images
over their mean.

The clients are tasks or threads of a few processes: a process for each would measure the machine's memory.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.cluster import connected
from actors.conversation import Busy
from actors.ledger import LedgerActor
from actors.replica import MAX_PER_ACCOUNT
from actors.transport import ServeTransport, direct
from benchmarks.measure import Line, Outcome, Spread, Target
from benchmarks.query_path import TOKEN, VICTIM, cpu_seconds, served
from simulator.models import build, to_bytes
from simulator.service.ledger import Ledger, Request, Terms, hash_token
from simulator.service.query import Query
from simulator.training.predict import use_one_thread

ACCOUNTS = 500
PROCESSES = 4
BUDGET = 10**9
#: Jain's index of the modest clients, and the greedy one's share of theirs
FAIR, GREED = Target("at least", 0.9), Target("at most", 2.0 * MAX_PER_ACCOUNT)
DIGEST = "0" * 32


def resident(actor: Any) -> float:
    """Resident memory of an actor's process in MB."""
    status: str = ray.get(actor.__ray_call__.remote(lambda _: Path("/proc/self/status").read_text()))
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


class Buyers:
    """Clients of the ledger: each reserves one image, waits for the grant and reserves the next."""

    def __init__(self, ledger: Any, accounts: Sequence[str]) -> None:
        self._ledger, self._keys = ledger, dict.fromkeys(accounts, 0)

    async def buy(self, end: float) -> int:
        """Grants until a moment."""
        return sum(await asyncio.gather(*(self._buy(account, end) for account in self._keys)))

    async def _buy(self, account: str, end: float) -> int:
        granted = 0
        while time.time() < end:
            await self._ledger.reserve.remote(account, TOKEN, self._keys[account], 1, DIGEST)
            self._keys[account] += 1
            granted += 1
        return granted

    async def granted(self) -> int:
        """All grants so far."""
        return sum(self._keys.values())


def ledger(
    rounds: int = 5, seconds: float = 2.0, accounts: int = ACCOUNTS, sync: bool = False, processes: int = PROCESSES
) -> Outcome:
    """The ledger's rate with ``accounts`` clients, against calls in its own process."""
    names = [f"attacker-{number}" for number in range(accounts)]
    terms = {name: Terms(VICTIM, "soft", BUDGET, hash_token(TOKEN)) for name in names}
    inside, rates, costs = [], [], []
    with tempfile.TemporaryDirectory() as folder, connected(None, Path(folder), cpus=processes + 1):
        plain = Ledger(Path(folder) / "plain.log", sync=sync)
        for name in names:
            plain.open(name, terms[name])
        actor: Any = LedgerActor.remote(str(Path(folder) / "ledger.log"), sync)
        ray.get(actor.open.remote(terms))
        empty = resident(actor)
        kind = ray.remote(num_cpus=0)(Buyers)
        buyers: list[Any] = [kind.remote(actor, names[first::processes]) for first in range(processes)]
        try:
            ray.get([buyer.buy.remote(time.time() + 0.5) for buyer in buyers])  # connections
            for key in range(rounds):
                inside.append(_inside(plain, names, key, seconds / 4))
                spent, end = cpu_seconds([actor])[0], time.time() + 0.2 + seconds
                start = time.time()
                grants = sum(ray.get([buyer.buy.remote(end) for buyer in buyers]))
                rates.append(grants / (time.time() - start))
                costs.append(1000 * (cpu_seconds([actor])[0] - spent) / max(1, grants))
            charged = sum(ray.get(actor.all_spent.remote()).values())
            assert charged == sum(ray.get([buyer.granted.remote() for buyer in buyers])), "granted is not charged"
            full = resident(actor)
        finally:
            for each in (*buyers, actor):
                ray.kill(each)
        plain.close()
    ratios = Spread.of([rate / base for rate, base in zip(rates, inside, strict=True)])
    return Outcome(
        title=f"The ledger with {accounts} clients that only reserve",
        unit="grants a second",
        rounds=rounds,
        lines=(
            Line("in process, a call for all clients", Spread.of(inside)),
            Line("as an actor, a call for each grant", Spread.of(rates), ratios),
        ),
        note=f"A grant costs the ledger's process {Spread.of(costs)} ms of CPU time. Its peak rate was "
        f"{max(rates):.0f} grants a second; it held {empty:.0f} MB with {accounts} accounts, and {full:.0f} MB after "
        f"{charged} grants.",
    )


def _inside(plain: Ledger, names: Sequence[str], turn: int, seconds: float) -> float:
    """Grants a second of a ledger in this process, asked for all accounts at once."""
    start, grants = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        key = (turn << 40) + grants
        plain.reserve_all([Request(name, TOKEN, key, 1, DIGEST) for name in names])
        grants += len(names)
    return grants / (time.perf_counter() - start)


class Askers:
    """Clients of the service, each a thread that asks one image of one pixel, waits and asks again."""

    def __init__(self, handle: Any, accounts: Sequence[str]) -> None:
        use_one_thread()
        self._accounts, self._handle = list(accounts), handle
        self._transports = [ServeTransport(handle) for _ in accounts]
        self._threads = ThreadPoolExecutor(len(accounts))
        self._keys = dict.fromkeys(accounts, 0)

    def ask(self, end: float) -> dict[str, int]:
        """Images that each was answered until a moment."""
        before = dict(self._keys)
        list(self._threads.map(lambda pair: self._ask(*pair, end), zip(self._accounts, self._transports, strict=True)))
        return {account: key - before[account] for account, key in self._keys.items()}

    def _ask(self, account: str, transport: ServeTransport, end: float) -> None:
        while time.time() < end:
            transport.send_all([Query(account, TOKEN, self._keys[account], pixel())])
            self._keys[account] += 1

    def flood(self, end: float, messages: int) -> tuple[int, int]:
        """Keeps so many messages of the first account under way; images answered, and messages sent away."""
        (account, *_), handle = self._accounts, direct(self._handle)
        key, under_way, answered, refused = self._keys[account], [], 0, 0
        while time.time() < end or under_way:
            while time.time() < end and len(under_way) < messages:
                under_way.append(handle.answer.remote([Query(account, TOKEN, key, pixel())]))
                key += 1
            (answer,) = under_way.pop(0).result(timeout_s=120)
            answered, refused = answered + (not isinstance(answer, Busy)), refused + isinstance(answer, Busy)
        self._keys[account] = key
        return answered, refused


def pixel() -> NDArray[np.uint8]:
    """One black image of one pixel."""
    return np.zeros((1, 1, 1, 1), np.uint8)


def crowd(
    rounds: int = 3, seconds: float = 8.0, clients: int = ACCOUNTS, messages: int = 50, processes: int = PROCESSES
) -> Outcome:
    """Many modest clients and a greedy one that keeps ``messages`` messages under way, through the whole path."""
    model = to_bytes(build("linear", channels=1, size=1, classes=2).eval())
    names = [f"attacker-{number}" for number in range(clients)]
    fairness, greed, rates, sent_away = [], [], [], 0
    total = dict.fromkeys(["greedy", *names], 0)
    with served(model, dict.fromkeys(total, BUDGET), cpus=processes + 3) as (handle, account_book, _):
        kind = ray.remote(num_cpus=0)(Askers)
        modest: list[Any] = [kind.remote(handle, names[first::processes]) for first in range(processes)]
        greedy: Any = kind.remote(handle, ["greedy"])
        try:
            ray.get([each.ask.remote(time.time() + 3) for each in (*modest, greedy)])  # connections
            warm: dict[str, int] = ray.get(account_book.all_spent.remote())
            for _ in range(rounds):
                end = time.time() + seconds
                flooding = greedy.flood.remote(end, messages)
                answered: dict[str, int] = {}
                for part in ray.get([each.ask.remote(end) for each in modest]):
                    answered |= part
                images, refused = ray.get(flooding)
                sent_away += refused
                shares = np.array(list(answered.values()), dtype=np.float64)
                fairness.append(float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())))
                greed.append(images / max(1.0, float(shares.mean())))
                rates.append((shares.sum() + images) / seconds)
                for name, count in {**answered, "greedy": images}.items():
                    total[name] += count
            charged = ray.get(account_book.all_spent.remote())
            assert {name: charged[name] - warm[name] for name in total} == total, "answered is not charged"
            held = resident(account_book)
        finally:
            for each in (*modest, greedy):
                ray.kill(each)
    return Outcome(
        title=f"{clients} clients that ask one pixel at a time, and a greedy one with {messages} messages under way",
        unit="figure",
        rounds=rounds,
        lines=(
            Line("queries a second, all together", Spread.of(rates)),
            Line("Jain's index of the modest", Spread.of(fairness), Spread.of(fairness), FAIR),
            Line("greedy over mean modest", Spread.of(greed), Spread.of(greed), GREED),
        ),
        note=f"{sent_away} messages of the greedy one were sent away unpaid; answered = charged for all. The ledger "
        f"held {held:.0f} MB.",
    )
