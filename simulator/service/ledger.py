"""The query account: exact, durable and idempotent.

Every account has a budget in images. A grant is written to disk before it is given, so after any kill

    answered images = charged images <= budget

holds for every account. A grant is named by the account and by a key that the client chooses. To ask again with the
same key and the same images is free, as a client does when an answer was lost on the way. The same key with other
images is refused.

The file is a log whose records are chained by hashes (:mod:`simulator.chain`). A kill may tear the last line: it has no
end then, was never acknowledged, and is cut off. Any other change to the file is damage, and the file is refused.

Beside the log lies its head, ``head.json``: how many records there were when it was written, and the last one's hash. A
log that does not hold its head was cut, edited, or replaced by an older copy, and is refused, too. The head is written
when the ledger begins and ends, and every few seconds; so after a kill the log may be ahead of it.

One process has the file at a time, by a lock that the system takes from a killed process. Without the lock, the ledger
of a killed driver could live on for a moment, and make grants that the next ledger would not know.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator import chain
from simulator.chain import Head, Reader
from simulator.errors import InputError
from simulator.files import Disk, Log

#: seconds after which a grant is followed by a new head
HEAD_SECONDS = 5.0
#: keys are natural numbers below this
KEYS = 2**63
#: characters of an unknown account's name that a message repeats
SHOWN = 60


class Refused(InputError):
    """The ledger refused a request, and charged nothing."""


class Unauthorised(Refused):
    """No such account, or not its token."""


class KeyReused(Refused):
    """The key has paid for other images."""


class OverBudget(Refused):
    """More images were asked than the account has left."""


@dataclass(frozen=True)
class Terms:
    """The terms of an account, which never change.

    Attributes:
        victim: id of the model that answers.
        labels: answer mode (see :mod:`simulator.service.answers`).
        budget: images that may be charged.
        token_hash: SHA-256 hex digest of the account's secret token; the token itself is never stored.
    """

    victim: str
    labels: str
    budget: int
    token_hash: str


@dataclass(frozen=True)
class Request:
    """What :meth:`Ledger.reserve` is asked; ``digest`` is :func:`digest_of` of the images."""

    account: str
    token: str
    key: int
    count: int
    digest: str


@dataclass(frozen=True)
class Grant:
    """A permission to answer ``count`` images; ``fresh`` is false where the key was already paid for."""

    count: int
    fresh: bool
    remaining: int


@dataclass
class _Account:
    terms: Terms
    spent: int = 0
    grants: dict[int, tuple[int, str]] = field(default_factory=dict)


def hash_token(token: str) -> str:
    """The form of a token that the ledger keeps."""
    return hashlib.sha256(token.encode()).hexdigest()


def digest_of(data: bytes | memoryview) -> str:
    """The 128-bit BLAKE2b digest (hex) by which the ledger knows a batch of images."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Ledger:
    """The account book over one log file, which is replayed when it exists.

    Args:
        path: the log.
        sync: wait for the disk at every grant. Without it a grant survives every kill of a process, but not a crash of
            the whole machine.
        disk: through which everything is written.

    Raises:
        InputError: the log is damaged, or does not hold its head, or another process has it and does not end in time
            (see :class:`simulator.files.Log`).
    """

    def __init__(self, path: Path, *, sync: bool = False, disk: Disk | None = None) -> None:
        self._path, self._disk = path, disk
        self._accounts: dict[str, _Account] = {}
        self._log = Log(path, sync=sync, disk=disk)
        try:
            self._kept = chain.read_head(path)
            self._count, self._hash = self._replay()
            self._keep_head()
        except BaseException:
            self._log.close()
            raise

    def open(self, account: str, terms: Terms) -> int:
        """Opens an account, or finds it open on the same terms. Returns its remaining budget in images."""
        known = self._accounts.get(account)
        if known is None:
            if terms.budget < 1:
                raise Refused(f"account {account}: budget {terms.budget} is not at least 1")
            record = {"open": account, **terms.__dict__}
            if not _is(record, OPENED):
                raise Refused(f"account {account}: the budget must be an integer, and victim, labels and token text")
            before = self._count
            try:
                self._write([json.dumps(record, separators=(",", ":")).encode()])
            finally:
                if self._count > before:  # also where an interrupt came just after it was written
                    self._accounts[account] = _Account(terms)
            known = self._accounts[account]
            self._keep_head_if_due()
        elif known.terms != terms:
            raise Refused(f"account {account} is already open on other terms: {known.terms}, not {terms}")
        return known.terms.budget - known.spent

    def reserve(self, account: str, token: str, key: int, count: int, digest: str) -> Grant:
        """Charges ``count`` images to the account under ``key``, unless that key has paid for these images already.

        Raises:
            Unauthorised: no such account, or not its token.
            KeyReused: the key belongs to other images.
            OverBudget: the budget does not suffice.
            Refused: a key below 0, no image, or something asked is of another type than it has to be.
        """
        (reply,) = self.reserve_all([Request(account, token, key, count, digest)])
        if isinstance(reply, Refused):
            raise reply
        return reply

    def reserve_all(self, requests: Sequence[Request]) -> list[Grant | Refused]:
        """The reply of :meth:`reserve` to each of several requests. A refused request does not touch the others.

        One write puts all grants on the disk, before any of them is given. With ``sync`` the disk is waited for once.
        """
        replies: list[Grant | Refused] = []
        fresh: list[Request] = []
        before = self._count
        try:
            for asked in requests:
                try:
                    grant = self._decide(asked)
                except Refused as refusal:
                    replies.append(refusal)
                    continue
                replies.append(grant)
                if grant.fresh:
                    fresh.append(asked)
            if fresh:
                self._write([_grant(asked) for asked in fresh])
        except BaseException:
            if self._count == before:  # else an interrupt came when all was written
                for undone in fresh:
                    entry = self._accounts[undone.account]
                    entry.spent -= entry.grants.pop(undone.key)[0]
            raise
        if fresh:
            self._keep_head_if_due()
        return replies

    def _decide(self, asked: Request) -> Grant:
        """The reply to one request, with a fresh grant entered into the account and not yet on the disk."""
        account, key, count, digest = asked.account, asked.key, asked.count, asked.digest
        entry = self._find(account)
        # an unknown account and a wrong token get the same refusal, so that nobody learns which accounts exist
        if entry is None or not _fits(asked.token, entry.terms):
            raise Unauthorised(f"account {_shown(account)}: unknown account or wrong token")
        name = account if account.isprintable() else repr(account)
        if type(key) is not int or type(count) is not int or type(digest) is not str:
            raise Refused(f"account {name}: key and count must be integers and the digest text")
        if not -KEYS <= key < KEYS or not -KEYS <= count < KEYS:  # checked first: longer numbers take long to print
            raise Refused(f"account {name}: key and count must be at least 0 and 1, and below {KEYS}")
        remaining = entry.terms.budget - entry.spent
        paid = entry.grants.get(key)
        if paid is not None:
            if paid != (count, digest):
                raise KeyReused(
                    f"account {name}: key {key} was used for other images (what is begun again on another kind of "
                    "processor, or with other versions, may choose others: go on where it began, or in a new directory)"
                )
            return Grant(count, fresh=False, remaining=remaining)
        if key < 0 or count < 1:
            raise Refused(f"account {name}: key {key} and count {count} must be at least 0 and 1")
        if count > remaining:
            raise OverBudget(f"account {name}: {count} images asked, {remaining} of {entry.terms.budget} remain")
        entry.grants[key] = (count, digest)
        entry.spent += count
        return Grant(count, fresh=True, remaining=remaining - count)

    def terms(self, account: str) -> Terms:
        """The terms of an account."""
        entry = self._find(account)
        if entry is None:
            raise Unauthorised(f"account {_shown(account)}: unknown account or wrong token")
        return entry.terms

    def spent(self, account: str) -> int:
        """Images charged to the account so far; 0 for an unknown one."""
        entry = self._accounts.get(account)
        return entry.spent if entry else 0

    def all_spent(self) -> dict[str, int]:
        """Images charged so far, by account."""
        return {name: entry.spent for name, entry in self._accounts.items()}

    def grants(self, account: str) -> dict[int, tuple[int, str]]:
        """Every key that was paid for: its image count and digest."""
        entry = self._accounts.get(account)
        return dict(entry.grants) if entry else {}

    def close(self) -> None:
        """Writes the head and closes the log.

        Raises:
            InputError: somebody else has removed, replaced or changed the log.
        """
        try:
            try:
                self._log.check()
            except OSError as error:
                raise InputError(str(error)) from None
            with suppress(OSError):  # a full disk: the log may be ahead of its head
                self._keep_head()
        finally:
            self._log.close()

    def _write(self, bodies: Sequence[bytes]) -> None:
        """Adds records to the log; all are there, and counted, or none."""
        hash_, lines = self._hash, []
        for body in bodies:
            hash_ = chain.step(hash_, body)
            lines.append(chain.line(hash_, body))
        block = b"".join(lines)
        end = self._log.end + len(block)
        try:
            self._log.append(block)
        finally:
            if self._log.end == end:
                self._count, self._hash = self._count + len(bodies), hash_

    def _keep_head_if_due(self) -> None:
        if time.monotonic() - self._kept_at >= HEAD_SECONDS:
            with suppress(OSError):  # the log may be ahead of its head; it is tried again
                self._keep_head()

    def _keep_head(self) -> None:
        """Writes the head, unless it is there. The log goes to the disk first: it must never be behind its head."""
        head = Head(count=self._count, hash=self._hash.hex())
        if head != self._kept:
            self._log.sync()
            chain.write_head(self._path, head, self._disk)
            self._kept = head
        self._kept_at = time.monotonic()

    def _find(self, account: str) -> _Account | None:
        return self._accounts.get(account) if type(account) is str else None

    def _replay(self) -> tuple[int, bytes]:
        """Rebuilds the accounts from the log, and cuts off what an interrupted write has left at its end."""
        heads = {} if self._kept is None else {chain.head_file(self._path).name: self._kept}
        reader = Reader(self._log.read(), self._path, heads)
        for record in reader.records():
            if not self._take(record):
                raise reader.damage()
        if reader.chained and self._kept is None:
            raise InputError(f"{chain.head_file(self._path)}: missing; restore the file from a copy")
        self._log.cut(reader.end)
        return reader.count, reader.hash

    def _take(self, record: dict[str, Any]) -> bool:
        """Enters a record of the log into the accounts; false if no ledger would have written it then."""
        if _is(record, OPENED):
            name = record.pop("open")
            if name in self._accounts or record["budget"] < 1:
                return False
            self._accounts[name] = _Account(Terms(**record))
            return True
        if not _is(record, GRANTED) or (entry := self._accounts.get(record["a"])) is None:
            return False
        key, count = record["k"], record["n"]
        if key in entry.grants or not 0 <= key < KEYS or not 1 <= count <= entry.terms.budget - entry.spent:
            return False
        entry.grants[key] = (count, record["d"])
        entry.spent += count
        return True


#: the fields of the two kinds of record: an account is opened, images are granted
OPENED: Mapping[str, type] = {"open": str, "victim": str, "labels": str, "budget": int, "token_hash": str}
GRANTED: Mapping[str, type] = {"a": str, "k": int, "n": int, "d": str}


def _is(record: Mapping[str, Any], kind: Mapping[str, type]) -> bool:
    """Whether a record has the fields of a kind, each of its type."""
    return {name: type(value) for name, value in record.items()} == kind


def _grant(asked: Request) -> bytes:
    """A grant's record, as :func:`json.dumps` would write it; that takes three times as long."""
    text = f'{{"a":{json.dumps(asked.account)},"k":{asked.key},"n":{asked.count},"d":{json.dumps(asked.digest)}}}'
    return text.encode()


def _fits(token: str, terms: Terms) -> bool:
    """Whether a token is the account's. The time it takes does not depend on the token."""
    try:
        return hmac.compare_digest(hash_token(token), terms.token_hash)
    except (AttributeError, TypeError, UnicodeError):  # not text, or text that cannot be encoded
        return False


def _shown(account: object) -> str:
    """The name of an unknown account, cut to fit into a message of one line."""
    return repr(account[:SHOWN]) if type(account) is str else f"of type {type(account).__name__}"
