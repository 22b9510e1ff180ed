"""Removals and evasions on Ray: models and rows of the plain loop, with what the theft was answered taken off the
shelf, and the images of suspects off the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from actors.layout import lay_out
from actors.runner import RayRun
from simulator.experiment.display import Display
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import check_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

BRIEF = {"epochs": 2, "batch_size": 32}
TRANSFER = {"name": "fine_tuning", "data": "transfer", "labels": "answers", "training": BRIEF}
LYING = {"name": "outliers", "detector": ["lof", "isolation_forest"], "flag_rate": 0.1}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 100, "test": 80},
    "training": BRIEF,
    "watermarks": ["badnets"],
    "key_filter": {"stages": "none"},
    "device": "cpu",
    "resources": {"attackers": 2, "attacker": 0.25, "trainer": 0.25},
    "scenarios": [
        {
            "attack": {"name": "knockoff", "training": BRIEF},
            "pool": "attacker",
            "budget": 60,
            "accounts": 2,
            "then": [
                {
                    "removal": [TRANSFER, {"name": "class_features", "share": 1.0, "epochs": 2}],
                    "then": [{"removal": "pruning"}, {"evasion": "filter"}],
                },
                {"evasion": LYING, "pool": {"attacker": 1, "patches": 1}},
            ],
        },
        {
            "then": [
                {"removal": [{"name": "fine_pruning", "training": BRIEF}]},
                {"evasion": LYING, "pool": "owner"},
            ]
        },
    ],
}


def rows(directory: RunDirectory) -> list[dict[str, Any]]:
    """What must be equal in equal runs: all but the times."""
    return [row.model_dump(exclude={"seconds", "started", "finished"}) for row in directory.rows()]


def weights(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    """The tensors of every model of a run."""
    models = (directory.path / "models").glob("*.safetensors")
    return {file.name: {name: tensor.tolist() for name, tensor in load_file(file).items()} for file in models}


def test_removals_and_evasions_on_ray_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    config = check_config(json.loads(json.dumps(CONFIG)))
    plan, world = prepare(config)
    display = Display(Console(quiet=True), total=0, quiet=True)
    local = RunDirectory.create(config, tmp_path / "local")
    assert LocalRun(config, plan, world, local, display).run()
    ray = RunDirectory.create(config, tmp_path / "ray")
    assert RayRun(config, plan, world, ray, display, lay_out(config, 2)).run()
    assert rows(ray) == rows(local)
    assert weights(ray) == weights(local)
    assert len([row for row in ray.rows() if row.role == "removed"]) == 2 * (4 + 1)
    assert len([row for row in ray.rows() if row.role == "guarded"]) == 2 * (2 + 2 + 2)
