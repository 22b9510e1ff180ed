"""``sweep/trials.parquet``: one row for each trial, one column for each searched setting."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from simulator.component import Settings, describe
from simulator.errors import InputError
from simulator.files import write_atomically
from tuning.objective import Measured
from tuning.space import Setting

SCHEMA_VERSION = "1"


class TrialRecord(Settings):
    """The record of an ended trial.

    Attributes:
        trial: hash of its setting.
        number: its place in the order of proposal. Number 0 is the default setting.
        status: ``done``; ``stopped`` at the rung named by ``stage``; ``failed``.
        found: what was measured of each seed.
        value: the objective's value. Trials are ranked by ``value_lower``, its lower confidence bound over the seeds.
        work_seconds: training, stealing and measuring, summed over its seeds.
        wait_seconds: waiting for a worker, summed over its seeds.
        busy_seconds: time in which work of it was done or waited for a worker. Seeds run side by side.
        overhead_seconds: what Tune costs: time in which it had a process or was to get one, but none of its work was
            done or waited for a worker. Its parts are ``start_seconds`` (until a process has it), ``call_seconds`` (in
            its process and in the workshop) and ``report_seconds`` (from a stage's end until Tune has the result and
            begins the next stage or ends the trial).
    """

    trial: str
    number: int
    status: Literal["done", "stopped", "failed"]
    stage: str
    setting: Mapping[str, Any]
    seeds: tuple[int, ...]
    found: tuple[Measured, ...] = ()
    error: str | None = None
    accuracy: float | None = None
    drop: float | None = None
    victim_wsr: float | None = None
    benign_wsr: float | None = None
    worst_wsr: float | None = None
    mean_wsr: float | None = None
    value: float | None = None
    value_lower: float | None = None
    work_seconds: float = 0.0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    overhead_seconds: float = 0.0
    start_seconds: float = 0.0
    call_seconds: float = 0.0
    report_seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether every attack was measured."""
        return self.status == "done"


#: columns with several values, written as JSON
JSON = ("setting", "seeds", "found")


def write_trials(path: Path, records: Sequence[TrialRecord], config_yaml: str) -> None:
    """Writes the table, atomically. Each searched field has a column ``setting.PATH``; each attack has a column
    ``wsr.ATTACK``, its WSR averaged over the seeds."""
    rows = []
    for record in records:
        row = record.model_dump(mode="json")
        row |= {f"setting.{name}": _plain(value) for name, value in record.setting.items()}
        for at, copy in enumerate(record.found[0].stolen if record.found else ()):
            row[f"wsr.{copy.attack}"] = sum(one.stolen[at].wsr for one in record.found) / len(record.found)
        rows.append(row | {name: json.dumps(row[name], sort_keys=True) for name in JSON})
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    metadata = {"exsim.trials_version": SCHEMA_VERSION, "exsim.sweep": config_yaml}
    table = pa.table({name: _array(values) for name, values in columns.items()}).replace_schema_metadata(metadata)
    file = io.BytesIO()
    pq.write_table(table, file)
    write_atomically(path, file.getvalue())


def read_trials(path: Path) -> list[TrialRecord]:
    """What :func:`write_trials` wrote.

    Raises:
        InputError: the file is missing, corrupt, of another version, or holds no trials.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None
    if (table.schema.metadata or {}).get(b"exsim.trials_version", b"").decode() != SCHEMA_VERSION:
        raise InputError(f"{path} is no table of trials of version {SCHEMA_VERSION}")
    records = []
    for row in table.to_pylist():
        data = {name: row[name] for name in TrialRecord.model_fields if name in row}
        try:
            data |= {name: json.loads(data[name]) for name in JSON}
            records.append(TrialRecord.model_validate_json(json.dumps(data)))
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            why = describe(error) if isinstance(error, ValidationError) else str(error)
            raise InputError(f"{path}: {why}") from None
    return records


def record(number: int, trial: str, setting: Setting, report: Mapping[str, Any], status: str) -> dict[str, Any]:
    """A trial's last report as plain data for a :class:`TrialRecord`."""
    kept = {name: report[name] for name in TrialRecord.model_fields if name in report and name != "found"}
    found = json.loads(report.get("found", "[]"))
    return kept | {
        "trial": trial,
        "number": number,
        "setting": setting,
        "status": status,
        "stage": report.get("stage", "none"),
        "found": found,
        "seeds": [one["seed"] for one in found],
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, sort_keys=True)


def _array(values: Sequence[Any]) -> pa.Array:
    """A column. It is JSON text if its values are of several types, e.g. a number and a word."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.array(list(values))
