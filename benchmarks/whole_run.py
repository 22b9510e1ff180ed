"""Where the time of a whole run goes, and what it takes beside the same work done back to back in one process.

    python -m benchmarks.whole_run [--config fashion-mnist-quick] [--set KEY=VALUE]... [--rounds N]

Each round starts, one after the other and each in a process of its own, as a user would from a shell,

- ``exsim run CONFIG``: on Ray;
- ``exsim run CONFIG --local``: the same training, querying and measuring back to back in one process, which leaves all
  cores but one idle, because it computes with one thread, to the bit what the Ray run computes;
- the same once more with as many threads as torch takes by itself, one for each core: the fastest that one process
  does the work on these cores. The target is against this one.

All times are those of a clock outside the process, from its start to its end: start-up, imports, the loading of data,
the report and the shutdown are in them. Where the machine has more cores than ``--cores``, all sides are held on so
many of them.

The profile of the Ray run is read from outside, from /proc, every tenth of a second: the CPU time of every process, and
what each actor is at, which Ray writes into the title of its process. Nothing in the run knows that it is watched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Line, Outcome, Spread, Target, machine
from simulator.errors import InputError
from simulator.experiment.preflight import prepare
from simulator.plan.config import read_config

TARGET = Target("at most", 1.25)
DEFAULT, FALLBACK = "fashion-mnist-quick", "digits"
RAY, ONE_THREAD, BACK_TO_BACK = "on Ray", "one process, one thread", "one process, a thread for each core"
#: seconds between two looks at the processes
INTERVAL = 0.1
#: marks the processes of one side, which inherit it
MARK = "EXSIM_WHOLE_RUN"
TICK = os.sysconf("SC_CLK_TCK")

#: ``exsim`` whose plain loop leaves the number of threads to torch
WITH_ALL_THREADS = (
    "import sys, simulator.experiment.local; simulator.experiment.local.use_one_thread = lambda: None; "
    "from simulator.cli import main; sys.exit(main())"
)
ACTOR = "ray::"
#: methods in which a worker does what the run is for; a worker at anything else is idle or starting
WORK = ("Trainer.train", "Attacker.steal", "Attacker.wash", "CollectorService.keep", "CollectorService.measure")


@dataclass
class Process:
    """One process of a run as it was seen: times are seconds since the start of the run."""

    name: str
    seen: float
    cpu: float = 0.0
    #: what it worked at: method, from, to
    work: list[tuple[str, float, float]] = field(default_factory=list)

    def look(self, title: str, cpu: float, now: float) -> None:
        """Notes its CPU seconds and, from an actor's title, what it is at."""
        self.cpu = cpu
        doing = title.removeprefix(ACTOR).split()[0] if title.startswith(ACTOR) else ""
        if doing:
            self.name = doing.partition(".")[0].partition(":")[0]
        if not doing.startswith(WORK):
            return
        if self.work and self.work[-1][0] == doing and now - self.work[-1][2] < 2 * INTERVAL:
            self.work[-1] = (doing, self.work[-1][1], now)
        else:
            self.work.append((doing, now, now))

    @property
    def busy(self) -> float:
        """Seconds in which it did what the run is for."""
        return sum(end - start for _, start, end in self.work)


@dataclass
class Profile:
    """One side of a round: its wall time, its exit status, and its processes by number."""

    seconds: float = 0.0
    status: int = 0
    processes: dict[int, Process] = field(default_factory=dict)

    @property
    def cpu(self) -> float:
        """CPU seconds of all its processes."""
        return sum(process.cpu for process in self.processes.values())

    def phases(self) -> list[tuple[str, float]]:
        """The wall time in five parts, one after the other."""
        ray = [each.seen for each in self.processes.values() if each.name in ("raylet", "gcs_server")]
        actors = [each.seen for each in self.processes.values() if each.name in ("Trainer", "Attacker")]
        work = [interval for each in self.processes.values() for interval in each.work]
        if not (ray and actors and work):
            return [("all of it", self.seconds)]
        marks = [0.0, min(ray), min(actors), min(start for _, start, _ in work), max(end for _, _, end in work)]
        names = ("imports, data, checks", "Ray starts", "the first worker imports", "work", "report and shutdown")
        ends = [*marks[1:], self.seconds]
        return [(name, max(0.0, end - start)) for name, start, end in zip(names, marks, ends, strict=True)]

    def by_name(self) -> list[tuple[str, int, float, float]]:
        """Name, number of processes, CPU seconds and busy seconds of each kind of process, the hungriest first."""
        kinds: dict[str, list[Process]] = {}
        for process in self.processes.values():
            kinds.setdefault(process.name, []).append(process)
        sums = [(name, len(of), sum(e.cpu for e in of), sum(e.busy for e in of)) for name, of in kinds.items()]
        return sorted(sums, key=lambda each: -each[2])


def watch(command: Sequence[str], cores: Iterable[int]) -> Profile:
    """Runs a command on some cores and profiles it from outside."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
    environment[MARK] = mark
    profile, strangers = Profile(), set(_numbers())
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        os.sched_setaffinity(child.pid, set(cores))
        try:
            while child.poll() is None:
                _look(profile, f"{MARK}={mark}".encode(), strangers, start)
                time.sleep(INTERVAL)
        finally:
            child.kill()
        profile.seconds, profile.status = time.monotonic() - start, child.wait()
        if profile.status != 0:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: status {profile.status}\n{output.read().decode()[-2000:]}")
    return profile


def _numbers() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _look(profile: Profile, mark: bytes, strangers: set[int], start: float) -> None:
    """Notes every process of the run as it is now."""
    now = time.monotonic() - start
    for number in _numbers():
        place = Path(f"/proc/{number}")
        if number in strangers:
            continue
        try:
            if number not in profile.processes and mark not in (place / "environ").read_bytes().split(b"\0"):
                # a process that has not become what it will be shows nothing yet
                if (place / "environ").read_bytes():
                    strangers.add(number)
                continue
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            times = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = profile.processes.setdefault(number, Process("", now))
        cpu = (int(times[11]) + int(times[12])) / TICK
        if command:
            process.name = _name(command)
            process.look(command, cpu, now)


def _name(command: str) -> str:
    """What a process is called in the profile, from its command line."""
    for part in ("raylet/raylet", "gcs_server", "log_monitor", "dashboard", "runtime_env", "default_worker.py"):
        if part in command:
            return {"raylet/raylet": "raylet", "default_worker.py": "worker without a task"}.get(part, part)
    return "driver" if "simulator" in command else command.split()[0].rpartition("/")[2]


def commands(config: str, overrides: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """The command of each side."""
    changes = [word for each in overrides for word in ("--set", each)]

    def out(name: str) -> list[str]:
        return ["run", config, *changes, "--out", str(folder / name)]

    return {
        RAY: [sys.executable, "-m", "simulator", *out("ray")],
        BACK_TO_BACK: [sys.executable, "-c", WITH_ALL_THREADS, *out("threads"), "--local"],
        ONE_THREAD: [sys.executable, "-m", "simulator", *out("local"), "--local"],
    }


def profile_tables(profile: Profile, cores: int) -> list[Table]:
    """The profile of a run: its phases, its processes by kind, and what each worker was at."""
    phases = Table(title="Where the wall time of the Ray run goes", title_justify="left")
    for name in ("phase", "seconds", "share"):
        phases.add_column(name, justify="left" if name == "phase" else "right")
    for name, seconds in profile.phases():
        phases.add_row(name, f"{seconds:.1f}", f"{seconds / profile.seconds:.0%}")
    phases.caption = (
        f"{profile.seconds:.1f} s; {profile.cpu:.1f} CPU seconds: "
        f"{profile.cpu / profile.seconds / cores:.0%} of {cores} cores"
    )
    kinds = Table(title="CPU seconds by kind of process", title_justify="left")
    for name in ("kind", "processes", "CPU s", "share", "at work s"):
        kinds.add_column(name, justify="left" if name == "kind" else "right")
    for name, count, cpu, busy in profile.by_name():
        if cpu >= 0.05:
            kinds.add_row(name, str(count), f"{cpu:.1f}", f"{cpu / profile.cpu:.0%}", f"{busy:.1f}" if busy else "")
    workers = Table(title="The workers", title_justify="left")
    for name in ("worker", "seen at", "first work", "last work", "at work s", "idle between s", "pieces"):
        workers.add_column(name, justify="left" if name == "worker" else "right")
    for process in sorted(profile.processes.values(), key=lambda each: each.seen):
        if process.work:
            first, last = process.work[0][1], process.work[-1][2]
            figures = (process.seen, first, last, process.busy, last - first - process.busy)
            workers.add_row(process.name, *(f"{figure:.1f}" for figure in figures), str(len(process.work)))
    return [phases, kinds, workers]


def run(config: str, overrides: Sequence[str], rounds: int, cores: Sequence[int]) -> tuple[Outcome, Profile]:
    """The three sides, which alternate, and the profile of the last Ray run."""
    profiles: dict[str, list[Profile]] = {RAY: [], BACK_TO_BACK: [], ONE_THREAD: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="exsim-whole-run-") as folder:
            for side, command in commands(config, overrides, Path(folder)).items():
                profiles[side].append(watch(command, cores))
    seconds = {side: [each.seconds for each in of] for side, of in profiles.items()}

    def ratio(side: str, base: str) -> Spread:
        return Spread.of([mine / other for mine, other in zip(seconds[side], seconds[base], strict=True)])

    used = {side: Spread.of([each.cpu / each.seconds / len(cores) for each in of]) for side, of in profiles.items()}
    work = {side: Spread.of([each.cpu for each in of]) for side, of in profiles.items()}
    lines = (
        Line(BACK_TO_BACK, Spread.of(seconds[BACK_TO_BACK])),
        Line(RAY, Spread.of(seconds[RAY]), ratio(RAY, BACK_TO_BACK), TARGET),
        Line(ONE_THREAD, Spread.of(seconds[ONE_THREAD]), ratio(ONE_THREAD, BACK_TO_BACK)),
    )
    shares = "; ".join(f"{side}: {used[side]} of {len(cores)} cores, {work[side]} CPU s" for side in profiles)
    return Outcome(f"A whole run of {config}", "wall seconds", rounds, lines, f"{shares}."), profiles[RAY][-1]


def _available(config: str) -> str:
    """The configuration, or the one that needs no data where this one's are not there."""
    try:
        prepare(read_config(config))
    except InputError as error:
        if config != DEFAULT:
            raise
        print(f"{error}; measuring {FALLBACK} instead", file=sys.stderr)
        return FALLBACK
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for bad input. A missed target is shown, not an error: the machine may be busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEFAULT)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="the Ray run and its profile alone")
    options = parser.parse_args(argv)
    console = Console()
    console.print(machine(), highlight=False)
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    try:
        config = _available(options.config)
    except InputError as error:
        print(f"whole_run: {error}", file=sys.stderr)
        return 2
    if options.profile:
        with tempfile.TemporaryDirectory(prefix="exsim-whole-run-") as folder:
            profile = watch(commands(config, options.overrides, Path(folder))[RAY], cores)
    else:
        outcome, profile = run(config, options.overrides, options.rounds, cores)
        console.print(outcome.table())
    for table in profile_tables(profile, len(cores)):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
