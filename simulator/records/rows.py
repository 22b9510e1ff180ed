"""The rows of a run, in Parquet.

One row is one measured model and one ownership test: a benign model, a watermarked victim, a stolen copy, or one of
them after a removal, measured with the key of one watermark. Rates are fractions in [0, 1]. A failed scenario is a row
with its error, never a missing row. Every row is a Parquet file of its own, so that writers never share a file and a
killed run keeps what it had; ``results/*.parquet`` reads as one table in DuckDB, Polars and pandas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator

from simulator.component import BENIGN, Settings, describe
from simulator.errors import InputError
from simulator.records.parquet import SCHEMA_VERSION, arrow_schema, read_parts, write_part


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
    (of an attack in several stages, or of several removals, a list of them).

    ``watermark`` is the scheme whose key the model was measured with. ``victim`` is the id of the model whose answers
    were stolen, or ``"benign"`` for a control and for the benign model itself. ``parent`` is the id of the model that
    this one was made from: the one that answered the thief, the target of a removal, or a victim's benign model. It is
    None for a model trained from nothing, and in rows of schema version 2, which lacked it.

    A row of the role ``"removed"`` is a victim or a copy after a removal, with the columns of that model; ``removal``
    names it. Several removals are one name each, joined by ``+``: ``"fine_tuning+pruning"``. The accuracy that it cost
    is that of the row of ``parent`` less its own; ``allowed_loss`` is what the configuration lets a thief give up.

    A row of the role ``"guarded"`` is any of these behind an evasion, which ``evasion`` names: accuracy, agreement and
    WSR are of the answers that come through it. Where an evasion flags queries, ``flagged_benign`` is the share of the
    test images that it flags, ``flagged_key`` that of the key, and ``flagged_auc`` the area under the ROC curve of its
    suspicion between the two.

    ``test`` names the ownership test and ``threshold`` is the WSR above which ``verified`` is true. ``key_filter``
    names the stages of the filter that chose the key's samples, ``"none"``, ``"first"`` or ``"both"``, and after a
    colon what went otherwise, e.g. ``"both: surrogate never triggered"``.

    ``detectors`` is the JSON list of the detectors that watched a theft's accounts. ``detected_at`` is how many images
    an account had been answered when it was noticed: the least over all accounts and detectors, None for never.
    ``false_alarms`` is the share of a victim's simulated benign clients that the detectors notice. A field is None if
    it does not apply to the role, or if the scenario failed before it was known.
    """

    scenario_id: ScenarioId
    role: Literal["benign", "victim", "stolen", "removed", "guarded"]
    victim: str
    parent: str | None = None
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
    evasion: str | None = None
    evasion_params: JsonParams | None = None
    allowed_loss: Fraction | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    budget: Count | None = None
    accounts: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    queries: Count | None = None
    accuracy: Fraction | None = None
    wsr: Fraction | None = None
    wsr_low: Fraction | None = None
    wsr_high: Fraction | None = None
    key_samples: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    key_filter: str | None = None
    agreement: Fraction | None = None
    p_value: Fraction | None = None
    threshold: Fraction | None = None
    verified: bool | None = None
    test: str = "wsr"
    seconds: Annotated[float, Field(ge=0)] | None = None
    false_trigger: Fraction | None = None
    flagged_benign: Fraction | None = None
    flagged_key: Fraction | None = None
    flagged_auc: Fraction | None = None
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
        if self.role != "guarded" and (self.role == "removed") != (self.removal is not None):
            raise ValueError(f"only a removed row has a removal, and each has one, found {self.role}, {self.removal!r}")
        if (self.role == "guarded") != (self.evasion is not None):
            raise ValueError(
                f"only a guarded row has an evasion, and each has one, found {self.role}, {self.evasion!r}"
            )
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"a failed row has an error and no other row has one, found {self.status}, {self.error!r}")
        return self

    @property
    def identity(self) -> tuple[str, str, str, str, str, str]:
        """``(scenario_id, role, watermark, victim, watermark_params, test)``: a run holds at most one row for each
        identity.

        A control is measured with the key of every watermark, so one scenario can have several rows. The parameters
        belong to the identity, because a grid over a loss weight gives several keys of one scheme.
        """
        return (self.scenario_id, self.role, self.watermark, self.victim, self.watermark_params, self.test)

    @property
    def origin(self) -> Literal["benign", "victim", "stolen"]:
        """The role of the model before any removal or evasion: ``"stolen"`` for a pruned copy. A control goes with its
        victim."""
        if self.role == "removed" or self.role == "guarded":
            return "victim" if self.attack is None else "stolen"
        return self.role

    @property
    def by_construction(self) -> bool:
        """Whether the key filter alone decides the WSR.

        The filter drops the samples that *this* benign model answers with the key's label, and keeps only those that
        *this* victim answers so. Their rates are 0 and 1 by construction, and have no interval. A filter that nothing
        passed has chosen nothing.
        """
        note = self.key_filter or "none"
        chosen = note != "none" and not note.endswith("nothing passed the filter")
        return chosen and ((self.role == "benign" and self.wsr == 0) or (self.role == "victim" and self.wsr == 1))


#: the columns of ``results/*.parquet``
SCHEMA = arrow_schema(Row)
#: columns that schema version 3 has added
ADDED = (
    *("parent", "allowed_loss", "key_filter", "threshold", "test"),
    *("evasion", "evasion_params", "flagged_benign", "flagged_key", "flagged_auc"),
)
_SCHEMAS = {"2": pa.schema([column for column in SCHEMA if column.name not in ADDED]), str(SCHEMA_VERSION): SCHEMA}


def write_row(run_dir: Path, row: Row, config_json: str) -> Path:
    """Write ``row`` as ``results/part-<scenario_id>-<hash of its identity>.parquet``, atomically.

    A row of the same identity is replaced, so a repeated scenario is never counted twice. A failure does not replace a
    good row. The schema version and ``config_json`` (the resolved config) go into the Parquet metadata.
    """
    # schema version 2 had no tests, so a row of the test "wsr" has the file name that it had there
    names = row.identity[:-1] if row.test == "wsr" else row.identity
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:10]
    path = run_dir / "results" / f"part-{row.scenario_id}-{digest}.parquet"
    if row.status == "failed" and path.exists():
        with pq.ParquetFile(path) as file:
            if file.read(["status"])["status"].to_pylist() == ["ok"]:
                return path
    return write_part(path, [row], SCHEMA, config_json)


def read_rows(run_dir: Path) -> list[Row]:
    """Every row of a run in the order of :func:`sorted_rows`; none if nothing has been measured yet.

    Rows of schema version 2 are read, too. The columns that they lack come from the config in their metadata.

    Raises:
        InputError: ``run_dir`` is no run, or a part file is corrupt, of another schema version, or not a row.
    """
    if not (run_dir / "results").is_dir() and not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir} is not a run directory: it holds neither results/ nor run.json")
    found: dict[tuple[str, ...], Path] = {}
    rows = []
    for path, config_json, record in read_parts(run_dir / "results", _SCHEMAS):
        try:
            row = Row.model_validate(record if "test" in record else record | _added(record, config_json))
        except ValidationError as error:
            raise InputError(f"{path}: {describe(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: its metadata hold no config, which a row of schema version 2 needs") from None
        first = found.setdefault(row.identity, path)
        if first != path:
            raise InputError(f"{path} repeats the row of {first.name}: delete one of the two")
        rows.append(row)
    return sorted_rows(rows)


def _added(record: dict[str, Any], config_json: str) -> dict[str, Any]:
    """The columns that a record of schema version 2 lacks, from its run's config."""
    config = json.loads(config_json)
    return {
        "key_filter": None if record["key_samples"] is None else config["key_filter"]["stages"],
        "threshold": config["verification"]["threshold"],
        "test": "wsr",
    }


def sorted_rows(rows: Iterable[Row]) -> list[Row]:
    """Benign models, then victims, then stolen ones, each with its removals and evasions below; within those by
    watermark, controls last, attack, ..., seed."""

    def key(row: Row) -> tuple[tuple[bool, Any], ...]:
        values = (
            ("benign", "victim", "stolen").index(row.origin),
            *(row.dataset, row.watermark, row.watermark_params, row.victim == BENIGN, row.stage),
            *(row.attack, row.attack_params, row.pool, row.labels, row.architecture, row.budget, row.seed, row.victim),
            *(row.removal, row.removal_params, row.evasion, row.evasion_params, row.scenario_id, row.test),
        )
        return tuple((value is not None, value) for value in values)

    return sorted(rows, key=key)
