"""The prediction service on Ray Serve: one replica, and its deployment.

A query goes attacker -> replica -> ledger -> replica -> attacker. The replica checks the images, has the ledger charge
them, and only then answers (:mod:`simulator.service.visit`). The same query always gets the same answer, so
:class:`~actors.transport.ServeTransport` asks again, at no charge, where an answer was lost.

Several queries of a client travel in one message, because only the model itself costs more time than a message does.
Each query is still checked, charged, answered or refused by itself.

A replica computes in one thread, where accounts take turns. Meanwhile its event loop decodes and checks the next
messages, and one call to the ledger charges all that wait. A replica holds at most :data:`MAX_PER_ACCOUNT` messages of
an account. It sends the next one away, unpaid, and the client sends it again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from actors.conversation import Busy
from actors.devices import Placement, settle
from actors.failures import innermost
from actors.ledger import NOTHING
from actors.metrics import Tally, VictimMetrics
from actors.turns import Teller, Worker
from simulator.errors import InputError
from simulator.models import from_bytes
from simulator.service.ledger import Grant, Request, Terms
from simulator.service.log import QueryLog
from simulator.service.query import MalformedQuery, Query
from simulator.service.victim import Hide, Precision, VictimService
from simulator.service.visit import Answer, Visit

#: messages that one replica holds at once; the rest wait at the clients. A message has at most 3 MiB, so this bounds
#: the replica's memory
MAX_ONGOING = 256


#: messages of one account that a replica holds at once
MAX_PER_ACCOUNT = 4


#: bytes of victims' weights that a replica keeps. Beyond that it drops the victim whose last query is the oldest, and
#: reads it from the shelf again when it is asked
ROOM = 1 << 30


#: messages that wait at one client, at most
MAX_QUEUED = 256


#: how often the service is started. Serve gives it up after three replicas in a row that did not come, as when the
#: calls that set them up were lost on the way
START_TRIES = 4


class Replica:
    """One replica, which answers for all victims. It counts nothing: a replica may die at any time, the ledger
    stays."""

    def __init__(
        self,
        ledger: ActorHandle[Any],
        shelf: ActorHandle[Any],
        placement: Placement,
        precision: Precision = "full",
        attacks: Mapping[str, str] = NOTHING,
        log: ActorHandle[Any] | None = None,
        hide: Hide | None = None,
    ) -> None:
        self._ledger, self._shelf = ledger, shelf
        self._attacks = dict(attacks)  # empty in a sweep, whose accounts are opened later: _know asks for their attacks
        self._metrics = VictimMetrics(self._attacks)
        self._log = QueryLog(lambda name, data: ray.get(log.write.remote(name, data)), self._attacks) if log else None
        self._service = VictimService(settle(placement), precision, room=ROOM, hide=hide)
        self._terms: dict[str, Terms] = {}
        self._worker = Worker(lambda: torch.set_num_threads(1))
        self._teller = Teller(lambda requests: ledger.reserve_all.remote(list(requests)), self._worker.low)
        self._present: Counter[tuple[str, str]] = Counter()

    async def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Probability rows ``(B, K)`` float32 for each query, charged to its account, or why it was refused.

        A query that is malformed, or that the ledger refuses, charges nothing and does not touch the others.
        """
        return [answer for answer, _ in await self.answer_with_grants(queries)]

    async def answer_with_grants(self, queries: Sequence[Query]) -> list[tuple[Answer, Grant | None]]:
        """As :meth:`answer`, each answer with the ledger's grant, or None for a query that was refused."""
        if not isinstance(queries, list | tuple):
            raise MalformedQuery(f"message of type {type(queries).__name__}; allowed: a list of queries")
        started = time.perf_counter()
        visits = [Visit(query, started) for query in queries]
        # an account's places are counted with its token: nobody without the token can take them
        owners = {(visit.query.account, visit.query.token) for visit in visits if visit.reply is None}
        if any(self._present[owner] >= MAX_PER_ACCOUNT for owner in owners):
            busy = Busy(f"more than {MAX_PER_ACCOUNT} messages under way at one replica")
            return [(busy, None) for _ in queries]
        self._present.update(owners)
        try:
            return await self._answered(visits, started)
        finally:
            self._present.subtract(owners)
            for owner in owners:
                if not self._present[owner]:
                    del self._present[owner]

    async def _answered(self, visits: Sequence[Visit], started: float) -> list[tuple[Answer, Grant | None]]:
        requests = [request for visit in visits if (request := await self._admit(visit)) is not None]
        grants = iter(await self._teller.reserve(requests) if requests else ())
        for visit in visits:
            if visit.reply is None:
                visit.reply = next(grants)
        replied = await asyncio.gather(*(self._reply(visit) for visit in visits))
        answers = [answer for answer, _ in replied]
        self._tell(visits, answers, time.perf_counter() - started - sum(seconds for _, seconds in replied))
        for visit in visits:
            visit.note(self._log)
        granted = [visit.reply if isinstance(visit.reply, Grant) else None for visit in visits]
        return list(zip(answers, granted, strict=True))

    async def _reply(self, visit: Visit) -> tuple[Answer, float]:
        """The answer to a query, and the seconds that it took to compute."""
        if not isinstance(visit.reply, Grant):
            assert visit.reply is not None
            return visit.reply, 0.0
        assert visit.terms is not None
        await self._load(visit.terms.victim)  # it may have been dropped for another while the ledger was asked
        answer = visit.answering(self._service)

        def work() -> tuple[Answer, float]:
            clock = time.perf_counter()
            return answer(), time.perf_counter() - clock

        return await self._worker.run(visit.query.account, visit.reply.count, work)

    def _tell(self, visits: Sequence[Visit], answers: Sequence[Answer], waiting: float) -> None:
        """Counts a message in the metrics: one call an account, so one for a client's message."""
        tallies: dict[str, Tally] = {}
        for visit, answer in zip(visits, answers, strict=True):
            # a query that names no open account is counted under no account
            account = visit.query.account if visit.terms is not None else ""
            tally = tallies.setdefault(account, Tally())
            if not isinstance(answer, InputError):
                tally.answered += len(answer)
                tally.asked += len(answer)
                continue
            tally.refused += 1
            images = visit.query.images if account else None
            if isinstance(images, np.ndarray) and images.ndim:
                tally.asked += len(images)
        for account, tally in tallies.items():
            victim = self._terms[account].victim if account else "unknown"
            self._metrics.tell(account, victim, tally, max(0.0, waiting))

    def __del__(self) -> None:
        """Writes what waits in the query log. Serve calls this before it stops a replica."""
        log: QueryLog | None = getattr(self, "_log", None)
        if log is not None:
            log.close()

    async def _admit(self, visit: Visit) -> Request | None:
        """What the ledger is asked for a query; None where it was refused."""
        if visit.reply is not None:
            return None
        try:
            terms = await self._know(visit.query.account)
        except InputError as refusal:  # Ray raises an error that is both a RayTaskError and of its cause's type
            cause = innermost(refusal)
            visit.reply = cause if isinstance(cause, InputError) else refusal
            return None
        await self._load(terms.victim)
        with visit.deciding():
            visit.admit(self._service, terms)
        return visit.request

    async def _load(self, victim: str) -> None:
        """Takes a victim from the shelf, if it is not here. A victim that is here is found without awaiting."""
        if victim not in self._service:
            self._service.add(victim, from_bytes(await self._shelf.get.remote(victim)))

    async def _know(self, account: str) -> Terms:
        """An account's terms, from the ledger at the first time. The account's attack comes with them, if the service
        was not told it at its start.

        Raises:
            InputError: there is no such account.
        """
        if account not in self._terms:
            terms: Terms = await self._ledger.terms.remote(account)
            if account not in self._attacks and (attack := await self._ledger.attack.remote(account)) is not None:
                self._attacks[account] = attack
            self._terms[account] = terms
        return self._terms[account]


def deploy(
    name: str,
    ledger: ActorHandle[Any],
    shelf: ActorHandle[Any],
    placement: Placement,
    replicas: int = 1,
    precision: Precision = "full",
    attacks: Mapping[str, str] = NOTHING,
    log: ActorHandle[Any] | None = None,
    hide: Hide | None = None,
) -> DeploymentHandle[Replica]:
    """Starts the service as a Serve application without an HTTP door; returns its handle.

    Args:
        attacks: the attack's name of each account, for the metrics and the query log.
        log: the actor :class:`actors.stores.LogFiles`; None without a query log.
        hide: puts an evasion before the models.
    """
    # a proxy would take port 8000 of every node, and nobody would use it. Where Serve runs already, nothing changes
    serve.start(proxy_location="Disabled")
    deployment: Any = serve.deployment(
        Replica,
        name="victim",
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        ray_actor_options=placement.options(),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    application = deployment.bind(ledger, shelf, placement, precision, dict(attacks), log, hide)
    for _ in range(START_TRIES - 1):
        with suppress(RuntimeError):
            return _run(application, name)
    return _run(application, name)


def _run(application: Any, name: str) -> DeploymentHandle[Replica]:
    handle: DeploymentHandle[Replica] = serve.run(application, name=name, route_prefix=None)
    return handle
