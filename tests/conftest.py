"""What every test shares: one thread, quiet and local Ray, hypothesis profiles, the session's one Ray, a tiny run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

# Ray reads these when it is imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

#: a whole run in a second: a benign model, a marked victim, three thefts and their controls
TINY = """
name: tiny
dataset: {name: digits, owner: 600, attacker: 300, test: 150}
architecture: naivenet
training: {epochs: 5, batch_size: 64, learning_rate: 2e-3}
watermarks: [{name: deeptracer, first_epochs: 3, second_epochs: 4, candidates: 60, margin: 0.5}]
key_filter: {architecture: naivenet, queries: 100, keep: 20, training: &thief {epochs: 6, batch_size: 32}}
scenarios:
  - {attack: {name: distillation, training: *thief}, pool: {owner: 9, triggers: 1}, budget: 600}
  - attack: {name: distillation, training: *thief}
    pool: attacker
    labels: [noise-0.5 then top-3 then round-2, hard]
    budget: 300
save_transfer_sets: true
query_log: true
detectors: [{name: prada, delta: 0.97}]
benign_clients: {count: 3, queries: 140}
"""


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests marked ``ray``: eight logical CPUs, whatever the machine has."""
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=8,
        namespace="exsim-tests",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def nothing_is_left(ray_session: None) -> Iterator[None]:
    """What runs on the session's Ray gives back what it took of it, which others use too."""
    import ray

    before = ray.available_resources()["CPU"]
    yield
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < before:
        assert time.monotonic() < deadline, "actors were left behind"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a configuration that runs in a second."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path) -> Path:
    """The finished run directory of ``tiny_config`` by the plain loop. Tests read it and change nothing in it."""
    from simulator.cli import main

    path = tiny_config.parent / "run"
    assert main(["run", str(tiny_config), "--local", "--out", str(path)]) == 0
    return path
