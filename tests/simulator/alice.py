"""A disk that remembers what a power cut could leave behind, after ALICE (Pillai et al., OSDI 2014).

Of the writes that nobody has waited for, any may be on the disk and any not: each sector of a write, each change of a
file's size, and each name in a folder by itself, in any order; and of a write any beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from simulator.chain import SECTOR
from simulator.files import Disk

#: bytes between two beginnings of a write that are tried
STEP = 41


class Quick(Disk):
    """A disk that nobody waits for, to open what a power cut has left."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


@dataclass
class Content:
    """A file's content: what is surely on the disk, and the changes that may be."""

    sure: bytes = b""
    open_: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: the size becomes the first number

    def states(self) -> Iterator[bytes]:
        for chosen in itertools.product((False, True), repeat=len(self.open_)):
            data = bytearray(self.sure)
            for (at, piece), there in zip(self.open_, chosen, strict=True):
                if there and piece is None:
                    data = data[:at].ljust(at, b"\0")
                elif there and piece is not None:
                    data = data.ljust(at, b"\0")
                    data[at : at + len(piece)] = piece
            yield bytes(data)
        if self.open_ and self.open_[-1][1] is not None:  # what a kill leaves: the beginning of what was written
            yield from (bytes(data[:end]) for end in range(len(data) - 1, len(self.sure), -STEP))

    def settle(self) -> None:
        for at, piece in self.open_:
            kept = self.sure[:at].ljust(at, b"\0")
            self.sure = kept if piece is None else kept + piece + self.sure[at + len(piece) :]
        self.open_ = []


@dataclass
class Name:
    """A change of a folder: a file, or None for a folder, gets a name, and may lose another."""

    folder: Path
    path: Path
    file: int | None
    old: Path | None = None
    sure: bool = False


class PowerCut(Disk):
    """Works like the disk of this machine. :meth:`crashes` gives what a power cut could leave now.

    Args:
        root: the folder below which it works.

    Attributes:
        watch: called before and after every change.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.handles: dict[int, int] = {}
        self.contents: list[Content] = []
        self.names: list[Name] = []
        self.there: dict[Path, int] = {}
        self.failing: set[str] = set()
        self.watch = lambda: None

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        new = not path.exists()
        file = super().open(path, flags, mode)
        if new:
            self.contents.append(Content())
            self.there[path] = len(self.contents) - 1
            self.names.append(Name(path.parent, path, self.there[path]))
            self.watch()
        self.handles[file] = self.there[path]
        return file

    def write(self, file: int, data: bytes, at: int) -> int:
        if "short" in self.failing:
            data = data[: len(data) // 2]
        done = super().write(file, data, at)
        open_, start = self.contents[self.handles[file]].open_, at
        while start < at + len(data):
            end = min(at + len(data), (start // SECTOR + 1) * SECTOR)
            open_.append((start, data[start - at : end - at]))
            start = end
        self.watch()
        return done

    def truncate(self, file: int, size: int) -> None:
        super().truncate(file, size)
        self.contents[self.handles[file]].open_.append((size, None))
        self.watch()

    def sync(self, file: int) -> None:
        self.watch()
        if "sync" in self.failing:
            self.failing.remove("sync")
            raise OSError("input/output error")
        if "interrupt" in self.failing:
            self.failing.remove("interrupt")
            raise KeyboardInterrupt
        self.contents[self.handles[file]].settle()
        self.watch()

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.there[new] = self.there.pop(old)
        self.names.append(Name(new.parent, new, self.there[new], old))
        self.watch()

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.names.append(Name(path.parent, path, None))
        self.watch()

    def sync_folder(self, path: Path) -> None:
        self.watch()
        for name in self.names:
            name.sure |= name.folder == path
        self.watch()

    def crashes(self) -> Iterator[dict[Path, bytes]]:
        """Every state: the files that are there, by their paths below the root."""
        unsure = [name for name in self.names if not name.sure]
        for chosen in itertools.product((False, True), repeat=len(unsure)):
            lost = [name for name, there in zip(unsure, chosen, strict=True) if not there]
            seen: dict[Path, int] = {}
            folders = {self.root}
            for name in self.names:
                if any(name is each for each in lost) or name.folder not in folders:
                    continue
                if name.file is None:
                    folders.add(name.path)
                    continue
                if name.old is not None:
                    seen.pop(name.old, None)
                seen[name.path] = name.file
            paths = [path.relative_to(self.root) for path in seen]
            for contents in itertools.product(*(self.contents[file].states() for file in seen.values())):
                yield dict(zip(paths, contents, strict=True))


def lay_out(state: dict[Path, bytes], root: Path) -> Path:
    """Writes a state's files below a new folder."""
    root.mkdir()
    for path, data in state.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root
