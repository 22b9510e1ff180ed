"""The shared workers of a sweep."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import ray

from tuning.workers import Workers, WorkFailed

pytestmark = pytest.mark.ray


class Worker:
    def work(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("no")


def new() -> Any:
    return ray.remote(Worker).options(num_cpus=0).remote()


def test_good_work_does_not_fail_by_idle_workers_that_died_with_their_node(ray_session: None) -> None:
    async def scene() -> None:
        workers = Workers(new, 6)
        try:
            pids = [await one.work.remote() for one in workers.everyone]
            for pid in pids[:4]:
                os.kill(pid, signal.SIGKILL)
            begun: list[int] = []
            for _ in range(7):
                (ref,) = await workers.do(lambda one: [one.work.remote()], lambda: begun.append(1))
                assert await ref not in pids[:4]
            with pytest.raises(WorkFailed, match="no"):
                await workers.do(lambda one: [one.fail.remote()], lambda: None)
        finally:
            while workers._arriving:
                await asyncio.wait(workers._arriving)
            while not workers._idle.empty():
                ray.kill(workers._idle.get_nowait())

    asyncio.run(scene())
