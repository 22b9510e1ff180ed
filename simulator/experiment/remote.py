"""Run directories in a bucket: ``--out URI`` and ``--resume URI``.

A run works in a local directory, because it appends to its ledger and replaces files, which buckets cannot. That
directory is copied to the URI every minute and at the end; ``--resume URI`` fetches it first. ``s3://``, ``gs://``,
``abfss://`` and ``file://`` are reached through :mod:`pyarrow.fs`, which finds credentials as each cloud's own tools
do.

What is copied is a state that the run can go on from: the ledger goes first, and only files follow that were there
before it was read, so that no row is ever in the bucket whose queries the bucket's ledger does not know. The ledger's
head is read before the ledger and written after it, so that the bucket's ledger is never behind its head. Checkpoints
stay here, for the ledger may not know all that they have asked: work under way begins anew and pays nothing twice.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from simulator.errors import InputError, one_line

#: seconds between two copies
INTERVAL = 60.0
#: what is copied, in this order; the rest, but for checkpoints, comes last
ORDER = ("ledger", "keys", "models")
#: what only this machine has a use for
LEFT_OUT = ("checkpoints",)
#: the ledger's head, which comes before the ledger in the order of names
HEAD = Path("ledger/head.json")
SCHEMES = ("s3", "gs", "gcs", "abfss", "file")


def is_uri(place: str | Path) -> bool:
    """Whether this is no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


class RemoteDirectory:
    """A run directory at a URI, and the local one that it is a copy of.

    Raises:
        InputError: the URI is of no kind that is known, or its place cannot be reached.
    """

    def __init__(self, uri: str, local: Path) -> None:
        scheme = uri.partition("://")[0]
        if scheme not in SCHEMES:
            raise InputError(f"{uri}: scheme {scheme!r}; allowed: a path, or {', '.join(f'{s}://' for s in SCHEMES)}")
        self.uri, self.local = uri.rstrip("/"), local
        try:
            self._system, self._path = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{uri}: {one_line(error)[:200]}") from None
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def demand_empty(self) -> None:
        """Sees that nothing is there yet, and that it can be written to.

        Raises:
            InputError: it is not so.
        """
        try:
            found = self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
            if not found:
                self._write(Path("began"), b"")
                self._system.delete_file(f"{self._path}/began")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.uri}: cannot write there: {one_line(error)[:200]}") from None
        if found:
            raise InputError(f"{self.uri}: exists and is not empty; resume it with --resume, or name another")

    def fetch(self) -> None:
        """Copies the run from there to the local directory.

        Raises:
            InputError: there is no run.
        """
        try:
            if self._system.get_file_info(f"{self._path}/config.yaml").type != fs.FileType.File:
                raise InputError(f"{self.uri}: not a run directory (it has no config.yaml)")
            self.local.mkdir(parents=True)
            fs.copy_files(self._path, str(self.local), self._system, fs.LocalFileSystem())
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.uri}: cannot read it: {one_line(error)[:200]}") from None
        secret = self.local / "ledger" / "secret"
        if secret.exists():
            secret.chmod(0o600)
        self._copied = {name: _stamp(self.local / name) for name in self._files()}

    def push(self) -> int:
        """Copies what has changed since the last time; returns how many files that were.

        Raises:
            OSError: there is no way to write them.
        """
        with self._lock:
            changed = 0
            heads: list[tuple[Path, tuple[int, int], bytes]] = []
            for name in self._files():
                try:
                    stamp = _stamp(self.local / name)
                    data = (self.local / name).read_bytes() if self._copied.get(name) != stamp else None
                except FileNotFoundError:  # it was a temporary one
                    continue
                if data is not None and name == HEAD:
                    heads.append((name, stamp, data))
                elif data is not None:
                    self._keep(name, stamp, data)
                changed += data is not None
            for head in heads:
                self._keep(*head)
            return changed

    def _keep(self, name: Path, stamp: tuple[int, int], data: bytes) -> None:
        self._write(name, data)
        self._copied[name] = stamp

    def _files(self) -> list[Path]:
        """The files there are now, in the order of copying. Results are listed first, and what they rest on after."""
        folders = ["results", *reversed(ORDER), "."]
        found: dict[str, list[Path]] = {}
        for folder in folders:
            paths = (path for path in (self.local / folder).rglob("*") if path.is_file())
            names = [path.relative_to(self.local) for path in paths if not path.name.startswith(".")]
            known = {*folders, *LEFT_OUT} if folder == "." else set(LEFT_OUT)
            found[folder] = [name for name in sorted(names) if name.parts[0] not in known]
        return [name for folder in (*ORDER, "results", ".") for name in found[folder]]

    def _write(self, name: Path, data: bytes) -> None:
        place = PurePosixPath(self._path) / name.as_posix()
        self._system.create_dir(str(place.parent), recursive=True)
        with self._system.open_output_stream(str(place)) as stream:
            stream.write(data)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextmanager
def mirrored(
    out: str | None, resume: str | None, interval: float = INTERVAL
) -> Iterator[tuple[Path | None, Path | None]]:
    """The paths to work with for ``--out`` and ``--resume``, each a path or a URI.

    A URI's local directory is ``runs/<time>_<its last part>``; it is copied to the URI every ``interval`` seconds
    inside the block and when the block ends, however it ends.

    Raises:
        InputError: the URI cannot be used.
    """
    uri = next((place for place in (out, resume) if place and is_uri(place)), None)
    if uri is None:
        yield Path(out) if out else None, Path(resume) if resume else None
        return
    local = Path("runs") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}_{PurePosixPath(uri).name}"
    remote = RemoteDirectory(uri, local)
    if resume:
        remote.fetch()
    else:
        remote.demand_empty()
    over = threading.Event()

    def copy() -> None:
        while not over.wait(interval):
            _try(remote)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield (None, local) if resume else (local, None)
    finally:
        over.set()
        thread.join()
        if local.exists() and _try(remote):
            print(f"copied to {remote.uri}", file=sys.stderr)


def _try(remote: RemoteDirectory) -> bool:
    """Copies; a failure is told, and does not end a run whose results are safe here."""
    try:
        remote.push()
    except (pa.ArrowException, OSError) as error:
        print(f"not copied to {remote.uri}: {one_line(error)[:200]}; it is in {remote.local}", file=sys.stderr)
        return False
    return True
