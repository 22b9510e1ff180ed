"""Runs whose actor calls are lost or late on the way, by Ray's own fault injection (``benchmarks.chaos --faults rpc``).

Of every hundred pushes of a call to an actor so many fail: the call is lost, or its answer is, or the answer is lost
while the call is under way; a third each, or all of one kind. Ray's variables are ``RAY_testing_rpc_failure`` and, for
late calls, ``RAY_testing_asio_delay_us``. Each run's rows, accounts, models and transfer sets have to equal those of a
run in one process, and its time is told relative to the undisturbed runs on Ray before and after.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import chaos
from runs.compare import differences
from simulator.experiment.local import run_config
from simulator.plan.config import RunConfig

#: what may be lost, and the name that Ray gives to its probability
LOST = {"request": "req_failure_prob", "response": "resp_failure_prob", "in flight": "in_flight_failure_prob"}
PUSH = "CoreWorkerService.grpc_client.PushTask"
#: microseconds by which each handler of a pushed call is late, at least and at most
DELAY = f"{PUSH}=1000:20000,CoreWorkerService.grpc_server.PushTask=1000:20000"
#: times that a run is resumed, at most
RESUMES = 5


@dataclass(frozen=True)
class Disturbed:
    """What came of one run."""

    name: str
    seconds: float
    resumes: int
    faults: list[str]


def lost(percent: int, kinds: Sequence[str] = tuple(LOST)) -> dict[str, str]:
    """The variables under which so many of a hundred calls are lost."""
    shares = {LOST[kind]: percent // len(kinds) + (place < percent % len(kinds)) for place, kind in enumerate(kinds)}
    return {"RAY_testing_rpc_failure": json.dumps({PUSH: {"num_failures": -1, **shares}})}


def disturbances(percents: Sequence[int]) -> dict[str, dict[str, str]]:
    """By name, the variables of each run: an undisturbed one first and last."""
    found: dict[str, dict[str, str]] = {"undisturbed": {}}
    for percent in percents:
        found[f"{percent} % of calls lost, a third each"] = lost(percent)
    for kind in LOST:
        found[f"{max(percents)} % lost: {kind}"] = lost(max(percents), [kind])
    found["late by 1 to 20 ms"] = {"RAY_testing_asio_delay_us": DELAY}
    found["undisturbed, again"] = {}
    return found


def disturb(config: RunConfig, out: Path, reference: Path, name: str, variables: Mapping[str, str]) -> Disturbed:
    """One run under some variables, resumed until it is done, and compared."""
    file, mark, log = out.with_suffix(".yaml"), f"{os.getpid()}-{time.time_ns()}", out.with_suffix(".log")
    file.write_text(config.to_yaml())
    begun, resumes, arguments = time.monotonic(), 0, ["run", str(file), "--out", str(out)]
    try:
        while (driver := chaos.start(arguments, mark, log, variables)).wait(chaos.PATIENCE) and resumes < RESUMES:
            chaos.end_all(mark)
            resumes += 1
            print(f"{name}: resumed, {chaos.why(driver.returncode, log)}", flush=True)
            arguments = ["run", "--resume", str(out)]
    except subprocess.TimeoutExpired:
        return Disturbed(name, chaos.PATIENCE, resumes, ["the run did not end"])
    finally:
        seconds = time.monotonic() - begun
        driver.kill()
        driver.wait()
        chaos.end_all(mark)
    return Disturbed(name, seconds, resumes, differences(reference, out))


def table(config: RunConfig, percents: Sequence[int]) -> tuple[list[str], bool]:
    """Every run's line, and whether all were equal to the undisturbed one."""
    config = config.model_copy(update={"save_transfer_sets": True})
    with tempfile.TemporaryDirectory(prefix="exsim-rpc-") as folder:
        reference = Path(folder) / "reference"
        run_config(config, reference)
        found = []
        for number, (name, variables) in enumerate(disturbances(percents).items()):
            out = Path(folder) / f"run-{number}"
            found.append(disturb(config, out, reference, name, variables))
            print(f"{name}: {found[-1].seconds:.0f} s, {found[-1].faults[:3] or 'equal'}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    calm = (found[0].seconds + found[-1].seconds) / 2
    rows = [
        f"| {run.name} | {run.seconds:.0f} | {run.seconds / calm:.2f} | {run.resumes} | "
        f"{'; '.join(run.faults[:3]) or 'equal'} |"
        for run in found
    ]
    head = "| calls | seconds | of the undisturbed | resumes | rows, accounts, models, transfer sets |"
    return [head, "|---|---|---|---|---|", *rows], not any(run.faults for run in found)
