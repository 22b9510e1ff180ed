"""A log of records whose lines are chained: each carries a hash of itself and of all that came before it.

A line is ``<hash> <json>``. The hash is BLAKE2b with 128 bits, in hex, over the hash of the line before and the JSON.
So no line can be edited, moved or taken out without all later ones being wrong. Whole lines at the end can be cut off
still: a :class:`Head`, which is kept outside the log, says how far the log went at some time.

Earlier versions wrote ``<crc32> <json>``. Such lines are read, and lines with a hash follow them: the hash of the first
covers the old ones.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from simulator.component import Settings, describe
from simulator.errors import InputError
from simulator.files import Disk, write_atomically

#: bytes of a hash
WIDTH = 16
#: the hash before the first line
START = bytes(WIDTH)
#: a disk writes sectors of this size whole, or not at all
SECTOR = 512
_NULS = re.compile(rb"\0+")
#: what a line may begin with that was not written to its end: no part of a hash, a part of it, or all and some JSON
_BEGUN = re.compile(rb"[0-9a-f]{0,31}|(?:[0-9a-f]{8}|[0-9a-f]{32}) ?|(?:[0-9a-f]{8}|[0-9a-f]{32}) \{[\x20-\x7e]*")


class Head(Settings):
    """How far a log went at some time: its number of records, and the hash (hex) of the last."""

    count: int = Field(ge=0)
    hash: str = Field(pattern="^[0-9a-f]{32}$")


class Broken(InputError):
    """A log is not what was written."""


def step(before: bytes, body: bytes) -> bytes:
    """The hash of a record, given the hash of the one before it."""
    return blake2b(before + body, digest_size=WIDTH).digest()


def line(hash_: bytes, body: bytes) -> bytes:
    """A record's line."""
    return b"%b %b\n" % (hash_.hex().encode(), body)


def head_file(log: Path) -> Path:
    """Where the head of a log lies, beside it: ``head.json``, or ``<log>.head.json`` beside any other than
    ``ledger.log``."""
    return log.with_name("head.json" if log.name == "ledger.log" else f"{log.name}.head.json")


def read_head(log: Path) -> Head | None:
    """The head that lies beside a log; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    file = head_file(log)
    try:
        return Head.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise Broken(f"{file}: {describe(error)}; restore the file from a copy") from None


def write_head(log: Path, head: Head, disk: Disk | None = None) -> None:
    """Writes the head beside its log. The log has to be on the disk before, up to there."""
    write_atomically(head_file(log), head.model_dump_json().encode() + b"\n", disk=disk)


class Reader:
    """Reads a log from its beginning, in time linear in its size.

    Args:
        data: the log.
        where: its file, for messages.
        heads: heads that were kept of it, by the place that each was kept at.

    Attributes:
        count, hash, end: number of records read, the hash of the last, and the position after it.
        chained: whether there is a line with a hash.
    """

    def __init__(self, data: bytes, where: Path, heads: Mapping[str, Head] | None = None) -> None:
        self._data, self._where, self._heads = data, where, dict(heads or {})
        self._hashes: dict[int, str] = {}
        self.count, self.hash, self.end, self.chained = 0, START, 0, False

    def records(self) -> Iterator[dict[str, Any]]:
        """The records in their order. What an interrupted write has left at the end is passed over.

        Raises:
            Broken: a line is damaged, or not the one that a head was kept of; or the log ends before a head.
        """
        wanted = {head.count for head in self._heads.values()}
        while (stop := self._data.find(b"\n", self.end)) >= 0:
            record = self._record(self._data[self.end : stop])
            if record is None:
                break
            yield record
            self.count, self.end = self.count + 1, stop + 1
            if self.count in wanted:
                self._hashes[self.count] = self.hash.hex()
        self._check_heads()
        if self.end < len(self._data) and not self._unfinished():
            raise self.damage()

    def head(self) -> Head:
        """How far was read."""
        return Head(count=self.count, hash=self.hash.hex())

    def damage(self) -> Broken:
        """The error that the record after those read is not as a ledger writes it."""
        return Broken(f"{self._where}: line {self.count + 1} is damaged; restore the file from a copy")

    def _record(self, text: bytes) -> dict[str, Any] | None:
        """A line's record, given without its end; None if the line is damaged."""
        old = text[8:9] == b" "
        body = text[9:] if old else text[2 * WIDTH + 1 :]
        following = step(self.hash, body)
        if old:
            good = not self.chained and text[:8] == b"%08x" % zlib.crc32(body)
        else:
            good = text[: 2 * WIDTH + 1] == following.hex().encode() + b" "
        if not good:
            return None
        try:
            record = json.loads(body)
        except (ValueError, RecursionError):
            raise self.damage() from None
        if type(record) is not dict:
            raise self.damage()
        self.hash, self.chained = following, not old
        return record

    def _check_heads(self) -> None:
        """Sees that the log has every head in it."""
        hashes = {0: START.hex(), **self._hashes}
        for place, head in self._heads.items():
            if head.count > self.count and self.end < len(self._data):
                raise self.damage()
            if head.count > self.count:
                raise Broken(
                    f"{self._where}: holds {self.count} records, and {place} says that there were {head.count}: its "
                    "end was cut off, or an older copy put back; restore the file from a copy"
                )
            if hashes[head.count] != head.hash:
                raise Broken(
                    f"{self._where}: line {head.count} is not the one that {place} knows: the file was edited, or is "
                    "another account's; restore the file from a copy"
                )

    def _unfinished(self) -> bool:
        """Whether what lies behind the last good record can be what a write has left that nobody was told of.

        A kill leaves the beginning of a line. A crash of the machine leaves sectors that were written and, as NULs,
        sectors that were not, in any order; a head tells then that the account began before them.
        """
        rest = self._data[self.end :]
        if b"\0" in rest.partition(b"\n")[0]:
            return bool(self._heads) and all(self._missing(each.span()) for each in _NULS.finditer(rest))
        if b"\n" in rest or not _BEGUN.fullmatch(rest):
            return False
        body = rest.partition(b" ")[2].decode()
        try:
            _, end = json.JSONDecoder().raw_decode(body)
        except (ValueError, RecursionError):
            return True
        # a kill does not leave a whole record with something else than the line's end behind it
        return end == len(body)

    def _missing(self, span: tuple[int, int]) -> bool:
        """Whether NULs can be sectors that were not written: they begin and end where a sector or the write does."""
        first, last = span[0] + self.end, span[1] + self.end
        begins = first == self.end or first % SECTOR == 0 or self._data[first - 1 : first] == b"\n"
        return begins and (last == len(self._data) or last % SECTOR == 0)
