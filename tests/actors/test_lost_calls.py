"""Calls to workers that Ray loses on the way, by Ray's own fault injection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rpc_faults import LOST, PUSH, disturbances, lost

SCENE = """
import ray
from actors.roles import once

class Worker:
    def __init__(self):
        self.done = []

    @once
    def work(self, name):
        self.done.append(name)

    def told(self):
        return self.done

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
worker = ray.remote(max_task_retries=-1)(Worker).remote()
for name in "abcabc":
    ray.get(worker.work.remote(name))
print("".join(ray.get(worker.told.remote())))
"""


@pytest.mark.slow
def test_a_call_whose_answer_is_lost_is_made_again_and_done_once() -> None:
    """Two of five answers are lost. What is asked twice by its caller is done twice."""
    done = subprocess.run(
        [sys.executable, "-c", SCENE],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **lost(40, ["response"])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "abcabc" in done.stdout.splitlines(), done.stderr[-2000:]  # Ray prints of each retry beside it


def test_the_share_of_lost_calls_is_what_was_asked() -> None:
    for percent in (10, 25, 50):
        shares = json.loads(lost(percent)["RAY_testing_rpc_failure"])[PUSH]
        assert sum(shares[name] for name in LOST.values()) == percent
        assert shares["num_failures"] == -1
    names = disturbances([10, 50])
    assert [name for name, variables in names.items() if not variables] == ["undisturbed", "undisturbed, again"]
