"""Whole runs on Ray: the plain loop's rows to the last bit, whoever computes them and whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
from rich.console import Console
from safetensors.torch import load_file

from actors.bench import CrewBench
from actors.layout import lay_out
from actors.runner import RayRun
from benchmarks.watched import Place, WatchedBench
from simulator.cli import main
from simulator.errors import InputError
from simulator.experiment.display import Display
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import RunConfig, check_config, read_config
from simulator.plan.subjects import Marked, OwnerModel, Stolen, Subject
from simulator.plan.tree import Plan, make_plan
from simulator.service.ledger import Ledger, digest_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

#: images or candidates that no memory holds
TOO_MANY = 10**15


def start(
    kind: Callable[..., RayRun], config: RunConfig, path: Path, *, attackers: int = 1
) -> tuple[RayRun, RunDirectory, Plan]:
    """A run on the session's Ray, in a directory that may be there already."""
    plan, world = prepare(config)
    directory = RunDirectory(path) if path.exists() else RunDirectory.create(config, path)
    data = json.loads(config.to_json())
    data["resources"] = {"attackers": attackers, "attacker": 0.25, "trainer": 0.25, "collectors": min(2, attackers)}
    layout = lay_out(check_config(data), attackers)
    display = Display(Console(quiet=True), total=0, quiet=True)
    return kind(config, plan, world, directory, display, layout), directory, plan


def rows(directory: RunDirectory) -> list[dict[str, Any]]:
    """What must be equal in equal runs: all but the times."""
    return [row.model_dump(exclude={"seconds", "started", "finished"}) for row in directory.rows()]


def files(path: Path, folder: str) -> dict[str, bytes]:
    """The files of a folder of a run, by name."""
    return {file.name: file.read_bytes() for file in (path / folder).iterdir()}


def weights(path: Path) -> dict[str, dict[str, list[Any]]]:
    """The tensors of every model of a run. (An owner's file also says how long its training took.)"""
    models = (path / "models").glob("*.safetensors")
    return {file.name: {name: tensor.tolist() for name, tensor in load_file(file).items()} for file in models}


def check_accounts(directory: RunDirectory, plan: Plan, *, transfer_sets: bool = True) -> None:
    """Rows, ledger, query log and transfer sets agree to the image and the digest, and nobody got more than it paid
    for."""
    ledger = Ledger(directory.ledger)
    logged = pandas.read_parquet(directory.path / "queries").query("outcome == 'answered'")
    paid = {(account, key): grant for account in ledger.all_spent() for key, grant in ledger.grants(account).items()}
    columns = (logged[name] for name in ("account", "key", "count", "digest"))
    assert sorted((account, key, (count, digest)) for account, key, count, digest in zip(*columns, strict=True)) == [
        (*name, grant) for name, grant in sorted(paid.items())
    ]
    assert [plan.attacks[account] for account in logged.account] == list(logged.attack)
    lost = "its victim could not be trained"
    stolen = [row for row in directory.rows() if row.role == "stolen" and lost not in (row.error or "")]
    queries = {row.scenario_id: row.queries for row in stolen}
    for scenario in plan.scenarios:
        charged = sum(ledger.spent(account) for account in scenario.accounts)
        assert queries.get(scenario.id, 0) == charged <= scenario.budget
        for account in scenario.accounts if transfer_sets and charged else ():
            kept = load_file(directory.path / "transfer" / f"{account}.safetensors")
            asked = Counter(
                (len(part), digest_of(part.contiguous().numpy().data.cast("B")))
                for part in kept["images"].split(kept["chunks"].tolist())
            )
            assert asked == Counter(ledger.grants(account).values())
            assert len(kept["answers"]) == ledger.spent(account)
    ledger.close()


def test_one_attacker_gives_the_rows_keys_models_and_transfer_sets_of_the_plain_loop(
    tiny_config: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run, directory, plan = start(RayRun, read_config(str(tiny_config)), tmp_path / "run")
    assert run.run()
    assert rows(directory) == rows(RunDirectory(tiny_run))
    for folder in ("keys", "transfer"):
        assert files(directory.path, folder) == files(tiny_run, folder)
    found, wanted = (pandas.read_parquet(path / "detections") for path in (directory.path, tiny_run))
    pandas.testing.assert_frame_equal(found, wanted)
    assert set(found.source) == {"attack", "test", "held-out"}
    assert weights(directory.path) == weights(tiny_run)
    check_accounts(directory, plan)


class KillingBench(WatchedBench):
    """Kills the first trainer as soon as it trains, and the first attacker as soon as it has paid."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.killed: dict[str, int] = {}
        super().__init__(*arguments, **options)

    async def given(self, subject: Subject, place: Place) -> None:
        if "trainer" not in self.killed and isinstance(subject, OwnerModel):
            self._kill("trainer", place)
        elif "attacker" not in self.killed and isinstance(subject, Stolen) and subject.budget < TOO_MANY:
            while not await self._crew.ledger.spent.remote(list(subject.accounts)):
                pass
            if "attacker" not in self.killed:  # another theft was quicker
                self._kill("attacker", place)

    def _kill(self, what: str, place: Place) -> None:
        self.killed[what] = place.process
        os.kill(place.process, signal.SIGKILL)


class Killing(RayRun):
    """Its workers are killed, and those that are started counted."""

    def bench(self) -> CrewBench:
        self.started: Counter[str] = Counter()
        self._crew.new_trainer = partial(self._new, "trainer", self._crew.new_trainer)
        self._crew.new_attacker = partial(self._new, "attacker", self._crew.new_attacker)
        self.used = KillingBench(self._crew, self._directory, self._config, started=self._crew.workers)
        return self.used

    def _new(self, kind: str, start: Callable[[], Any]) -> Any:
        self.started[kind] += 1
        return start()


def test_kills_and_failures_leave_every_row_and_every_account_as_it_should_be(
    tiny_config: Path, tmp_path: Path
) -> None:
    """Three attackers; a trainer and an attacker are killed, one victim and one theft cannot be computed."""
    data = json.loads(read_config(str(tiny_config)).to_json())
    data["watermarks"].append({**data["watermarks"][0], "candidates": TOO_MANY, "first_epochs": 0, "second_epochs": 1})
    data["scenarios"].append({"attack": "distillation", "pool": "patches", "budget": TOO_MANY})
    config = check_config(data)
    plan, world = prepare(config)
    local = RunDirectory.create(config, tmp_path / "local")
    display = Display(Console(quiet=True), total=0, quiet=True)
    assert not LocalRun(config, plan, world, local, display).run()
    run, directory, plan = start(Killing, config, tmp_path / "ray", attackers=3)
    assert isinstance(run, Killing)
    assert not run.run()
    assert set(run.used.killed) == {"trainer", "attacker"}
    assert run.started == {"trainer": 1, "attacker": 4}, "the first trainer is the crew's own"
    assert rows(directory) == rows(local)
    assert weights(directory.path) == weights(local.path)
    check_accounts(directory, plan)
    # a failed theft has a row for each key, and so has a good control for the key that there is not
    assert Counter((row.role, row.status) for row in directory.rows()) == {
        ("benign", "ok"): 1,
        ("victim", "ok"): 1,
        ("victim", "failed"): 1,
        ("stolen", "ok"): 3 + 3,
        ("stolen", "failed"): 1 + 4 + 1 + 2 + 2,
    }


def test_a_half_done_run_of_the_plain_loop_is_finished_and_pays_nothing_again(
    tiny_config: Path, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(tiny_run, path)
    config = read_config(str(tiny_config))
    lost = [scenario.id for scenario in make_plan(config).scenarios][1::2]
    for scenario in lost:
        for file in path.rglob(f"*{scenario}*"):
            file.unlink()
    for file in (path / "models").glob("deeptracer-*"):
        file.unlink()
    before = (path / "ledger" / "ledger.log").read_bytes()
    run, directory, plan = start(RayRun, config, path)
    assert [scenario.id for scenario in directory.open_copies(plan)] == lost
    assert run.run()
    assert rows(directory) == rows(RunDirectory(tiny_run))
    assert weights(path) == weights(tiny_run)
    assert files(path, "transfer") == files(tiny_run, "transfer")
    assert (path / "ledger" / "ledger.log").read_bytes() == before


def test_a_run_whose_collector_fails_ends_in_one_line_that_says_how_to_go_on(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot read the key of a victim that has just been trained."""
    make, run = CrewBench.make, tmp_path / "run"

    async def spoil(self: CrewBench, subject: Subject) -> None:
        await make(self, subject)
        if isinstance(subject, Marked):
            (run / "keys" / f"{subject.id}.safetensors").write_bytes(b"no key")

    monkeypatch.setattr(CrewBench, "make", spoil)
    assert main(["run", str(tiny_config), "--out", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the collector failed: InputError: " in line
    assert ".safetensors" in line
    assert f"exsim run --resume {run}" in line
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_what_fails_beside_the_work_ends_the_run_at_once(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would draw or make room any more."""
    run, directory, _ = start(RayRun, read_config(str(tiny_config)), tmp_path / "run")

    def fail(*_: object) -> None:
        raise RuntimeError("nobody looks")

    monkeypatch.setattr(run, "_make_room", fail)
    with pytest.raises(RuntimeError, match="nobody looks"):
        run.run()
    assert directory.rows() == []


def test_a_damaged_account_is_refused_before_anything_starts(tiny_config: Path, tiny_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(tiny_run, path)
    log = path / "ledger" / "ledger.log"
    log.write_bytes(b"x" + log.read_bytes()[1:])
    with pytest.raises(InputError, match="line 1 is damaged"):
        start(RayRun, read_config(str(tiny_config)), path)


def test_an_account_that_was_opened_on_other_terms_is_one_line(
    tiny_config: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """As when the run's secret is another one: so are the accounts' tokens."""
    path = tmp_path / "run"
    shutil.copytree(tiny_run, path)
    shutil.rmtree(path / "results")
    (path / "ledger" / "secret").write_text("another")
    with pytest.raises(InputError, match="is already open on other terms") as caught:
        start(RayRun, read_config(str(tiny_config)), path)
    assert "\n" not in str(caught.value)
