"""Bugs that are planted, to see that the checker finds them and after how many histories."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from actors.conversation import Conversation, Lost
from benchmarks.simulation.history import Parts
from simulator.service import ledger as ledger_module
from simulator.service.ledger import Grant, Ledger, Request
from simulator.service.oracle import ServiceOracle


class KeyAgain(ServiceOracle):
    """Goes on from a checkpoint with the last key in place of the next."""

    def restore(self, asked: int, key: int) -> None:
        """See :class:`ServiceOracle`."""
        super().restore(asked, max(0, key - 1))


class GivesUp(Conversation):
    """Takes the first loss of a message for the last word."""

    def _result(self, message: Any, response: Any) -> Any:
        steps, outcome = super()._result(message, response), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as ended:
                return ended.value
            outcome = yield step
            if isinstance(outcome, Lost):
                raise outcome.error


class ChargesTwice(Ledger):
    """Charges a key that was paid for once more, where the budget allows."""

    def _decide(self, asked: Request) -> Grant:
        grant = super()._decide(asked)
        entry = self._accounts[asked.account]
        if grant.fresh or grant.remaining < asked.count:
            return grant
        entry.spent += asked.count
        return Grant(asked.count, False, grant.remaining - asked.count)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _without_hash() -> Any:
    """The log's checksums are not looked at."""

    def parse(line: bytes) -> dict[str, Any] | None:
        try:
            record: Any = json.loads(line[9:])
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    return patch.object(ledger_module, "_parse", parse)


#: what each bug is, the parts that have it, and what has to be replaced besides
PLANTS: dict[str, tuple[Parts, Callable[[], Any]]] = {
    "remove the sync": (Parts(ledger=functools.partial(Ledger, sync=False)), _nothing),
    "reuse a key": (Parts(oracle=KeyAgain), _nothing),
    "skip the hash": (Parts(), _without_hash),
    "forget a retry": (Parts(conversation=GivesUp), _nothing),
    "charge twice": (Parts(ledger=functools.partial(ChargesTwice, sync=True)), _nothing),
}
