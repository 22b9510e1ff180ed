"""The long-lived actors of a run or a sweep: ledger, board, shelf, keeper, collector, the service, and the workers.

Nobody here decides what is done when; that is the runner's, or the sweep's. A crew travels to another actor as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve

from actors.board import BoardActor
from actors.cluster import Layout, here
from actors.ledger import LedgerActor
from actors.stores import KeeperActor, LogFilesActor, ShelfActor
from actors.victim import deploy
from actors.workers import AttackerActor, CollectorActor, TrainerActor
from simulator.config import RunConfig
from simulator.rundir import RunDirectory
from simulator.service import Precision
from simulator.simulate import World


@dataclass
class Crew:
    """Handles of the actors. (Ray types a handle as its actor's class, whose methods have no ``.remote``: all are Any.)

    Attributes:
        worlds: references to the world of trainers and of attackers.
        service: the handle of the victims' service, once :meth:`serve` was called.
        workers: every trainer and attacker that this copy of the crew has started.
    """

    layout: Layout
    precision: Precision
    app: str
    ledger: Any
    board: Any
    shelf: Any
    keeper: Any
    collector: Any
    log: Any
    worlds: tuple[Any, Any]
    service: Any = None
    workers: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, config: RunConfig, world: World, directory: RunDirectory, layout: Layout) -> Crew:
        """Starts all but the workers and the service; what reads or writes the directory, on this node."""
        path, pinned = str(directory.path), {"scheduling_strategy": here()}
        # by way of the disk: an actor with arguments in the object store cannot be started again for certain
        directory.save_test(world.dataset.test, world.dataset.attacker if config.detectors else None)
        collector: Any = CollectorActor.options(**layout.collector.options(), **pinned)
        return cls(
            layout,
            config.resources.precision,
            f"exsim-{directory.path.name}-{time.time_ns()}",
            ledger=LedgerActor.options(**pinned).remote(str(directory.ledger), config.sync_ledger),
            board=BoardActor.remote(),
            shelf=ShelfActor.options(**pinned).remote(path),
            keeper=KeeperActor.options(**pinned).remote(path),
            collector=collector.remote(path, config, world.dataset.name),
            log=LogFilesActor.options(**pinned).remote(path) if config.query_log else None,
            worlds=(ray.put(world), ray.put(world.for_attackers())),
        )

    def serve(self, attacks: Mapping[str, str]) -> None:
        """Starts the victims' service; returns when it answers.

        Args:
            attacks: the attack's name of each account, for the metrics and the query log.
        """
        layout, placement = self.layout, self.layout.victim
        service = deploy(
            self.app, self.ledger, self.shelf, placement, layout.replicas, self.precision, attacks, self.log
        )
        self.service = service

    def new_trainer(self) -> Any:
        """Starts another trainer."""
        share = self.layout.trainer
        actor: Any = TrainerActor.options(**share.options())
        self.workers.append(actor.remote(self.worlds[0], self.board, self.keeper, share))
        return self.workers[-1]

    def new_attacker(self) -> Any:
        """Starts another attacker; the service must be there."""
        share = self.layout.attacker
        actor: Any = AttackerActor.options(**share.options())
        self.workers.append(actor.remote(self.worlds[1], self.service, self.board, self.keeper, share))
        return self.workers[-1]

    def dismiss(self) -> None:
        """Ends the service and every actor: the cluster and this process may go on."""
        # the replicas write their query log to its end when they stop
        serve.delete(self.app, _blocking=self.log is not None)
        others = (self.collector, self.keeper, self.shelf, self.board, self.ledger, self.log)
        for actor in (*self.workers, *(actor for actor in others if actor is not None)):
            ray.kill(actor)
