"""A run on several nodes against the plain loop on one: equal rows, and a node that is lost costs time only.

    python -m benchmarks.cluster --nodes 4            the nodes are processes of this machine
    python -m benchmarks.cluster --nodes 4 --lose     one of them is removed as soon as an attacker there has paid

Every node has room for one attacker beside what else it holds, so that a run spreads over all of them. With ``--gpus``
each has a logical GPU, which attackers share by halves.
"""

from __future__ import annotations

import argparse
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

from actors.cluster import connected, lay_out
from actors.runner import RayRun
from simulator.config import RunConfig, check_config
from simulator.display import Display
from simulator.ledger import Ledger
from simulator.local import run_config
from simulator.plan import Scenario
from simulator.preflight import prepare
from simulator.results import Row
from simulator.rundir import RunDirectory

#: what differs between equal runs
TIMES = {"seconds", "started", "finished"}


def workload(epochs: int = 6, share: float = 1.0) -> RunConfig:
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
            "resources": {"attacker": share, "trainer": 0.25, "victim": 0.125, "collector": 0.125},
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


def node_of(_: object) -> tuple[str, list[int]]:
    """The node of an actor, and the GPUs it was given."""
    return ray.get_runtime_context().get_node_id(), [int(gpu) for gpu in ray.get_gpu_ids()]


class OnNodes(RayRun):
    """Notes where attackers are, and takes a node away when an attacker there has paid."""

    cluster: Any = None
    lose = False
    found: Found

    def _steal(self, attacker: Any, scenario: Scenario) -> None:
        where = attacker.__ray_call__.remote(node_of)
        super()._steal(attacker, scenario)
        node, gpus = ray.get(where)
        self.found.where[node] += 1
        self.found.shares.update((node, gpu) for gpu in gpus)
        head = ray.get_runtime_context().get_node_id()
        if self.lose and not self.found.lost and node != head:
            while not ray.get(self._ledger.spent.remote(list(scenario.accounts))):
                time.sleep(0.01)
            self.found.lost = node
            (gone,) = [each for each in self.cluster.list_all_nodes() if each.node_id == node]
            self.cluster.remove_node(gone, allow_graceful=False)


def on_nodes(config: RunConfig, out: Path, nodes: int, *, lose: bool = False, gpus: int = 0) -> Found:
    """Runs on a cluster of ``nodes`` processes of this machine; the rows go to ``out``."""
    size = {"num_cpus": 2, "num_gpus": gpus, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**size)
        cluster.wait_for_nodes()
        plan, world = prepare(config)
        directory = RunDirectory.create(config, out)
        start = time.monotonic()
        with connected(cluster.address, directory.path / "logs"):
            OnNodes.cluster, OnNodes.lose, OnNodes.found = cluster, lose, Found()
            display = Display(Console(stderr=True), total=0, quiet=True)
            layout = lay_out(config, len(plan.scenarios))
            if not OnNodes(config, plan, world, directory, display, layout).run():
                OnNodes.found.faults.append("not every row is good")
        OnNodes.found.seconds = time.monotonic() - start
    finally:
        cluster.shutdown()
    ledger = Ledger(directory.ledger)
    for scenario in plan.scenarios:
        spent = sum(ledger.spent(account) for account in scenario.accounts)
        if spent != scenario.budget:
            OnNodes.found.faults.append(f"{scenario.id}: charged {spent} of {scenario.budget}")
    ledger.close()
    return OnNodes.found


def differences(rows: list[Row], others: list[Row]) -> list[str]:
    """Every row that differs in more than its times, or is on one side only."""
    mine, theirs = ({row.identity: row.model_dump(exclude=TIMES) for row in side} for side in (rows, others))
    names = sorted(mine.keys() | theirs.keys())
    return [f"row differs: {name[:3]}" for name in names if mine.get(name) != theirs.get(name)]


def main() -> int:
    """``python -m benchmarks.cluster``; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--lose", action="store_true", help="remove a node in mid-run")
    parser.add_argument("--gpus", type=int, default=0, help="logical ones, a node")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    # with logical GPUs two attackers share one; without, one fills more than half a node
    config = workload(options.epochs, 0.5 if options.gpus else 1.0)
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
