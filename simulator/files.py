"""Files that are whole or not there; without torch, for the small actors that only keep bytes.

Everything that a run keeps is written by :func:`write_atomically` or by a :class:`Log`. Both write through a
:class:`Disk`, so that a test can put another one in its place, which remembers what a power cut could leave behind.
Neither writes through a symbolic link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simulator.errors import InputError

#: the file that the process which works in a folder has locked
LOCK = ".lock"
#: seconds to wait until another process gives up a log
PATIENCE = 60.0
#: folders of a run directory whose files other programs write, and no part of a run reads
FOREIGN = ("logs/ray", "sweep/tune")


class Disk:
    """The system calls by which files change. An error is an ``OSError``, as the system raises it."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """A handle of a file, which must not be a symbolic link."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def close(self, file: int) -> None:
        """Gives a handle back, and with it the file's lock."""
        os.close(file)

    def write(self, file: int, data: bytes, at: int) -> int:
        """Writes at a position; returns how many bytes were taken."""
        return os.pwrite(file, data, at)

    def truncate(self, file: int, size: int) -> None:
        """Cuts a file to a size."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Waits until a file's bytes and size are on the disk."""
        os.fdatasync(file)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file another name, in place of the file that had it."""
        old.replace(new)

    def make_folder(self, path: Path) -> None:
        """Makes one folder; it may be there already."""
        path.mkdir(exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Waits until the names in a folder are on the disk. A network file system may have no such call."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(file)


#: the disk of this machine
DISK = Disk()


def _opened(disk: Disk, path: Path, flags: int, mode: int = 0o644) -> int:
    """A handle of a regular file.

    Raises:
        InputError: there is something else under that name, such as a symbolic link.
    """
    try:
        file = disk.open(path, flags | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise InputError(f"{path}: is no regular file ({error.strerror}); remove it") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise InputError(f"{path}: is no regular file; remove it")
    return file


def _make_folders(disk: Disk, path: Path) -> None:
    """Makes a folder and those above it; each name is on the disk before something is put into it."""
    missing = [each for each in (path, *path.parents) if not each.is_dir()]
    for folder in reversed(missing):
        disk.make_folder(folder)
        disk.sync_folder(folder.parent)


def write_atomically(path: Path, data: bytes, mode: int = 0o644, disk: Disk | None = None) -> None:
    """Writes a file under a temporary name and renames it. A reader sees the old file or the new one, never half of it.

    When the call returns, both the file and its name are on the disk.
    """
    disk = disk or DISK
    _make_folders(disk, path.parent)
    # hidden and with another suffix, so that a writer killed here leaves nothing that *.parquet would match
    temporary = path.with_name(f".{path.name[:100]}-{secrets.token_hex(6)}.tmp")
    file = _opened(disk, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            os.fchmod(file, mode)
            written = 0
            while written < len(data):
                written += disk.write(file, data[written:] if written else data, written)
            disk.sync(file)  # else a power cut may leave the new name with nothing under it
        finally:
            disk.close(file)
        disk.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    disk.sync_folder(path.parent)


class Log:
    """A file that grows by blocks. A block is there as a whole after :meth:`append`, or not at all.

    One process has the file at a time. It holds a lock, which the system takes from a killed process.

    Args:
        path: the file, which is made if there is none.
        sync: wait for the disk at every block. Without it a block survives every kill of a process, but not a crash of
            the whole machine.
        disk: through which the file is written.

    Attributes:
        end: the size of the file, in bytes. It changes at the moment at which a block is there.

    Raises:
        InputError: the path is no regular file, or another process has it and does not end within :data:`PATIENCE`
            seconds.
    """

    def __init__(self, path: Path, *, sync: bool = False, disk: Disk | None = None) -> None:
        self.path, self._sync, self._disk = path, sync, disk or DISK
        _make_folders(self._disk, path.parent)
        self._file = _opened(self._disk, path, os.O_RDWR | os.O_CREAT)
        try:
            self._disk.sync_folder(path.parent)
            self._lock()
        except BaseException:
            self._disk.close(self._file)
            raise
        found = os.fstat(self._file)
        self._inode, self.end = found.st_ino, found.st_size
        self._torn = False

    def read(self) -> bytes:
        """All that the file holds."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def cut(self, end: int) -> None:
        """Cuts off what lies behind a position, and waits until it is gone from the disk."""
        if end != self.end:
            self._disk.truncate(self._file, end)
            self._disk.sync(self._file)
            self.end = end

    def append(self, block: bytes) -> None:
        """Adds a block. Whatever keeps it from being there, an interrupt too, takes all of it away again.

        Raises:
            OSError: the disk did not take it, or somebody else has removed, replaced or changed the file.
        """
        if self._torn:
            self._undo()
        self.check()
        self._torn = True
        try:
            if self._disk.write(self._file, block, self.end) != len(block):  # a full disk
                raise OSError(errno.ENOSPC, f"could not write the whole record: {os.strerror(errno.ENOSPC)}", self.path)
            if self._sync:
                self._disk.sync(self._file)
            self.end += len(block)
            self._torn = False
        except BaseException:
            with suppress(OSError):  # it is tried again before the next block
                self._undo()
            raise

    def check(self) -> None:
        """Sees that the file is still the one that was opened, and as long as it was left.

        Raises:
            OSError: it is not.
        """
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            found = None
        if found is None or found.st_ino != self._inode:
            raise OSError(f"{self.path}: was removed or replaced while it was in use")
        if found.st_size != self.end:
            raise OSError(f"{self.path}: was changed by another program while it was in use")

    def sync(self) -> None:
        """Waits until all blocks are on the disk."""
        self._disk.sync(self._file)

    def close(self) -> None:
        """Gives the file back. A block that could not be taken away before is taken away now."""
        try:
            if self._torn:
                self._undo()
        finally:
            self._disk.close(self._file)

    def _undo(self) -> None:
        self._disk.truncate(self._file, self.end)
        self._disk.sync(self._file)  # else a power cut could bring back what nobody was told of
        self._torn = False

    def _lock(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not try_lock(self._file):
            if time.monotonic() > deadline:
                raise InputError(f"{self.path}: another process has had this account for {PATIENCE:g} s; end it first")
            time.sleep(0.05)


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
        InputError: another process works there now, or the file is a symbolic link.
    """
    file = _opened(DISK, folder / name, os.O_RDWR | os.O_CREAT)
    try:
        if not try_lock(file):
            holder = os.read(file, 200).decode(errors="replace").strip() or "unknown"
            raise InputError(f"{folder}: in use by another process ({holder}); wait for its end or stop it")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


def demand_plain(folder: Path) -> None:
    """Sees that a run directory holds files and folders alone. One from elsewhere could hold a symbolic link to a file
    of the user's, which a resumed run would overwrite, or a pipe, which it would read for ever.

    The folder itself may be a link, because the user named it.

    Raises:
        InputError: there is something else in it.
    """
    waiting = [os.fspath(folder)]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):  # the run goes on; or there is none, as the caller will see
            continue
        except OSError as error:
            raise InputError(f"{place}: cannot be read: {error.strerror}") from None
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if Path(entry.path).relative_to(folder).as_posix() not in FOREIGN:
                    waiting.append(entry.path)
            elif entry.is_symlink() or (not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path)):
                kind = "a symbolic link" if entry.is_symlink() else "no regular file"
                raise InputError(f"{entry.path}: is {kind}, and a run directory holds none; remove it")


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
