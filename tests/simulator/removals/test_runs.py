"""Removals in a run by the plain loop: what they are handed, that they go on, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from simulator.context import Context
from simulator.errors import InputError
from simulator.experiment.display import Display, Task
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import load_world, prepare
from simulator.experiment.removal import wash
from simulator.experiment.rundir import RunDirectory
from simulator.models import Classifier, build
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Removed
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row
from simulator.removals.base import ThiefTask
from simulator.removals.fine_tuning import FineTuning

BRIEF = {"epochs": 2, "batch_size": 32}
FROM_TRANSFER = {"name": "fine_tuning", "data": "transfer", "labels": "answers", "training": BRIEF}
FROM_POOL = {"name": "fine_tuning", "depth": "last", "training": BRIEF}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 100, "test": 80},
    "architecture": "naivenet",
    "training": BRIEF,
    "watermarks": [{"name": "badnets"}],
    "key_filter": {"stages": "none"},
    "device": "cpu",
    "scenarios": [
        {
            "attack": {"name": "knockoff", "training": BRIEF},
            "pool": "attacker",
            "budget": 60,
            "then": [{"removal": [FROM_TRANSFER, FROM_POOL], "then": [{"removal": "quantisation"}]}],
        },
        {"then": [{"removal": [{"name": "distillation", "training": BRIEF, "architecture": "lenet5"}]}]},
    ],
}


class Quiet(Display):
    """Shows nothing; interrupts the run, as Ctrl-C does, when a removal has told of its progress."""

    def __init__(self, interrupt: bool = False) -> None:
        super().__init__(Console(quiet=True), total=0, quiet=True)
        self.interrupt = interrupt

    def update(self, name: str, task: Task) -> None:
        super().update(name, task)
        if self.interrupt and name.startswith("fine_tuning") and task.done == 1:
            raise KeyboardInterrupt


def run(config: RunConfig, path: Path, *, interrupt: bool = False) -> tuple[RunDirectory, Plan]:
    plan, world = prepare(config)
    directory = RunDirectory(path) if path.exists() else RunDirectory.create(config, path)
    LocalRun(config, plan, world, directory, Quiet(interrupt)).run()
    return directory, plan


def weights(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    files = (directory.path / "models").glob("*.safetensors")
    return {file.name: {name: tensor.tolist() for name, tensor in load_file(file).items()} for file in files}


def measured(directory: RunDirectory) -> list[dict[str, Any]]:
    return [row.model_dump(exclude={"seconds", "started", "finished"}) for row in directory.rows()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Plan]:
    return run(check_config(CONFIG), tmp_path_factory.mktemp("removals") / "run")


def test_every_removal_has_a_good_row_with_what_it_cost_and_the_theft_keeps_its_answers(
    whole: tuple[RunDirectory, Plan],
) -> None:
    directory, plan = whole
    rows = [row for row in directory.rows() if row.role == "removed"]
    assert {row.status for row in rows} == {"ok"}, [row.error for row in rows]
    assert len(rows) == len(plan.removals) == 2 * (4 + 1)
    assert {row.allowed_loss for row in rows} == {0.035}
    assert {row.architecture for row in rows if row.removal == "distillation"} == {"lenet5"}
    assert {row.removal for row in rows} == {"fine_tuning", "fine_tuning+quantisation", "distillation"}
    assert {row.queries for row in rows if row.attack} == {60}, "a removal asks no victim"
    kept = {file.stem for file in (directory.path / "transfer").iterdir()}
    assert kept == {account for theft in plan.scenarios for account in theft.accounts}


def test_a_run_interrupted_in_a_removal_goes_on_to_the_same_models_and_rows(
    whole: tuple[RunDirectory, Plan], tmp_path: Path
) -> None:
    config, path = check_config(CONFIG), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(config, path, interrupt=True)
    resumed, _ = run(config, path)
    assert weights(resumed) == weights(whole[0])
    assert measured(resumed) == measured(whole[0])


def test_a_removal_that_is_made_again_reads_what_the_theft_was_answered(
    whole: tuple[RunDirectory, Plan], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    directory, plan = run(check_config(CONFIG), path)
    washed = next(each for each in plan.removals if "transfer" in each.removal.needs and not each.control)
    model = path / "models" / f"{washed.file}.safetensors"
    before = load_file(model)
    model.unlink()
    for part in (path / "results").glob(f"*{washed.id}*"):
        part.unlink()
    paid = directory.ledger.read_bytes()
    run(check_config(CONFIG), path)
    assert directory.ledger.read_bytes() == paid
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(model).items())
    assert measured(directory) == measured(whole[0])


def test_a_transfer_set_that_is_lost_is_a_row_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run"
    directory, plan = run(check_config(CONFIG), path)
    for file in (path / "transfer").iterdir():
        file.unlink()
    lost = [each for each in plan.removals if "transfer" in each.removal.needs]
    for each in lost:
        (path / "models" / f"{each.file}.safetensors").unlink()
        for part in (path / "results").glob(f"*{each.id}*"):
            part.unlink()
    run(check_config(CONFIG), path)
    failed: list[Row] = [row for row in directory.rows() if row.scenario_id in {each.id for each in lost}]
    assert {row.status for row in failed} == {"failed"}
    assert all("no transfer set was kept" in (row.error or "") for row in failed)


class Looking(FineTuning):
    """Keeps what it was handed."""

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        seen.append(task)
        return super().remove(model, task, context)


seen: list[ThiefTask] = []


def test_a_thief_holds_its_labelled_pool_and_sees_neither_keys_nor_the_test_part() -> None:
    config = check_config(CONFIG)
    plan = make_plan(config)
    world = load_world(config, plan).for_attackers()
    given = next(each for each in plan.removals if each.pool is not None and "labels" in each.removal.needs)
    subject = Removed(given.target, Looking(epochs=0), given.pool)
    wash(subject, build("naivenet", channels=1, size=8, classes=10), world, None, torch.device("cpu"))
    task = seen.pop()
    assert task.transfer is None
    assert task.pool is not None
    held = {image.numpy().tobytes(): int(label) for image, label in zip(*_of(world.dataset.attacker), strict=True)}
    assert task.pool.labels is not None
    found = {
        image.numpy().tobytes(): int(label) for image, label in zip(task.pool.images, task.pool.labels, strict=True)
    }
    assert found == held


def _of(images: Any) -> tuple[Any, Any]:
    return images.images, images.labels


@pytest.mark.parametrize(
    ("then", "stolen", "wanted"),
    [
        ({"removal": FROM_TRANSFER}, False, "fine_tuning: it needs the transfer set of a theft"),
        ({"removal": FROM_POOL, "pool": "patches"}, True, "labels: pool patches has no true labels of digits"),
        ({"removal": {"name": "neural_cleanse", "most_classes": 5}}, True, "digits has 10 classes"),
        ({"removal": {"name": "distillation", "architecture": "naivnet"}}, True, "'naivnet' is not one of"),
    ],
)
def test_what_a_removal_lacks_is_refused_in_one_line_before_anything_runs(
    then: dict[str, Any], stolen: bool, wanted: str
) -> None:
    theft = {"attack": {"name": "knockoff", "training": BRIEF}, "pool": "attacker", "budget": 60} if stolen else {}
    with pytest.raises(InputError, match=wanted) as failure:
        prepare(check_config({**CONFIG, "scenarios": [{**theft, "then": [then]}]}))
    assert "\n" not in str(failure.value)


def test_only_a_run_whose_removals_need_them_keeps_transfer_sets() -> None:
    def records(then: list[dict[str, Any]]) -> bool:
        return check_config({**CONFIG, "scenarios": [{"attack": "knockoff", "then": then}]}).records_thefts

    assert not records([{"removal": FROM_POOL}])
    assert records([{"removal": "pruning", "then": [{"removal": FROM_TRANSFER}]}])
    assert check_config({**CONFIG, "scenarios": [], "save_transfer_sets": True}).records_thefts
