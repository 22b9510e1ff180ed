"""A disk that keeps what was synced, and may lose the rest when its machine dies.

Files lie in memory (a folder of a tmpfs), so a call costs microseconds; beside each stands what a dead machine would
keep for certain. A death leaves that, and of the later writes and truncations any number of the first ones; of the next
write it leaves a part, whose end may be zeros. A rename whose folder was not synced may be undone. (Every state that a
power cut may leave is enumerated elsewhere, for one operation at a time. Here states are drawn, in whole histories.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from simulator import chain, files

#: what may happen to a call
DEATHS = {"machine": True, "process": False}


class Killed(BaseException):
    """The process died inside a call to the disk, and its whole ``machine`` perhaps. Nothing handles it there."""

    def __init__(self, machine: bool) -> None:
        super().__init__()
        self.machine = machine


@dataclass
class _File:
    """What a dead machine keeps for certain, and what was done since: at which byte, and what (None: cut there)."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


def _do(data: bytearray, at: int, what: bytes | None) -> None:
    data.extend(bytes(max(0, at - len(data))))
    if what is None:
        del data[at:]
    else:
        data[at : at + len(what)] = what


class Disk(files.Disk):
    """The files of one machine.

    Args:
        happens: asked at every write (``"write"``), sync (``"sync"``) and rename (``"rename"``) what happens to it:
            ``""`` for nothing, ``"full"``, ``"error"``, ``"machine"`` or ``"process"`` for a death.
    """

    def __init__(self, dice: Random, happens: Callable[[str], str]) -> None:
        self._dice, self._happens = dice, happens
        self._files: dict[Path, _File] = {}
        self._open: dict[int, Path] = {}
        self._renamed: list[tuple[Path, bytes | None]] = []

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """See :class:`simulator.files.Disk`."""
        file = super().open(path, flags, mode)
        self._open[file] = path
        self._files.setdefault(path, _File())
        return file

    def close(self, file: int) -> None:
        """See :class:`simulator.files.Disk`. The files of a dead process are closed already."""
        if self._open.pop(file, None) is not None:
            super().close(file)

    def write(self, file: int, data: bytes, at: int) -> int:
        """See :class:`simulator.files.Disk`. A full disk takes a part; a process may die before, in the middle, or
        after."""
        fate = self._happens("write")
        if fate == "error":
            raise OSError("the disk failed")
        taken = bytes(data)
        if fate == "full":
            taken = taken[: self._dice.randrange(len(data))]
        elif fate:
            taken = taken[: self._dice.randint(0, len(data))]
        super().write(file, taken, at)
        self._files[self._open[file]].pending.append((at, taken))
        if fate in DEATHS:
            raise Killed(DEATHS[fate])
        return len(taken)

    def truncate(self, file: int, size: int) -> None:
        """See :class:`simulator.files.Disk`."""
        super().truncate(file, size)
        self._files[self._open[file]].pending.append((size, None))

    def sync(self, file: int) -> None:
        """See :class:`simulator.files.Disk`. After a failure what was written may be on the disk or not."""
        self._suffer("sync")
        kept = self._files[self._open[file]]
        for at, what in kept.pending:
            _do(kept.durable, at, what)
        kept.pending = []

    def rename(self, old: Path, new: Path) -> None:
        """See :class:`simulator.files.Disk`."""
        self._suffer("rename")
        self._renamed.append((new, new.read_bytes() if new.exists() else None))
        super().rename(old, new)
        self._files[new] = self._files.pop(old)

    def sync_folder(self, path: Path) -> None:
        """See :class:`simulator.files.Disk`."""
        self._renamed = []

    def _suffer(self, call: str) -> None:
        fate = self._happens(call)
        if fate in DEATHS:
            raise Killed(DEATHS[fate])
        if fate:
            raise OSError("the disk failed")

    def die(self, machine: bool) -> None:
        """The process dies, and with the whole ``machine`` what it had not synced."""
        for file in list(self._open):
            self.close(file)
        if not machine:
            return
        for path, file in self._files.items():
            if file.pending:
                self._lose(path, file)
        kept = self._dice.randint(0, len(self._renamed))
        for new, before in reversed(self._renamed[kept:]):
            if before is None:
                new.unlink(missing_ok=True)
            else:
                new.write_bytes(before)
            self._files[new] = _File(bytearray(before or b""))
        self._renamed = []

    def _lose(self, path: Path, file: _File) -> None:
        data, dice = file.durable, self._dice
        kept = dice.randint(0, len(file.pending))
        for at, what in file.pending[:kept]:
            _do(data, at, what)
        if kept < len(file.pending):
            at, what = file.pending[kept]
            if what and dice.random() < 0.7:
                _do(data, at, self._part(at, what))
        file.pending = []
        if path.exists():
            path.write_bytes(data)

    def _part(self, at: int, what: bytes) -> bytes:
        """What a dying machine has written: a beginning, or sectors, behind which the file has length and no bytes."""
        dice = self._dice
        if dice.random() < 0.7:
            return what[: dice.randrange(len(what))]
        begun = dice.choice([0, *range(-at % chain.SECTOR, len(what), chain.SECTOR)])
        return what[:begun] + bytes(dice.randint(0, len(what) - begun))

    def damage(self, path: Path, damaged: bytes) -> Callable[[], None]:
        """Somebody changes a file that nobody has open; gives what restores it from its copy."""
        copy, file = path.read_bytes(), self._files[path]
        kept = _File(bytearray(file.durable), list(file.pending))
        path.write_bytes(damaged)

        def restore() -> None:
            path.write_bytes(copy)
            self._files[path] = kept

        return restore
