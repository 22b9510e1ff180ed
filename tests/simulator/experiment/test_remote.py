"""Run directories at a URI, on a local file system reached as one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from simulator.cli import main
from simulator.experiment.remote import RemoteDirectory, is_uri, mirrored
from simulator.records.rows import read_rows
from simulator.service.ledger import Ledger, Terms, hash_token


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local directories are made below the working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("place", "uri"), [("s3://b/x", True), ("file:///x", True), ("runs/x", False), ("/x", False), ("C:/x", False)]
)
def test_a_uri_is_known_by_its_scheme(place: str, uri: bool) -> None:
    assert is_uri(place) == uri


def test_a_path_is_left_as_it_is() -> None:
    with mirrored("runs/x", None) as found:
        assert found == (Path("runs/x"), None)
    with mirrored(None, "runs/y") as found:
        assert found == (None, Path("runs/y"))
    assert not Path("runs").exists()


def test_a_run_goes_to_the_uri_and_is_resumed_from_there(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = tmp_path / "bucket"
    uri = f"file://{bucket}/run"
    assert main(["run", str(tiny_config), "--local", "--out", uri]) == 0
    assert f"copied to {uri}" in capsys.readouterr().err
    (local,) = Path("runs").iterdir()
    here = {name: data for name, data in files(local).items() if not name.startswith("checkpoints")}
    assert files(bucket / "run") == here
    assert main(["run", str(tiny_config), "--local", "--out", uri]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    # another machine, which has nothing of it; some of the work is lost
    shutil.rmtree("runs")
    before = (bucket / "run" / "ledger" / "ledger.log").read_bytes()
    lost = sorted((bucket / "run" / "results").glob("*.parquet"))[::2]
    for file in lost:
        file.unlink()
    assert main(["run", "--resume", uri, "--local"]) == 0
    excluded = {"seconds", "started", "finished"}
    rows = [row.model_dump(exclude=excluded) for row in read_rows(bucket / "run")]
    assert rows == [row.model_dump(exclude=excluded) for row in read_rows(tiny_run)]
    assert (bucket / "run" / "ledger" / "ledger.log").read_bytes() == before
    (local,) = Path("runs").iterdir()
    assert (local / "ledger" / "secret").stat().st_mode & 0o777 == 0o600


def test_only_what_changed_is_copied_and_the_ledger_before_what_rests_on_it(tmp_path: Path) -> None:
    local, bucket = tmp_path / "local", tmp_path / "bucket"
    for name in (
        "results/a.parquet",
        "models/m",
        "keys/k",
        "ledger/ledger.log",
        "run.json",
        "checkpoints/c",
        "b/.t.tmp",
    ):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    remote = RemoteDirectory(f"file://{bucket}", local)
    order = [str(path) for path in remote._files()]
    assert order == ["ledger/ledger.log", "keys/k", "models/m", "results/a.parquet", "run.json"]
    assert remote.push() == 5
    assert sorted(files(bucket)) == sorted(order)
    assert remote.push() == 0
    with (local / "ledger" / "ledger.log").open("a") as log:
        log.write("more")
    assert remote.push() == 1
    assert (bucket / "ledger" / "ledger.log").read_text() == "ledger/ledger.logmore"


def test_a_row_that_comes_while_copying_waits_for_the_next_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queries may be in no ledger that has been copied."""
    local, bucket = tmp_path / "local", tmp_path / "bucket"
    ledger = Ledger(local / "ledger" / "ledger.log")
    ledger.close()
    remote = RemoteDirectory(f"file://{bucket}", local)
    write = remote._write

    def slow(name: Path, data: bytes) -> None:
        write(name, data)
        (local / "results").mkdir(exist_ok=True)
        (local / "results" / "late.parquet").write_text("row")

    monkeypatch.setattr(remote, "_write", slow)
    assert remote.push() == 2
    assert sorted(files(bucket)) == ["ledger/head.json", "ledger/ledger.log"]
    assert remote.push() == 1
    assert sorted(files(bucket)) == ["ledger/head.json", "ledger/ledger.log", "results/late.parquet"]


def test_the_ledger_in_the_bucket_is_never_behind_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the copying ends, and whatever is granted meanwhile."""
    local, bucket, order = tmp_path / "local", tmp_path / "bucket", list[str]()
    ledger = Ledger(local / "ledger" / "ledger.log")
    remote = RemoteDirectory(f"file://{bucket}", local)
    write = remote._write

    def watched(name: Path, data: bytes) -> None:
        order.append(str(name))
        write(name, data)
        if name.name == "ledger.log" or (bucket / "ledger" / "head.json").exists():
            copy = shutil.copytree(bucket / "ledger", tmp_path / f"copy-{len(order)}")
            if (copy / "head.json").exists():
                Ledger(copy / "ledger.log").close()

    monkeypatch.setattr(remote, "_write", watched)
    for number in range(3):
        ledger.open(f"account-{number}", Terms("v", "soft", 10, hash_token("t")))
        ledger.close()
        ledger = Ledger(local / "ledger" / "ledger.log")
        remote.push()
    assert order == 3 * ["ledger/ledger.log", "ledger/head.json"]


def test_a_copy_is_made_at_intervals(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with mirrored(f"file://{bucket}/run", None, interval=0.01) as (local, _):
        assert local is not None
        (local / "ledger").mkdir(parents=True)
        (local / "ledger" / "ledger.log").write_text("x")
        while not (bucket / "run" / "ledger" / "ledger.log").exists():
            pass


def test_what_cannot_be_copied_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = tmp_path / "bucket"
    with mirrored(f"file://{bucket}/run", None) as (local, _):
        assert local is not None
        local.mkdir(parents=True)
        (local / "run.json").write_text("{}")
        shutil.rmtree(bucket)
        bucket.write_text("no folder any more")
    error = capsys.readouterr().err
    assert "not copied to file://" in error
    assert str(local) in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "ftp://host/run"], ["ftp://host/run", "scheme 'ftp'", "s3://"]),
        (["--out", "file://relative/run"], ["file://relative/run"]),
        (["--out", "file:///proc/nobody/run"], ["file:///proc/nobody/run", "cannot write there"]),
        (["--resume", "file:///nowhere/run"], ["file:///nowhere/run", "no config.yaml"]),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "--local"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == [], error
    assert not Path("runs").exists()


def test_a_run_that_could_not_start_leaves_the_uri_free(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/bucket/run"
    assert main(["run", "digits", "--set", "watermarks=[]", "--local", "--out", uri]) == 2
    assert files(tmp_path / "bucket") == {}
    with mirrored(uri, None):
        pass
