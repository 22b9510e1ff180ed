"""A trial as Tune sees it: a light process that asks the workshop for one stage after the other and reports.

It imports no torch and computes nothing but means: what trains, steals and measures are the shared actors, which stay
warm from trial to trial. A trial whose process died starts again, and gets what was done already from the workshop at
once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tuning.objective import Measured, Objective, metrics

STATE = "state.json"


class Trial(tune.Trainable):
    """One setting; a call of :meth:`step` is one stage of it."""

    def setup(
        self,
        config: dict[str, Any],
        workshop: Any = None,
        stages: tuple[str, ...] = (),
        objective: Objective | None = None,
        attacks: int = 0,
    ) -> None:
        """Takes the setting, and the sweep's parameters from ``tune.with_parameters``."""
        assert objective is not None
        self._workshop, self._stages, self._objective, self._attacks = workshop, stages, objective, attacks
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._setting, self._next = config["setting"], 0
        self._work = self._busy = 0.0

    def step(self) -> dict[str, Any]:
        """Has the next stage computed and reports what is known of the trial by then; a victim or a theft that failed
        ends the trial, with its ``error`` and the worst value."""
        stage = self._stages[self._next]
        reply = ray.get(self._workshop.stage.remote(self._setting, stage))
        self._next += 1
        self._work += reply["work"]
        self._busy += reply["busy"]
        report = {
            "stage": stage,
            "last_stage": self._stages[-1],
            "found": json.dumps(reply["found"]),
            "work_seconds": self._work,
            "busy_seconds": self._busy,
        }
        if reply["error"]:
            return report | {"error": reply["error"], "value": self._objective.worst, "done": True}
        found = [Measured.model_validate_json(json.dumps(one)) for one in reply["found"]]
        return report | {
            "done": self._next == len(self._stages),
            **metrics(self._objective, found, self._attacks),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keeps which stage is next: all else is in the sweep's directory."""
        state = {"next": self._next, "work": self._work, "busy": self._busy}
        (Path(checkpoint_dir) / STATE).write_text(json.dumps(state))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Goes on with the stage that :meth:`save_checkpoint` noted."""
        state = json.loads((Path(checkpoint_dir) / STATE).read_text())
        self._next, self._work, self._busy = state["next"], state["work"], state["busy"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes another trial, so that a process serves many."""
        self._begin(new_config)
        return True
