"""A run's directory: made, found again, and what of it is done."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from simulator.detectors.base import Detection
from simulator.detectors.prada import PRADA
from simulator.errors import InputError
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.removal import Washed
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft
from simulator.models import Classifier, build, load_model, save_model
from simulator.ownership.key import KeySamples, save_key
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Marked, Removed, Stolen, Subject
from simulator.plan.tree import Plan, make_plan
from simulator.records.detections import detectors_json
from simulator.records.rows import Row, write_row
from simulator.removals.base import REMOVALS
from simulator.service.ledger import Ledger, Terms, hash_token

STARTED = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": "digits",
    "architecture": "linear",
    "watermarks": ["deeptracer", {"name": "deeptracer", "margin": 2.0}],
    "scenarios": [{"attack": "knockoff", "pool": "attacker", "budget": [30, 40]}],
}


@pytest.fixture
def config() -> RunConfig:
    return check_config(CONFIG)


@pytest.fixture
def plan(config: RunConfig) -> Plan:
    return make_plan(config)


@pytest.fixture
def directory(config: RunConfig, tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(config, tmp_path / "run")


def model(seed: int = 1) -> Classifier:
    drawn = torch.Generator().manual_seed(seed)
    return build("naivenet", channels=1, size=8, classes=10, mean=(0.1,), std=(0.7,), generator=drawn).eval()


def key(value: int) -> KeySamples:
    images = torch.full((3, 1, 8, 8), value, dtype=torch.uint8)
    return KeySamples(images, torch.tensor([4, 4, 4]), 10, {"filter": "both"})


def found(at: int | None) -> Detection:
    return Detection("a", PRADA(), 30, at, 0.5)


def equal(one: Classifier, other: Classifier) -> bool:
    """Whether two models answer alike, to the last bit."""
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return one.spec == other.spec and torch.equal(one.eval()(images), other.eval()(images))


def row(scenario: Stolen, of: Marked, **columns: Any) -> Row:
    return Row(
        scenario_id=scenario.id,
        role="stolen",
        victim="benign" if scenario.control else scenario.victim.id,
        dataset="digits",
        watermark=of.watermark.name,
        watermark_params=of.watermark.params_json(),
        architecture="linear",
        seed=0,
        **columns,
    )


class TestCreate:
    def test_a_new_directory_can_be_resumed(self, config: RunConfig, directory: RunDirectory) -> None:
        again, found = RunDirectory.resume(directory.path)
        assert again.path == directory.path
        assert found == config
        assert directory.rows() == []

    def test_an_empty_directory_is_taken(self, config: RunConfig, tmp_path: Path) -> None:
        assert (RunDirectory.create(config, tmp_path).path / "config.yaml").is_file()

    def test_its_default_name(self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = RunDirectory.create(config, None).path
        assert path.parent == tmp_path / "runs"
        assert path.name.endswith("_tiny")

    def test_what_is_there_is_never_overwritten(self, config: RunConfig, tmp_path: Path) -> None:
        file = tmp_path / "thesis.txt"
        file.write_text("mine")
        for path in (tmp_path, file):
            with pytest.raises(InputError, match=r"--resume") as error:
                RunDirectory.create(config, path)
            assert str(path) in str(error.value)
        with pytest.raises(InputError, match="cannot write"):
            RunDirectory.create(config, file / "below")
        assert file.read_text() == "mine"

    @pytest.mark.parametrize("missing", [True, False])
    def test_what_is_no_run_cannot_be_resumed(self, missing: bool, tmp_path: Path) -> None:
        path = tmp_path / "absent" if missing else tmp_path
        with pytest.raises(InputError, match="not a run directory"):
            RunDirectory.resume(path)


class TestDiscard:
    def test_what_has_not_begun_is_removed(self, directory: RunDirectory) -> None:
        directory.token("a")
        directory.discard()
        assert not directory.path.exists()

    @pytest.mark.parametrize("what", ["models/a.safetensors", "results/part-a.parquet"])
    def test_what_was_made_stays(self, what: str, directory: RunDirectory) -> None:
        (directory.path / what).parent.mkdir()
        (directory.path / what).write_bytes(b"x")
        directory.discard()
        assert (directory.path / what).exists()


class TestLock:
    def test_a_second_process_is_told_who_has_it(self, directory: RunDirectory) -> None:
        """An open file stands for the process: locks belong to it."""
        with directory.held():
            with pytest.raises(InputError, match=rf"in use by another process \(process {os.getpid()} on ") as caught:
                RunDirectory.resume(directory.path)[0].held().__enter__()
            assert len(str(caught.value).splitlines()) == 1
        with directory.held():
            pass

    def test_an_end_by_an_error_gives_it_back(self, directory: RunDirectory) -> None:
        with pytest.raises(KeyboardInterrupt), directory.held():
            raise KeyboardInterrupt
        with directory.held():
            pass

    def test_of_several_that_make_the_same_directory_one_does(self, config: RunConfig, tmp_path: Path) -> None:
        start = Barrier(4)

        def make(_: int) -> str:
            start.wait()
            try:
                RunDirectory.create(config, tmp_path / "same")
            except InputError as error:
                return str(error)
            return "made"

        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(make, range(4)))
        assert found.count("made") == 1
        assert all("not an empty directory" in each or "in use" in each for each in found if each != "made")

    def test_a_file_system_without_locks_is_not_refused(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr("simulator.files.fcntl.flock", none)
        with directory.held(), directory.held():
            pass


class TestTokens:
    def test_they_stay_and_differ_by_account_and_run(
        self, config: RunConfig, directory: RunDirectory, tmp_path: Path
    ) -> None:
        token = directory.token("a")
        assert token == directory.token("a") == RunDirectory.resume(directory.path)[0].token("a")
        assert token != directory.token("b")
        assert token != RunDirectory.create(config, tmp_path / "other").token("a")

    def test_nobody_else_can_read_the_secret_and_no_file_holds_a_token(self, directory: RunDirectory) -> None:
        token = directory.token("a")
        secret = directory.path / "ledger" / "secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        files = [path for path in directory.path.rglob("*") if path.is_file()]
        assert not any(token.encode() in path.read_bytes() for path in files)

    def test_a_lost_secret_is_not_replaced_once_it_was_used(self, config: RunConfig, directory: RunDirectory) -> None:
        terms = Terms("victim", "soft", 10, hash_token(directory.token("a")))
        ledger = Ledger(directory.ledger)
        ledger.open("a", terms)
        ledger.close()
        secret = directory.path / "ledger" / "secret"
        secret.unlink()
        with pytest.raises(InputError, match=r"ledger/secret: missing"):
            RunDirectory.resume(directory.path)[0].token("a")
        assert not secret.exists()


class TestModels:
    @pytest.mark.parametrize("damaged", ["model", "key"])
    def test_damaged_ones_are_named_before_anything_is_done(
        self, damaged: str, plan: Plan, directory: RunDirectory
    ) -> None:
        directory.check_owners(plan)
        directory.save_owner(plan.victims[0], TrainedOwner(model(), key(1), key(2), 0.125, 3.5, STARTED))
        directory.check_owners(plan)
        name = f"{plan.victims[0].id}.safetensors"
        file = directory.path / ("models" if damaged == "model" else "keys") / name
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(InputError) as caught:
            directory.check_owners(plan)
        assert str(file) in str(caught.value)
        assert f"remove {directory.path / 'models' / name}" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_victim_comes_back_as_it_was(self, plan: Plan, directory: RunDirectory) -> None:
        spec = plan.victims[0]
        assert directory.load_owner(spec) is None
        directory.save_owner(spec, TrainedOwner(model(), key(1), key(2), 0.125, 3.5, STARTED))
        found = directory.load_owner(spec)
        assert found is not None
        assert (found.false_trigger, found.seconds, found.started) == (0.125, 3.5, STARTED)
        assert found.key is not None
        assert found.triggers is not None
        assert torch.equal(found.key.images, key(1).images)
        assert torch.equal(found.triggers.images, key(2).images)
        assert found.key.info == {"filter": "both"}
        # to the last bit, or what a resumed run answers would differ
        images = torch.rand(20, 1, 8, 8)
        assert torch.equal(found.model(images), model()(images))
        assert found.model.spec == model().spec
        # the other victim, whose margin differs, is another
        assert directory.load_owner(plan.victims[1]) is None

    def test_a_benign_model_has_no_key(self, plan: Plan, directory: RunDirectory) -> None:
        directory.save_owner(plan.benigns[0], TrainedOwner(model(), None, None, None, 3.5, STARTED))
        found = directory.load_owner(plan.benigns[0])
        assert found is not None
        assert (found.key, found.triggers, found.false_trigger) == (None, None, None)
        assert not (directory.path / "keys").exists()

    @pytest.mark.parametrize("killed_at", range(3))
    def test_the_model_is_the_sign_that_all_is_there(
        self, killed_at: int, plan: Plan, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kill at any of the three files leaves nothing that would be taken for a victim."""
        written: list[object] = []

        def mortal(write: Callable[..., None]) -> Callable[..., None]:
            def writing(*arguments: Any) -> None:
                if len(written) == killed_at:
                    raise KeyboardInterrupt
                written.append(arguments)
                write(*arguments)

            return writing

        monkeypatch.setattr("simulator.experiment.rundir.save_key", mortal(save_key))
        monkeypatch.setattr("simulator.experiment.rundir.save_model", mortal(save_model))
        with pytest.raises(KeyboardInterrupt):
            directory.save_owner(plan.victims[0], TrainedOwner(model(), key(1), key(2), 0.125, 3.5, STARTED))
        assert directory.load_owner(plan.victims[0]) is None
        assert not directory.has(plan.victims[0])

    @pytest.mark.parametrize("recorded", [True, False])
    def test_a_stolen_model_and_its_transfer_set(self, plan: Plan, directory: RunDirectory, recorded: bool) -> None:
        scenario = plan.scenarios[0]
        kept = {"one": b"bytes", "two": b"others"} if recorded else {}
        directory.save_theft(scenario, Theft(model(), 30, 1.0, STARTED, kept))
        assert (directory.path / "models" / f"stolen-{scenario.id}.safetensors").is_file()
        assert {path.name: path.read_bytes() for path in (directory.path / "transfer").glob("*")} == {
            f"{account}.safetensors": content for account, content in kept.items()
        }

    def test_a_model_a_key_and_triggers_are_read_one_by_one(self, plan: Plan, directory: RunDirectory) -> None:
        spec = plan.victims[0]
        assert not directory.has(spec)
        directory.save_owner(spec, TrainedOwner(model(), key(1), key(2), 0.125, 3.5, STARTED))
        assert directory.has(spec)
        assert not directory.has(spec.benign)
        assert equal(directory.load_model(spec), model())
        assert torch.equal(directory.load_key(spec).images, key(1).images)
        assert torch.equal(directory.load_triggers(spec).images, key(2).images)


def removal_of(target: Subject, fraction: float = 0.5) -> Removed:
    return Removed(target, REMOVALS.make({"name": "pruning", "fraction": fraction}), None)


class TestCopies:
    """What thieves made comes back with all that is measured of it."""

    def test_a_theft(self, plan: Plan, directory: RunDirectory) -> None:
        theft = plan.scenarios[0]
        assert not directory.has(theft)
        curve = ((10, model(2)), (20, model(3)))
        directory.save_theft(theft, Theft(model(), 30, 1.5, STARTED, {}, curve, (found(None), found(25), found(12))))
        assert directory.has(theft)
        copy = directory.load_copy(theft)
        assert equal(copy.model, model())
        assert equal(directory.load_model(theft), model())
        assert (copy.queries, copy.seconds, copy.started, copy.noticed) == (30, 1.5, STARTED, 12)
        assert copy.detectors == detectors_json((PRADA(),))
        assert [queries for queries, _ in copy.snapshots] == [10, 20]
        assert all(equal(kept, made) for (_, kept), (_, made) in zip(copy.snapshots, curve, strict=True))
        # each of them tells whose it is, to those who find it alone
        for name in (theft.file, f"{theft.file}-q10"):
            _, about = load_model(directory.path / "models" / f"{name}.safetensors")
            assert json.loads(about["stolen"])["scenario"] == theft.id

    def test_a_theft_that_nobody_watched(self, plan: Plan, directory: RunDirectory) -> None:
        directory.save_theft(plan.scenarios[0], Theft(model(), 30, 1.0, STARTED))
        copy = directory.load_copy(plan.scenarios[0])
        assert (copy.snapshots, copy.detectors, copy.noticed) == ((), None, None)

    def test_a_washed_copy_has_its_thefts_queries_and_its_own_time(self, plan: Plan, directory: RunDirectory) -> None:
        theft = plan.scenarios[0]
        first, second = removal_of(theft), removal_of(removal_of(theft), 0.9)
        directory.save_theft(theft, Theft(model(), 30, 1.0, STARTED, {}, ((10, model(2)),), (found(12),)))
        for washed, seed in ((first, 4), (second, 5)):
            assert not directory.has(washed)
            directory.save_washed(washed, Washed(model(seed), 0.25, STARTED.replace(year=2027)))
            assert directory.has(washed)
            copy = directory.load_copy(washed)
            assert equal(copy.model, model(seed))
            assert (copy.queries, copy.seconds, copy.started.year) == (30, 0.25, 2027)
            # these are of the theft, whose row has them
            assert (copy.snapshots, copy.detectors, copy.noticed) == ((), None, None)

    def test_a_washed_model_of_the_owners_cost_no_query(self, plan: Plan, directory: RunDirectory) -> None:
        washed = removal_of(plan.victims[0])
        directory.save_washed(washed, Washed(model(), 0.25, STARTED))
        assert directory.load_copy(washed).queries == 0

    @pytest.mark.parametrize("killed_at", range(3))
    def test_the_last_model_is_the_sign_that_all_is_there(
        self, killed_at: int, plan: Plan, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[object] = []

        def mortal(*arguments: Any) -> None:
            if len(written) == killed_at:
                raise KeyboardInterrupt
            written.append(arguments)
            save_model(*arguments)

        monkeypatch.setattr("simulator.experiment.rundir.save_model", mortal)
        with pytest.raises(KeyboardInterrupt):
            directory.save_theft(
                plan.scenarios[0], Theft(model(), 30, 1.0, STARTED, {}, ((10, model(2)), (20, model(3))))
            )
        assert not directory.has(plan.scenarios[0])

    def test_a_damaged_one_is_not_there_and_one_without_its_counts_neither(
        self, plan: Plan, directory: RunDirectory
    ) -> None:
        """Both are made again, and pay nothing twice."""
        theft = plan.scenarios[0]
        directory.save_theft(theft, Theft(model(), 30, 1.0, STARTED))
        file = directory.path / "models" / f"{theft.file}.safetensors"
        whole = file.read_bytes()
        for damaged in (whole[:100], whole[:-1], b"", b"some text"):
            file.write_bytes(damaged)
            assert not directory.has(theft)
        file.write_bytes(whole)
        assert directory.has(theft)
        # as earlier versions wrote it
        save_model(model(), file, {"stolen": "{}"})
        assert not directory.has(theft)
        with pytest.raises(InputError, match=f"{theft.file}.safetensors: not a model of this run") as caught:
            directory.load_copy(theft)
        assert "\n" not in str(caught.value)


class TestQueryLog:
    def test_what_a_kill_swallowed_comes_from_the_account(self, directory: RunDirectory) -> None:
        ledger = Ledger(directory.ledger)
        ledger.open("a", Terms("victim", "soft", 10, hash_token("secret")))
        ledger.reserve("a", "secret", 0, 3, "digest")
        ledger.close()
        for _ in range(2):  # a run may be resumed and ended again
            directory.settle({"a": "knockoff"})
            (part,) = (directory.path / "queries").glob("*.parquet")
            (entry,) = pq.read_table(part).to_pylist()
            assert (entry["account"], entry["attack"], entry["count"]) == ("a", "knockoff", 3)
        # the account is left as it was, and free
        again = Ledger(directory.ledger)
        assert again.all_spent() == {"a": 3}
        again.close()


class TestOpenCopies:
    def write(self, directory: RunDirectory, *rows: Row) -> None:
        for each in rows:
            write_row(directory.path, each, "{}")

    def test_all_of_a_new_run(self, plan: Plan, directory: RunDirectory) -> None:
        assert directory.open_copies(plan) == list(plan.scenarios)
        assert len(plan.scenarios) == 6

    def test_what_follows_a_theft_stays_open_when_the_theft_is_done(self, directory: RunDirectory) -> None:
        entry = {**CONFIG["scenarios"][0], "budget": 30, "then": [{"removal": {"name": "pruning", "fraction": [0, 1]}}]}
        plan = make_plan(check_config({**CONFIG, "scenarios": [entry, {"then": entry["then"]}]}))
        assert directory.open_copies(plan) == [*plan.scenarios, *plan.removals]
        assert len(plan.removals) == 2 * 3 + 2 * 3
        self.write(directory, *(row(theft, of) for theft in plan.scenarios for of in plan.keys_for(theft)))
        assert directory.open_copies(plan) == list(plan.removals)

    def test_a_good_row_closes_and_a_failed_one_does_not(self, plan: Plan, directory: RunDirectory) -> None:
        first, second, *_ = [scenario for scenario in plan.scenarios if not scenario.control]
        self.write(
            directory, row(first, first.victim), row(second, second.victim, status="failed", error="out of memory")
        )
        assert directory.open_copies(plan) == [scenario for scenario in plan.scenarios if scenario != first]

    def test_a_control_needs_its_row_with_each_key(self, plan: Plan, directory: RunDirectory) -> None:
        control = plan.scenarios[0]
        assert control.control
        for number, of in enumerate(plan.victims):
            assert control in directory.open_copies(plan), number
            self.write(directory, row(control, of))
        assert control not in directory.open_copies(plan)

    def test_schemes_with_equal_parameters_are_not_confused(self, plan: Plan, directory: RunDirectory) -> None:
        """Another scheme's row with the same parameters is not this scheme's."""
        scenario = next(scenario for scenario in plan.scenarios if not scenario.control)
        self.write(directory, row(scenario, scenario.victim).model_copy(update={"watermark": "other"}))
        assert scenario in directory.open_copies(plan)
