"""Whether an account, and all that a run says of it, agree.

A model in one thread, which shares no code with the ledger but the format of its file, replays the log. What it finds
is compared with the rows, the transfer sets and the query log. Nothing is written, and no lock is taken, so a run may
be audited while it goes on. Each file is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from simulator.chain import Head, Reader, head_file, read_head
from simulator.errors import InputError
from simulator.service.ledger import GRANTED, OPENED, digest_of

#: disagreements that a message names
SHOWN = 3


class Measured(Protocol):
    """What a row says of the account behind it (see :class:`simulator.records.rows.Row`)."""

    @property
    def scenario_id(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def queries(self) -> int | None: ...
    @property
    def budget(self) -> int | None: ...
    @property
    def status(self) -> str: ...


@dataclass
class Account:
    """One account of the log: its budget, what was charged, and the count and digest paid for under each key."""

    budget: int
    charged: int = 0
    grants: dict[int, tuple[int, str]] = field(default_factory=dict)


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        accounts: by name.
        compared: what was compared with the log, e.g. ``["4 rows", "1 transfer set"]``.
        faults: every disagreement, one line each.
        missing: whether there is no ledger, and none that is known to have been there. A directory of results that was
            passed on may have none.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    missing: bool = False

    @property
    def agrees(self) -> bool:
        """Whether there is no disagreement."""
        return not self.faults

    def line(self) -> str:
        """One line for a report."""
        if self.missing:
            return "account: no ledger lies here, so nothing was checked"
        grants = sum(len(account.grants) for account in self.accounts.values())
        images = sum(account.charged for account in self.accounts.values())
        text = f"account: {_number(grants, 'grant')}, {_number(images, 'image')}"
        if self.agrees:
            agree = "agrees" if len(self.compared) == 1 and self.compared[0].startswith("1 ") else "agree"
            return f"{text}; {_listed(self.compared)} {agree}" if self.compared else text
        more = f"; and {len(self.faults) - SHOWN} more" if len(self.faults) > SHOWN else ""
        faults = "; ".join(self.faults[:SHOWN])  # which may hold an account's name, with anything in it
        return f"{text}; DISAGREES: {''.join(each if each.isprintable() else ' ' for each in faults)}{more}"


def audit(run: Path, rows: Iterable[Measured], head: Head | None = None, *, ended: bool = True) -> Audit:
    """Audits a run directory.

    Args:
        rows: the run's.
        head: of the account, as ``run.json`` has it.
        ended: whether the run has ended by itself. The query log of another may lack entries.
    """
    found = Audit()
    # what is there before the log is read, the log knows
    sets, parts = sorted((run / "transfer").glob("*.safetensors")), sorted((run / "queries").glob("part-*.parquet"))
    if head is None and not (run / "ledger").exists():
        found.missing = True
        return found
    try:
        _replay(found, run / "ledger" / "ledger.log", head)
    except InputError as error:
        found.faults.append(str(error))
        return found
    _compare_rows(found, rows)
    _compare_transfer_sets(found, sets)
    _compare_query_log(found, parts, ended=ended)
    return found


def check_charges(run: Path, rows: Iterable[Measured], head: Head | None) -> None:
    """Sees that an account can be gone on with: its log is whole, and knows all that the rows say.

    Raises:
        InputError: it is not so.
    """
    found = Audit()
    _replay(found, run / "ledger" / "ledger.log", head)
    _compare_rows(found, rows)
    if found.faults:
        raise InputError(f"{run / 'ledger' / 'ledger.log'}: {found.faults[0]}; restore the file from a copy")


def _replay(found: Audit, log: Path, head: Head | None) -> None:
    """The accounts of a log.

    Raises:
        InputError: a record is not as a ledger writes it, or a head is not in the log.
    """
    beside = read_head(log)
    heads = {name: each for name, each in ((head_file(log).name, beside), ("run.json", head)) if each is not None}
    try:
        data = log.read_bytes()
    except FileNotFoundError:
        data = b""
    reader = Reader(data, log, heads)
    for record in reader.records():
        if not _enter(found.accounts, record):
            raise reader.damage()
    if reader.chained and beside is None:
        raise InputError(f"{head_file(log)}: missing; restore the file from a copy")


def _enter(accounts: dict[str, Account], record: Mapping[str, Any]) -> bool:
    """Enters a record into the model; false if it cannot follow what is there."""
    kinds = {name: type(value) for name, value in record.items()}
    if kinds == OPENED:
        new = record["open"] not in accounts and record["budget"] > 0
        accounts.setdefault(record["open"], Account(record["budget"]))
        return new
    if kinds != GRANTED or record["a"] not in accounts:
        return False
    account, key, count = accounts[record["a"]], record["k"], record["n"]
    if key in account.grants or key < 0 or count < 1:
        return False
    account.grants[key] = (count, record["d"])
    account.charged += count
    return account.charged <= account.budget


def _compare_rows(found: Audit, rows: Iterable[Measured]) -> None:
    """Every row of a stolen model, or of one that was made from it, against what its theft was charged.

    A row of a budget curve, and one that failed, says how much was charged at some time: no more than now.
    """
    charged: dict[str, int] = {}
    for name, account in found.accounts.items():
        theft = name.partition(".")[0]
        charged[theft] = charged.get(theft, 0) + account.charged
    rows, compared = list(rows), 0
    parents = {row.scenario_id: row.parent for row in rows if row.role == "removed"}
    for row in rows:
        if row.queries is None or row.role not in ("stolen", "removed"):
            continue
        theft = row.scenario_id
        seen = set[str]()
        while theft in parents and theft not in seen:  # a removal of a removal
            seen.add(theft)
            theft = parents[theft] or theft
        point = theft.endswith(f"-q{row.budget}")
        of = theft.removesuffix(f"-q{row.budget}") if point else theft
        now = charged.get(of, 0)
        compared += 1
        if row.queries > now or (row.queries != now and row.status == "ok" and not point):
            found.faults.append(f"row {row.scenario_id} says {row.queries} images, the account {now}")
    if compared:
        found.compared.append(_number(compared, "row"))


def _compare_transfer_sets(found: Audit, files: Sequence[Path]) -> None:
    """Every batch of every transfer set against the count and digest under its key: the keys count the batches."""
    for file in files:
        account = found.accounts.get(file.stem)
        try:
            batches = [(len(images), digest_of(images.data.cast("B"))) for images in _batches(file)]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            found.faults.append(f"transfer/{file.name} cannot be read: {' '.join(str(error).split())[:200]}")
            continue
        paid = account.grants if account else {}
        wrong = [key for key, batch in enumerate(batches) if paid.get(key) != batch]
        if wrong:
            found.faults.append(f"transfer/{file.name}: batch {wrong[0]} is not what was paid for")
        elif len(paid) != len(batches):
            found.faults.append(f"transfer/{file.name}: {len(batches)} batches, {len(paid)} paid for")
    if files:
        found.compared.append(_number(len(files), "transfer set"))


def _batches(file: Path) -> Iterator[NDArray[Any]]:
    """The images of each batch as they were asked, one after the other (see
    :meth:`simulator.service.recording.Recording.transfer_set`)."""
    with safe_open(file, "numpy") as opened:
        chunks, uint8 = opened.get_tensor("chunks"), opened.get_tensor("uint8")
        images, start = opened.get_slice("images"), 0
        if chunks.sum() != images.get_shape()[0] or len(chunks) != len(uint8):
            raise ValueError("its batches are not as long as its images")
        for count, whole in zip(chunks.tolist(), uint8.tolist(), strict=True):
            part = images[start : start + count]
            start += count
            if whole and part.dtype != np.uint8:
                part = np.rint(part * np.float32(255)).astype(np.uint8)
            yield np.ascontiguousarray(part)


def _compare_query_log(found: Audit, files: Sequence[Path], *, ended: bool) -> None:
    """Every answered query of the log against what was paid for under its key, and the other way round."""
    noted: set[tuple[str, int]] = set()
    answered = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as part:
                table = part.read(columns=["account", "key", "count", "digest", "outcome"])
        except (pa.ArrowException, OSError) as error:
            found.faults.append(f"queries/{file.name} cannot be read: {' '.join(str(error).split())[:200]}")
            continue
        for name, key, count, digest, outcome in zip(*table.to_pydict().values(), strict=True):
            if outcome not in ("answered", "repeated"):
                continue
            account = found.accounts.get(name)
            if account is None or account.grants.get(key) != (count, digest):
                found.faults.append(f"queries/{file.name}: key {key} of {name} is answered, and was not paid for")
            elif outcome == "answered":
                found.faults += [f"queries: key {key} of {name} is charged twice"] if (name, key) in noted else []
                noted.add((name, key))
                answered += 1
    paid = sum(len(account.grants) for account in found.accounts.values())
    if files and ended and answered < paid:
        found.faults.append(f"queries: {answered} answered queries, {paid} paid for")
    if files:
        found.compared.append("the query log")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
