"""Runs a plan on a Ray cluster: it has the scheduler work on a crew's bench, and makes room after the loss of a node.

The service and the attackers start while the benign models train. Thefts start longest first, so that a run does not
end with one long theft.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from actors.bench import CrewBench
from actors.crew import Crew
from actors.layout import Layout, nodes
from simulator.experiment.display import Display
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import Scheduler
from simulator.experiment.world import World
from simulator.plan.config import RunConfig
from simulator.plan.tree import Plan
from simulator.service.ledger import Ledger

#: seconds between two looks at the board and the ledger
REFRESH = 0.5
#: seconds between two checks for lost nodes
LOOK = 5.0
#: seconds that a trainer or the service may lack a place after the loss of a node, before an attacker gives way
ROOM = 30.0
#: seconds between two checks whether the service is up
START_POLL = 0.05
#: seconds to wait at the end of a run for a service that is still starting
START_PATIENCE = 60.0


class Deployment:
    """Starts the service in a thread of its own, while the run goes on."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: Callable[[], Any]) -> None:
        try:
            self._result = start()
        except BaseException as error:
            self._error = error

    def handle(self) -> Any:
        """The service's handle, or None while it starts.

        Raises:
            BaseException: the error that ended the start.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def wait(self) -> None:
        """Waits until the start has succeeded or failed, for :data:`START_PATIENCE` seconds at most."""
        self._thread.join(START_PATIENCE)


class RayRun:
    """One run on the connected cluster. :meth:`run` does all work that is not done yet."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        world: World,
        directory: RunDirectory,
        display: Display,
        layout: Layout,
    ) -> None:
        self._config, self._plan, self._directory, self._display = config, plan, directory, display
        self._layout = layout
        self._open = directory.open_copies(plan)
        self._open_accounts()
        # Ray starts a few processes at a time, in this order. Trainers come early: they train the benign models, and
        # all other work waits for these.
        self._crew = Crew.start(config, world, directory, layout, trainers=layout.trainers)
        self._nodes, self._looked, self._missing_since = len(nodes()), time.monotonic(), 0.0

    def _open_accounts(self) -> None:
        """Opens every account before the ledger actor starts. So a damaged log is refused here, in one line, and so is
        an account that an earlier run of this directory opened on other terms."""
        ledger = Ledger(self._directory.ledger, sync=self._config.sync_ledger)
        for theft in {copy.theft.id: copy.theft for copy in self._open if copy.theft}.values():
            for account, token in self._directory.tokens(theft).items():
                ledger.open(account, theft.terms(account, token))
        ledger.close()

    def run(self) -> bool:
        """Runs everything that is not done yet; returns whether every row is good.

        A failure becomes a row with its error, and the rest goes on.
        """
        deployment = Deployment(lambda: self._crew.serve(self._plan.attacks))
        try:
            asyncio.run(self._run(deployment))
        finally:
            deployment.wait()  # else its thread would outlive our Ray and start another
            self._crew.dismiss()
            self._directory.settle(self._plan.attacks if self._config.query_log else None)
            self._directory.clear_test()
        return all(row.status == "ok" for row in self._directory.rows())

    def bench(self) -> CrewBench:
        """A new bench over the run's crew."""
        return CrewBench(self._crew, self._directory, self._config, started=self._crew.workers)

    async def _run(self, deployment: Deployment) -> None:
        bench, over = self.bench(), asyncio.Event()
        work = asyncio.create_task(self._work(bench, deployment))
        watch = asyncio.create_task(self._watch(bench, over))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.set()
            await watch  # lets its last call end: Ray prints an error when an actor is killed during a call
        await work

    async def _work(self, bench: CrewBench, deployment: Deployment) -> None:
        scheduler = Scheduler(bench, self._directory, self._plan.keys_for, self._display.rows)
        await asyncio.gather(_opened(bench, deployment), scheduler.measure_all((*self._plan.victims, *self._open)))

    # -- the watch: display and room -----------------------------------------------------------------------------------

    async def _watch(self, bench: CrewBench, over: asyncio.Event) -> None:
        while not over.is_set():
            self._make_room(bench)
            tasks = await bench.glance()
            self._display.replace_all(tasks, "" if tasks else self._waited_for(bench))
            try:
                await asyncio.wait_for(over.wait(), REFRESH)
            except TimeoutError:
                continue

    def _make_room(self, bench: CrewBench) -> None:
        """Ends attackers, one after the other, until the trainer and the service have a place again. After the loss of
        a node, attackers may hold the resources that these need."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked, up = now, len(nodes())
        self._nodes = max(self._nodes, up)
        if up == self._nodes or (_training(bench) and self._serving(bench)):
            self._missing_since = 0.0
        elif not self._missing_since or (
            now - self._missing_since > ROOM and self._has_place(bench) and bench.attackers.shed()
        ):
            self._missing_since = now
        bench.attackers.paused = bool(self._missing_since)
        bench.attackers.fill()

    def _has_place(self, bench: CrewBench) -> bool:
        """Whether the missing actors would fit the nodes that are left. If not, no attacker's end would help."""
        missing = [self._layout.trainer] * (not _training(bench)) + [self._layout.victim] * (not self._serving(bench))
        return all(any(share.fits(node) for node in nodes()) for share in missing)

    def _serving(self, bench: CrewBench) -> bool:
        return bench.serving and self._crew.replicas_running() > 0

    def _waited_for(self, bench: CrewBench) -> str:
        """The status line while no work is under way, e.g. ``waiting for an attacker: 1 of a CPU``."""
        if bench.trainers.waiting:
            return f"waiting for a trainer: {self._layout.trainer}"
        if not bench.serving or (self._missing_since and not self._serving(bench)):
            return f"waiting for the service: {self._layout.victim} for each replica"
        return f"waiting for an attacker: {self._layout.attacker}" if bench.attackers.waiting else "measuring"


async def _opened(bench: CrewBench, deployment: Deployment) -> None:
    """Opens the bench to thefts once the service is up."""
    while (service := deployment.handle()) is None:
        await asyncio.sleep(START_POLL)
    bench.open(service)


def _training(bench: CrewBench) -> bool:
    return not bench.trainers.waiting or bench.trainers.working
