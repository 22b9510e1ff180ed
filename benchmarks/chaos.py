"""Kills everything that a run is made of, again and again, and checks that its account and its rows do not show it.

    python -m benchmarks.chaos --kills 100 --minutes 10 [--report FILE]        (make chaos)
    python -m benchmarks.chaos --faults rpc --scenarios 3 --seeds 1        (calls are lost: rpc_faults.py)

A run is started as a user would start it. Processes of it are killed with SIGKILL at random moments, alone or several
at once: attackers, replicas of the service, Serve's controller, the ledger, the keeper, the collector, the trainer, the
board, the shelf, and the driver, after which the run is resumed. The kind that was killed least is the next, so every
kind has its share. A run that ends before the kills and the minutes are spent is followed by another. A run that ends
otherwise than by its driver's death, or with failed rows, is resumed as well, and the report says why. Then, for each,

- every account was charged for the same images under the same keys as in an undisturbed run without Ray, what its row
  says, and not more than its budget: nothing over-charged, and no answer paid for and lost;
- the rows are those of the undisturbed run: none lost, none doubled, none different; and so is every stolen model, to
  the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measure import machine
from simulator.errors import InputError
from simulator.experiment.local import run_config
from simulator.plan.config import RunConfig, check_config
from simulator.records.rows import Row, read_rows
from simulator.service.ledger import Ledger

#: process titles that Ray gives, and what we call them
KINDS = {
    "ray::Attacker": "attacker",
    "ray::ServeReplica": "replica",
    "ray::SERVE_REPLICA": "replica",  # the same, when it has not answered anything yet
    "ray::LedgerService": "ledger",
    "ray::Keeper": "keeper",
    "ray::CollectorService": "collector",
    "ray::Trainer": "trainer",
    "ray::Board": "board",
    "ray::Shelf": "shelf",
    "ray::ServeController": "controller",
}
#: so many kills for each kind make it certain that each has its share
FAIR = 5
#: marks the processes of one chaos run, which inherit it
MARK = "EXSIM_CHAOS"
#: how many are killed in one moment
AT_ONCE = (1, 1, 1, 2, 3)
#: seconds in which a run that is left alone has to end
PATIENCE = 1800.0
#: what must not depend on kills
COMPARED = ("accuracy", "wsr", "agreement", "queries", "key_samples", "status", "error")
#: no variables of the environment
NONE: Mapping[str, str] = MappingProxyType({})


def workload(scenarios: int = 6, seeds: int = 1, epochs: int = 6) -> RunConfig:
    """A run on digits, long enough to be killed in: each scenario steals with its own budget."""
    recipe = {"epochs": epochs, "batch_size": 64, "learning_rate": 2e-3, "decay_at": [0.5]}
    budgets = [400 + 100 * number for number in range(scenarios)]
    return check_config(
        {
            "name": "chaos",
            "dataset": {"name": "digits", "owner": 600, "attacker": 400, "test": 300},
            "training": recipe,
            "watermarks": [{"name": "deeptracer", "first_epochs": epochs, "second_epochs": epochs, "candidates": 200}],
            "key_filter": {"architecture": "naivenet", "queries": 400, "keep": 100, "training": recipe},
            "scenarios": [{"attack": {"name": "knockoff", "training": recipe}, "budget": budgets}],
            "seeds": list(range(seeds)),
        }
    )


@dataclass
class Outcome:
    """What a chaos run did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    #: when there was first something to kill
    begun: float | None = None
    rows: int = 0
    images: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """Kills of every kind."""
        return sum(self.kills.values())

    def lines(self) -> list[str]:
        """The report."""
        killed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return [
            f"{self.killed} kills ({killed}), {self.resumes.total()} resumes of {self.runs} runs, {self.seconds:.0f} s",
            *(f"resumed {count} x: {why}" for why, count in self.resumes.most_common()),
            f"{self.rows} rows and {self.images} charged images compared with an undisturbed run; "
            f"{len(self.faults)} faults",
            *self.faults,
        ]


def chaos(config: RunConfig, kills: int, pause: tuple[float, float], seed: int, limit: float) -> Outcome:
    """Runs ``config`` while killing ``kills`` of its processes, at most for ``limit`` seconds, and checks the result.

    Args:
        pause: shortest and longest time between two kills, in seconds.
        limit: after this no more is killed, and the run may finish.
    """
    return campaign(config, kills, pause, seed, 0.0, limit)


def campaign(
    config: RunConfig, kills: int, pause: tuple[float, float], seed: int, least: float, limit: float
) -> Outcome:
    """Like :func:`chaos`, with runs of ``config`` one after the other, until ``kills`` processes were killed and
    ``least`` seconds have passed; at least one run, and no new one after ``limit`` seconds."""
    dice, outcome, started = random.Random(seed), Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="exsim-chaos-") as folder:
        while True:
            outcome.runs += 1
            out = Path(folder) / f"run-{outcome.runs}"
            finished = _disturb(
                config, out, dice, pause, outcome, lambda: _enough(outcome, kills, least, limit, started)
            )
            outcome.seconds = time.monotonic() - started
            if not finished:
                outcome.faults.append("the run did not finish")
                return outcome
            if outcome.runs == 1:
                run_config(config, Path(folder) / "reference")
            audit(out, Path(folder) / "reference", outcome)
            shutil.rmtree(out)
            # the short test has one run, however few were killed before it ended
            if not least or _enough(outcome, kills, least, limit, started):
                return outcome


def _enough(outcome: Outcome, kills: int, least: float, limit: float, started: float) -> bool:
    """Whether no more has to be killed. The limit counts from when something could be: a busy machine starts slowly."""
    now = time.monotonic()
    late = now - started >= limit + PATIENCE or (outcome.begun is not None and now - outcome.begun >= limit)
    return late or (outcome.killed >= kills and now - started >= least)


def _disturb(
    config: RunConfig, out: Path, dice: random.Random, pause: tuple[float, float], outcome: Outcome, enough: Any
) -> bool:
    """One run, killed at and resumed until it is done; false where it does not end without kills either."""
    mark, file = f"{os.getpid()}-{time.time_ns()}", out.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    log = out.with_suffix(".log")
    driver, calm = start(["run", str(file), "--out", str(out)], mark, log), None
    try:
        while (status := driver.poll()) != 0:
            if status is not None:
                end_all(mark)
                outcome.resumes[why(status, log)] += 1
                resumable = (out / "config.yaml").exists()
                arguments = ["run", "--resume", str(out)] if resumable else ["run", str(file), "--out", str(out)]
                driver = start(arguments, mark, log)
            if enough():
                calm = calm or time.monotonic()
                if time.monotonic() - calm > PATIENCE:
                    return False
                time.sleep(0.2)
            else:
                time.sleep(dice.uniform(*pause))
                for _ in range(dice.choice(AT_ONCE)):
                    _kill_one(mark, driver, dice, outcome)
    finally:
        driver.kill()
        driver.wait()
        end_all(mark)
    return True


def start(
    arguments: list[str], mark: str, log: Path | None = None, variables: Mapping[str, str] = NONE
) -> subprocess.Popen[bytes]:
    """``exsim`` with some arguments. Its processes inherit the variables and the mark, and its words replace those in
    ``log``, if any."""
    environment = {**os.environ, **variables, MARK: mark, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simulator", *arguments]
    with (log or Path(os.devnull)).open("wb") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)


def why(status: int, log: Path) -> str:
    """Why a driver ended without having done everything: what it said of failures, or else its last words."""
    if status == -signal.SIGKILL:
        return "the driver was killed"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("failed:")] or lines
    return f"status {status}: {said[-1][:300] if said else 'no word'}"


def marked(mark: str) -> dict[int, str]:
    """The processes of a run and their titles."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended meanwhile
                continue
    return found


def _kill_one(mark: str, driver: subprocess.Popen[bytes], dice: random.Random, outcome: Outcome) -> None:
    """Kills a process of the kind that was killed least among those that are alive."""
    alive: dict[str, list[int]] = {}
    for pid, title in marked(mark).items():
        kind = next((name for prefix, name in KINDS.items() if title.startswith(prefix)), None)
        if kind:
            alive.setdefault(kind, []).append(pid)
    if not alive:
        return  # it is starting; killed now, it would never come to anything
    outcome.begun = outcome.begun or time.monotonic()
    alive["driver"] = [driver.pid]
    # the driver's death ends all others: a third as often
    kind = min(
        sorted(alive, key=lambda _: dice.random()), key=lambda name: outcome.kills[name] * (1 + 2 * (name == "driver"))
    )
    try:
        os.kill(dice.choice(alive[kind]), signal.SIGKILL)
    except ProcessLookupError:
        return
    outcome.kills[kind] += 1


def end_all(mark: str, patience: float = 20.0) -> None:
    """Waits until the processes of a dead driver are gone, and ends those that stay, as ``ray stop`` would."""
    deadline = time.monotonic() + patience
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        with_pid = Path(f"/proc/{pid}")
        if with_pid.exists():
            os.kill(pid, signal.SIGKILL)


def audit(out: Path, reference: Path, outcome: Outcome) -> None:
    """Notes every difference of a run from the undisturbed one, and every account that does not add up."""
    try:
        rows, undisturbed = read_rows(out), read_rows(reference)
        ledger, wanted = _book(out), _book(reference)
    except InputError as error:  # such as a row that is there twice, or a charge above the budget
        outcome.faults.append(str(error))
        return
    outcome.rows += len(rows)
    outcome.images += sum(ledger.all_spent().values())
    outcome.faults += [*_rows(rows, undisturbed), *_accounts(rows, ledger, wanted), *_models(out, reference)]


def _book(run: Path) -> Ledger:
    """A run's account, read from a copy of its file."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(shutil.copytree(run / "ledger", Path(folder) / "ledger")) / "ledger.log")
        ledger.close()
    return ledger


def _rows(rows: list[Row], undisturbed: list[Row]) -> list[str]:
    """Rows that are lost, doubled, or not as they should be."""
    mine, theirs = {row.identity: row for row in rows}, {row.identity: row for row in undisturbed}
    faults = [f"{len(rows) - len(mine)} rows are doubled"] if len(mine) != len(rows) else []
    faults += [f"lost: {identity}" for identity in theirs.keys() - mine.keys()]
    faults += [f"nobody asked for: {identity}" for identity in mine.keys() - theirs.keys()]
    for identity in mine.keys() & theirs.keys():
        for name in COMPARED:
            found, wanted = getattr(mine[identity], name), getattr(theirs[identity], name)
            if found != wanted:
                faults.append(f"{identity[0]} {identity[1]}: {name} is {found}, undisturbed {wanted}")
    return faults


def _accounts(rows: list[Row], ledger: Ledger, wanted: Ledger) -> list[str]:
    """Accounts that were charged for anything else than the undisturbed ones, or not what their rows say."""
    faults = []
    queries = {row.scenario_id: row.queries for row in rows if row.role == "stolen"}
    charged: Counter[str] = Counter()
    for account in sorted(ledger.all_spent() | wanted.all_spent()):
        charged[account.partition(".")[0]] += ledger.spent(account)
        found, right = ledger.grants(account), wanted.grants(account)
        if account in ledger.all_spent() and ledger.spent(account) > ledger.terms(account).budget:
            faults.append(f"{account}: charged {ledger.spent(account)} of a budget of {ledger.terms(account).budget}")
        for key in sorted(found.keys() | right.keys()):
            if found.get(key) != right.get(key):
                faults.append(f"{account}: key {key} paid for {found.get(key)}, undisturbed {right.get(key)}")
    for scenario, spent in charged.items():
        if queries.get(scenario) != spent:
            faults.append(f"{scenario}: charged {spent}, its row says {queries.get(scenario)}")
    return faults


def _models(out: Path, reference: Path) -> list[str]:
    """Models that differ in any bit: what was paid for and lost would be missing in a thief's training."""
    faults = []
    for file in sorted((reference / "models").glob("*.safetensors")):
        mine = out / "models" / file.name
        if not mine.exists():
            faults.append(f"{file.name}: lost")
            continue
        found, wanted = load_file(mine), load_file(file)
        if found.keys() != wanted.keys() or not all(torch.equal(found[name], wanted[name]) for name in wanted):
            faults.append(f"{file.name}: other weights than undisturbed")
    return faults


def main(argv: list[str] | None = None) -> int:
    """``make chaos``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", choices=("kills", "rpc"), default="kills", help="rpc: lost and late calls")
    parser.add_argument(
        "--percents", type=int, nargs="+", default=[10, 25, 50], help="of calls lost, with --faults rpc"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10, help="go on killing at least so long")
    parser.add_argument("--limit", type=float, default=60, help="minutes after which nothing more is killed")
    parser.add_argument("--pause", type=float, nargs=2, default=(2.0, 8.0), metavar="SECONDS", help="between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--report", type=Path, help="write the report there, too")
    options = parser.parse_args(argv)
    config = workload(options.scenarios, options.seeds, options.epochs)
    if options.faults == "rpc":
        from benchmarks import rpc_faults  # it starts its runs as this module does

        report, good = rpc_faults.table(config, options.percents)
        return _tell(report, options.report, good)
    least, limit = 60 * options.minutes, 60 * options.limit
    outcome = campaign(config, options.kills, tuple(options.pause), options.seed, least, limit)
    kinds = (*dict.fromkeys(KINDS.values()), "driver")
    if options.kills >= FAIR * len(kinds):  # then the report would say less than it seems to
        outcome.faults += [f"no {kind} was killed" for kind in kinds if not outcome.kills[kind]]
    return _tell(outcome.lines(), options.report, not outcome.faults)


def _tell(lines: list[str], file: Path | None, good: bool) -> int:
    """Prints a report and writes it to a file, if there is one; returns the exit status."""
    print("\n".join(lines))
    if file:
        file.write_text("\n".join([machine(), "", *lines, ""]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
