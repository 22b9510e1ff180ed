"""A disk that keeps what was synced, and may lose the rest when its machine dies.

Files lie in memory (a folder of a tmpfs), so a call costs microseconds; beside each stands what a dead machine would
keep for certain. A death leaves that, and of the later writes and truncations any number of the first ones; of the next
write it leaves a part, whose end may be zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from simulator.service import ledger as ledger_module


class Killed(BaseException):
    """The machine died inside a call to the disk. Nothing in the process handles it."""


@dataclass
class _File:
    """What a dead machine keeps for certain, and what was done since: at which byte, and what (None: cut there)."""

    durable: bytearray
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


def _do(data: bytearray, at: int, what: bytes | None) -> None:
    data.extend(bytes(max(0, at - len(data))))
    if what is None:
        del data[at:]
    else:
        data[at : at + len(what)] = what


class Disk:
    """The files of one machine.

    Args:
        happens: asked at every write (``"write"``) and sync (``"sync"``) what happens to it: ``""`` for nothing,
            ``"full"``, ``"error"``, or ``"killed"``.
    """

    def __init__(self, dice: Random, happens: Callable[[str], str]) -> None:
        self._dice, self._happens = dice, happens
        self._files: dict[str, _File] = {}
        self._open: dict[int, str] = {}

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """A handle of a file."""
        number = os.open(path, flags, mode)
        self._open[number] = str(path)
        self._files.setdefault(str(path), _File(bytearray()))
        return number

    def close(self, number: int) -> None:
        """Gives a handle back."""
        if self._open.pop(number, None) is not None:
            os.close(number)

    def write(self, number: int, data: bytes, at: int) -> int:
        """Writes at a position. A full disk takes a part; a machine may die before, in the middle, or after."""
        fate = self._happens("write")
        if fate == "error":
            raise OSError("the disk failed")
        taken = bytes(data[: self._dice.randrange(len(data))]) if fate else bytes(data)
        os.pwrite(number, taken, at)
        self._files[self._open[number]].pending.append((at, taken))
        if fate == "killed":
            raise Killed
        return len(taken)

    def truncate(self, number: int, size: int) -> None:
        """Cuts a file to a size."""
        if size != os.fstat(number).st_size:
            os.ftruncate(number, size)
            self._files[self._open[number]].pending.append((size, None))

    def sync(self, number: int) -> None:
        """Waits for the disk. After a failure what was written may be on the disk or not."""
        fate = self._happens("sync")
        if fate == "killed":
            raise Killed
        if fate:
            raise OSError("the disk failed")
        file = self._files[self._open[number]]
        for at, what in file.pending:
            _do(file.durable, at, what)
        file.pending = []

    def die(self, machine: bool) -> None:
        """The process dies, and with the whole ``machine`` what it had not synced."""
        for number in list(self._open):
            self.close(number)
        for path, file in self._files.items():
            if not machine or not file.pending:
                continue
            data, dice = file.durable, self._dice
            kept = dice.randint(0, len(file.pending))
            for at, what in file.pending[:kept]:
                _do(data, at, what)
            if kept < len(file.pending):
                at, what = file.pending[kept]
                if what and dice.random() < 0.7:
                    part = what[: dice.randrange(len(what))]
                    # a file's length may be on the disk before its bytes are
                    zeros = bytes(dice.randrange(len(what) - len(part)) * (dice.random() < 0.3))
                    _do(data, at, part + zeros)
            file.pending = []
            Path(path).write_bytes(data)

    def damage(self, path: Path, damaged: bytes) -> Callable[[], None]:
        """Somebody changes a file that nobody has open; gives what restores it from its copy."""
        file, copy = self._files[str(path)], path.read_bytes()
        path.write_bytes(damaged)

        def restore() -> None:
            path.write_bytes(copy)
            file.durable, file.pending = bytearray(copy), []

        return restore


class Calls:
    """Stands for :mod:`os` in the ledger's module, and passes its calls on to the disk of the history under way."""

    O_RDWR, O_CREAT, SEEK_SET, SEEK_CUR = os.O_RDWR, os.O_CREAT, os.SEEK_SET, os.SEEK_CUR
    disk: Disk

    def open(self, path: Path, flags: int, mode: int) -> int:
        """See :func:`os.open`."""
        return self.disk.open(path, flags, mode)

    def close(self, number: int) -> None:
        """See :func:`os.close`."""
        self.disk.close(number)

    def lseek(self, number: int, offset: int, whence: int) -> int:
        """See :func:`os.lseek`."""
        return os.lseek(number, offset, whence)

    def write(self, number: int, data: bytes) -> int:
        """See :func:`os.write`."""
        at = os.lseek(number, 0, os.SEEK_CUR)
        taken = self.disk.write(number, data, at)
        os.lseek(number, at + taken, os.SEEK_SET)
        return taken

    def ftruncate(self, number: int, length: int) -> None:
        """See :func:`os.ftruncate`."""
        self.disk.truncate(number, length)

    def fdatasync(self, number: int) -> None:
        """See :func:`os.fdatasync`."""
        self.disk.sync(number)


@contextmanager
def installed(calls: Calls) -> Iterator[None]:
    """Puts the ledger's module onto simulated disks, inside the block."""
    module = vars(ledger_module)
    before, module["os"] = module["os"], calls
    try:
        yield
    finally:
        module["os"] = before
