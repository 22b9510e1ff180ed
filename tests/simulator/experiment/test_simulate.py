"""A victim that is measured between two phases, and goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulator.checkpoint import CheckpointFolder
from simulator.experiment.owner import train_owner, train_phase
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import read_config
from simulator.seeding import fork
from simulator.watermarks.deeptracer import DeepTracer


def test_a_victim_measured_after_its_first_phase_becomes_the_same_model_and_key(
    tiny_config: Path, tiny_run: Path, tmp_path: Path
) -> None:
    plan, world = prepare(read_config(str(tiny_config)))
    directory, device = RunDirectory(tiny_run), torch.device("cpu")
    benign, whole = directory.load_owner(plan.benigns[0]), directory.load_owner(plan.victims[0])
    assert benign is not None
    assert whole is not None
    (spec,) = plan.victims
    (phase,) = spec.watermark.phases()
    checkpoint = CheckpointFolder(tmp_path).checkpoint(spec.id)
    half = train_phase(spec, world, benign.model, phase, device, checkpoint=checkpoint)
    assert 0 < half.accuracy < 1
    assert 0 <= half.wsr <= 1

    def never(phase: str, done: int, total: int) -> None:
        assert not phase.startswith("phase 1")

    again = train_owner(spec, world, benign.model, device, never, CheckpointFolder(tmp_path).checkpoint(spec.id))
    assert {name: value.tolist() for name, value in again.model.state_dict().items()} == {
        name: value.tolist() for name, value in whole.model.state_dict().items()
    }
    assert again.key is not None
    assert whole.key is not None
    assert again.key.images.equal(whole.key.images)


def test_a_fork_draws_what_its_generator_would_and_leaves_it_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    torch.randint(9, (3,), generator=generator)
    ahead = torch.randint(1000, (5,), generator=fork(generator))
    assert ahead.equal(torch.randint(1000, (5,), generator=generator))


@pytest.mark.parametrize(("first", "wanted"), [(0, ()), (3, ("phase 1",))])
def test_a_scheme_names_the_phases_that_it_has(first: int, wanted: tuple[str, ...]) -> None:
    assert DeepTracer(first_epochs=first).phases() == wanted
