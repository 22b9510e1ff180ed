"""The long-lived actors of a run or a sweep: ledger, board, shelf, keeper, collector, the service, and the workers.

The runner or the sweep decides what is done when. A crew can be passed to another actor.
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

#: seconds to wait for the first trainer before the other actors are started, too
HEAD_START = 30.0


@dataclass
class Crew:
    """Handles of the actors. They are typed Any, because Ray types a handle as its actor's class, which has no
    ``.remote``.

    Attributes:
        worlds: references to the trainers' world and to the attackers' world.
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
        """Starts all actors but the service and the attackers. Those that read or write the directory run on this node.

        Args:
            trainers: how many are started. The first is waited for before the actors that it does not need are started.
        """
        path, pinned = str(directory.path), {"scheduling_strategy": here()}
        _end_service(_app_name(directory))
        # The collector gets the images from disk: Ray cannot always restart an actor whose arguments lie in the object
        # store.
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
            # A process with torch in it takes two seconds of a core to start. The other actors have no work before a
            # benign model is trained. So they start during its training, which leaves cores idle, and do not slow the
            # trainer's start.
            ray.wait([crew.workers[0].__ray_ready__.remote()], timeout=HEAD_START)
        crew.ledger = LedgerActor.options(**pinned).remote(str(directory.ledger), config.sync_ledger)
        crew.shelf = ShelfActor.options(**pinned).remote(path)
        # The collector must run on the driver's node. `lay_out` has reserved its CPU share, so we ask Ray for none
        # here: otherwise it could wait for ever for a busy node.
        collector: Any = CollectorActor.options(num_cpus=0, **pinned)
        crew.collectors = [collector.remote(path, config, world.dataset.name) for _ in range(layout.collectors)]
        if config.query_log:
            crew.log = LogFilesActor.options(**pinned).remote(path)
        return crew

    @property
    def collector(self) -> Any:
        """The collector that keeps and measures all models of the owner."""
        return self.collectors[0]

    def serve(self, attacks: Mapping[str, str]) -> Any:
        """Starts the victims' service, and returns its handle once it answers.

        Args:
            attacks: the name of the attack behind each account, for the metrics and the query log.
        """
        layout, precision = self.layout, self.precision
        self.service = deploy(
            self.app, self.ledger, self.shelf, layout.victim, layout.replicas, precision, attacks, self.log
        )
        return self.service

    def replicas_running(self) -> int:
        """How many replicas of the service answer, by Serve's own count."""
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
        """Starts another attacker. It gets the service's handle with its first theft."""
        share = self.layout.attacker
        actor: Any = AttackerActor.options(**share.options())
        self.workers.append(actor.remote(self.worlds[1], self.board, self.keeper, share))
        return self.workers[-1]

    def dismiss(self) -> None:
        """Ends the service and every actor, because the cluster and this process may live on."""
        # with a query log this blocks: a replica writes the last part of the log when it stops
        with suppress(RayServeException):  # Serve never came up
            serve.delete(self.app, _blocking=self.log is not None)
        others = (*self.collectors, self.keeper, self.shelf, self.board, self.ledger, self.log)
        for actor in (*self.workers, *(actor for actor in others if actor is not None)):
            ray.kill(actor)


def _app_name(directory: RunDirectory) -> str:
    """The name of a directory's service. It is always the same, so that a killed driver's service can be found."""
    where = hashlib.sha256(f"{socket.gethostname()}:{directory.path}".encode()).hexdigest()[:10]
    return f"exsim-{directory.path.name}-{where}"


def _end_service(app: str) -> None:
    """Ends the service that a killed driver has left. Serve's actors outlive their driver, and would keep their share
    of the cluster for ever. No other driver uses this service, because the directory is locked."""
    if app in serve.status().applications:
        serve.delete(app)
