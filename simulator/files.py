"""Files that are whole or not there; without torch, for the small actors that only keep bytes."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simulator.errors import InputError

#: the file that the process which works in a folder has locked
LOCK = ".lock"


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a file under a temporary name and renames it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing under it
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def try_lock(file: int) -> bool:
    """Takes the lock of an open file for this process; false where another has it. Closing the file gives it back, and
    so does any end of the process.

    A network file system has such locks between machines only where its server and mount do them (NFS: not with
    ``nolock``); where it says that it has none at all, there is nothing to take and the answer is true.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keeps other processes from working in a folder, inside the block, by a lock on a file in it.

    Raises:
        InputError: another process works there now.
    """
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(file):
            holder = os.read(file, 200).decode(errors="replace").strip() or "unknown"
            raise InputError(f"{folder}: in use by another process ({holder}); wait for its end or stop it")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


class Folder:
    """Bytes by name, one file each, written atomically."""

    def __init__(self, path: Path, suffix: str = ".safetensors") -> None:
        self._path, self._suffix = path, suffix

    def file(self, name: str) -> Path:
        """Where a name lies."""
        return self._path / f"{name}{self._suffix}"

    def read(self, name: str) -> bytes | None:
        """What was last written under a name."""
        return self.file(name).read_bytes() if self.file(name).exists() else None

    def write(self, name: str, data: bytes) -> None:
        """Replaces what is kept under a name."""
        write_atomically(self.file(name), data)

    def clear(self, name: str) -> None:
        """Forgets a name, when its work is done."""
        self.file(name).unlink(missing_ok=True)
