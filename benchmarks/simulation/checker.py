"""A model of the account book in one thread, which knows the linear order of all grants and checks it as it goes.

The ledger decides one call at a time, so the order of its calls is the order of the history, and no search for one is
needed: each check takes constant time, and a whole history time linear in its events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from simulator.service.ledger import Grant, KeyReused, Ledger, OverBudget, Refused, Request, Unauthorised

Name = tuple[str, int]
Paid = tuple[int, str]


class Violation(Exception):
    """The history is not one that the contract allows."""


def demand(holds: bool, what: str, *found: object) -> None:
    """Raises a :class:`Violation` unless something holds."""
    if not holds:
        raise Violation(what.format(*found))


class Checker:
    """The contract of the account book.

    Args:
        budgets: of each account.
        token: the one secret of all accounts.
    """

    def __init__(self, budgets: dict[str, int], token: str) -> None:
        self._budgets, self._token = budgets, token
        self._grants: dict[Name, Paid] = {}
        self._spent: Counter[str] = Counter()
        self._doubt: dict[Name, Paid] = {}
        self._answers: dict[Name, tuple[str, bytes]] = {}

    # -- the ledger's side -------------------------------------------------------------------------------------------

    def replied(self, requests: Sequence[Request], replies: Sequence[Grant | Refused]) -> None:
        """The ledger has decided a call, and what it granted is to be on the disk."""
        demand(len(requests) == len(replies), "{} requests got {} replies", len(requests), len(replies))
        fresh = False
        for asked, reply in zip(requests, replies, strict=True):
            wanted = self._decide(asked)
            found = reply if isinstance(reply, Grant) else type(reply)
            demand(found == wanted, "{} got {!r}, the contract says {}", asked, reply, wanted)
            fresh |= isinstance(reply, Grant) and reply.fresh
        if fresh:
            self._doubt.clear()  # a later record is synced, so no earlier one that was cut off can come back

    def failed(self, requests: Sequence[Request]) -> None:
        """A call has ended in an error or with the ledger's death: what it would have granted is in doubt."""
        self._doubt |= {(asked.account, asked.key): (asked.count, asked.digest) for asked in requests}

    def restarted(self, ledger: Ledger) -> None:
        """The ledger has read its log after its death: every synced record is there, and nothing that nobody asked."""
        demand(ledger.all_spent().keys() == self._budgets.keys(), "the accounts became {}", sorted(ledger.all_spent()))
        found = {(name, key): paid for name in self._budgets for key, paid in ledger.grants(name).items()}
        for name, paid in self._grants.items():
            demand(found.get(name) == paid, "the grant {} of {} became {}", name, paid, found.get(name))
        for name in found.keys() - self._grants.keys():
            demand(self._doubt.get(name) == found[name], "nobody asked for the grant {} of {}", name, found[name])
            self._spent[name[0]] += found[name][0]
        self._grants, self._doubt = found, {}
        self.balanced(ledger)

    @property
    def charged(self) -> int:
        """Images charged to all accounts."""
        return self._spent.total()

    def balanced(self, ledger: Ledger) -> None:
        """Every account is charged for its grants, and within its budget."""
        for account, budget in self._budgets.items():
            spent = ledger.spent(account)
            demand(spent == self._spent[account] <= budget, "{} is charged {} of {}", account, spent, budget)

    def _decide(self, asked: Request) -> Any:
        """The reply that the contract demands: a grant, or the type of a refusal."""
        name, paid = (asked.account, asked.key), (asked.count, asked.digest)
        budget = self._budgets.get(asked.account)
        if budget is None or asked.token != self._token:
            return Unauthorised
        left = budget - self._spent[asked.account]
        if name in self._grants:
            return Grant(asked.count, False, left) if self._grants[name] == paid else KeyReused
        if asked.count > left:
            return OverBudget
        self._grants[name] = paid
        self._spent[asked.account] += asked.count
        return Grant(asked.count, True, left - asked.count)

    # -- the clients' side -------------------------------------------------------------------------------------------

    def answered(self, account: str, key: int, digest: str, rows: bytes, wanted: bytes) -> None:
        """A client was answered: it has been paid for, and every time it is the same and right answer."""
        name = (account, key)
        demand(self._grants.get(name, (0, ""))[1] == digest, "{} was answered and not paid for", name)
        demand(rows == wanted, "{} was answered wrongly", name)
        demand(self._answers.setdefault(name, (digest, rows)) == (digest, rows), "{} was answered in two ways", name)

    def ended(self, ledger: Ledger) -> None:
        """All clients have what they asked for: what was charged was answered, and the other way round."""
        self.balanced(ledger)
        lost = self._grants.keys() ^ self._answers.keys()
        demand(not lost, "paid and not answered, or answered and not paid: {}", sorted(lost))
