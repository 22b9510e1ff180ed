"""One history: a few clients, two replicas and a ledger, from a seed."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from actors.conversation import Conversation
from benchmarks.simulation.checker import Checker, Violation
from benchmarks.simulation.clients import PATIENCE, TOKEN, Client, batches_of
from benchmarks.simulation.clock import Stuck, VirtualLoop
from benchmarks.simulation.disk import DEATHS, Disk
from benchmarks.simulation.faults import Faults
from benchmarks.simulation.service import WAY, LedgerHost, Service, SimulatedReplica, Unreachable
from simulator.errors import InputError
from simulator.service import ledger as ledgers
from simulator.service import oracle as oracles
from simulator.service.ledger import Ledger, hash_token
from simulator.service.oracle import ServiceOracle
from simulator.service.query import Query

#: images in one query, so that a batch of five makes three
CHUNK = 2
#: replicas of the service
REPLICAS = 2
#: seconds of virtual time that a late message takes: longer than a client waits
LATE = 200.0
TOKEN_HASH = hash_token(TOKEN)
SYNCED = functools.partial(Ledger, sync=True)


@dataclass(frozen=True)
class Parts:
    """The real parts, which a planted bug replaces."""

    ledger: Callable[..., Ledger] = SYNCED
    oracle: type[ServiceOracle] = ServiceOracle
    conversation: type[Conversation] = Conversation


REAL = Parts()


@dataclass
class Result:
    """What a history was: its end, which faults it had, and its lines, if they were asked for.

    Attributes:
        violation: what the contract does not allow; empty for a good history.
        images: that were charged.
    """

    seed: int
    violation: str = ""
    workloads: tuple[str, ...] = ()
    happened: dict[str, int] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


@functools.cache
def _place(process: int) -> Path:
    """Where the ledger of a process's histories lies: in memory, where there is such a folder. A forked process, whose
    number is another one, has a folder of its own."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"exsim-simulation-{process}-", dir=shared if shared.is_dir() else None))
    # by multiprocessing, as a forked worker does not come to what is registered with atexit
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=1)
    return folder / "ledger.log"


def run(seed: int, parts: Parts = Parts(), *, trace: bool = False) -> Result:
    """The history of a seed."""
    loop = VirtualLoop()
    with patch.object(oracles, "CHUNK", CHUNK), patch.object(ledgers, "time", SimpleNamespace(monotonic=loop.time)):
        return _run(seed, parts, loop, trace)


def _run(seed: int, parts: Parts, loop: VirtualLoop, trace: bool) -> Result:
    result, path = Result(seed), _place(os.getpid())
    for file in path.parent.iterdir():
        file.unlink()
    say = _quiet
    if trace:

        def say(line: str) -> None:
            result.lines.append(f"{loop.time():12.4f}  {line}")

    asyncio.set_event_loop(loop)
    try:
        history = _History(Random(seed), parts, path, say, result, loop)
        loop.run_until_complete(history.run())
    except (Violation, Stuck) as violation:
        result.violation = str(violation) or type(violation).__name__
    except InputError as refused:  # a log that the ledger itself wrote, and refuses
        result.violation = f"refused: {refused}"
    finally:
        result.seconds = loop.time()
        loop.set_exception_handler(lambda *_: None)  # who waits still, waits for ever
        asyncio.set_event_loop(None)
        loop.close()
        history.disk.die(machine=False)
    return result


def _quiet(line: str) -> None:
    """Says nothing."""


class _History:
    def __init__(
        self,
        dice: Random,
        parts: Parts,
        path: Path,
        say: Callable[[str], None],
        result: Result,
        loop: VirtualLoop,
    ) -> None:
        self._dice, self._parts, self._say, self._result = dice, parts, say, result
        self._faults = Faults(dice)
        self._quiet_disk = True
        self._budgets: dict[str, int] = {}
        self._checker = Checker(self._budgets, TOKEN)
        self.disk = Disk(dice, self._disk_fault)
        self._ledger = LedgerHost(dice, self._faults, self._checker, self.disk, path, parts.ledger, say, self._fail)
        self._failure: asyncio.Future[None] = asyncio.Future(loop=loop)
        self._never = asyncio.Event()
        self._replicas: list[SimulatedReplica] = []
        self._clients: list[Client] = []

    async def run(self) -> None:
        """Sets the scene and plays it to its end."""
        works = self._cast()
        self._ledger.begin(self._budgets, TOKEN_HASH)
        self._quiet_disk = False
        self._attacks = dict.fromkeys(self._budgets, "attack")
        self._service = Service()
        for _ in range(REPLICAS):
            self._start_replica()
        lives = [asyncio.ensure_future(client.live(work)) for client, work in works]
        for life in lives:
            life.add_done_callback(self._seen)
        await asyncio.wait(
            (asyncio.gather(*lives, return_exceptions=True), self._failure), return_when=asyncio.FIRST_COMPLETED
        )
        if self._failure.done():
            self._failure.result()
        self._faults.left = 0
        await asyncio.sleep(2 * LATE)  # what is still under way arrives, and must do no harm
        if self._failure.done():
            self._failure.result()
        self._ledger.close()
        self._result.happened = self._faults.happened
        self._result.images = self._checker.charged

    def _seen(self, life: asyncio.Future[Any]) -> None:
        error = None if life.cancelled() else life.exception()
        if isinstance(error, Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def _cast(self) -> list[tuple[Client, Callable[[], Any]]]:
        """The clients and their work, by workload; every workload has an account of its own."""
        dice, works = self._dice, []
        workloads = tuple(dice.choice(("transfer", "again", "doubt", "grab")) for _ in range(dice.randint(1, 2)))
        for number, workload in enumerate(workloads):
            account = f"{workload}-{number}"
            batches = batches_of(dice, dice.randint(1, 3))
            total = sum(map(len, batches))
            twins = 2 if workload in ("doubt", "grab") else 1
            self._budgets[account] = max(1, total * 3 // 2) if workload == "grab" else total
            for twin in range(twins):
                client = self._client(account, batches, first=1000 * twin)
                work = {"transfer": client.transfer, "doubt": client.transfer}.get(workload)
                works.append((client, work or getattr(client, workload)))
        self._result.workloads = workloads
        return works

    def _client(self, account: str, batches: Any, first: int) -> Client:
        budget = self._budgets[account]

        def oracle(name: str, transport: Any) -> ServiceOracle:
            return self._parts.oracle(transport, name, TOKEN, labels="soft", classes=2, shape=(1, 2, 2), budget=budget)

        def conversation() -> Conversation:
            return self._parts.conversation(asyncio.get_running_loop().time, patience=PATIENCE)

        send = functools.partial(self._send, account)
        client = Client(
            account, batches, self._dice, self._faults, self._checker, send, oracle, conversation, self._say, first
        )
        self._clients.append(client)
        return client

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def _disk_fault(self, call: str) -> str:
        if self._quiet_disk:
            return ""
        if self._faults("killed while it writes"):
            return self._dice.choice(tuple(DEATHS))
        if call == "write" and self._faults("disk full"):
            return "full"
        return "error" if self._faults("disk error") else ""

    def _start_replica(self) -> None:
        self._replicas.append(SimulatedReplica(self._ledger, self._service, self._attacks))

    def _kill_replica(self) -> None:
        if self._replicas:
            replica = self._replicas.pop(self._dice.randrange(len(self._replicas)))
            self._say("a replica is killed")
            replica.die()
            asyncio.get_running_loop().call_later(1.0, self._start_replica)

    def _send(self, account: str, message: list[Query]) -> asyncio.Future[Any]:
        self._dice.choice(self._clients).maybe_die()
        task = asyncio.ensure_future(self._deliver(account, message))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio complains
        return task

    async def _deliver(self, account: str, message: list[Query]) -> Any:
        """The way of a message to a replica, and of its answer back."""
        dice, faults, keys = self._dice, self._faults, [query.key for query in message]
        await asyncio.sleep(WAY * dice.random())
        self._say(f"{account} sends {keys}")
        if faults("request lost"):
            self._say(f"{account}: request {keys} lost")
            return await self._unreachable()
        if faults("delayed"):
            await asyncio.sleep(LATE * dice.random())
        if faults("duplicated"):
            asyncio.get_running_loop().call_later(LATE * dice.random(), self._handle, message)
        task = self._handle(message)
        if faults("replica killed"):
            asyncio.get_running_loop().call_later(0.01 * dice.random(), self._kill_replica)
        if task is None:
            return await self._unreachable()
        try:
            answers = await task
        except asyncio.CancelledError:
            raise Unreachable("the replica died") from None
        if faults("response lost"):
            self._say(f"{account}: response {keys} lost")
            return await self._unreachable()
        self._say(f"{account} hears of {keys}")
        return answers

    def _handle(self, message: list[Query]) -> asyncio.Task[Any] | None:
        """Has some replica handle a message; None where there is none."""
        if not self._replicas:
            return None
        replica = self._dice.choice(self._replicas)
        task = asyncio.get_running_loop().create_task(replica.answer(message))
        replica.tasks.add(task)
        task.add_done_callback(replica.tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _unreachable(self) -> Any:
        """What a client sees of a loss: an error, or nothing at all."""
        if self._dice.random() < 0.5:
            await self._never.wait()
        raise Unreachable("lost")
