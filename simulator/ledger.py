"""The query account: exact, durable and idempotent.

Every account has a budget in images. A grant is written to disk before it is given, so after any kill

    answered images = charged images <= budget

holds for every account. A grant is named by the account and a key that the client chooses; asking again with the same
key and the same images is free (an answer lost on the way is asked again), the same key with other images is refused.
The file is a log of lines ``<crc32> <json>``; a last line torn by a kill was never acknowledged and is cut off.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.errors import InputError


class Refused(InputError):
    """The ledger refused a request; nothing was charged."""


class Unauthorised(Refused):
    """No such account, or not its token."""


class KeyReused(Refused):
    """The key has paid for other images."""


class OverBudget(Refused):
    """More images were asked than the account has left."""


@dataclass(frozen=True)
class Terms:
    """What an account was opened for.

    Attributes:
        victim: id of the model that answers.
        labels: answer mode (see :mod:`simulator.answers`).
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
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self._path, self._sync = path, sync
        self._accounts: dict[str, _Account] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._replay() if path.exists() else 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

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
            Refused: a key below 0, or no image.
        """
        entry = self._accounts.get(account)
        # the same answer for an unknown account and a wrong token: nobody learns which accounts exist
        if entry is None or not hmac.compare_digest(hash_token(token), entry.terms.token_hash):
            raise Unauthorised(f"account {account!r}: unknown account or wrong token")
        remaining = entry.terms.budget - entry.spent
        paid = entry.grants.get(key)
        if paid is not None:
            if paid != (count, digest):
                raise KeyReused(f"account {account}: key {key} was used for other images")
            return Grant(count, fresh=False, remaining=remaining)
        if key < 0 or count < 1:
            raise Refused(f"account {account}: key {key} and count {count} must be at least 0 and 1")
        if count > remaining:
            raise OverBudget(f"account {account}: {count} images asked, {remaining} of {entry.terms.budget} remain")
        self._write({"a": account, "k": key, "n": count, "d": digest})
        entry.grants[key] = (count, digest)
        entry.spent += count
        return Grant(count, fresh=True, remaining=remaining - count)

    def reserve_all(self, requests: Sequence[Request]) -> list[Grant | Refused]:
        """What :meth:`reserve` says to each of several requests. One that is refused does not touch the others."""
        replies: list[Grant | Refused] = []
        for asked in requests:
            try:
                replies.append(self.reserve(asked.account, asked.token, asked.key, asked.count, asked.digest))
            except Refused as refusal:
                replies.append(refusal)
        return replies

    def terms(self, account: str) -> Terms:
        """What the account was opened for."""
        if account not in self._accounts:
            raise Unauthorised(f"account {account!r}: unknown account or wrong token")
        return self._accounts[account].terms

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

    def _write(self, record: dict[str, Any]) -> None:
        body = json.dumps(record, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            if os.write(self._file, line) != len(line):  # a full disk
                raise OSError(f"{self._path}: could not write the whole record")
            if self._sync:
                os.fdatasync(self._file)
        except OSError:
            # the grant is not given: were its record left, the next one would follow a torn line or charge twice
            os.ftruncate(self._file, start)
            os.lseek(self._file, start, os.SEEK_SET)
            raise

    def _replay(self) -> int:
        """Rebuilds the accounts from the log; returns where its last whole record ends."""
        data = self._path.read_bytes()
        end = 0
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            record = _parse(line)
            if record is None:
                if end + len(line) < len(data):
                    raise InputError(f"{self._path}: line {number} is damaged and is not the last; restore the file")
                break
            if "open" in record:
                name = record.pop("open")
                self._accounts[name] = _Account(Terms(**record))
            else:
                entry = self._accounts[record["a"]]
                entry.grants[record["k"]] = (record["n"], record["d"])
                entry.spent += record["n"]
            end += len(line)
        return end


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a whole, undamaged line, else None."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    body = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(body):
        return None
    record: dict[str, Any] = json.loads(body)
    return record
