"""A run on several nodes against the plain loop on one: equal rows, and a node that is lost costs time only.

    python -m benchmarks.cluster --nodes 4            the nodes are processes of this machine
    python -m benchmarks.cluster --nodes 4 --lose attacker       and one of them is removed in mid-run

A node is removed as by a power cut: all its processes are killed, and the objects that lay there are gone.
``attacker``: the first node, other than the driver's, on which an attacker has paid; ``trainer`` and ``replica``: the
one where the marked victim is being trained, or where the service answers an attacker. In these two the collector fills
the driver's node and attackers all others, so that one of them has to make room.

Every node has room for one attacker beside what else it holds, so that a run spreads over all of them. With ``--gpus``
each has a logical GPU, which attackers share by halves.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from actors.cluster import connected
from actors.layout import lay_out
from actors.runner import RayRun
from benchmarks.watched import Place, WatchedBench, place_of
from simulator.experiment.display import Display
from simulator.experiment.local import run_config
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Marked, Stolen, Subject
from simulator.records.rows import Row
from simulator.service.ledger import Ledger

#: what differs between equal runs
TIMES = {"seconds", "started", "finished"}


def workload(epochs: int = 6, share: float = 1.0, collector: float = 0.125) -> RunConfig:
    """Six thefts, each from a marked victim and from the benign model; ``share`` of a CPU or GPU for an attacker."""
    recipe = {"epochs": epochs, "batch_size": 64, "learning_rate": 2e-3}
    return check_config(
        {
            "name": "nodes",
            "dataset": {"name": "digits", "owner": 600, "attacker": 300, "test": 150},
            "training": recipe,
            "watermarks": [{"name": "deeptracer", "first_epochs": 3, "second_epochs": 4, "candidates": 60}],
            "key_filter": {"architecture": "naivenet", "queries": 100, "keep": 20, "training": recipe},
            "scenarios": [{"attack": {"name": "knockoff", "training": recipe}, "budget": [400, 500, 600]}],
            "resources": {"attacker": share, "trainer": 0.25, "victim": 0.125, "collector": collector},
        }
    )


@dataclass
class Found:
    """What a run on nodes gave."""

    seconds: float = 0.0
    where: Counter[str] = field(default_factory=Counter)
    shares: set[tuple[str, int]] = field(default_factory=set)
    lost: str = ""
    faults: list[str] = field(default_factory=list)


class OnNodesBench(WatchedBench):
    """Notes where attackers are, and takes a node away."""

    cluster: Any = None
    lose: str | None = None
    found: Found

    async def given(self, subject: Subject, place: Place) -> None:
        """Removes the node that is to be lost, at the moment that is asked for."""
        if isinstance(subject, Stolen):
            self.found.where[place.node] += 1
            self.found.shares.update((place.node, gpu) for gpu in place.gpus)
        if self.found.lost:
            return
        if self.lose == "trainer" and isinstance(subject, Marked):
            while not (await self._crew.board.read.remote()).get(subject.id):
                await asyncio.sleep(0.01)
            self._remove(place.node)
        elif self.lose in ("attacker", "replica") and isinstance(subject, Stolen):
            node = place.node
            if self.lose == "replica":
                node = (await replica(self._crew.app).__ray_call__.remote(place_of)).node
            if node != ray.get_runtime_context().get_node_id():
                while not await self._crew.ledger.spent.remote(list(subject.accounts)):
                    await asyncio.sleep(0.01)
                self._remove(node)

    def _remove(self, node: str) -> None:
        if self.found.lost:  # another theft was quicker
            return
        (gone,) = [each for each in self.cluster.list_all_nodes() if each.node_id == node]
        assert gone.node_id != ray.get_runtime_context().get_node_id()
        self.found.lost = node
        self.cluster.remove_node(gone, allow_graceful=False)


class OnNodes(RayRun):
    """A run on the bench that loses a node."""

    def bench(self) -> OnNodesBench:
        """The bench that the run's work is done on."""
        return OnNodesBench(self._crew, self._directory, self._config, started=self._crew.workers)


def replica(app: str) -> Any:
    """The actor of an application's only replica."""
    named: Any = ray.util.list_named_actors(all_namespaces=True)
    (found,) = [each for each in named if f"::{app}#" in each["name"]]
    return ray.get_actor(found["name"], found["namespace"])


def on_nodes(config: RunConfig, out: Path, nodes: int, *, lose: str | None = None, gpus: int = 0) -> Found:
    """Runs on a cluster of ``nodes`` processes of this machine; the rows go to ``out``."""
    size = {"num_cpus": 2, "num_gpus": gpus, "object_store_memory": 100 << 20}
    head = {"num_cpus": 1, "num_gpus": 0} if lose in ("trainer", "replica") else {}
    found, cluster = Found(), Cluster(initialize_head=True, head_node_args={**size, **head, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**size)
        cluster.wait_for_nodes()
        plan, world = prepare(config)
        directory = RunDirectory.create(config, out)
        start = time.monotonic()
        with connected(cluster.address, directory.path / "logs"):
            OnNodesBench.cluster, OnNodesBench.lose, OnNodesBench.found = cluster, lose, found
            display = Display(Console(stderr=True), total=0, quiet=True)
            layout = lay_out(config, len(plan.scenarios))
            if not OnNodes(config, plan, world, directory, display, layout).run():
                found.faults.append("not every row is good")
        found.seconds = time.monotonic() - start
    finally:
        cluster.shutdown()
    ledger = Ledger(directory.ledger)
    for scenario in plan.scenarios:
        spent = sum(ledger.spent(account) for account in scenario.accounts)
        if spent != scenario.budget:
            found.faults.append(f"{scenario.id}: charged {spent} of {scenario.budget}")
    ledger.close()
    return found


def differences(rows: list[Row], others: list[Row]) -> list[str]:
    """Every row that differs in more than its times, or is on one side only."""
    mine, theirs = ({row.identity: row.model_dump(exclude=TIMES) for row in side} for side in (rows, others))
    names = sorted(mine.keys() | theirs.keys())
    return [f"row differs: {name[:3]}" for name in names if mine.get(name) != theirs.get(name)]


def main() -> int:
    """``python -m benchmarks.cluster``; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--lose", choices=["attacker", "trainer", "replica"], help="remove its node in mid-run")
    parser.add_argument("--gpus", type=int, default=0, help="logical ones, a node")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    # with logical GPUs two attackers share one; without, one fills more than half a node
    alone = options.lose in ("trainer", "replica")
    config = workload(options.epochs, 0.5 if options.gpus else 1.0, 1.0 if alone else 0.125)
    with tempfile.TemporaryDirectory(prefix="exsim-nodes-") as folder:
        reference = run_config(config, Path(folder) / "one")
        found = on_nodes(config, Path(folder) / "many", options.nodes, lose=options.lose, gpus=options.gpus)
        rows = RunDirectory(Path(folder) / "many").rows()
    faults = found.faults + differences(rows, reference)
    spread = ", ".join(str(count) for count in sorted(found.where.values()))
    print(f"{options.nodes} nodes, {found.seconds:.0f} s; scenarios a node: {spread}; GPUs used: {len(found.shares)}")
    print(f"node lost in mid-run: {found.lost[:12] or 'none'}; {len(rows)} rows compared, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    from benchmarks import cluster  # by its name: what is defined in __main__ is sent to other processes by value

    sys.exit(cluster.main())
