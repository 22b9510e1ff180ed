"""The command line: what it prints, its exit status, bad input in one line, and interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simulator.cli import main
from simulator.experiment.rundir import RunDirectory
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.plan.config import read_config
from simulator.plan.settings_file import presets
from simulator.records.provenance import read_run_info
from simulator.records.rows import Row, read_rows

ROOT = Path(__file__).parents[3]
#: images that no memory holds
TOO_MANY = 10**15


def of_role(run: Path, role: str, **columns: Any) -> Row:
    """The first row of a run with this role and these columns."""
    for row in read_rows(run):
        if row.role == role and all(getattr(row, name) == value for name, value in columns.items()):
            return row
    raise LookupError(columns)


def model_of(run: Path, row: Row) -> str:
    name = f"stolen-{row.scenario_id}" if row.role == "stolen" else row.scenario_id
    return str(run / "models" / f"{name}.safetensors")


def key_of(run: Path) -> str:
    return str(run / "keys" / f"{of_role(run, 'victim').victim}.safetensors")


# -- what works -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(tiny_run: Path) -> None:
    info = read_run_info(tiny_run)
    assert (info.name, info.status, info.mode, info.seeds) == ("tiny", "done", "local", [0])
    assert info.finished is not None
    assert info.finished >= info.started
    roles = [row.role for row in read_rows(tiny_run)]
    assert [roles.count(role) for role in ("benign", "victim", "stolen")] == [1, 1, 6]
    assert (tiny_run / "report" / "index.html").is_file()
    assert (tiny_run / "ledger" / "secret").stat().st_mode & 0o077 == 0


def test_the_resolved_configuration_of_a_run_is_input_again(
    tiny_run: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(config: Path) -> str:
        assert main(["plan", str(config)]) == 0
        scenarios, title, _estimate_of_the_clock = capsys.readouterr().out.partition("estimate")
        assert title
        return scenarios

    assert planned(tiny_run / "config.yaml") == planned(tiny_config)


def test_a_plan_shows_every_scenario_and_runs_nothing(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(tiny_config), "--set", "seeds=[0, 1]"]) == 0
    out = capsys.readouterr().out
    assert "12 scenarios" in out
    assert "to train: 2 benign, 2 marked" in out
    assert f"{2 * 2 * (600 + 300 + 300):,} images" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", presets())
def test_every_preset_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("attacks", ["knockoff", "distillation", "Orekondy et al., CVPR 2019", "temperature=4.0"]),
        ("watermarks", ["deeptracer", "Yang et al., AAAI 2026", "margin="]),
        ("removals", ["removals", "pruning", "Yang et al., AAAI 2026", "fraction=0.5", "scope=global"]),
        ("detectors", ["prada", "Juuti et al., EuroS&P 2019", "delta=0.95"]),
        ("ownership_tests", ["wsr_sequential", "threshold=0.2", "Yang et al., AAAI 2026"]),
        ("models", ["naivenet", "lenet5", "vit"]),
        ("datasets", ["digits", "cifar10", "no download"]),
        ("presets", ["digits", "fashion-mnist"]),
        ("all", ["knockoff", "deeptracer", "lenet5", "cifar10", "no download"]),
    ],
)
def test_a_list_names_what_there_is(family: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", family]) == 0
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["run", "--help"], ["verify", "-h"]])
def test_help_and_version_are_no_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "Usage: exsim" in err
    assert len(err.splitlines()) > 5


@pytest.mark.parametrize(
    ("role", "columns", "status"),
    [
        ("victim", {}, 0),
        ("stolen", {"pool": "9*owner+triggers", "victim": None}, 0),
        ("stolen", {"pool": "9*owner+triggers", "victim": "benign"}, 1),
        ("benign", {}, 1),
    ],
    ids=["victim", "stolen from it", "stolen from the benign model", "benign"],
)
def test_verify_says_whether_a_model_is_marked(
    tiny_run: Path, role: str, columns: dict[str, Any], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if "victim" in columns and columns["victim"] is None:
        columns = {**columns, "victim": of_role(tiny_run, "victim").victim}
    row = of_role(tiny_run, role, **columns)
    assert main(["verify", model_of(tiny_run, row), "--key", key_of(tiny_run)]) == status
    out = capsys.readouterr().out
    assert out.startswith("VERIFIED" if status == 0 else "not verified")
    assert f"WSR {row.wsr:.4f}" in out
    assert f"on {row.key_samples} key samples" in " ".join(out.split())


def test_the_threshold_decides(tiny_run: Path) -> None:
    row = of_role(tiny_run, "victim")
    arguments = ["verify", model_of(tiny_run, row), "--key", key_of(tiny_run), "--threshold"]
    assert row.wsr is not None
    assert main([*arguments, f"{row.wsr - 0.01}"]) == 0
    assert main([*arguments, f"{min(row.wsr, 0.999)}"]) == (1 if row.wsr < 0.999 else 0)


def test_report_writes_the_page_again(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "report")
    assert main(["report", str(run)]) == 0
    assert "deeptracer" in capsys.readouterr().out
    assert (run / "report" / "index.html").is_file()


def test_a_failed_row_is_status_1_and_the_others_are_kept(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    scenarios = "[{attack: distillation, pool: patches, budget: 1e15}, {attack: {name: distillation}, budget: 64}]"
    scenarios = scenarios.replace("1e15", str(TOO_MANY))
    brief = ["--set", f"scenarios={scenarios}", "--set", "scenarios.1.attack.training={epochs: 1}"]
    assert main(["run", str(tiny_config), "--local", "--out", str(run), *brief]) == 1
    assert "failed: distillation on" in capsys.readouterr().out
    found = [(row.role, row.status) for row in read_rows(run)]
    assert found.count(("stolen", "failed")) == found.count(("stolen", "ok")) == 2
    assert read_run_info(run).status == "failed"
    assert main(["report", str(run)]) == 1


def test_a_finished_run_resumed_does_nothing(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    models = {file.name: file.stat().st_mtime_ns for file in (run / "models").iterdir()}
    assert main(["run", "--resume", str(run), "--local"]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in (run / "models").iterdir()} == models
    assert (run / "ledger" / "ledger.log").read_bytes() == (tiny_run / "ledger" / "ledger.log").read_bytes()


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_config(str(tiny_config))
    assert len({RunDirectory.create(config, None).path for _ in range(4)}) == 4


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_config: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good files and every kind of bad one."""
    path = tmp_path_factory.mktemp("bad")
    shutil.copy(tiny_config, path / "tiny.yaml")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (30, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(30) % 3,
    }
    np.savez(path / "good.npz", **arrays)
    np.savez(path / "pickled.npz", **{**arrays, "x_train": np.array([{}] * 60, dtype=object)})
    (path / "cut.npz").write_bytes((path / "good.npz").read_bytes()[:2000])
    (path / "not.yaml").write_text("scenarios: [1")
    (path / "list.yaml").write_text("- 1")
    (path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (path / "file").write_text("some text")
    (path / "full").mkdir()
    (path / "full.npz").mkdir()
    (path / "full" / "something").write_text("precious")
    shutil.copy(model_of(tiny_run, of_role(tiny_run, "victim")), path / "model")
    shutil.copy(key_of(tiny_run), path / "key")
    shutil.copy(key_of(tiny_run).replace(".safetensors", ".triggers.safetensors"), path / "triggers")
    (path / "cut").write_bytes((path / "model").read_bytes()[:-100])
    torch.save({"weight": torch.ones(1)}, path / "pickle")
    key = load_key(path / "key")
    save_key(KeySamples(key.images[..., :-1, :-1], key.labels, key.classes), path / "small-key")
    save_key(KeySamples(key.images, key.labels, 11), path / "key-of-11")
    shutil.copytree(tiny_run, path / "run")
    (path / "young").mkdir()
    shutil.copy(tiny_run / "run.json", path / "young")
    shutil.copytree(tiny_run, path / "damaged")
    next((path / "damaged" / "results").iterdir()).write_bytes(b"PAR1")
    return path


def settings(*overrides: str) -> list[str]:
    """A run of tiny.yaml with some settings changed."""
    return ["run", "tiny.yaml", "--local", *(word for each in overrides for word in ("--set", each))]


#: arguments, and what the line has to say
BAD: dict[str, tuple[list[str], list[str]]] = {
    "no such command": (["frobnicate"], ["frobnicate"]),
    "no such option": (["run", "--frob"], ["--frob"]),
    "too many arguments": (["run", "a", "b"], ["unexpected", "b"]),
    "no such list": (["list", "attack"], ["'attack'", "attacks", "presets"]),
    "no such preset": (["run", "digit"], ["'digit'", "did you mean 'digits'"]),
    "no such file": (["run", "missing.yaml"], ["missing.yaml", "no such file"]),
    "not YAML": (["run", "not.yaml"], ["not.yaml", "not YAML", "line 1"]),
    "not a mapping": (["run", "list.yaml"], ["list.yaml", "mapping", "list"]),
    "not text": (["plan", "binary.yaml"], ["binary.yaml", "text"]),
    "a folder": (["plan", "full"], ["'full'", "digits"]),
    "misspelt key": (settings("training.epohcs=3"), ["training.epohcs", "no such setting"]),
    "wrong type": (settings("training.epochs=ten"), ["training.epochs", "integer", "'ten'"]),
    "too small": (settings("training.epochs=0"), ["training.epochs", "1", "0"]),
    "attack": (settings("scenarios.0.attack.name=knokoff"), ["scenarios.0.attack", "did you mean 'knockoff'"]),
    "watermark": (settings("watermarks.0.name=deeptrace"), ["watermarks.0", "did you mean 'deeptracer'"]),
    "removal": (
        settings("scenarios.0.then=[{removal: prunning}]"),
        ["scenarios.0.then.0.removal", "did you mean 'pruning'"],
    ),
    "removal's setting": (
        settings("scenarios.0.then=[{removal: {name: pruning, fraction: 2}}]"),
        ["fraction", "2", "1"],
    ),
    "nothing but settings": (settings("scenarios=[{budget: 9}]"), ["scenarios.0", "'attack'", "'stages'", "'then'"]),
    "nothing stolen, and a budget": (
        settings("scenarios=[{then: [{removal: pruning}], budget: 9}]"),
        ["scenarios.0", "no other key than 'then'"],
    ),
    "architecture": (settings("architecture=resnet17"), ["architecture", "'resnet17'", "resnet18"]),
    "surrogate": (settings("scenarios.0.architecture=[lenet5, lenet]"), ["architecture.1", "'lenet'", "lenet5"]),
    "filter": (settings("key_filter.architecture=alex"), ["key_filter.architecture", "'alex'", "alexnet"]),
    "data set": (settings("dataset.name=digit"), ["dataset.name", "'digit'", "digits"]),
    "pool": (settings("scenarios.0.pool=attackers"), ["scenarios.0.pool", "did you mean 'attacker'"]),
    "pool's weight": (settings("scenarios.0.pool={attacker: 0}"), ["pool", "attacker", "0"]),
    "the victim's own set as a pool": (settings("scenarios.0.pool=digits"), ["pool", "'digits'", "attacker"]),
    "a pool without images": (
        settings("dataset.attacker=1", "scenarios.0.pool={parts: attacker, classes: [9]}"),
        ["attacker", "class", "9"],
    ),
    "a pool too large": (settings(f"scenarios.0.pool={{parts: patches, size: {TOO_MANY}}}"), ["patches", "memory"]),
    "the filter's pool": (settings("key_filter.pool={owner: 1, triggers: 1}"), ["key_filter.pool", "triggers"]),
    "labels": (settings("scenarios.1.labels=[soft, sofft]"), ["labels.1", "'sofft'", "top-K"]),
    "no budget": (settings("scenarios.0.budget=0"), ["scenarios.0.budget", "0", "1"]),
    "half an image": (settings("scenarios.0.budget=1.5"), ["scenarios.0.budget", "1.5", "integer"]),
    "an empty list": (settings("scenarios.0.budget=[]"), ["scenarios.0", "budget", "empty"]),
    "no label": (settings("scenarios.1.labels=[]"), ["scenarios.1", "labels", "empty"]),
    "no watermark": (settings("watermarks=[]"), ["watermarks", "empty"]),
    "no seed": (settings("seeds=[]"), ["seeds", "at least one"]),
    "a seed twice": (settings("seeds=[1, 1]"), ["seeds", "different"]),
    "margin": (settings("watermarks.0.margin=0"), ["watermarks.0", "margin", "greater than 0"]),
    "threshold": (settings("verification.threshold=2"), ["verification", "threshold", "2", "between 0 and 1"]),
    "source classes": (settings("watermarks.0.source_classes=10"), ["source_classes", "10", "8"]),
    "more source classes than classes": (settings("dataset={name: good.npz}"), ["source_classes 4", "3 classes"]),
    "too many images": (settings("dataset.owner=5000"), ["digits", "1797", "5000"]),
    "too many test images": (settings("dataset.test=5000"), ["digits", "1797", "5000"]),
    "device": (settings("device=gpu"), ["device", "'gpu'", "'cuda'"]),
    "attackers": (settings("resources.attackers=many"), ["resources.attackers", "'many'"]),
    "name": (settings("name=../x"), ["name", "'../x'"]),
    "no value": (settings("margin"), ["--set margin", "key=value"]),
    "no such position": (settings("watermarks.7.margin=1"), ["watermarks.7.margin=1", "'7'", "list of 1"]),
    "no position": (settings("watermarks.x.margin=1"), ["watermarks.x.margin=1", "'x'", "list of 1"]),
    "a value that is not YAML": (settings("seeds=[1"), ["seeds=[1", "not YAML"]),
    "beneath a number": (settings("training.epochs.x=1"), ["training.epochs.x=1", "'x'"]),
    "missing npz": (settings("dataset.name=missing.npz"), ["missing.npz", "no such file"]),
    "missing folder": (settings("dataset.name=./missing"), ["missing", "no such folder"]),
    "truncated npz": (settings("dataset={name: cut.npz}"), ["cut.npz", "truncated"]),
    "pickled npz": (settings("dataset={name: pickled.npz}"), ["pickled.npz", "pickled objects"]),
    "a truncated npz as a pool": (settings("scenarios.0.pool=./cut.npz"), ["cut.npz", "truncated"]),
    "a pickled npz for the filter": (settings("key_filter.pool=./pickled.npz"), ["pickled.npz", "pickled objects"]),
    "a missing folder as a pool": (settings("scenarios.0.pool={attacker: 1, ./none: 1}"), ["none", "no such folder"]),
    "text for npz": (settings("dataset={name: ./file}"), ["file", "folder"]),
    "out under a file": ([*settings(), "--out", "file/run"], ["file/run", "cannot write"]),
    "out is a file": ([*settings(), "--out", "file"], ["file", "exists"]),
    "out is not empty": ([*settings(), "--out", "full"], ["full", "not an empty directory", "--resume"]),
    "out has an impossible name": ([*settings(), "--out", "x" * 300], ["cannot write"]),
    "nothing to resume": (["run", "--resume", "missing"], ["missing", "not a run directory"]),
    "no run to resume": (["run", "--resume", "full"], ["full", "not a run directory"]),
    "resume with a configuration": (["run", "tiny.yaml", "--resume", "run"], ["--resume", "CONFIG"]),
    "resume with a setting": (["run", "--resume", "run", "--set", "seeds=1"], ["--resume", "--set"]),
    "resume with a directory": (["run", "--resume", "run", "--out", "x"], ["--resume", "--out"]),
    "resume nothing": (["run", "--resume", ""], ["--resume", "empty"]),
    "resume blanks": (["run", "--resume", " "], ["--resume", "empty"]),
    "resume no sweep": (["sweep", "--resume", ""], ["--resume", "empty"]),
    "out without a name": ([*settings(), "--out", ""], ["--out", "empty"]),
    "a sweep's out without a name": (["sweep", "digits", "--out", ""], ["--out", "empty"]),
    "data nowhere": ([*settings(), "--data", ""], ["--data", "empty"]),
    "a plan's data nowhere": (["plan", "tiny.yaml", "--data", ""], ["--data", "empty"]),
    "a wait of no number": ([*settings(), "--wait", "nan"], ["--wait", "nan", "finite"]),
    "a wait without an end": ([*settings(), "--wait", "inf"], ["--wait", "inf", "finite"]),
    "a wait backwards": ([*settings(), "--wait", "-1"], ["--wait", "-1"]),
    "a budget that no ledger holds": (
        ["serve", "--model", "model", "--budget", "9" * 23],
        ["--budget", "9" * 23, "9223372036854775807"],
    ),
    "a folder for a configuration": (["run", "./full"], ["./full", "is a directory"]),
    "triggers for a key": (["verify", "model", "--key", "triggers"], ["triggers", "no key", "filtered"]),
    "triggers for a key at a URL": (
        ["verify", "--url", "http://127.0.0.1:9", "--key", "triggers"],
        ["triggers", "no key", "filtered"],
    ),
    "a folder for a key": (["verify", "model", "--key", "full"], ["full", "is a directory", "a key file"]),
    "a folder for a model": (["verify", "full", "--key", "key"], ["full", "directory"]),
    "a folder for an npz": (settings("dataset={name: full.npz}"), ["full.npz", "is a directory"]),
    "a file for a folder of images": (settings("dataset={name: ./file}"), ["file", "is a file", "folder"]),
    "no run to report": (["report", "full"], ["full", "not a run directory"]),
    "nothing to report": (["report", "young"], ["young", "no results yet"]),
    "a damaged row": (["report", "damaged"], ["damaged", "Parquet"]),
    "no key": (["verify", "model"], ["--key"]),
    "missing model": (["verify", "missing", "--key", "key"], ["missing"]),
    "missing key": (["verify", "model", "--key", "missing"], ["missing", "no such file"]),
    "text for a model": (["verify", "file", "--key", "key"], ["file", "safetensors"]),
    "text for a key": (["verify", "model", "--key", "file"], ["file", "safetensors"]),
    "truncated model": (["verify", "cut", "--key", "key"], ["cut", "damaged"]),
    "pickled model": (["verify", "pickle", "--key", "key"], ["pickle", "never loaded"]),
    "pickled key": (["verify", "model", "--key", "pickle"], ["pickle", "never loaded"]),
    "key for a model": (["verify", "key", "--key", "key"], ["key", "no model"]),
    "model for a key": (["verify", "model", "--key", "model"], ["model", "not a key"]),
    "key of another size": (["verify", "model", "--key", "small-key"], ["small-key", "(1, 15, 15)", "(1, 16, 16)"]),
    "key of other classes": (["verify", "model", "--key", "key-of-11"], ["key-of-11", "11", "10"]),
    "threshold too high": (["verify", "model", "--key", "key", "--threshold", "2"], ["threshold", "2", "0 and 1"]),
    "threshold no number": (["verify", "model", "--key", "key", "--threshold", "x"], ["threshold", "'x'"]),
    "threshold NaN": (["verify", "model", "--key", "key", "--threshold", "nan"], ["threshold", "finite"]),
}
#: what a run is refused for, its plan is, too
BAD |= {
    f"plan: {name}": (["plan", *arguments[:1], *arguments[2:]], words)
    for name, (command, *arguments), words in ((name, *case) for name, case in BAD.items())
    if (command, *arguments[:2]) == ("run", "tiny.yaml", "--local") and not {"--out", "--wait"} & set(arguments)
}
ON_RAY = {
    "no GPU in the cluster": (["run", "tiny.yaml", "--set", "device=cuda"], ["device", "cuda", "cluster", "cpu"]),
    "more than a node has": (
        ["run", "tiny.yaml", "--set", "resources.attacker=99.0"],
        ["resources.attacker", "99 CPU", "8"],
    ),
    "more than the cluster has": (
        ["run", "tiny.yaml", "--set", "resources.attackers=99"],
        ["resources", "99 x", "CPU", "8"],
    ),
}


def check_refused(
    arguments: list[str],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, status 2, and not a file more or less."""
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("exsim: ")
    assert [word for word in words if word not in printed.err] == [], printed.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refused(arguments, words, folder, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(settings("device=cuda"), ["device", "cuda", "cpu"], folder, monkeypatch, capsys)


@pytest.mark.ray
@pytest.mark.parametrize(("arguments", "words"), ON_RAY.values(), ids=ON_RAY.keys())
def test_what_the_cluster_has_not_is_one_line(
    ray_session: None,
    arguments: list[str],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refused(arguments, words, folder, monkeypatch, capsys)


# -- in a process of its own ----------------------------------------------------------------------------------------

#: as a terminal starts it: a shell's background job, which tests may be, has SIGINT ignored
AS_FROM_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('simulator', run_name='__main__', alter_sys=True)"
)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Any]:
    """Starts ``exsim`` in an empty directory."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", AS_FROM_A_TERMINAL, *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def test_the_exit_status_of_the_process(process: Any, tiny_run: Path) -> None:
    bad = process("run", "nonsense")
    row = of_role(tiny_run, "benign")
    unmarked = process("verify", model_of(tiny_run, row), "--key", key_of(tiny_run))
    out, err = bad.communicate(timeout=60)
    assert (bad.returncode, out, len(err.splitlines())) == (2, "", 1)
    out, err = unmarked.communicate(timeout=60)
    assert (unmarked.returncode, err) == (1, "")
    assert "not verified" in out


@pytest.mark.slow
def test_two_processes_do_not_run_in_one_directory_and_a_killed_one_leaves_it_free(
    process: Any,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "shared"
    long = ["--set", "training.epochs=100000"]
    running = process("run", str(tiny_config), "--local", "--out", "shared", *long)
    while not (run / "run.json").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}
    for arguments in (["--resume", "shared"], ["--resume", "shared", "--local"], [str(tiny_config), "--out", "shared"]):
        assert main(["run", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert f"in use by another process (process {running.pid} on " in err or "not an empty directory" in err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()} == before
    running.kill()
    running.wait()
    directory, _ = RunDirectory.resume(run)
    with directory.held():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_an_interrupted_run_says_so_and_is_resumed(
    process: Any, where: str, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = ["--set", "scenarios.1.attack.training.epochs=50", "--set", "resources.attackers=1"]
    run = tmp_path / "interrupted"
    local = ["--local"] if where == "local" else []
    running = process("run", str(tiny_config), "--out", "interrupted", *local, *longer)
    while not list(run.glob("results/*.parquet")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches all processes that it started
    out, err = running.communicate(timeout=120)
    assert running.returncode == 130, out + err
    assert "exsim run --resume interrupted" in out
    assert err == ""
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert not (run / "checkpoints" / "test.safetensors").exists()
    kept = {row.identity: row for row in read_rows(run)}
    assert 0 < len(kept) < 8
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--resume", "interrupted", "--local"]) == 0
    rows = {row.identity: row for row in read_rows(run)}
    assert len(rows) == 8
    stolen = [row for row in kept.values() if row.role == "stolen"]
    assert [rows[row.identity] for row in stolen] == stolen
    assert read_run_info(run).status == "done"
