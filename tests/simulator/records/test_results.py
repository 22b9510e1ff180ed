import hashlib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Literal

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AwareDatetime, Field, ValidationError

from simulator.component import Settings
from simulator.errors import InputError
from simulator.files import DISK, Disk
from simulator.records.parquet import arrow_schema
from simulator.records.provenance import collect_provenance, read_run_info, write_run_info
from simulator.records.rows import ADDED, SCHEMA, Row, read_rows, sorted_rows, write_row

BASE = {
    "scenario_id": "s1",
    "role": "stolen",
    "victim": "deeptracer-1",
    "dataset": "digits",
    "watermark": "deeptracer",
    "watermark_params": '{"margin": 2.0}',
    "architecture": "lenet5",
    "seed": 0,
}


def row(**changes: object) -> Row:
    return Row.model_validate(BASE | changes)


class Every(Settings):
    """A field of every kind that a record may have."""

    text: str
    named: Annotated[str, Field(max_length=9)] | None = None
    chosen: Literal["a", "b"] = "a"
    count: Annotated[int, Field(ge=0)] | None
    small: Annotated[int, Field(ge=0, lt=2**31)]
    smaller: Annotated[int, Field(lt=100)] | None
    rate: Annotated[float, Field(ge=0, le=1)] | None = None
    sure: bool | None = None
    when: AwareDatetime


def test_the_columns_follow_from_the_fields() -> None:
    columns = [
        *[("text", pa.string(), False), ("named", pa.string(), True), ("chosen", pa.string(), False)],
        *[("count", pa.int64(), True), ("small", pa.int32(), False), ("smaller", pa.int32(), True)],
        *[("rate", pa.float64(), True), ("sure", pa.bool_(), True), ("when", pa.timestamp("us", tz="UTC"), False)],
    ]
    assert arrow_schema(Every).equals(pa.schema([pa.field(name, kind, nullable) for name, kind, nullable in columns]))


def test_the_columns_of_a_row() -> None:
    assert SCHEMA.names == list(Row.model_fields)
    assert [column.name for column in SCHEMA if not column.nullable] == [
        *("scenario_id", "role", "victim", "dataset", "watermark", "watermark_params", "architecture", "seed", "test"),
        "status",
    ]
    assert {column.name for column in SCHEMA if column.type == pa.int32()} == {"stage", "accounts", "key_samples"}


def test_a_full_row_comes_back_as_it_was(tmp_path: Path) -> None:
    when = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    full = row(
        **{"attack": "knockoff", "attack_params": '{"strategy": "random"}', "labels": "soft", "pool": "attacker"},
        **{
            "role": "guarded",
            "parent": "s0",
            "stage": 1,
            "removal": "fine-tuning+pruning",
            "removal_params": "[{}, {}]",
            "evasion": "outliers",
            "evasion_params": '{"detector": "lof"}',
            "allowed_loss": 0.035,
            "budget": 5000,
            "accounts": 2,
            "queries": 4999,
        },
        **{"accuracy": 0.9, "wsr": 0.5, "wsr_low": 0.4, "wsr_high": 0.6, "key_samples": 100, "agreement": 0.8},
        **{
            "key_filter": "both",
            "threshold": 0.2,
            "test": "another",
            "p_value": 1e-300,
            "verified": True,
            "seconds": 1.5,
            "false_trigger": 0.0,
            **{"flagged_benign": 0.01, "flagged_key": 0.5, "flagged_auc": 0.75},
            "detectors": "[]",
            "detected_at": 130,
            "false_alarms": 0.05,
            "warning": "weak",
            "started": when,
        },
    )
    assert None not in full.model_dump(exclude={"error", "finished"}).values()
    write_row(tmp_path, full, "{}")
    assert read_rows(tmp_path) == [full]


@given(accuracy=st.none() | st.floats(0, 1), budget=st.none() | st.integers(0, 2**63 - 1), seed=st.integers(0, 2**40))
def test_values_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, accuracy: float | None, budget: int | None, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written = row(accuracy=accuracy, budget=budget, seed=seed)
    write_row(folder, written, "{}")
    assert read_rows(folder) == [written]


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": 1.01},
        {"wsr": float("nan")},
        {"watermark_params": "not json"},
        {"watermark_params": "3"},
        {"scenario_id": "../escape"},
        {"role": "benign"},
        {"role": "removed"},
        {"removal": "pruning"},
        {"role": "guarded"},
        {"role": "guarded", "removal": "pruning"},
        {"evasion": "outliers"},
        {"role": "removed", "removal": "pruning", "evasion": "outliers"},
        {"test": None},
        {"status": "failed"},
        {"error": "but it is ok"},
        {"started": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"accurracy": 0.5},
    ],
    ids=str,
)
def test_a_row_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        row(**changes)


def test_the_parameters_of_two_stages_are_a_list() -> None:
    assert row(attack="knockoff+knockoff", attack_params='[{"epochs": 1}, {"epochs": 2}]').attack_params


def test_the_same_row_again_replaces_the_first(tmp_path: Path) -> None:
    write_row(tmp_path, row(status="failed", error="killed"), "{}")
    write_row(tmp_path, row(accuracy=0.9), "{}")
    assert [found.accuracy for found in read_rows(tmp_path)] == [0.9]
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_failure_does_not_replace_a_good_row(tmp_path: Path) -> None:
    good, failed = row(wsr=0.5), row(status="failed", error="no room")
    write_row(tmp_path, failed, "{}")
    assert [each.status for each in read_rows(tmp_path)] == ["failed"]
    write_row(tmp_path, good, "{}")
    write_row(tmp_path, failed, "{}")
    assert read_rows(tmp_path) == [good]


def test_a_control_measured_with_several_keys_is_several_rows(tmp_path: Path) -> None:
    keys = [("deeptracer", '{"margin": 2.0}'), ("deeptracer", '{"margin": 4.0}'), ("ewe", "{}")]
    for watermark, params in keys:
        write_row(tmp_path, row(victim="benign", watermark=watermark, watermark_params=params), "{}")
    assert [(found.watermark, found.watermark_params) for found in read_rows(tmp_path)] == keys


def test_order_does_not_depend_on_the_writing() -> None:
    rows = [
        row(role="benign", victim="benign"),
        row(role="victim"),
        row(attack="distillation", budget=1000),
        row(attack="knockoff", budget=500),
        row(attack="knockoff", budget=1000),
        row(attack="knockoff", budget=1000, seed=1),
        row(victim="benign", attack="distillation", budget=1000),
        row(watermark="ewe", attack="distillation"),
    ]
    assert sorted_rows(reversed(rows)) == rows


RATIO_2: dict[str, object] = {"removal": "pruning", "removal_params": '{"ratio": 0.2}'}


def test_a_removal_and_an_evasion_stand_below_what_they_were_made_from() -> None:
    rows = [
        row(role="victim"),
        row(role="removed", removal="pruning"),
        row(attack="knockoff", budget=500),
        row(role="guarded", attack="knockoff", budget=500, evasion="outliers"),
        row(role="removed", attack="knockoff", budget=500, removal="pruning", removal_params='{"ratio": 0.2}'),
        row(**RATIO_2, role="guarded", attack="knockoff", budget=500, evasion="filter", evasion_params='{"sigma": 1}'),
        row(**RATIO_2, role="guarded", attack="knockoff", budget=500, evasion="filter", evasion_params='{"sigma": 2}'),
        row(role="removed", attack="knockoff", budget=500, removal="pruning", removal_params='{"ratio": 0.4}'),
        row(attack="knockoff", budget=1000),
        row(role="removed", attack="knockoff", budget=1000, removal="fine_tuning"),
    ]
    assert [each.origin for each in rows] == ["victim"] * 2 + ["stolen"] * 8
    assert sorted_rows(reversed(rows)) == rows


def test_metadata_and_other_readers(tmp_path: Path) -> None:
    path = write_row(tmp_path, row(accuracy=0.25), '{"name": "x"}')
    write_row(tmp_path, row(scenario_id="s2", accuracy=0.75), '{"name": "x"}')
    metadata = pq.read_metadata(path).metadata
    assert metadata[b"exsim.schema_version"] == b"3"
    assert metadata[b"exsim.config"] == b'{"name": "x"}'
    parts = tmp_path / "results"
    mean = duckdb.sql(f"SELECT avg(accuracy) FROM '{parts}/*.parquet'")
    assert mean is not None
    assert mean.fetchall() == [(0.5,)]
    assert pd.read_parquet(parts)["accuracy"].mean() == 0.5
    assert pq.read_table(path).schema.equals(SCHEMA)


def test_a_run_folder_with_an_equals_sign_reads(tmp_path: Path) -> None:
    write_row(tmp_path / "a=1", row(), "{}")
    assert read_rows(tmp_path / "a=1") == [row()]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_corrupt_part_is_named(tmp_path: Path) -> None:
    path = write_row(tmp_path, row(), "{}")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError) as error:
        read_rows(tmp_path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        (SCHEMA.with_metadata({"exsim.schema_version": "1"}), "schema version 1.*reads versions 2 and 3"),
        (SCHEMA.with_metadata({"exsim.schema_version": "4"}), "schema version 4.*reads versions 2 and 3"),
        (SCHEMA.with_metadata({"exsim.schema_version": "2"}), "does not have the columns of schema version 2"),
        (SCHEMA, "schema version none"),
        (SCHEMA.remove(0).with_metadata({"exsim.schema_version": "3"}), "does not have the columns"),
    ],
)
def test_a_part_of_another_schema_is_refused(tmp_path: Path, schema: pa.Schema, match: str) -> None:
    path = write_row(tmp_path, row(), "{}")
    pq.write_table(pa.Table.from_pylist([], schema=schema), path)
    with pytest.raises(InputError, match=match) as error:
        read_rows(tmp_path)
    one_line(error)


#: the columns of ``results/*.parquet`` of schema version 2, as it stood written out
TEXTS_2 = "scenario_id role victim dataset watermark watermark_params architecture"
VERSION_2 = [
    *((name, pa.string()) for name in f"{TEXTS_2} attack attack_params labels pool".split()),
    *[("stage", pa.int32()), ("removal", pa.string()), ("removal_params", pa.string()), ("seed", pa.int64())],
    *[("budget", pa.int64()), ("accounts", pa.int32()), ("queries", pa.int64()), ("accuracy", pa.float64())],
    *[("wsr", pa.float64()), ("wsr_low", pa.float64()), ("wsr_high", pa.float64()), ("key_samples", pa.int32())],
    *[("agreement", pa.float64()), ("p_value", pa.float64()), ("verified", pa.bool_()), ("seconds", pa.float64())],
    *[("false_trigger", pa.float64()), ("detectors", pa.string()), ("detected_at", pa.int64())],
    *[("false_alarms", pa.float64()), ("warning", pa.string()), ("status", pa.string()), ("error", pa.string())],
    *[("started", pa.timestamp("us", tz="UTC")), ("finished", pa.timestamp("us", tz="UTC"))],
]
CONFIG_2 = '{"key_filter": {"stages": "first"}, "verification": {"threshold": 0.3}}'


def write_version_2(folder: Path, written: Row, config_json: str = CONFIG_2) -> Path:
    """Writes a row as schema version 2 had it, under the name of then."""
    required = {*TEXTS_2.split(), "seed", "status"}
    schema = pa.schema([pa.field(name, kind, name not in required) for name, kind in VERSION_2])
    identity = (written.scenario_id, written.role, written.watermark, written.victim, written.watermark_params)
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:10]
    path = folder / "results" / f"part-{written.scenario_id}-{digest}.parquet"
    path.parent.mkdir(exist_ok=True)
    metadata = {"exsim.schema_version": "2", "exsim.config": config_json}
    with pq.ParquetWriter(path, schema, store_schema=False) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(pa.Table.from_pylist([written.model_dump(exclude=set(ADDED))], schema=schema))
    return path


def test_a_row_of_version_2_is_read_and_gets_what_it_lacks_from_the_config(tmp_path: Path) -> None:
    old = row(attack="knockoff", wsr=0.25, key_samples=8, verified=False, accounts=1, started=datetime.now(UTC))
    failed = row(scenario_id="s2", attack="knockoff", status="failed", error="no room")
    for each in (old, failed):
        write_version_2(tmp_path, each)
    lacked = {"parent": None, "key_filter": "first", "threshold": 0.3, "test": "wsr"}
    upgraded = [old.model_copy(update=lacked), failed.model_copy(update=lacked | {"key_filter": None})]
    assert read_rows(tmp_path) == upgraded
    # a run that is resumed replaces its failed row of then, and the new rows stand beside the old ones
    good = failed.model_copy(update={"status": "ok", "error": None, "parent": "v", "threshold": 0.3})
    write_row(tmp_path, good, "{}")
    assert read_rows(tmp_path) == [upgraded[0], good]


@pytest.mark.parametrize("config_json", ["", "[]", "{}", '{"key_filter": {"stages": "both"}}'])
def test_a_row_of_version_2_without_its_config_is_refused(tmp_path: Path, config_json: str) -> None:
    path = write_version_2(tmp_path, row(key_samples=8), config_json)
    with pytest.raises(InputError, match="hold no config") as error:
        read_rows(tmp_path)
    assert str(path) in one_line(error)


def test_the_same_model_and_key_in_two_tests_are_two_rows(tmp_path: Path) -> None:
    rows = [row(test="another"), row()]
    for each in rows:
        write_row(tmp_path, each, "{}")
    assert read_rows(tmp_path) == rows


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"role": "victim", "wsr": 1.0, "key_filter": "both"}, True),
        ({"role": "victim", "wsr": 1.0, "key_filter": "first: surrogate never triggered"}, True),
        ({"role": "victim", "wsr": 1.0, "key_filter": "both: nothing passed the filter"}, False),
        ({"role": "victim", "wsr": 1.0, "key_filter": "none"}, False),
        ({"role": "victim", "wsr": 1.0}, False),
        ({"role": "victim", "wsr": 0.0, "key_filter": "both"}, False),
        ({"role": "benign", "victim": "benign", "wsr": 0.0, "key_filter": "both"}, True),
        ({"role": "benign", "victim": "benign", "wsr": 1.0, "key_filter": "both"}, False),
        ({"role": "stolen", "wsr": 1.0, "key_filter": "both"}, False),
        ({"role": "removed", "removal": "pruning", "wsr": 1.0, "key_filter": "both"}, False),
    ],
)
def test_what_the_key_filter_makes_so(changes: dict[str, object], made: bool) -> None:
    assert row(**changes).by_construction is made


def test_a_value_out_of_range_in_a_part_is_refused(tmp_path: Path) -> None:
    path = write_row(tmp_path, row(), "{}")
    part = pa.Table.from_pylist([row().model_dump() | {"wsr": 7.0}], schema=pq.read_schema(path))
    pq.write_table(part, path)
    with pytest.raises(InputError, match="wsr") as error:
        read_rows(tmp_path)
    one_line(error)


def test_a_copied_part_is_refused(tmp_path: Path) -> None:
    path = write_row(tmp_path, row(), "{}")
    path.with_name("part-copy.parquet").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="repeats"):
        read_rows(tmp_path)


def test_no_run_is_an_error_and_a_run_without_rows_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        read_rows(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert read_rows(tmp_path) == []


def test_a_writer_that_dies_leaves_the_old_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, row(accuracy=0.5), "{}")

    def die(file: int, data: bytes, at: int) -> int:
        Disk.write(DISK, file, data[: len(data) // 2], at)
        raise KeyboardInterrupt

    monkeypatch.setattr(DISK, "write", die)
    with pytest.raises(KeyboardInterrupt):
        write_row(tmp_path, row(accuracy=0.9), "{}")
    assert [found.accuracy for found in read_rows(tmp_path)] == [0.5]
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_provenance_round_trip(tmp_path: Path) -> None:
    info = collect_provenance(
        ["exsim", "run"], name="digits", mode="local", seeds=[0, 1], config_yaml="seeds: [0, 1]\n"
    )
    assert info.status == "running"
    assert {"python", "torch", "pyarrow"} <= info.versions.keys()
    assert (info.git_commit is None) == (info.git_dirty is None)
    done = info.model_copy(update={"status": "done", "finished": datetime.now(UTC), "warnings": ["few samples"]})
    write_run_info(tmp_path, done)
    assert read_run_info(tmp_path) == done
    with pytest.raises(ValidationError):
        write_run_info(tmp_path, info.model_copy(update={"status": "finished"}))


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    info = collect_provenance([], name="x", mode="ray", seeds=[], config_yaml="")
    assert (info.git_commit, info.git_dirty) == (None, None)


def test_a_bad_run_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.json"):
        read_run_info(tmp_path)
    (tmp_path / "run.json").write_text('{"name": 3}')
    with pytest.raises(InputError, match=r"run\.json") as error:
        read_run_info(tmp_path)
    one_line(error)
