"""A whole run of 1,000 attackers against 50 victims on one machine, with the compute left out.

    python -m benchmarks.scale --attackers 1000 --victims 50

What is real: the plan and its preflight, the runner that hands out scenarios, the ledger actor and its log, the service
on Ray Serve, the client's transport and oracle, the collector that measures every stolen model and writes its row.
What is not: nobody trains, and the models are one linear layer, so that all that is left is the simulator's own work.
An attacker costs a gigabyte where it trains with torch; here each is a coroutine in one of a few processes, and between
two messages it sleeps for the time that its training was recorded to take (``--think``).

Printed are rates, and for every kind of process its CPU seconds and its greatest memory: a kind that has used about as
many CPU seconds as the clock is what saturates first.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from rich.console import Console
from rich.table import Table

from actors.bench import CrewBench
from actors.cluster import connected
from actors.conversation import PACK
from actors.devices import Placement
from actors.layout import Layout
from actors.runner import RayRun
from actors.transport import direct
from benchmarks.measure import machine
from simulator.detectors.base import Detector
from simulator.errors import InputError
from simulator.experiment.display import Display
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft
from simulator.experiment.world import World
from simulator.models import build
from simulator.ownership.key import KeySamples
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Marked, OwnerModel, Stolen
from simulator.service.ledger import Ledger
from simulator.service.oracle import CHUNK
from simulator.service.query import Query
from simulator.training.predict import use_one_thread

#: attackers in one process
EACH = 250
#: key samples of a victim
KEY = 50
#: share of a CPU that every actor asks; the machine's cores are no matter where nothing computes
SHARE = 0.01


def workload(attackers: int, victims: int, queries: int) -> RunConfig:
    """A plan of one theft for each attacker, ``queries`` messages of the transport's size each."""
    each = attackers // victims
    budgets = [queries * CHUNK - number for number in range(each)]
    return check_config(
        {
            "name": "scale",
            "dataset": {"name": "digits", "owner": 200, "attacker": 200, "test": 100},
            "architecture": "linear",
            "watermarks": [{"name": "deeptracer", "margin": 1 + number / 100} for number in range(victims)],
            "key_filter": {"stages": "none"},
            "scenarios": [{"attack": "knockoff", "budget": budgets}],
            "controls": False,
        }
    )


class Host:
    """A process that does as if it were many."""

    def ready(self) -> None:
        """Answers when the process has started."""


class Trainers(Host):
    """Owners' models without training: fresh weights, and a key of noise."""

    def __init__(self, world: World) -> None:
        use_one_thread()
        self._world = world

    def train(self, spec: OwnerModel, shelf: Any, collector: Any) -> None:
        """As :meth:`actors.roles.Trainer.train`."""
        data, generator = self._world.dataset, torch.Generator().manual_seed(0)
        model = build(spec.architecture, channels=data.channels, size=data.size, classes=data.classes).eval()
        key = None
        if isinstance(spec, Marked):
            shape = (KEY, data.channels, data.size, data.size)
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            key = KeySamples(images, torch.zeros(KEY, dtype=torch.int64), data.classes, {"filter": "none"})
        owner = TrainedOwner(model, key, key, None, 0.0, datetime.now(UTC))
        ray.get(collector.keep.remote(spec, owner))


class Attackers(Host):
    """Many attackers in one process, a coroutine each, who ask and do not learn."""

    def __init__(self, world: World, think: float) -> None:
        use_one_thread()
        self._handle, self._think = None, think
        data = world.dataset
        self._model = build("linear", channels=data.channels, size=data.size, classes=data.classes).eval()
        self._images = data.attacker.images.repeat(2, 1, 1, 1)[:CHUNK].numpy()

    async def steal(
        self,
        service: Any,
        theft: Stolen,
        tokens: dict[str, str],
        triggers: KeySamples | None,
        collector: Any,
        record: bool,
        detectors: Sequence[Detector] = (),
    ) -> None:
        """As :meth:`actors.roles.Attacker.steal`: spends the budget, a step's time between two messages.

        The messages are those of :class:`actors.transport.ServeTransport`, which would need a thread for each attacker:
        hundreds of threads in a process spend their time on Python's lock.
        """
        if self._handle is None:
            self._handle = direct(service)
        started, clock = datetime.now(UTC), time.perf_counter()
        ((account, token),) = tokens.items()
        asked = key = 0
        while asked < theft.budget:
            message = []
            while len(message) < PACK and asked < theft.budget:
                images = self._images[: theft.budget - asked]
                message.append(Query(account, token, key, images))
                asked, key = asked + len(images), key + 1
            for answer in await self._handle.answer.remote(message):
                if isinstance(answer, InputError):
                    raise answer
            await asyncio.sleep(self._think * len(message))
        await collector.keep.remote(theft, Theft(self._model, asked, time.perf_counter() - clock, started))


class Seat:
    """One of the attackers in a process: a worker of its own for the runner."""

    def __init__(self, host: Any) -> None:
        self.steal, self.__ray_ready__ = host.steal, host.__ray_ready__


class SimulatedBench(CrewBench):
    """The bench as it is, but for a call at the first theft."""

    first: Callable[[], None]

    async def _steal(self, theft: Stolen) -> None:
        await asyncio.shield(self._service)
        self.first()
        await super()._steal(theft)


class Simulated(RayRun):
    """The runner as it is; only the processes that compute are other ones."""

    think = 0.0

    def __init__(self, *arguments: Any) -> None:
        self._seats: deque[Seat] = deque()
        self._looker: Watch | None = None
        self.began = self.cpu_at_start = 0.0
        self.before: dict[int, tuple[str, float, float]] = {}
        super().__init__(*arguments)

    def watched_by(self, watch: Watch) -> None:
        """Where CPU seconds are read when the first theft begins."""
        self._looker = watch

    def bench(self) -> CrewBench:
        """The bench that the run's work is done on."""
        crew = self._crew
        crew.new_trainer, crew.new_attacker = self._new_trainer, self._new_attacker
        crew.layout = replace(crew.layout, trainers=1)
        bench = SimulatedBench(crew, self._directory, self._config)
        bench.first = self._begin
        return bench

    def _begin(self) -> None:
        if not self.began:
            # a process with torch in it takes seconds of CPU to start, which is not what is asked here
            ray.get([worker.ready.remote() for worker in self._crew.workers])
            assert self._looker is not None
            self._looker.look()
            self.before, self.began = dict(self._looker.uses), time.perf_counter()
            self.cpu_at_start = time.thread_time()

    def _new_trainer(self) -> Any:
        self._crew.workers.append(ray.remote(num_cpus=SHARE)(Trainers).remote(self._crew.worlds[0]))
        return self._crew.workers[-1]

    def _new_attacker(self) -> Any:
        if not self._seats:
            kind: Any = ray.remote(num_cpus=SHARE, max_concurrency=EACH)(Attackers)
            self._crew.workers.append(kind.remote(self._crew.worlds[1], self.think))
            self._seats.extend(Seat(self._crew.workers[-1]) for _ in range(EACH))
        return self._seats.popleft()


@dataclass
class Use:
    """What a kind of process has used: CPU seconds, and megabytes at most (of one, resident)."""

    processes: int = 0
    cpu: float = 0.0
    memory: float = 0.0


@dataclass
class Watch:
    """Looks at this process and its descendants every two seconds, until it is stopped."""

    uses: dict[int, tuple[str, float, float]] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)

    def loop(self) -> None:
        """What the watching thread does."""
        while not self.stopped.wait(2.0):
            self.look()

    def look(self) -> None:
        """Notes CPU time and memory of every process that is there."""
        parents, found = {}, {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
            cpu, memory = ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            found[int(entry.name)] = (title, cpu, memory)
        for process, (title, cpu, memory) in found.items():
            above = process
            while above in parents and above != os.getpid():
                above = parents[above]
            if above == os.getpid():
                kind, _, most = self.uses.get(process, ("other", 0.0, 0.0))
                # a process that has ended has lost its title
                self.uses[process] = (_kind(process, title) if title else kind, cpu, max(memory, most))

    def totals(self, before: dict[int, tuple[str, float, float]]) -> dict[str, Use]:
        """By kind of process, since ``before``."""
        totals: dict[str, Use] = {}
        for process, (kind, cpu, memory) in self.uses.items():
            use = totals.setdefault(kind, Use())
            use.processes += 1
            use.cpu += cpu - (before[process][1] if process in before else 0.0)
            use.memory = max(use.memory, memory)
        return totals


def _kind(process: int, title: str) -> str:
    if process == os.getpid():
        return "driver"
    names = {
        "ray::LedgerService": "ledger",
        "ray::ServeReplica": "replica",
        "ray::Attackers": "attackers",
        "ray::Trainers": "trainers",
        "ray::CollectorService": "collector",
        "ray::ServeController": "Serve controller",
        "gcs_server": "Ray GCS",
        "raylet": "raylet",
    }
    return next((kind for text, kind in names.items() if text in title), "other")


@dataclass(frozen=True)
class Outcome:
    """What one simulated run gave; ``runner`` is CPU seconds of the thread in which the runner's loop turns."""

    attackers: int
    victims: int
    setup: float
    seconds: float
    grants: int
    images: int
    rows: int
    runner: float
    uses: dict[str, Use]

    def table(self) -> Table:
        """For the terminal."""
        rate = f"{self.grants / self.seconds:,.0f} grants/s, {self.rows / self.seconds:,.1f} rows/s"
        table = Table(
            title=f"{self.attackers} attackers, {self.victims} victims: {self.seconds:.1f} s, {rate}",
            caption=f"begun after {self.setup:.1f} s; {self.grants:,} grants, {self.images:,} images, {self.rows} rows",
        )
        columns = ("kind", "processes", "CPU s", "of the clock", "CPU us a grant", "CPU ms a row", "MB, the largest")
        for name in columns:
            table.add_column(name, justify="left" if name == "kind" else "right")
        for kind, use in sorted(self.uses.items(), key=lambda item: -item[1].cpu):
            share = f"{use.cpu / self.seconds:.0%}"
            grant, row = f"{1e6 * use.cpu / self.grants:.0f}", f"{1e3 * use.cpu / self.rows:.1f}"
            table.add_row(kind, str(use.processes), f"{use.cpu:.1f}", share, grant, row, f"{use.memory:.0f}")
        table.add_row(
            "driver's own thread", "", f"{self.runner:.2f}", "", "", f"{1e3 * self.runner / self.rows:.2f}", ""
        )
        return table


def simulate(
    attackers: int = 1000, victims: int = 50, queries: int = 20, think: float = 0.0, profile: Path | None = None
) -> Outcome:
    """Runs the workload and checks its account and its rows.

    Args:
        queries: that each attacker asks, of 256 images each.
        think: seconds that an attacker sleeps after each.
        profile: where to write what the driver spent its time with.
    """
    config = workload(attackers, victims, queries)
    watch = Watch()
    thread = threading.Thread(target=watch.loop, daemon=True)
    with tempfile.TemporaryDirectory(prefix="exsim-scale-") as folder:
        start = time.perf_counter()
        plan, world = prepare(config)
        directory = RunDirectory.create(config, Path(folder) / "run")
        count = len(plan.scenarios)
        share = Placement(False, SHARE)
        # no trainer of the crew's own: the one that does as if it trained is started by itself
        layout = Layout(False, count, 0, 1, 1, share, share, share, share)
        with connected(None, directory.path / "logs", cpus=8):
            Simulated.think = think
            display = Display(Console(quiet=True), total=count, quiet=True)
            run = Simulated(config, plan, world, directory, display, layout)
            run.watched_by(watch)
            thread.start()
            profiler = cProfile.Profile(time.thread_time)
            good = profiler.runcall(run.run) if profile else run.run()
            setup, seconds = run.began - start, time.perf_counter() - run.began
            thread_seconds = time.thread_time() - run.cpu_at_start
            watch.stopped.set()
            thread.join()
        if profile:
            with profile.open("w") as file:
                pstats.Stats(profiler, stream=file).sort_stats("cumulative").print_stats(45)
        ledger = Ledger(directory.ledger)
        grants = {name: ledger.grants(name) for name in ledger.all_spent()}
        ledger.close()
        rows = directory.rows()
    assert good
    charged = {name: sum(number for number, _ in paid.values()) for name, paid in grants.items()}
    assert charged == {scenario.id: scenario.budget for scenario in plan.scenarios}
    assert {row.scenario_id: row.queries for row in rows if row.role == "stolen"} == charged
    uses = watch.totals(run.before)
    return Outcome(
        attackers=count,
        victims=victims,
        setup=setup,
        seconds=seconds,
        grants=sum(map(len, grants.values())),
        images=sum(charged.values()),
        rows=len(rows),
        runner=thread_seconds,
        uses=uses,
    )


def main() -> None:
    """``python -m benchmarks.scale``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attackers", type=int, default=1000)
    parser.add_argument("--victims", type=int, default=50)
    parser.add_argument("--queries", type=int, default=20, help="of 256 images, that each attacker asks")
    parser.add_argument("--think", type=float, default=0.0, help="seconds between two of an attacker's queries")
    parser.add_argument("--profile", type=Path, help="where to write the driver's profile")
    options = parser.parse_args()
    use_one_thread()
    console = Console(width=120)
    console.print(machine(), highlight=False)
    outcome = simulate(options.attackers, options.victims, options.queries, options.think, options.profile)
    console.print(outcome.table())


if __name__ == "__main__":
    from benchmarks import scale  # by its name: what is defined in __main__ is sent to other processes by value

    scale.main()
