"""A trial as Tune sees it: a light process that asks the workshop for one stage after the other and reports.

The process imports no torch and computes only means. The shared actors train, steal and measure, and stay warm from
trial to trial. The process keeps no state either, because the trial's configuration names the next stage. So a trial
that has waited at a rung goes on in any process without a checkpoint. After the death of its process it gets its
finished stages from the workshop at once.
"""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from ray import tune

from tuning.objective import Measured, Objective, metrics

#: key in a trial's configuration: how many stages were done before its process took it
NEXT = "next"


class Trial(tune.Trainable):
    """One setting. Each call of :meth:`step` does one stage of it."""

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
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        """Has the next stage computed, and reports all that is known of the trial by then. A failed victim or theft
        ends the trial with its ``error`` and the worst value."""
        began, stage = time.time(), self._stages[self._next]
        reply = ray.get(self._workshop.stage.remote(self._setting, stage))
        self._next += 1
        report = {
            "stage": stage,
            "last_stage": self._stages[-1],
            "training_iteration": self._next,
            "found": json.dumps(reply["found"]),
            "work_seconds": reply["work"],
            "wait_seconds": reply["wait"],
            "busy_seconds": reply["busy"],
            "began": began,
            "ended": time.time(),
        }
        if reply["error"]:
            return report | {"error": reply["error"], "value": self._objective.worst, "done": True}
        found = [Measured.model_validate_json(json.dumps(one)) for one in reply["found"]]
        return report | {
            "done": self._next == len(self._stages),
            **metrics(self._objective, found, self._attacks),
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes another trial, so that one process serves many trials."""
        self._setting, self._next = new_config["setting"], new_config[NEXT]
        return True
