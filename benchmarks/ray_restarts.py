"""Why a run replaces its workers itself, and why its trainings are actors and not Ray tasks.

    python -m benchmarks.ray_restarts

**Restarts.** The cluster has a head without CPUs and two nodes of one CPU each, and an actor on each node. One actor
has a call under way, the other is idle, and the node of the first is removed. Ray restarts an actor only where there is
room, and the call waits for that. :class:`actors.workers.Workers` gives the work to the idle actor.

**Tasks.** On two logical GPUs, tasks of one GPU each say in which process they are and which GPU Ray gave them. CUDA
reads ``CUDA_VISIBLE_DEVICES`` once, when a process first uses a GPU. A process that serves several tasks therefore
computes on the first one's GPU. Ray's default is a new process for each GPU task, which imports torch again.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.cluster_utils import Cluster

from actors.cluster import connected
from actors.workers import Workers
from benchmarks.measure import machine

#: seconds that a call may take after the loss of its node, and that it takes; rounds of two tasks, one for each GPU
PATIENCE, CALL, ROUNDS = 30.0, 2.0, 6


class Sleeper:
    """What is asked to do something."""

    def work(self, seconds: float) -> str:
        """Sleeps; its node."""
        time.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())


async def by_ray(begun: Callable[[str], None]) -> str:
    """A call to one of two actors that Ray restarts, and whose calls it repeats."""
    kind: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Sleeper)
    idle, actor = kind.remote(), kind.remote()
    await idle.work.remote(0)
    begun(await actor.work.remote(0))
    return str(await actor.work.remote(CALL))


async def by_workers(begun: Callable[[str], None]) -> str:
    """The same call to whichever of two workers is there."""
    workers = Workers("sleeper", lambda: ray.remote(num_cpus=1)(Sleeper).remote(), 2)
    await workers.ready()

    async def call(worker: Any) -> str:
        begun(await worker.work.remote(0))
        return str(await worker.work.remote(CALL))

    return str(await workers.do(call, lambda: None))


async def after_loss(cluster: Cluster, work: Callable[[Callable[[str], None]], Awaitable[str]]) -> str:
    """How long a call takes after the loss of the node where it was under way."""
    at: list[str] = []
    under_way = asyncio.ensure_future(work(at.append))
    while not at:
        await asyncio.sleep(0.05)
    await asyncio.sleep(CALL / 2)
    (gone,) = [each for each in cluster.list_all_nodes() if each.node_id == at[0]]
    start = time.monotonic()
    cluster.remove_node(gone, allow_graceful=False)
    if not (await asyncio.wait([under_way], timeout=PATIENCE))[0]:
        return f"not done after {PATIENCE:.0f} s"
    assert under_way.result() != at[0]
    return f"done after {time.monotonic() - start:.1f} s, {CALL:.0f} s of it the call itself"


def on_nodes(work: Callable[[Callable[[str], None]], Awaitable[str]]) -> str:
    """:func:`after_loss` on a cluster of its own."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        _ = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
        with TemporaryDirectory() as logs, connected(cluster.address, Path(logs)):
            return asyncio.run(after_loss(cluster, work))
    finally:
        cluster.shutdown()


def task() -> tuple[int, str, float]:
    """The process, the GPU that is visible to it, and the CPU seconds in which it imports torch."""
    seconds = -time.process_time()
    __import__("torch")
    seconds += time.process_time()
    time.sleep(0.5)  # so that the two tasks of a round are there at once
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], seconds


def tasks(**options: Any) -> str:
    """What tasks of one GPU each find."""
    with TemporaryDirectory() as logs, connected(None, Path(logs), cpus=2, gpus=2):
        kind: Any = ray.remote(num_gpus=1, **options)(task)
        found = [each for _ in range(ROUNDS) for each in ray.get([kind.remote() for _ in range(2)])]
    gpus = {process: {gpu for other, gpu, _ in found if other == process} for process, *_ in found}
    both, slow = sum(len(each) > 1 for each in gpus.values()), [seconds for *_, seconds in found if seconds > 0.1]
    seconds = f"torch imported {len(slow)} times, {statistics.median(slow):.1f} CPU s each"
    return f"{len(found)} tasks in {len(gpus)} processes, {both} of which had one GPU, then the other; {seconds}"


if __name__ == "__main__":  # what is defined here goes to other processes by value: they have no torch before the task
    print(machine(), end="\n\n| | found |\n|---|---|\n", flush=True)
    print(f"| node lost: Ray restarts the actor, repeats the call | {on_nodes(by_ray)} |", flush=True)
    print(f"| node lost: `Workers` gives the work to another | {on_nodes(by_workers)} |", flush=True)
    print(f"| GPU tasks, `max_calls=0` | {tasks(max_calls=0)} |\n| GPU tasks, Ray's default | {tasks()} |")
