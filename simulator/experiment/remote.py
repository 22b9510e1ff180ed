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
#: folders that are copied first, in this order; results and the rest follow
ORDER = ("ledger", "keys", "models")
#: folders that are not copied
LEFT_OUT = ("checkpoints",)
#: the ledger's head, which comes before the ledger in the order of names
HEAD = Path("ledger/head.json")
SCHEMES = ("s3", "gs", "gcs", "abfss", "file")


def is_uri(place: str | Path) -> bool:
    """Whether this is a URI, e.g. ``s3://bucket/run``, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


class RemoteDirectory:
    """The copy, at a URI, of a local run directory.

    Raises:
        InputError: the URI's scheme is unknown, or its place cannot be reached.
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
        """Checks that the URI is empty and can be written to.

        Raises:
            InputError: it is not empty, or cannot be written to.
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
        """Copies the run at the URI to the local directory.

        Raises:
            InputError: there is no run, or it cannot be read.
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
        """Copies the files that have changed since the last copy; returns how many.

        Raises:
            OSError: they cannot be written.
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
        """The present files, in the order of copying. Results are listed first, so that all that they rest on is copied
        with them."""
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
    """The local paths for ``--out`` and ``--resume``, each of which may be a path or a URI.

    A URI's local directory is ``runs/<time>_<its last part>``. It is copied to the URI every ``interval`` seconds
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
    """Copies, and says whether that worked. A failure is printed; it does not end the run, whose results are safe
    here."""
    try:
        remote.push()
    except (pa.ArrowException, OSError) as error:
        print(f"not copied to {remote.uri}: {one_line(error)[:200]}; it is in {remote.local}", file=sys.stderr)
        return False
    return True
