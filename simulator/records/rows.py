"""What a run leaves behind: its rows and curves (Parquet) and where they came from (``run.json``).

One row is one measured model: a benign model, a watermarked victim, or a stolen copy, measured with the key of one
watermark. Rows are tidy: rates are fractions in [0, 1], and a failed scenario is a row with its error, never a missing
one. Every row is a Parquet file of its own, so that writers never share a file and a killed run keeps what it had;
``results/*.parquet`` reads as one table in DuckDB, Polars and pandas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from simulator.component import Settings
from simulator.errors import InputError
from simulator.records.parquet import _model, _read_parts, write_part

BENIGN = "benign"  #: the ``victim`` of a control, and of a benign model itself


def _json_params(text: str) -> str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    stages = value if isinstance(value, list) else [value]
    if not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"must be a JSON object, or a list of them, found {text!r}")
    return text


# A scenario's id becomes part of a file name, so it may not hold a path.
ScenarioId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=150)]


JsonParams = Annotated[str, AfterValidator(_json_params)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Count = Annotated[int, Field(ge=0)]


class Row(Settings):
    """One measured model. Rates are fractions in [0, 1]; times are aware of their zone; ``*_params`` are JSON objects
    (of an attack in several stages a list of them, one a stage).

    ``watermark`` is the scheme whose key the model was measured with, ``victim`` whose answers were stolen: a victim's
    id, or ``"benign"`` for a control (and for the benign model itself). ``detectors`` is the JSON list of the detectors
    that watched a theft's accounts, ``detected_at`` the images that an account had been answered when it was noticed,
    the least of all accounts and detectors (None: never), ``false_alarms`` the share of a victim's simulated benign
    clients that they notice. Not every field applies to every role; what does not apply, or failed before it was known,
    is None.
    """

    scenario_id: ScenarioId
    role: Literal["benign", "victim", "stolen"]
    victim: str
    dataset: str
    watermark: str
    watermark_params: JsonParams
    architecture: str
    attack: str | None = None
    attack_params: JsonParams | None = None
    labels: str | None = None
    pool: str | None = None
    stage: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    removal: str | None = None
    removal_params: JsonParams | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    budget: Count | None = None
    accounts: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    queries: Count | None = None
    accuracy: Fraction | None = None
    wsr: Fraction | None = None
    wsr_low: Fraction | None = None
    wsr_high: Fraction | None = None
    key_samples: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    agreement: Fraction | None = None
    p_value: Fraction | None = None
    verified: bool | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    false_trigger: Fraction | None = None
    detectors: str | None = None
    detected_at: Count | None = None
    false_alarms: Fraction | None = None
    warning: str | None = None
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    started: AwareDatetime | None = None
    finished: AwareDatetime | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role == "benign" and self.victim != BENIGN:
            raise ValueError(f"the victim of a benign row must be {BENIGN!r}, found {self.victim!r}")
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"a failed row has an error and no other row has one, found {self.status}, {self.error!r}")
        return self

    @property
    def identity(self) -> tuple[str, str, str, str, str]:
        """``(scenario_id, role, watermark, victim, watermark_params)``: a run holds at most one row of each.

        A control is measured with the key of every watermark, so one scenario can have several rows; the parameters
        belong to the identity because a grid over a loss weight has several keys of one scheme.
        """
        return (self.scenario_id, self.role, self.watermark, self.victim, self.watermark_params)


class CurvePoint(Settings):
    """How good a surrogate was after ``queries`` queries. Rates are fractions in [0, 1]."""

    scenario_id: ScenarioId
    queries: Count
    accuracy: Fraction | None = None
    wsr: Fraction | None = None
    agreement: Fraction | None = None


_TEXT, _RATE, _TIME = pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")


#: the columns of ``results/*.parquet``: the fields of :class:`Row`, in its order
SCHEMA = pa.schema(
    [
        pa.field("scenario_id", _TEXT, nullable=False),
        pa.field("role", _TEXT, nullable=False),
        pa.field("victim", _TEXT, nullable=False),
        pa.field("dataset", _TEXT, nullable=False),
        pa.field("watermark", _TEXT, nullable=False),
        pa.field("watermark_params", _TEXT, nullable=False),
        pa.field("architecture", _TEXT, nullable=False),
        pa.field("attack", _TEXT),
        pa.field("attack_params", _TEXT),
        pa.field("labels", _TEXT),
        pa.field("pool", _TEXT),
        pa.field("stage", pa.int32()),
        pa.field("removal", _TEXT),
        pa.field("removal_params", _TEXT),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("budget", pa.int64()),
        pa.field("accounts", pa.int32()),
        pa.field("queries", pa.int64()),
        pa.field("accuracy", _RATE),
        pa.field("wsr", _RATE),
        pa.field("wsr_low", _RATE),
        pa.field("wsr_high", _RATE),
        pa.field("key_samples", pa.int32()),
        pa.field("agreement", _RATE),
        pa.field("p_value", _RATE),
        pa.field("verified", pa.bool_()),
        pa.field("seconds", _RATE),
        pa.field("false_trigger", _RATE),
        pa.field("detectors", _TEXT),
        pa.field("detected_at", pa.int64()),
        pa.field("false_alarms", _RATE),
        pa.field("warning", _TEXT),
        pa.field("status", _TEXT, nullable=False),
        pa.field("error", _TEXT),
        pa.field("started", _TIME),
        pa.field("finished", _TIME),
    ]
)


#: the columns of ``curves/*.parquet``
CURVE_SCHEMA = pa.schema(
    [
        pa.field("scenario_id", _TEXT, nullable=False),
        pa.field("queries", pa.int64(), nullable=False),
        pa.field("accuracy", _RATE),
        pa.field("wsr", _RATE),
        pa.field("agreement", _RATE),
    ]
)


def write_row(run_dir: Path, row: Row, config_json: str) -> Path:
    """Write ``row`` as ``results/part-<scenario_id>-<hash of its identity>.parquet``, atomically.

    A row of the same identity is replaced, so a repeated scenario is never counted twice; but one that is good never
    by a failure. The schema version and ``config_json`` (the resolved config) go into the Parquet metadata.
    """
    digest = hashlib.sha256("\0".join(row.identity).encode()).hexdigest()[:10]
    path = run_dir / "results" / f"part-{row.scenario_id}-{digest}.parquet"
    if row.status == "failed" and path.exists():
        with pq.ParquetFile(path) as file:
            if file.read(["status"])["status"].to_pylist() == ["ok"]:
                return path
    return write_part(path, [row], SCHEMA, config_json)


def read_rows(run_dir: Path) -> list[Row]:
    """Every row of a run in the order of :func:`sorted_rows`; none if nothing has been measured yet.

    Raises:
        InputError: ``run_dir`` is no run, or a part file is corrupt, of another schema version, or not a row.
    """
    if not (run_dir / "results").is_dir() and not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir} is not a run directory: it holds neither results/ nor run.json")
    found: dict[tuple[str, ...], Path] = {}
    rows = []
    for path, record in _read_parts(run_dir / "results", SCHEMA):
        row = _model(Row, record, path)
        first = found.setdefault(row.identity, path)
        if first != path:
            raise InputError(f"{path} repeats the row of {first.name}: delete one of the two")
        rows.append(row)
    return sorted_rows(rows)


def sorted_rows(rows: Iterable[Row]) -> list[Row]:
    """Benign models, then victims, then stolen ones; within those by watermark, controls last, attack, ..., seed."""

    def key(row: Row) -> tuple[tuple[bool, Any], ...]:
        values = (
            ("benign", "victim", "stolen").index(row.role),
            *(row.dataset, row.watermark, row.watermark_params, row.victim == BENIGN, row.stage),
            *(row.attack, row.attack_params, row.removal, row.removal_params),
            *(row.pool, row.labels, row.architecture, row.budget, row.seed, row.victim, row.scenario_id),
        )
        return tuple((value is not None, value) for value in values)

    return sorted(rows, key=key)


def table(run_dir: Path) -> pa.Table:
    """The rows of a run as one Arrow table, in the order of :func:`sorted_rows`."""
    return pa.Table.from_pylist([row.model_dump() for row in read_rows(run_dir)], schema=SCHEMA)


def write_curve(run_dir: Path, points: Sequence[CurvePoint], config_json: str) -> Path:
    """Write the points of one scenario as ``curves/part-<scenario_id>.parquet``, replacing an earlier curve of it."""
    ids = {point.scenario_id for point in points}
    if len(ids) != 1:
        raise ValueError(f"a curve holds the points of one scenario, found {len(ids)}")
    return write_part(run_dir / "curves" / f"part-{ids.pop()}.parquet", points, CURVE_SCHEMA, config_json)


def read_curves(run_dir: Path) -> list[CurvePoint]:
    """Every point of every curve of a run, by scenario and number of queries; none if there is no curve.

    Raises:
        InputError: a part file is corrupt, of another schema version, or not a curve.
    """
    points = [_model(CurvePoint, record, path) for path, record in _read_parts(run_dir / "curves", CURVE_SCHEMA)]
    return sorted(points, key=lambda point: (point.scenario_id, point.queries))
