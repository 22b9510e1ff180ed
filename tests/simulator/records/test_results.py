from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from simulator.errors import InputError
from simulator.records.provenance import collect_provenance, read_run_info, write_run_info
from simulator.records.rows import (
    CURVE_SCHEMA,
    SCHEMA,
    CurvePoint,
    Row,
    read_curves,
    read_rows,
    sorted_rows,
    table,
    write_curve,
    write_row,
)

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


def test_every_column_is_a_field_in_the_same_order() -> None:
    assert SCHEMA.names == list(Row.model_fields)
    assert CURVE_SCHEMA.names == list(CurvePoint.model_fields)


def test_a_full_row_comes_back_as_it_was(tmp_path: Path) -> None:
    when = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    full = row(
        **{"attack": "knockoff", "attack_params": '{"strategy": "random"}', "labels": "soft", "pool": "attacker"},
        **{
            "stage": 1,
            "removal": "fine-tuning",
            "removal_params": "{}",
            "budget": 5000,
            "accounts": 2,
            "queries": 4999,
        },
        **{"accuracy": 0.9, "wsr": 0.5, "wsr_low": 0.4, "wsr_high": 0.6, "key_samples": 100, "agreement": 0.8},
        **{
            "p_value": 1e-300,
            "verified": True,
            "seconds": 1.5,
            "false_trigger": 0.0,
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


def test_metadata_and_other_readers(tmp_path: Path) -> None:
    path = write_row(tmp_path, row(accuracy=0.25), '{"name": "x"}')
    write_row(tmp_path, row(scenario_id="s2", accuracy=0.75), '{"name": "x"}')
    metadata = pq.read_metadata(path).metadata
    assert metadata[b"exsim.schema_version"] == b"2"
    assert metadata[b"exsim.config"] == b'{"name": "x"}'
    parts = tmp_path / "results"
    mean = duckdb.sql(f"SELECT avg(accuracy) FROM '{parts}/*.parquet'")
    assert mean is not None
    assert mean.fetchall() == [(0.5,)]
    assert pd.read_parquet(parts)["accuracy"].mean() == 0.5
    assert table(tmp_path).schema == SCHEMA
    assert table(tmp_path)["accuracy"].to_pylist() == [0.25, 0.75]


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
        (SCHEMA.with_metadata({"exsim.schema_version": "1"}), "schema version 1.*reads version 2"),
        (SCHEMA, "schema version none"),
        (SCHEMA.remove(0).with_metadata({"exsim.schema_version": "2"}), "does not have the columns"),
    ],
)
def test_a_part_of_another_schema_is_refused(tmp_path: Path, schema: pa.Schema, match: str) -> None:
    path = write_row(tmp_path, row(), "{}")
    pq.write_table(pa.Table.from_pylist([], schema=schema), path)
    with pytest.raises(InputError, match=match) as error:
        read_rows(tmp_path)
    one_line(error)


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

    def die(writer: pq.ParquetWriter, _: pa.Table) -> None:
        Path(writer.where).write_bytes(b"half a")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", die)
    with pytest.raises(KeyboardInterrupt):
        write_row(tmp_path, row(accuracy=0.9), "{}")
    assert [found.accuracy for found in read_rows(tmp_path)] == [0.5]
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_curves_round_trip(tmp_path: Path) -> None:
    points = [CurvePoint(scenario_id="s1", queries=n, accuracy=n / 10) for n in (1, 2)]
    write_curve(tmp_path, points[:1], "{}")
    write_curve(tmp_path, points[::-1], "{}")
    assert read_curves(tmp_path) == points
    with pytest.raises(ValueError, match="one scenario"):
        write_curve(tmp_path, [], "{}")


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
