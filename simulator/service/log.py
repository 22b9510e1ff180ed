"""The query log: all that a defender can see of every query, in Parquet. A run writes it if ``query_log: true``.

``queries/*.parquet`` reads as one table in DuckDB, Polars and pandas:

============ ========= ================================================================================================
``time``     timestamp when the query arrived, UTC; null in entries that were restored from the ledger
``account``  string    the account that asked; null where the query names none
``attack``   string    the attack behind the account, which a defender would not know
``key``      int64     the client's number for the query; null where the number is no 64-bit integer
``digest``   string    BLAKE2b digest of the images; null where they were not well-formed
``count``    int64     images in the query; null where they are no batch
``latency``  double    seconds from the query's arrival to its answer or refusal; null where ``time`` is
``outcome``  string    ``answered`` and charged, ``repeated`` (answered again at no charge), ``refused`` by the ledger,
                       ``malformed``
``reason``   string    why the query was refused; null where it was not
============ ========= ================================================================================================

**Off the query path.** A query puts a tuple into a queue of bounded length. One thread of each service process takes
the tuples out, and writes a part file for every ``ROWS`` entries, or after ``SECONDS``. If the disk is slower than that
for long, the queue fills and queries wait.

**Under kills.** A service process that is killed loses the entries that it has not written: those of the last
``SECONDS`` or so. When a run ends, :func:`restore` adds from the ledger every query that was paid and is not in the log
as ``answered``, without its time and latency. So after a run that ended, for every account,

    sum of ``count`` where ``outcome = 'answered'`` = images charged by the ledger
"""

from __future__ import annotations

import io
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simulator.errors import InputError
from simulator.files import Folder
from simulator.service.ledger import Grant, Ledger, Refused
from simulator.service.query import Query

#: entries in one part file, at most
ROWS = 4096
#: entries that wait to be written, at most
WAITING = 4 * ROWS
#: seconds that an entry waits, at most
SECONDS = 2.0
#: name of the part that :func:`restore` writes
RESTORED = "part-restored"

#: the columns of ``queries/*.parquet``
SCHEMA = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC")),
        pa.field("account", pa.string()),
        pa.field("attack", pa.string()),
        pa.field("key", pa.int64()),
        pa.field("digest", pa.string()),
        pa.field("count", pa.int64()),
        pa.field("latency", pa.float64()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)

#: a row of the log
Entry = tuple[
    datetime | None, str | None, str | None, int | None, str | None, int | None, float | None, str, str | None
]


class QueryLog:
    """The log of one service process.

    Args:
        write: called with the name of a part and the bytes of its Parquet file, in another thread.
        attacks: the attack behind each account.
    """

    def __init__(self, write: Callable[[str, bytes], object], attacks: Mapping[str, str]) -> None:
        self._write, self._attacks = write, attacks
        self._name, self._parts = f"part-{uuid.uuid4().hex[:12]}", 0
        self._queue: queue.Queue[Entry | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="query log", daemon=True)
        self._thread.start()

    def note(self, query: Query, digest: str | None, reply: Grant | InputError, started: float) -> None:
        """Enters a query that has been answered or refused.

        Args:
            digest: of its images; None if they were malformed.
            reply: the ledger's grant, or why the query was refused.
            started: when the query arrived, by :func:`time.perf_counter`.

        Raises:
            OSError: earlier entries could not be written. An owner who wants a log answers nothing without it.
        """
        if self._error is not None:
            raise OSError(f"the query log cannot be written: {self._error}")
        latency = time.perf_counter() - started
        refused = isinstance(reply, InputError)
        if isinstance(reply, InputError):
            outcome = "refused" if isinstance(reply, Refused) else "malformed"
        else:
            outcome = "answered" if reply.fresh else "repeated"
        account = query.account if isinstance(query.account, str) else None
        key = query.key if type(query.key) is int and -(2**63) <= query.key < 2**63 else None
        count = reply.count if isinstance(reply, Grant) else _length(query.images)
        arrived = datetime.fromtimestamp(time.time() - latency, UTC)
        attack = self._attacks.get(account) if account is not None else None
        reason = " ".join(str(reply).split()) if refused else None
        self._queue.put((arrived, account, attack, key, digest, count, latency, outcome, reason))

    def close(self) -> None:
        """Writes all entries that wait. No query may be noted afterwards."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        waiting: list[Entry] = []
        due = 0.0
        entry: Entry | None = None
        while True:
            try:
                entry = self._queue.get(timeout=max(0.0, due - time.monotonic()) if waiting else None)
            except queue.Empty:
                self._flush(waiting)
                continue
            if entry is None:
                self._flush(waiting)
                return
            if not waiting:
                due = time.monotonic() + SECONDS
            waiting.append(entry)
            if len(waiting) >= ROWS:
                self._flush(waiting)

    def _flush(self, waiting: list[Entry]) -> None:
        """Writes the entries and clears the list. After a failure entries are dropped, and :meth:`note` raises it."""
        if waiting and self._error is None:
            try:
                self._write(f"{self._name}-{self._parts:06d}", encode(waiting))
            except Exception as error:  # any error: this thread has no caller who could see it
                self._error = error
            self._parts += 1
        waiting.clear()


def encode(entries: Sequence[Entry]) -> bytes:
    """The entries as a Parquet file."""
    columns = zip(*entries, strict=True) if entries else [()] * len(SCHEMA)
    arrays = [pa.array(list(column), type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), file)
    return file.getvalue()


def restore(path: Path, ledger: Ledger, attacks: Mapping[str, str]) -> int:
    """Adds to a log the paid queries that it lacks, from the ledger; returns how many. All its writers must have ended.

    Args:
        path: the folder of the parts.
        attacks: the attack behind each account.
    """
    folder = Folder(path, ".parquet")
    noted: set[tuple[str, int]] = set()
    for part in sorted(path.glob("part-*.parquet")):
        if part.stem == RESTORED:
            continue
        with pq.ParquetFile(part) as file:
            rows = file.read(columns=["account", "key", "outcome"]).to_pydict()
        noted |= {(account, key) for account, key, outcome in zip(*rows.values(), strict=True) if outcome == "answered"}
    missing: list[Entry] = [
        (None, account, attacks.get(account), key, digest, count, None, "answered", None)
        for account in ledger.all_spent()
        for key, (count, digest) in ledger.grants(account).items()
        if (account, key) not in noted
    ]
    if missing:
        folder.write(RESTORED, encode(missing))
    else:
        folder.clear(RESTORED)
    return len(missing)


def _length(images: Any) -> int | None:
    """The number of images in what was sent as such; None if it is no batch."""
    shape = getattr(images, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else None
