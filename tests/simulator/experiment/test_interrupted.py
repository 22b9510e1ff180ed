"""Ctrl-C ends a run in one process at once, and not when the training that it hits has come to its end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from rich.console import Console

from simulator.experiment.display import Display, Task
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import read_config


class Interrupted(Display):
    """Sends the signal at the first sign of a training."""

    seen = 0

    def update(self, name: str, task: Task) -> None:
        super().update(name, task)
        if (task.phase, task.done) == ("train", 1):
            signal.raise_signal(signal.SIGINT)
        self.seen += task.done > 1


def test_ctrl_c_does_not_wait_for_the_end_of_a_training(tiny_config: Path, tmp_path: Path) -> None:
    config = read_config(str(tiny_config))
    plan, world = prepare(config)
    display = Interrupted(Console(quiet=True), total=0, quiet=True)
    # whoever is started in the background, as a test run may be, ignores Ctrl-C
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            LocalRun(config, plan, world, RunDirectory.create(config, tmp_path / "run"), display).run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert display.seen == 0
