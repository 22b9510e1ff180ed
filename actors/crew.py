"""The long-lived actors of a run or a sweep: ledger, board, shelf, keeper, collector, the service, and the workers.

Nobody here decides what is done when; that is the runner's, or the sweep's. A crew travels to another actor as it is.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from actors.board import BoardActor
from actors.cluster import here
from actors.layout import Layout
from actors.ledger import LedgerActor
from actors.replica import deploy
from actors.roles import AttackerActor, CollectorActor, TrainerActor
from actors.stores import KeeperActor, LogFilesActor, ShelfActor
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.world import World
from simulator.plan.config import RunConfig
from simulator.service.victim import Precision

#: seconds that a first trainer may take to start before the others are started, too
HEAD_START = 30.0


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
    worlds: tuple[Any, Any]
    board: Any
    keeper: Any
    ledger: Any = None
    shelf: Any = None
    collectors: list[Any] = field(default_factory=list)
    log: Any = None
    service: Any = None
    workers: list[Any] = field(default_factory=list)

    @classmethod
    def start(
        cls, config: RunConfig, world: World, directory: RunDirectory, layout: Layout, *, trainers: int = 0
    ) -> Crew:
        """Starts all but the service and the attackers; what reads or writes the directory, on this node.

        Args:
            trainers: how many are started; one of them stands before everything that it does not need is started.
        """
        path, pinned = str(directory.path), {"scheduling_strategy": here()}
        _end_service(_app_name(directory))
        # by way of the disk: an actor with arguments in the object store cannot be started again for certain
        directory.save_test(world.dataset.test, world.dataset.attacker if config.detectors else None)
        if config.evades:
            directory.save_world(world)
        crew = cls(
            layout,
            config.resources.precision,
            _app_name(directory),
            worlds=(ray.put(world), ray.put(world.for_attackers())),
            board=BoardActor.options(**pinned).remote(),
            keeper=KeeperActor.options(**pinned).remote(path),
        )
        for _ in range(trainers):
            crew.new_trainer()
        if trainers:
            # A process with torch in it takes two seconds of a core to start. Nobody has work before a benign model is
            # trained, so the others start while its training leaves cores idle, and not while the trainer starts.
            ray.wait([crew.workers[0].__ray_ready__.remote()], timeout=HEAD_START)
        crew.ledger = LedgerActor.options(**pinned).remote(str(directory.ledger), config.sync_ledger)
        crew.shelf = ShelfActor.options(**pinned).remote(path)
        # it has to be on this node, which may have no CPU to offer, or none left by now: what it takes was left for it,
        # and it waits for nobody
        collector: Any = CollectorActor.options(num_cpus=0, **pinned)
        crew.collectors = [collector.remote(path, config, world.dataset.name) for _ in range(layout.collectors)]
        if config.query_log:
            crew.log = LogFilesActor.options(**pinned).remote(path)
        return crew

    @property
    def collector(self) -> Any:
        """The collector that every model of the owner's goes to."""
        return self.collectors[0]

    def serve(self, attacks: Mapping[str, str]) -> Any:
        """Starts the victims' service; returns its handle when it answers.

        Args:
            attacks: the attack's name of each account, for the metrics and the query log.
        """
        layout, precision = self.layout, self.precision
        self.service = deploy(
            self.app, self.ledger, self.shelf, layout.victim, layout.replicas, precision, attacks, self.log
        )
        return self.service

    def replicas_running(self) -> int:
        """Replicas of the service that answer, as Serve sees it."""
        app = serve.status().applications.get(self.app)
        states: list[Any] = [each.replica_states for each in app.deployments.values()] if app else []
        return sum(each.get("RUNNING", 0) for each in states)

    def new_trainer(self) -> Any:
        """Starts another trainer."""
        share = self.layout.trainer
        actor: Any = TrainerActor.options(**share.options())
        self.workers.append(actor.remote(self.worlds[0], self.board, self.keeper, share))
        return self.workers[-1]

    def new_attacker(self) -> Any:
        """Starts another attacker; it learns of the service with its first scenario."""
        share = self.layout.attacker
        actor: Any = AttackerActor.options(**share.options())
        self.workers.append(actor.remote(self.worlds[1], self.board, self.keeper, share))
        return self.workers[-1]

    def dismiss(self) -> None:
        """Ends the service and every actor: the cluster and this process may go on."""
        # the replicas write their query log to its end when they stop
        with suppress(RayServeException):  # Serve never came up
            serve.delete(self.app, _blocking=self.log is not None)
        others = (*self.collectors, self.keeper, self.shelf, self.board, self.ledger, self.log)
        for actor in (*self.workers, *(actor for actor in others if actor is not None)):
            ray.kill(actor)


def _app_name(directory: RunDirectory) -> str:
    """The name of a directory's service: always the same, so that what a killed driver has left is found."""
    where = hashlib.sha256(f"{socket.gethostname()}:{directory.path}".encode()).hexdigest()[:10]
    return f"exsim-{directory.path.name}-{where}"


def _end_service(app: str) -> None:
    """Ends the service that an earlier driver, which was killed, has left: Serve's actors outlive drivers, and it would
    keep its share of the cluster for ever. Nobody else works in the directory, for it is locked."""
    if app in serve.status().applications:
        serve.delete(app)
