"""The query account: exact, durable and idempotent.

Every account has a budget in images. A grant is written to disk before it is given, so after any kill

    answered images = charged images <= budget

holds for every account. A grant is named by the account and by a key that the client chooses. To ask again with the
same key and the same images is free, as a client does when an answer was lost on the way. The same key with other
images is refused.

The file is a log of lines ``<crc32> <json>``. A kill may tear the last line: it has no end then, was never
acknowledged, and is cut off. Any other change to the file is damage, and the file is refused.

One process has the file at a time. It holds a lock, which the system takes from a killed process. Without the lock, the
ledger of a killed driver could live on for a moment, and make grants that the next ledger would not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.files import try_lock

#: seconds to wait until another process gives up the log
PATIENCE = 60.0
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

    Raises:
        InputError: the log is damaged, or another process has it and does not end within :data:`PATIENCE` seconds.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self._path, self._sync = path, sync
        self._accounts: dict[str, _Account] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            end = self._replay()
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
        except BaseException:
            os.close(self._file)
            raise

    def open(self, account: str, terms: Terms) -> int:
        """Opens an account, or finds it open on the same terms. Returns its remaining budget in images."""
        known = self._accounts.get(account)
        if known is None:
            if terms.budget < 1:
                raise Refused(f"account {account}: budget {terms.budget} is not at least 1")
            self._write({"open": account, **terms.__dict__})
            known = self._accounts[account] = _Account(terms)
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
                self._write(*({"a": new.account, "k": new.key, "n": new.count, "d": new.digest} for new in fresh))
        except BaseException:
            for undone in fresh:
                entry = self._accounts[undone.account]
                del entry.grants[undone.key]
                entry.spent -= undone.count
            raise
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
        """Closes the log."""
        os.close(self._file)

    def _write(self, *records: dict[str, Any]) -> None:
        lines = b"".join(_line(record) for record in records)
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            if os.write(self._file, lines) != len(lines):  # a full disk
                raise OSError(f"{self._path}: could not write the whole record")
            if self._sync:
                os.fdatasync(self._file)
        except OSError:
            # the grant is not given. Its record goes, or the next one would follow a torn line, or charge twice
            os.ftruncate(self._file, start)
            os.lseek(self._file, start, os.SEEK_SET)
            raise

    def _find(self, account: str) -> _Account | None:
        return self._accounts.get(account) if type(account) is str else None

    def _lock(self) -> None:
        """Waits until no other process has the log."""
        deadline = time.monotonic() + PATIENCE
        while not try_lock(self._file):
            if time.monotonic() > deadline:
                raise InputError(f"{self._path}: another process has had this account for {PATIENCE:g} s; end it first")
            time.sleep(0.05)

    def _replay(self) -> int:
        """Rebuilds the accounts from the log; returns the position after its last whole record."""
        with open(self._file, "rb", closefd=False) as log:
            data = log.read()
        lines = data.split(b"\n")
        torn = lines.pop()
        end = 0
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None or not self._take(record):
                raise InputError(f"{self._path}: line {number} is damaged; restore the file from a copy")
            end += len(line) + 1
        # a kill does not leave a whole record with something else than the line's end behind it
        if _parse(torn[:-1]) is not None:
            raise InputError(f"{self._path}: line {len(lines) + 1} is damaged; restore the file from a copy")
        return end

    def _take(self, record: dict[str, Any]) -> bool:
        """Enters a record of the log into the accounts; false if the record does not fit them."""
        with contextlib.suppress(KeyError, TypeError):
            if "open" in record:
                name = record.pop("open")
                if name in self._accounts:
                    return False
                self._accounts[name] = _Account(Terms(**record))
                return True
            entry, key, count = self._accounts[record["a"]], record["k"], record["n"]
            if key in entry.grants or not 1 <= count <= entry.terms.budget - entry.spent:
                return False
            entry.grants[key] = (count, record["d"])
            entry.spent += count
            return True
        return False


def _fits(token: str, terms: Terms) -> bool:
    """Whether a token is the account's. The time it takes does not depend on the token."""
    try:
        return hmac.compare_digest(hash_token(token), terms.token_hash)
    except (AttributeError, TypeError, UnicodeError):  # not text, or text that cannot be encoded
        return False


def _shown(account: object) -> str:
    """The name of an unknown account, cut to fit into a message of one line."""
    return repr(account[:SHOWN]) if type(account) is str else f"of type {type(account).__name__}"


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, which is given without its end; None if the line is torn or damaged."""
    body = line[9:]
    if line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(body):
        return None
    record: dict[str, Any] = json.loads(body)
    return record
