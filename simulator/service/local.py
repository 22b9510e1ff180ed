"""The service, its ledger and its client in one process."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.service.ledger import Ledger
from simulator.service.log import QueryLog
from simulator.service.query import Query
from simulator.service.victim import VictimService
from simulator.service.visit import Visit


class LocalTransport:
    """The service, its ledger and its client in one process."""

    def __init__(self, service: VictimService, ledger: Ledger, log: QueryLog | None = None) -> None:
        self._service, self._ledger, self._log = service, ledger, log

    def send(self, query: Query) -> NDArray[np.float32]:
        """The answer to one query.

        Raises:
            MalformedQuery: something is wrong with the query.
            Refused: the ledger does not pay for it.
        """
        visit = Visit(query, time.perf_counter())
        if visit.reply is None:
            with visit.deciding():
                request = visit.admit(self._service, self._ledger.terms(query.account))
                (visit.reply,) = self._ledger.reserve_all([request])
        answer = visit.refusal or visit.answering(self._service)()
        visit.note(self._log)
        if isinstance(answer, InputError):
            raise answer
        return answer

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order."""
        return [self.send(query) for query in queries]
