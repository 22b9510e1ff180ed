"""What a run leaves behind: its rows and curves (Parquet) and where they came from (``run.json``).

One row is one measured model: a benign model, a watermarked victim, or a stolen copy, measured with the key of one
watermark. Rows are tidy: rates are fractions in [0, 1], and a failed scenario is a row with its error, never a missing
one. Every row is a Parquet file of its own, so that writers never share a file and a killed run keeps what it had;
``results/*.parquet`` reads as one table in DuckDB, Polars and pandas.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator

from simulator.component import Settings, describe
from simulator.errors import InputError

S = TypeVar("S", bound=Settings)

SCHEMA_VERSION = 2
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


def write_part(path: Path, records: Sequence[Settings], schema: pa.Schema, config_json: str) -> Path:
    """Write records as one Parquet file, atomically, with the schema version and the config in its metadata."""
    metadata = {"exsim.schema_version": str(SCHEMA_VERSION), "exsim.config": config_json}
    part = pa.Table.from_pylist([record.model_dump() for record in records], schema=schema)

    def write(file: Path) -> None:
        # Arrow's own copy of the schema would hold the metadata once more, which is most of a part of one row
        with pq.ParquetWriter(file, schema, store_schema=False) as writer:
            writer.add_key_value_metadata(metadata)
            writer.write_table(part)

    replace_file(path, write)
    return path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it there: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # hidden and with another suffix, so that a writer killed here leaves nothing that *.parquet would match
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_parts(folder: Path, schema: pa.Schema) -> Iterable[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:  # not read_table: it would take a folder named a=b for a partition
                part = file.read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None
        metadata = part.schema.metadata or {}
        found = metadata.get(b"exsim.schema_version", b"none").decode(errors="replace")
        if found != str(SCHEMA_VERSION):
            raise InputError(f"{path} has schema version {found}, this program reads version {SCHEMA_VERSION}")
        if part.schema.names != schema.names or part.schema.types != schema.types:
            raise InputError(f"{path} does not have the columns of schema version {SCHEMA_VERSION}")
        for record in part.to_pylist():
            yield path, record


def _model(model: type[S], record: dict[str, Any], path: Path) -> S:
    try:
        return model.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None


class Host(Settings):
    """The machine that drove the run; ``cpus`` is its number of logical cores."""

    hostname: str
    cpus: int | None
    platform: str


class RunInfo(Settings):
    """``run.json``: how the rows beside it came to be. Change it with ``info.model_copy(update={...})``."""

    name: str
    status: Literal["running", "done", "failed", "interrupted"]
    mode: Literal["ray", "local"]
    started: AwareDatetime
    finished: AwareDatetime | None = None
    argv: list[str]
    seeds: list[int]
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    host: Host
    config_sha256: str
    warnings: list[str] = Field(default_factory=list)


def collect_provenance(
    argv: Sequence[str], *, name: str, mode: Literal["ray", "local"], seeds: Sequence[int], config_yaml: str
) -> RunInfo:
    """The provenance of a run that starts now. ``config_yaml`` is the text of ``config.yaml``, which is hashed."""
    commit, dirty = _git(Path(__file__))
    return RunInfo(
        name=name,
        status="running",
        mode=mode,
        started=datetime.now(UTC),
        argv=list(argv),
        seeds=list(seeds),
        git_commit=commit,
        git_dirty=dirty,
        versions=_versions(("extraction-simulator", "torch", "torchvision", "ray", "numpy", "pydantic", "pyarrow")),
        host=Host(hostname=platform.node(), cpus=os.cpu_count(), platform=platform.platform()),
        config_sha256=hashlib.sha256(config_yaml.encode()).hexdigest(),
    )


def write_run_info(run_dir: Path, info: RunInfo) -> Path:
    """Write ``run.json``, atomically."""
    checked = RunInfo.model_validate(info.model_dump())  # model_copy(update=...) checks nothing
    path = run_dir / "run.json"
    replace_file(path, lambda file: file.write_text(checked.model_dump_json(indent=2) + "\n", encoding="utf-8"))
    return path


def read_run_info(run_dir: Path) -> RunInfo:
    """Read ``run.json``.

    Raises:
        InputError: it is missing or is not what :func:`write_run_info` writes.
    """
    path = run_dir / "run.json"
    try:
        return RunInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{run_dir} is not a run directory: run.json: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(source: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that tracks ``source``; ``(None, None)`` if there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # installed inside somebody else's checkout: not our commit
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
