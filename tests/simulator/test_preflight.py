"""What is checked, and cleaned, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simulator.config import RunConfig, check_config
from simulator.data import Images, load
from simulator.local import run_config
from simulator.plan import make_plan
from simulator.pools import PoolSpec
from simulator.preflight import load_world
from simulator.simulate import World

BRIEF = {"epochs": 1, "batch_size": 32}


def config_of(**changes: Any) -> RunConfig:
    """A run of a second at most."""
    settings: dict[str, Any] = {
        "name": "small",
        "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 300, "test": 80},
        "architecture": "linear",
        "training": BRIEF,
        "watermarks": ["badnets"],
        "key_filter": {"architecture": "linear", "pool": "attacker", "queries": 40, "keep": 20, "training": BRIEF},
        "controls": False,
        "device": "cpu",
    }
    return check_config({**settings, **changes})


def rows(images: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in images.numpy()}


def save_npz(path: Path, images: Images) -> str:
    """The images as the training part of a file."""
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    np.savez(path, x_train=pixels, y_train=images.labels.numpy(), x_test=pixels[:2], y_test=np.arange(2))
    return str(path)


@pytest.fixture
def leak(tmp_path: Path) -> str:
    """A file with all test images and fifty others."""
    data = load(config_of().dataset)
    images = torch.cat([data.test.images, data.attacker.images[:50]])
    return save_npz(tmp_path / "leak.npz", Images(images, torch.cat([data.test.labels, data.attacker.labels[:50]])))


def world_of(config: RunConfig) -> World:
    return load_world(config, make_plan(config))


class TestTestImages:
    def test_no_pool_of_an_attacker_has_one(self, leak: str) -> None:
        pool = {"attacker": 1, leak: 1}
        config = config_of(scenarios=[{"attack": "knockoff", "pool": [leak, pool], "budget": 200}])
        world = world_of(config)
        for value in (leak, pool):
            for view in (world, world.for_attackers()):
                found = view.pool(PoolSpec.parse(value), 200, torch.Generator().manual_seed(0))
                assert not rows(found.images) & rows(world.dataset.test.images)
        assert len(world.for_attackers().pool(PoolSpec.parse(leak), 200, torch.Generator())) == 50

    def test_no_attacker_asks_one(self, leak: str, tmp_path: Path) -> None:
        scenario = {"attack": {"name": "knockoff", "training": BRIEF}, "pool": leak, "budget": 130}
        config = config_of(scenarios=[scenario], save_transfer_sets=True)
        found = [row for row in run_config(config, tmp_path / "run") if row.role == "stolen"]
        assert [(row.status, row.queries) for row in found] == [("ok", 50)]
        (kept,) = (tmp_path / "run" / "transfer").iterdir()
        asked = load_file(kept)["images"]
        assert len(asked) == 50
        assert not rows(asked) & rows(world_of(config).dataset.test.images)
