"""The tokens of the accounts of ``exsim serve``, hashed, in ``DIR/accounts.json``: who opens which account.

A token is shown once, when it is made. The file keeps its SHA-256 alone, and the secret by which the door itself speaks
to the ledger for the account. The ledger's terms never change, so the secret outlives the token, which its owner may
replace (``rotate``) or take back (``revoke``) while the door is open. The secret opens nothing at the door.

Older directories kept the tokens in ``DIR/tokens.json`` in clear. Their accounts go on: the ledger knows the clients'
own tokens there, until the first rotation.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from simulator.component import describe
from simulator.errors import InputError
from simulator.files import locked, write_atomically
from simulator.service.ledger import hash_token

FILE, OLD_FILE, LOCK = "accounts.json", "tokens.json", ".accounts.lock"


class Entry(BaseModel):
    """What opens an account.

    Attributes:
        opens: SHA-256 (hex) of the token; None where it was revoked.
        secret: what the ledger is told in the token's place; None where it knows the token itself.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    opens: str | None = Field(pattern="^[0-9a-f]{64}$")
    secret: str | None


_Entries = TypeAdapter(dict[str, Entry])


class Accounts:
    """The accounts by their tokens, as the file says at this moment. Where it cannot be read, nobody gets in.

    Args:
        names: the accounts that are open.
    """

    def __init__(self, directory: Path, names: Collection[str]) -> None:
        self._file, self._names = directory / FILE, frozenset(names)
        self._seen: tuple[int, ...] | None = None
        self._by_hash: dict[str, tuple[str, Entry]] = {}

    def find(self, token: str) -> tuple[str, str] | None:
        """The account that a token opens, and what the ledger is told for it; None if it opens none.

        Only hashes are compared, so the time that it takes does not tell how much of a token is right.
        """
        try:
            status = self._file.stat()
            seen = status.st_ino, status.st_mtime_ns, status.st_size
            if seen != self._seen:
                self._seen, self._by_hash = None, {}
                entries = {name: entry for name, entry in read(self._file.parent).items() if name in self._names}
                self._by_hash = {entry.opens: (name, entry) for name, entry in entries.items() if entry.opens}
                self._seen = seen
            found = self._by_hash.get(hash_token(token))
        except (OSError, InputError, UnicodeError):
            return None
        if found is None:
            return None
        name, entry = found
        return name, token if entry.secret is None else entry.secret


def read(directory: Path) -> dict[str, Entry]:
    """The accounts of a directory, with those that an older one has in ``tokens.json`` only.

    Raises:
        InputError: a file is damaged.
    """
    file = directory / FILE
    entries = {name: Entry(opens=hash_token(token), secret=None) for name, token in _old(directory).items()}
    if file.exists():
        try:
            entries |= _Entries.validate_json(file.read_bytes())
        except ValidationError as error:
            raise InputError(f"{file}: {describe(error)}") from None
    return entries


@contextmanager
def changing(directory: Path) -> Iterator[dict[str, Entry]]:
    """The accounts of a directory, to be changed by one process at a time; written at the end of the block."""
    with locked(directory, LOCK):
        entries = read(directory)
        before = dict(entries)
        yield entries
        if entries != before or not (directory / FILE).exists():
            data = {name: entry.model_dump() for name, entry in entries.items()}
            write_atomically(directory / FILE, (json.dumps(data, indent=2) + "\n").encode(), mode=0o600)


def new() -> tuple[str, Entry]:
    """A new token, and the entry that it opens."""
    token = secrets.token_hex(24)
    return token, Entry(opens=hash_token(token), secret=secrets.token_hex(24))


def rotate(directory: Path, name: str) -> str:
    """Gives an account a new token, which is returned; the old one opens nothing from now on.

    Raises:
        InputError: there is no such account, or the ledger knows it by a token that is no longer at hand.
    """
    with changing(directory) as entries:
        entry, secret = _entry(entries, name, directory), None
        if (secret := entry.secret or _old(directory).get(name)) is None:
            raise InputError(
                f"{directory}: account {name} is older than {FILE}, and the ledger knows it by its first token; "
                f"put {OLD_FILE}, in which that token was, back for this command, or open another account"
            )
        token, fresh = new()
        entries[name] = fresh.model_copy(update={"secret": secret})
    return token


def revoke(directory: Path, name: str) -> None:
    """Takes an account's token back; a rotation gives it a new one.

    Raises:
        InputError: there is no such account.
    """
    with changing(directory) as entries:
        entries[name] = _entry(entries, name, directory).model_copy(update={"opens": None})


def _entry(entries: dict[str, Entry], name: str, directory: Path) -> Entry:
    if name not in entries:
        raise InputError(f"{directory}: no account {name[:60]!r}; there are: {', '.join(entries) or 'none'}")
    return entries[name]


def _old(directory: Path) -> dict[str, str]:
    """The tokens of an older directory, in clear."""
    file = directory / OLD_FILE
    if not file.exists():
        return {}
    try:
        tokens = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()):
        raise InputError(f"{file}: not a JSON object of account names and tokens")
    return tokens
