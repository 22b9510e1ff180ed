"""Compares two run directories: what was measured, made and paid, but not when, where or how fast.

    python runs/compare.py OLD NEW

Prints each difference and exits with 1 if there is one. Rows are compared in every column that both have but times;
keys and models tensor by tensor; accounts by what the ledger's log says. Columns that one side lacks are named once.
A sweep's directory is compared in its table of trials and its recommendation, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from simulator.service.ledger import Ledger

#: columns that tell when and how fast, not what
TIMES = {"seconds", "started", "finished"}
#: columns that make a row the same row
IDENTITY = ("scenario_id", "role", "watermark", "victim", "watermark_params")
#: differences that are shown of one kind
SHOWN = 20


def rows(run: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows by what makes them the same row."""
    found = {}
    for part in sorted((run / "results").glob("*.parquet")):
        with pq.ParquetFile(part) as file:
            for row in file.read().to_pylist():
                found[tuple(row[name] for name in IDENTITY)] = row
    return found


def compare_rows(old: Path, new: Path) -> Iterator[str]:
    """Rows that only one side has, and values that differ."""
    before, after = rows(old), rows(new)
    yield from (f"row only in {old}: {key}" for key in sorted(before.keys() - after.keys(), key=str))
    yield from (f"row only in {new}: {key}" for key in sorted(after.keys() - before.keys(), key=str))
    for key in before.keys() & after.keys():
        for column in (before[key].keys() & after[key].keys()) - TIMES:
            if before[key][column] != after[key][column]:
                yield f"row {key}: {column}: {before[key][column]!r} != {after[key][column]!r}"


def compare_tensors(old: Path, new: Path, folder: str) -> Iterator[str]:
    """Files of tensors of one folder: those that only one side has, and those that differ in a value."""
    before, after = ({path.name: path for path in (run / folder).glob("*.safetensors")} for run in (old, new))
    yield from (f"{folder}: only in one: {name}" for name in sorted(before.keys() ^ after.keys()))
    for name in sorted(before.keys() & after.keys()):
        first, second = load_file(before[name]), load_file(after[name])
        if first.keys() != second.keys() or not all(torch.equal(first[part], second[part]) for part in first):
            yield f"{folder}/{name} differs"


def accounts(run: Path) -> dict[str, tuple[Any, ...]]:
    """By account: its victim, answer mode, budget and what was spent."""
    if not (run / "ledger" / "ledger.log").exists():
        return {}
    ledger = Ledger(run / "ledger" / "ledger.log")
    try:
        spent = ledger.all_spent()
        terms = {name: ledger.terms(name) for name in spent}
        return {name: (t.victim, t.labels, t.budget, spent[name]) for name, t in terms.items()}
    finally:
        ledger.close()


def compare_accounts(old: Path, new: Path) -> Iterator[str]:
    """Accounts that only one side has, or that were charged otherwise."""
    before, after = accounts(old), accounts(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"account {name}: {before.get(name)} != {after.get(name)}"


def compare_sweeps(old: Path, new: Path) -> Iterator[str]:
    """What a sweep found: trials without their seconds, and the recommendation."""
    paths = [run / "sweep" / "recommendation.json" for run in (old, new)]
    if not all(path.exists() for path in paths):
        return

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not k.endswith("seconds")}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    first, second = (timeless(json.loads(path.read_text())) for path in paths)
    if first != second:
        yield f"recommendation: {first} != {second}"
    tables = []
    for run in (old, new):
        with pq.ParquetFile(run / "sweep" / "trials.parquet") as file:
            tables.append([timeless(row) for row in file.read().to_pylist()])
    if tables[0] != tables[1]:
        yield "trials differ"


def differences(old: Path, new: Path) -> list[str]:
    """Every difference, as a line."""
    found = [*compare_rows(old, new), *compare_accounts(old, new), *compare_sweeps(old, new)]
    for folder in ("models", "keys", "transfer"):
        found += compare_tensors(old, new, folder)
    return found


def main() -> int:
    """Compares two directories; the exit status says whether they are equal."""
    old, new = map(Path, sys.argv[1:])
    found = differences(old, new)
    print("\n".join(found[:SHOWN]) or f"equal: {len(rows(new))} rows, {len(accounts(new))} accounts")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
