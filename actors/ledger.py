"""The ledger as a Ray actor: a thin shell around :class:`simulator.service.ledger.Ledger`.

The methods are ``async`` and never wait, so one runs at a time and no lock is needed. The actor may be killed at any
moment. Ray then starts it again, it replays its log, and Ray repeats the request, which the ledger does not charge
twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ray

from simulator.service.ledger import Grant, Ledger, Refused, Request, Terms

#: the empty mapping from accounts to attacks
NOTHING: Mapping[str, str] = MappingProxyType({})


class LedgerService:
    """The ledger's methods as coroutines."""

    def __init__(self, path: str, sync: bool) -> None:
        self._ledger = Ledger(Path(path), sync=sync)
        self._attacks: dict[str, str] = {}

    async def open(self, accounts: Mapping[str, Terms], attacks: Mapping[str, str] = NOTHING) -> int:
        """Opens several accounts (see :meth:`Ledger.open`); returns their remaining budget together.

        Args:
            attacks: the attack's name of each account, for a service that was started before they were known.
        """
        self._attacks |= attacks
        return sum(self._ledger.open(account, terms) for account, terms in accounts.items())

    async def reserve(self, account: str, token: str, key: int, count: int, digest: str) -> Grant:
        """See :meth:`Ledger.reserve`."""
        return self._ledger.reserve(account, token, key, count, digest)

    async def reserve_all(self, requests: Sequence[Request]) -> list[Grant | Refused]:
        """See :meth:`Ledger.reserve_all`."""
        return self._ledger.reserve_all(requests)

    async def terms(self, account: str) -> Terms:
        """See :meth:`Ledger.terms`."""
        return self._ledger.terms(account)

    async def attack(self, account: str) -> str | None:
        """The attack's name that an account was opened with. None if it had none, or if the ledger was started again
        since: the log does not hold it."""
        return self._attacks.get(account)

    async def spent(self, accounts: Sequence[str]) -> int:
        """Images charged to several accounts together."""
        return sum(self._ledger.spent(account) for account in accounts)

    async def all_spent(self) -> dict[str, int]:
        """See :meth:`Ledger.all_spent`."""
        return self._ledger.all_spent()


LedgerActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LedgerService)
