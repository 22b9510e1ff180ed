"""The owner's side of a history: the ledger with its deaths, and replicas that compute without a thread."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.replica import Replica
from actors.turns import FairQueue, Teller, Worker
from benchmarks.simulation.checker import Checker, Violation, demand
from benchmarks.simulation.disk import Disk, Killed
from benchmarks.simulation.faults import Faults
from simulator import chain
from simulator.errors import InputError
from simulator.service.ledger import Grant, Ledger, Refused, Request, Terms
from simulator.service.query import Query
from simulator.service.victim import VictimService

#: seconds of virtual time: a message's way, a computation, a restart, and until Ray sends a lost call again
WAY, COMPUTING, RESTART, RESEND = 0.001, 0.003, 1.0, 1.0
WEIGHTS = np.arange(1, 5, dtype=np.float32)
SPEC = SimpleNamespace(channels=1, size=2, classes=2)


class Unreachable(Exception):
    """A message or its answer was lost, or the process that had it died."""


def answer_to(query: Query) -> NDArray[np.float32]:
    """The answer f(images) to a query, ``(B, 2)`` float32: a linear model of the images, and the query's key, as a
    victim's noise depends on it."""
    rows = np.empty((len(query.images), 2), np.float32)
    rows[:, 0] = query.images.reshape(len(rows), -1) @ WEIGHTS
    rows[:, 1] = query.key
    return rows


class Service(VictimService):
    """The checks of the real service, and a model of one line. It has no state, so all replicas share it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        models: Any = OrderedDict(v=SimpleNamespace(spec=SPEC))
        self._models = models

    def answering(self, victim: str, labels: str, query: Query) -> Callable[[], NDArray[np.float32]]:
        """See :class:`VictimService`."""
        return functools.partial(answer_to, query)


class LoopWorker(Worker):
    """The real worker's queue, turns and signals, with a task of the loop in place of its thread."""

    def __init__(self) -> None:
        self._queue = FairQueue()
        self._low, self._awaited = asyncio.Event(), False
        self.task: asyncio.Task[None] | None = None

    async def run(self, account: str, cost: float, work: Callable[[], Any]) -> Any:
        """See :class:`Worker`."""
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._turns())
        return await super().run(account, cost, work)

    async def _turns(self) -> None:
        while True:
            await asyncio.sleep(COMPUTING)
            if not len(self._queue):
                self.task = None
                return
            self._serve()


class SimulatedReplica(Replica):
    """The real replica without Ray's metrics, shelf and thread."""

    def __init__(self, ledger: Any, service: VictimService, attacks: dict[str, str]) -> None:
        metrics: Any = SimpleNamespace(tell=lambda *_: None)
        self._ledger, self._attacks, self._metrics, self._log = ledger, attacks, metrics, None
        self._service, self._terms, self._present = service, {}, Counter()
        self._worker = LoopWorker()
        self._teller = Teller(lambda requests: ledger.reserve_all.remote(list(requests)), self._worker.low)
        self.tasks: set[asyncio.Task[Any]] = set()

    def die(self) -> None:
        """Ends all that it does. What it had asked of the ledger goes on there."""
        for task in (*self.tasks, self._worker.task, self._teller._task):
            if task is not None:
                task.cancel()


def tampered(log: Path, dice: Random) -> tuple[Path, bytes]:
    """A changed log or head: a flipped bit, records cut off that the head knows, or one removed, moved or written over
    with NULs."""
    head, data = chain.read_head(log), log.read_bytes()
    records = data.split(b"\n")[: head.count if head else 0]
    rest = data[sum(len(record) + 1 for record in records) :]
    how = dice.choice(("bit", "head", "cut", "removed", "moved", "nothing left"))
    if how in ("bit", "head") or len(records) < 2:
        file = chain.head_file(log) if how == "head" else log
        changed = bytearray(file.read_bytes())
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        return file, bytes(changed)
    place = dice.randrange(len(records))
    if how == "cut":
        records, rest = records[:place], b""
    elif how == "removed":
        del records[place]
    elif how == "moved":
        records.insert((place + 1) % len(records), records.pop(place))
    else:
        return log, bytes(len(data)) if dice.random() < 0.5 else b""
    return log, b"".join(record + b"\n" for record in records) + rest


class LedgerHost:
    """The ledger's actor, which Ray starts again after each death, and whose calls Ray repeats until they are answered.

    Args:
        open_ledger: opens the ledger over its log.
        say: takes a line for the trace.
        fail: ends the history with an error. Here one is raised where the real parts would handle it.
    """

    def __init__(
        self,
        dice: Random,
        faults: Faults,
        checker: Checker,
        disk: Disk,
        path: Path,
        open_ledger: Callable[..., Ledger],
        say: Callable[[str], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._dice, self._faults, self._checker, self._disk = dice, faults, checker, disk
        self._path, self._open_ledger, self._say, self._fail = path, open_ledger, say, fail
        self.ledger: Ledger | None = None
        self._up = asyncio.Event()
        self.reserve_all = SimpleNamespace(remote=lambda requests: self._call(self._reserve, requests))
        self.terms = SimpleNamespace(remote=lambda account: self._call(self._terms, account))

    def begin(self, budgets: dict[str, int], token_hash: str) -> None:
        """Opens the accounts in a new log, before anything can fail."""
        self.ledger = self._opened()
        for account, budget in budgets.items():
            self.ledger.open(account, Terms("v", "soft", budget, token_hash))
        self._up.set()

    async def _call(self, method: Callable[[Any], Any], argument: Any) -> Any:
        """A call as Ray makes it: lost requests and answers are repeated, and what is raised is handed on."""
        while True:
            await asyncio.sleep(WAY * self._dice.random())
            if self._faults("request lost"):
                await asyncio.sleep(RESEND)
                continue
            await self._up.wait()
            for kind in ("ledger killed", "machine killed"):
                if self._up.is_set() and self._faults(kind):
                    self._die(kind, machine=kind == "machine killed")
            if not self._up.is_set():
                continue
            try:
                value = method(argument)
            except Killed as killed:
                self._die("killed while it writes", killed.machine)
                continue
            if not self._faults("response lost"):
                return value
            await asyncio.sleep(RESEND)

    def _reserve(self, requests: Sequence[Request]) -> list[Grant | Refused]:
        assert self.ledger is not None
        try:
            replies = self.ledger.reserve_all(requests)
        except (OSError, Killed) as error:
            self._say(f"ledger: {len(requests)} requests, and {type(error).__name__}")
            self._checker.failed(requests)
            raise
        self._say(f"ledger: {[(r.account, r.key, r.count) for r in requests]} -> {replies}")
        try:
            self._checker.replied(requests, replies)
        except Violation as violation:
            self._fail(violation)
            raise
        return replies

    def _terms(self, account: str) -> Terms:
        assert self.ledger is not None
        return self.ledger.terms(account)

    def _die(self, why: str, machine: bool) -> None:
        self._say(f"ledger: {why}")
        self._up.clear()
        self.ledger = None
        self._disk.die(machine)
        asyncio.get_running_loop().call_later(RESTART, self._restart)

    def _opened(self) -> Ledger:
        return self._open_ledger(self._path, disk=self._disk)

    def _restart(self) -> None:
        try:
            self.ledger = self._opened_tampered() if self._faults("tampered") else self._opened()
            self._say(f"ledger: restarted with {self.ledger.all_spent()}")
            self._checker.restarted(self.ledger)
        except (Violation, InputError) as violation:
            self._fail(violation)
        except Killed as killed:
            self._die("killed while it starts", killed.machine)
        except OSError:
            self._die("cannot start", machine=False)
        else:
            self._up.set()

    def _opened_tampered(self) -> Ledger:
        """A log that somebody has changed is refused, and its owner restores it. A change behind the last granted
        record may pass unnoticed: then the grants have to be right."""
        file, damaged = tampered(self._path, self._dice)
        restore = self._disk.damage(file, damaged)
        try:
            return self._opened()
        except InputError as refused:
            self._say(f"ledger: {str(refused).replace(str(self._path.parent), '')}")
            self._disk.die(machine=False)
            restore()
            return self._opened()

    def close(self) -> None:
        """Ends the history: the ledger is up, and its log says what it says."""
        demand(self.ledger is not None, "the ledger is down at the end")
        assert self.ledger is not None
        self._checker.ended(self.ledger)
        self.ledger.close()
