"""The audit of a run: a good one agrees, and whatever is changed in it is found and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from simulator import chain
from simulator.cli import main
from simulator.records.rows import read_rows, write_row
from simulator.report.account import audit_run


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def log(run: Path) -> Path:
    return run / "ledger" / "ledger.log"


def records(run: Path) -> list[dict[str, Any]]:
    return list(chain.Reader(log(run).read_bytes(), log(run)).records())


def forge(run: Path, kept: list[dict[str, Any]]) -> None:
    """Writes an account with other records, all its hashes and its heads, as its owner could."""
    lines, last = [], chain.START
    for record in kept:
        body = json.dumps(record).encode()
        last = chain.step(last, body)
        lines.append(chain.line(last, body))
    head = chain.Head(count=len(kept), hash=last.hex())
    log(run).write_bytes(b"".join(lines))
    chain.write_head(log(run), head)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "account": head.model_dump()}))


def test_a_good_run_agrees_and_says_so_everywhere(
    tiny_run: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audit_run(run)
    grants = [record for record in records(run) if "a" in record]
    images = sum(record["n"] for record in grants)
    assert found.line() == (
        f"account: {len(grants)} grants, {images} images; 6 rows, 6 transfer sets and the query log agree"
    )
    assert main(["audit-ledger", str(run)]) == 0
    assert capsys.readouterr().out.strip() == found.line()
    assert main(["report", str(run)]) == 0
    assert found.line() in capsys.readouterr().out
    assert f"- {found.line()}" in (run / "report" / "table.md").read_text()
    assert f"{images} images; 6 rows, 6 transfer sets" in (run / "report" / "index.html").read_text()
    head = json.loads((run / "run.json").read_text())["account"]
    assert head == json.loads((run / "ledger" / "head.json").read_text())
    assert head["count"] == len(records(run))


def less_charged(run: Path) -> None:
    forge(run, records(run)[:-1])


def another_key(run: Path) -> None:
    *others, last = records(run)
    forge(run, [*others, {**last, "k": last["k"] + 100}])


def other_images(run: Path) -> None:
    *others, last = records(run)
    forge(run, [*others, {**last, "d": "0" * 32}])


def over_budget(run: Path) -> None:
    forge(run, [{**record, "budget": 1} if "open" in record else record for record in records(run)])


def miscounted(run: Path) -> None:
    row = next(row for row in read_rows(run) if row.role == "stolen")
    write_row(run, row.model_copy(update={"queries": (row.queries or 0) - 1}), "{}")


def other_transfer_set(run: Path) -> None:
    file = next((run / "transfer").iterdir())
    tensors = load_file(file)
    tensors["images"] = tensors["images"].copy()
    tensors["images"][-1] ^= 1
    save_file(tensors, file)


def shorter_transfer_set(run: Path) -> None:
    file = next((run / "transfer").iterdir())
    tensors = load_file(file)
    first = int(tensors["chunks"][0])
    save_file({name: t[:first] if name in ("images", "answers") else t[:1] for name, t in tensors.items()}, file)


def logged(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    file = next(file for file in (run / "queries").iterdir() if pq.read_metadata(file).num_rows)
    table = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), file)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut at a boundary": (
        lambda run: log(run).write_bytes(log(run).read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n"),
        "records, and head.json says",
    ),
    "emptied": (lambda run: log(run).write_bytes(b""), "holds 0 records, and head.json says"),
    "emptied with its head": (
        lambda run: (log(run).write_bytes(b""), chain.head_file(log(run)).unlink()),
        "holds 0 records, and run.json says",
    ),
    "NULs": (lambda run: log(run).write_bytes(b"\0" * log(run).stat().st_size), "line 1 is damaged"),
    "less charged": (less_charged, "images, the account"),
    "another key": (another_key, "is not what was paid for"),
    "other images": (other_images, "is not what was paid for"),
    "over budget": (over_budget, "is damaged"),
    "a row counts less": (miscounted, "images, the account"),
    "another transfer set": (other_transfer_set, "is not what was paid for"),
    "a shorter transfer set": (shorter_transfer_set, "1 batches, "),
    "a damaged transfer set": (lambda run: next((run / "transfer").iterdir()).write_bytes(b"x"), "cannot be read"),
    "an answer that was not paid": (
        lambda run: logged(run, lambda rows: [{**rows[0], "key": 10**6}, *rows[1:]]),
        "is answered, and was not paid for",
    ),
    "an answer that is not logged": (lambda run: logged(run, lambda rows: rows[1:]), "answered queries, "),
    "an answer that is logged twice": (lambda run: logged(run, lambda rows: [*rows, rows[0]]), "is charged twice"),
    "a damaged query log": (lambda run: next((run / "queries").iterdir()).write_bytes(b"x"), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_what_does_not_agree_is_found_and_told(
    damage: Callable[[Path], object], fault: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    found = audit_run(run)
    assert fault in found.line()
    assert "DISAGREES" in found.line()
    assert main(["audit-ledger", str(run)]) == 1
    assert fault in capsys.readouterr().out
    assert main(["report", str(run)]) == 1
    assert "DISAGREES" in (run / "report" / "index.html").read_text()


@pytest.mark.parametrize("name", ["cut at a boundary", "emptied", "emptied with its head", "NULs", "less charged"])
def test_a_run_whose_account_lost_something_is_not_gone_on_with(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, fault = FAULTS[name]
    damage(run)
    before = log(run).read_bytes()
    assert main(["run", "--resume", str(run), "--local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fault in line
    assert log(run).read_bytes() == before


def test_rows_of_an_old_run_are_checked_without_any_head(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "ledger")
    info = json.loads((run / "run.json").read_text())
    del info["account"]
    (run / "run.json").write_text(json.dumps(info))
    assert main(["run", "--resume", str(run), "--local"]) == 2
    assert "images, the account 0; restore the file from a copy" in capsys.readouterr().err
    assert main(["audit-ledger", str(run)]) == 1
    assert "no ledger lies here" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0


def test_no_run_directory_is_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit-ledger", str(tmp_path / "nowhere")]) == 2
    assert main(["audit-ledger", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("command", [["report"], ["audit-ledger"], ["run", "--local", "--resume"]])
@pytest.mark.parametrize("place", ["report/index.html", "report/table.md", ".lock", "ledger/ledger.log", "results"])
def test_links_in_a_run_directory_are_refused_and_their_targets_left_alone(
    command: list[str], place: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine"
    target.write_text("mine")
    if (run / place).is_dir():
        (run / place).rename(tmp_path / "elsewhere")
        target = tmp_path / "elsewhere"
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(target)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_dir()}
    assert main([*command, str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}: is a symbolic link" in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_dir()} == before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"\0" * 99, b"a: [" * 3000, b"{}", b"", b"dataset: {path: /etc}", None]
)
def test_a_report_of_an_odd_configuration_is_a_report_or_one_line(
    content: bytes | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("config.yaml", "sweep/config.yaml"):
        (run / place).unlink(missing_ok=True)
        if content is None:
            (run / place).mkdir(parents=True)
        else:
            (run / place).parent.mkdir(exist_ok=True)
            (run / place).write_bytes(content)
        status = main(["report", str(run)])
        assert status == 0 or (status == 2 and len(capsys.readouterr().err.splitlines()) == 1)


def test_an_audit_takes_time_linear_in_the_records_and_writes_nothing(run: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    log(run).chmod(0o444)
    assert audit_run(run).agrees
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before
