"""The attackers of a history: the real oracle's chunks and keys, the real conversation, and three workloads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.conversation import Await, Conversation, Lost, Pause, Send, Steps
from benchmarks.simulation.checker import Checker, demand
from benchmarks.simulation.faults import Faults
from benchmarks.simulation.service import Unreachable, answer_to
from simulator.errors import InputError
from simulator.service.ledger import KeyReused, OverBudget, Unauthorised, digest_of
from simulator.service.oracle import ServiceOracle
from simulator.service.query import Query

#: faults end long before a client's patience does, so whoever gives up has forgotten to try again
PATIENCE = 1e6
TOKEN = "s3cret"

Batches = list[Tensor]


class Captured(Exception):
    """Carries the queries that the oracle wants to send."""

    def __init__(self, queries: list[Query]) -> None:
        super().__init__()
        self.queries = queries


class Waiting:
    """A transport between two worlds: the oracle calls it and does not wait, the simulation waits and may not be
    called. It first raises the queries, and when the oracle is asked again it has their answers."""

    def __init__(self) -> None:
        self.answers: list[NDArray[np.float32]] | None = None

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """See :class:`~simulator.service.oracle.Transport`."""
        if self.answers is None:
            raise Captured(queries)
        answers, self.answers = self.answers, None
        return answers


async def converse(steps: Steps, send: Callable[[list[Query]], asyncio.Future[Any]]) -> list[NDArray[np.float32]]:
    """Takes the steps of a conversation in virtual time."""
    outcome: Any = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as ended:
            answers: list[NDArray[np.float32]] = ended.value
            return answers
        if isinstance(step, Send):
            outcome = send(step.message)
        elif isinstance(step, Pause):
            outcome = await asyncio.sleep(step.seconds)
        else:
            assert isinstance(step, Await)
            outcome = await _outcome(step)


async def _outcome(step: Await) -> Any:
    """The answers, or that they were lost. What fails otherwise is raised."""
    await asyncio.wait((step.response,), timeout=step.seconds)
    if not step.response.done():
        return Lost(TimeoutError())
    error = step.response.exception()
    if isinstance(error, Unreachable):
        return Lost(error)
    return step.response.result()


class Client:
    """One attacker of an account.

    Args:
        send: sends a message; what it gives stands for the response.
        oracle: makes the account's oracle over a transport.
        conversation: makes the client's rules.
        first: the first key of :meth:`grab`, which no other client of the account has.
    """

    def __init__(
        self,
        account: str,
        batches: Batches,
        dice: Random,
        faults: Faults,
        checker: Checker,
        send: Callable[[list[Query]], asyncio.Future[Any]],
        oracle: Callable[[str, Any], ServiceOracle],
        conversation: Callable[[], Conversation],
        say: Callable[[str], None],
        first: int = 0,
    ) -> None:
        self.account, self._batches, self._dice, self._faults = account, batches, dice, faults
        self._checker, self._send, self._oracle, self._new = checker, send, oracle, conversation
        self._say, self._first = say, first
        self._saved = (0, (0, 0))
        self._task: asyncio.Task[None] | None = None

    async def live(self, work: Callable[[], Any]) -> None:
        """Does a work to its end, in as many lives as it takes: a death or a disk that failed ends one, and the next
        goes on from the checkpoint."""
        while True:
            self._task = asyncio.get_running_loop().create_task(work())
            await asyncio.wait((self._task,))
            if self._task.cancelled():
                self._say(f"{self.account}: killed")
                continue
            error = self._task.exception()
            if error is None:
                return
            if not isinstance(error, OSError):
                demand(not isinstance(error, Unreachable | TimeoutError), "{} gave up: {!r}", self.account, error)
                demand(not isinstance(error, InputError), "{} was refused: {}", self.account, error)
                raise error
            self._say(f"{self.account}: {error}")
            await asyncio.sleep(1.0)

    def maybe_die(self) -> None:
        """Ends this life, if the faults say so."""
        if self._task is not None and not self._task.done() and self._faults("client killed"):
            self._task.cancel()

    async def transfer(self) -> None:
        """Asks its batches in their order, from the checkpoint on. (An attack is a function of its seed, so one that
        begins anew asks the same.)"""
        transport = Waiting()
        oracle, conversation = self._oracle(self.account, transport), self._new()
        at, counters = self._saved
        oracle.restore(*counters)
        while at < len(self._batches):
            await self._ask(oracle, transport, conversation, self._batches[at])
            at += 1
            if self._dice.random() < 0.5:
                self._saved = (at, oracle.counters())

    async def _ask(self, oracle: ServiceOracle, transport: Waiting, conversation: Conversation, images: Tensor) -> None:
        before = oracle.counters()
        try:
            oracle.query(images)
        except Captured as captured:
            queries = captured.queries
        oracle.restore(*before)
        transport.answers = await converse(conversation.ask(queries), self._send)
        for query, rows in zip(queries, transport.answers, strict=True):
            self._answered(query, rows)
        found = oracle.query(images)
        demand(len(found) == len(images), "{} images got {} answers", len(images), len(found))

    def _answered(self, query: Query, rows: NDArray[np.float32]) -> None:
        digest = digest_of(np.ascontiguousarray(query.images).data.cast("B"))
        self._checker.answered(query.account, query.key, digest, rows.tobytes(), answer_to(query).tobytes())

    async def again(self) -> None:
        """Buys, and then asks its keys once more: with the same images, with others, and beyond its rights."""
        await self.transfer()
        images = self._batches[0][:2].contiguous().numpy()
        await self._raw(Query(self.account, TOKEN, 0, images), None)
        others = images ^ 1
        await self._raw(Query(self.account, TOKEN, 0, others), KeyReused)
        await self._raw(Query(self.account, "guess", 0, images), Unauthorised)
        await self._raw(Query(self.account, TOKEN, 10**6, np.repeat(images, 40, 0)), OverBudget)

    async def grab(self) -> None:
        """Races with the others of its account for the last images: some are refused, and none is charged for that."""
        for key, images in enumerate(self._batches, start=self._first):
            await self._raw(Query(self.account, TOKEN, key, images.numpy()), OverBudget, must=False)

    async def _raw(self, query: Query, wanted: type[InputError] | None, *, must: bool = True) -> None:
        """One query under a key of its own, which is to be answered, or refused as ``wanted``."""
        while True:
            try:
                (rows,) = await converse(self._new().ask([query]), self._send)
            except OSError:  # the disk failed: the same client asks under the same key
                await asyncio.sleep(1.0)
                continue
            except InputError as refusal:
                found = type(refusal)
                demand(wanted is not None and found is wanted, "{} was refused: {}", query.account, refusal)
            else:
                demand(wanted is None or not must, "{} was answered what it may not ask", query.account)
                self._answered(query, rows)
            return


def batches_of(dice: Random, count: int) -> Batches:
    """Images of an attack, which are a function of its seed: batches ``(B, 1, 2, 2)`` uint8, B from 1 to 5."""
    sizes = [dice.randint(1, 5) for _ in range(count)]
    data = torch.frombuffer(bytearray(dice.randbytes(4 * sum(sizes))), dtype=torch.uint8)
    return list(data.view(-1, 1, 2, 2).split(sizes))
