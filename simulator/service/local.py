"""The service, its ledger and its client in one process."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.service.ledger import Ledger
from simulator.service.log import QueryLog
from simulator.service.query import Query, check_form
from simulator.service.victim import VictimService


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
        started, digest = time.perf_counter(), None
        try:
            check_form(query)
            terms = self._ledger.terms(query.account)
            digest = self._service.check(terms.victim, query)
            grant = self._ledger.reserve(query.account, query.token, query.key, len(query.images), digest)
        except InputError as refusal:
            if self._log is not None and type(query) is Query:
                self._log.note(query, digest, refusal, started)
            raise
        answer = self._service.answer(terms.victim, terms.labels, query)
        if self._log is not None:
            self._log.note(query, digest, grant, started)
        return answer

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order."""
        return [self.send(query) for query in queries]
