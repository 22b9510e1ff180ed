"""The order of service, in one place: a query is checked, paid for, answered, and noted in the log.

:class:`Visit` follows one query through that order. The service in one process (:mod:`simulator.service.local`) takes
the steps one after the other. A Ray replica takes the same steps, and asks the ledger about many visits in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.service.ledger import Grant, Request, Terms
from simulator.service.log import QueryLog
from simulator.service.query import Query, check_form
from simulator.service.victim import VictimService

#: the reply to one query: probability rows ``(B, K)``, or why it was refused
Answer = NDArray[np.float32] | InputError


class Visit:
    """One query, from its arrival to its entry in the log. The constructor checks the query's form.

    Attributes:
        query: what was sent. It is a well-formed :class:`Query` unless ``reply`` is a refusal.
        terms: the terms of its account; None until :meth:`admit`.
        request: what the ledger is asked; None until :meth:`admit` has checked the images.
        reply: the ledger's grant, or why the query was refused; None until it is decided.
    """

    def __init__(self, query: Query, started: float) -> None:
        self.query, self._started = query, started
        self.terms: Terms | None = None
        self.request: Request | None = None
        self.reply: Grant | InputError | None = None
        with self.deciding():
            check_form(query)

    @property
    def refusal(self) -> InputError | None:
        """Why the query was refused; None where it was not."""
        return self.reply if isinstance(self.reply, InputError) else None

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A refusal that is raised inside the block becomes the visit's ``reply``."""
        try:
            yield
        except InputError as refusal:
            self.reply = refusal

    def admit(self, service: VictimService, terms: Terms) -> Request:
        """Checks the images against the victim of the account, and gives what the ledger is to be asked.

        Raises:
            MalformedQuery: see :meth:`VictimService.check`.
        """
        self.terms, query = terms, self.query
        digest = service.check(terms.victim, query.images)
        self.request = Request(query.account, query.token, query.key, len(query.images), digest)
        return self.request

    def answering(self, service: VictimService) -> Callable[[], NDArray[np.float32]]:
        """A function that computes the answer of a query that has been paid for."""
        assert self.terms is not None
        return service.answering(self.terms.victim, self.terms.labels, self.query)

    def note(self, log: QueryLog | None) -> None:
        """Enters the decided query into the log, if there is one. What is no :class:`Query` is not entered."""
        if log is not None and self.reply is not None and type(self.query) is Query:
            log.note(self.query, self.request.digest if self.request else None, self.reply, self._started)
