"""Reaching a Ray cluster, checking that it has what a run asks, and keeping its log lines out of the user's sight."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.devices import CPU_BESIDE_GPU, Placement
from simulator.config import RunConfig
from simulator.errors import InputError

#: bytes of object store for a local cluster; data sets and models of this field are small
OBJECT_STORE = 1 << 30
#: how long a cluster's address may take to answer
CONNECT_SECONDS = 10.0
#: seconds between two looks at how far a cluster has grown
GROWTH_POLL = 2.0
#: a CPU's share that rounding may miss by
SLACK = 1e-6
#: the least share of a resource that Ray knows
PRECISION = 1e-4


@dataclass(frozen=True)
class Layout:
    """How many actors of each kind a run starts, and on what share of which resource."""

    gpu: bool
    attackers: int
    trainers: int
    replicas: int
    collectors: int
    attacker: Placement
    trainer: Placement
    victim: Placement
    collector: Placement


@contextmanager
def connected(address: str | None, logs: Path, *, cpus: int | None = None, gpus: int | None = None) -> Iterator[None]:
    """A connection to the cluster at ``address`` (or ``RAY_ADDRESS``), or to a local one that lives inside the block.

    A connection that exists already is used and left alone. Ray's and Serve's lines of this process go to
    ``logs/driver.log``, and a local cluster's own logs are copied beside it when it ends.

    Raises:
        InputError: no cluster answers at the address.
    """
    with _logged_to(logs / "driver.log"):
        if address:
            _reach(address)
        if ray.is_initialized():
            yield
            return
        if not address and (address := os.environ.get("RAY_ADDRESS")):
            _reach(address)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                quiet["include_dashboard"] = False
                # "local": with no address at all Ray would join a cluster that somebody has started on this machine
                ray.init("local", num_cpus=cpus, num_gpus=gpus, object_store_memory=OBJECT_STORE, **quiet)
        except Exception as error:  # of a node that took too long to start, Ray raises no narrower one
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
        session = None if address else _session_logs()
        try:
            with _terminated_as_interrupted():
                yield
        finally:
            ray.shutdown()
            if session is not None:
                _keep_logs(session, logs / "ray")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as of a job that is stopped, ends the block as Ctrl-C does. Ray's own handler would end the process with
    the service left on the cluster. (Only a main thread may have it so.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Sees that something listens at ``host:port``, for Ray would try for many minutes.

    Ray Client (``ray://``) is refused: its driver is on no node, and so there is none on which the ledger and the
    collector could write into the run directory.

    Raises:
        InputError: nothing does.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"no Ray cluster at {address} for a run: its actors write beside the driver, so start it on a node of the "
            f"cluster, by ray job submit or ray exec; allowed there: auto, HOST:PORT"
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return  # "auto" and its like: Ray looks for a cluster on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address}: {error}; allowed: HOST:PORT, auto") from None


def _session_logs() -> Path | None:
    """Where the local cluster logs. Ray has no public call for it."""
    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node else None


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Sends the lines of Ray's loggers, and what the raylet complains of, to a file inside the block, and none to the
    terminal."""
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    shown = ray._private.worker.print_to_stdstream
    ray._private.worker.print_to_stdstream = _logged
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = shown
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _logged(data: dict[str, Any], *_: Any, **__: Any) -> None:
    """In place of Ray's function that prints the raylet's errors, such as that many processes have been started, to
    standard output. Ray has no setting for them: ``log_to_driver`` is for the workers' lines alone."""
    for line in data["lines"]:
        logging.getLogger("ray").error("%s: %s", data.get("pid", "raylet"), line)


def _keep_logs(session: Path, target: Path) -> None:
    """Copies what the workers of a local cluster wrote. A log that vanished meanwhile is no loss."""
    for pattern in ("worker-*", "serve/*", "raylet.*", "gcs_server.*"):
        for file in session.glob(pattern):
            if file.is_file() and file.stat().st_size:
                place = target / file.relative_to(session)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def here() -> NodeAffinitySchedulingStrategy:
    """The node of this process, for actors that read and write its files."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def nodes() -> list[dict[str, float]]:
    """The resources of every node of the connected cluster."""
    alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in alive]


def grow(config: RunConfig, scenarios: int, patience: float) -> None:
    """Asks the cluster's autoscaler for all that a run can use, and waits until it is there, ``patience`` seconds at
    most; what has come by then is used. GPUs are asked for unless ``device`` is ``cpu``.

    Without this a run is fitted onto the nodes that are up, and workers that scale from zero stay at zero.
    """
    shares, gpu = config.resources, config.device != "cpu"
    attackers = max(1, scenarios if shares.attackers == "auto" else shares.attackers)
    parts = [shares.attacker] * attackers + [shares.trainer] * shares.trainers + [shares.victim] * shares.replicas
    request_resources(bundles=[{"GPU": part, "CPU": CPU_BESIDE_GPU} if gpu else {"CPU": part} for part in parts])
    until = time.monotonic() + patience
    try:
        while time.monotonic() < until:
            try:
                layout = lay_out(config, scenarios)
                if layout.gpu == gpu and layout.attackers == attackers:
                    return
            except InputError:  # it does not fit yet
                pass
            time.sleep(min(GROWTH_POLL, max(0.0, until - time.monotonic())))
    finally:
        request_resources(bundles=[])  # a node that has come stays for the autoscaler's idle time


def this_machine() -> list[dict[str, float]]:
    """What a local cluster would have: one node with this machine's cores and GPUs."""
    return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]


def lay_out(config: RunConfig, scenarios: int, there: list[dict[str, float]] | None = None) -> Layout:
    """Fits a run onto the connected cluster: GPUs where it has any (or ``device`` demands one), else CPUs.

    Args:
        scenarios: that are to run.
        there: resources of the nodes, in place of the connected cluster's.

    Raises:
        InputError: naming the resource that does not suffice, how much is asked and how much there is.
    """
    there = nodes() if there is None else there
    gpus = sum(node.get("GPU", 0) for node in there)
    if config.device == "cuda" and not gpus:
        raise InputError("device: cuda demands a GPU and the cluster has none; allowed: auto, cpu, or a GPU node")
    gpu = gpus > 0 and config.device != "cpu"
    shares, kind = config.resources, "GPU" if gpu else "CPU"
    for name in ("attacker", "trainer", "victim"):
        _check_share(name, getattr(shares, name), kind, there)
    _check_share("collector", shares.collector, "CPU", there)
    others = [shares.trainer] * shares.trainers + [shares.victim] * shares.replicas
    collectors = [shares.collector] * shares.collectors
    limits = {kind: (shares.attacker, others if gpu else others + collectors)}
    if gpu:
        limits["CPU"] = (CPU_BESIDE_GPU, [CPU_BESIDE_GPU] * len(others) + collectors)
    wanted = max(1, scenarios if shares.attackers == "auto" else shares.attackers)
    if (
        shares.attackers == "auto" and not gpu
    ):  # each computes with one thread, so more than cores would only take turns
        wanted = min(wanted, max(1, int(sum(node.get("CPU", 0) for node in there))))
    least = 1 if shares.attackers == "auto" else wanted
    for resource, (each, rest) in limits.items():
        fit = _how_many(each, rest, resource, there, wanted)
        if fit < least:
            have = sum(node.get(resource, 0) for node in there)
            asked = f"{least} x {each:g} for attackers and {sum(rest):g} for the rest"
            raise InputError(f"resources: {asked} of a {resource} do not fit the cluster's {have:g} {resource}s")
        wanted = min(wanted, fit)
    return Layout(
        gpu=gpu,
        attackers=min(wanted, max(1, scenarios)),
        trainers=shares.trainers,
        replicas=shares.replicas,
        collectors=shares.collectors,
        attacker=Placement(gpu, shares.attacker),
        trainer=Placement(gpu, shares.trainer),
        victim=Placement(gpu, shares.victim),
        collector=Placement(False, shares.collector),
    )


def _check_share(name: str, share: float, kind: str, nodes: list[dict[str, float]]) -> None:
    largest = max((node.get(kind, 0) for node in nodes), default=0)
    if share > largest + SLACK:
        raise InputError(f"resources.{name}: {share:g} {kind} asked, the largest node has {largest:g}")
    if kind == "GPU" and share > 1 and share != int(share):
        raise InputError(f"resources.{name}: {share:g} GPU asked; a share above 1 must be a whole number")
    if 0 < share < PRECISION:
        raise InputError(f"resources.{name}: {share:g} {kind} asked; Ray counts in steps of {PRECISION:g}")


def _how_many(share: float, others: list[float], kind: str, nodes: list[dict[str, float]], wanted: int) -> int:
    """How many shares fit beside the others, ``wanted`` at most; -1 if not even the others fit.

    The cluster's sum does not tell: a share lies on one node, and on one GPU. Each is put where the least is left free,
    as Ray does on a node.
    """
    free = [[1.0] * int(node.get("GPU", 0)) if kind == "GPU" else [node.get("CPU", 0.0)] for node in nodes]

    def place(part: float) -> bool:
        if kind == "GPU" and part > 1:
            whole = next((gpus for gpus in free if gpus.count(1.0) >= part), [])
            for _ in range(int(part) if whole else 0):
                whole[whole.index(1.0)] = 0.0
            return bool(whole)
        room = [(left, gpus, at) for gpus in free for at, left in enumerate(gpus) if left >= part - SLACK]
        if room:
            left, gpus, at = min(room, key=lambda entry: entry[0])
            gpus[at] = left - part
        return bool(room)

    if not all(place(part) for part in others):
        return -1
    return next((count for count in range(wanted) if not place(share)), wanted)
