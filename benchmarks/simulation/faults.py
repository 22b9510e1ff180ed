"""Which faults a history has: a random part of all kinds, each as often as the history's dice say (swarm testing,
Groce et al., ISSTA 2012), and few enough for every history to end."""

from __future__ import annotations

from random import Random

#: everything that may happen
KINDS = (
    "request lost",  # between a client and a replica, or a replica and the ledger
    "response lost",
    "delayed",  # long enough for the client to ask again meanwhile
    "duplicated",
    "replica killed",
    "ledger killed",  # its process: what it wrote stays
    "machine killed",  # the ledger's: what it had not synced may be lost
    "killed while it writes",
    "disk full",
    "disk error",
    "client killed",  # and resumed from its checkpoint
    "damaged",  # a bit of the ledger's log is flipped while it is down
)
#: faults in one history, at most
MOST = 12


class Faults:
    """The faults of one history.

    Args:
        only: kinds in place of a random part of all.
    """

    def __init__(self, dice: Random, only: tuple[str, ...] | None = None) -> None:
        self._dice = dice
        chosen = [kind for kind in KINDS if dice.random() < 0.5] if only is None else list(only)
        self.rates = {kind: dice.choice((0.03, 0.1, 0.3)) for kind in chosen}
        self.left = dice.randint(1, MOST)
        self.happened: dict[str, int] = {}

    def __call__(self, kind: str) -> bool:
        """Whether a fault of a kind happens now."""
        rate = self.rates.get(kind)
        if rate is None or not self.left or self._dice.random() >= rate:
            return False
        self.left -= 1
        self.happened[kind] = self.happened.get(kind, 0) + 1
        return True
