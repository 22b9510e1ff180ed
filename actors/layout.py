"""Fits a run onto a cluster: how many actors of each kind, and what share of a GPU or CPU each gets."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.autoscaler.sdk import request_resources

from actors.devices import CPU_BESIDE_GPU, Placement
from simulator.errors import InputError
from simulator.plan.config import RunConfig

#: seconds between two looks at how far a cluster has grown
GROWTH_POLL = 2.0


#: rounding error to allow when shares are compared
SLACK = 1e-6


#: the smallest share of a resource that Ray can count
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


def nodes() -> list[dict[str, float]]:
    """The resources of every node of the connected cluster."""
    alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in alive]


def grow(config: RunConfig, scenarios: int, patience: float) -> None:
    """Asks the cluster's autoscaler for all that a run can use, and waits for it, at most ``patience`` seconds.

    The run then uses what has come. GPUs are asked for unless ``device`` is ``cpu``. Without this call a run would be
    fitted onto the nodes that are up, and groups of workers that scale from zero would stay at zero.
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
        request_resources(bundles=[])  # new nodes stay up for the autoscaler's idle time


def this_machine() -> list[dict[str, float]]:
    """The resources of a local cluster: one node with this machine's cores and GPUs."""
    return [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}]


def lay_out(config: RunConfig, scenarios: int, there: list[dict[str, float]] | None = None) -> Layout:
    """Fits a run onto the connected cluster: onto its GPUs if it has any and ``device`` is not ``cpu``, else onto CPUs.

    Args:
        scenarios: how many thefts are to run.
        there: the nodes' resources, in place of the connected cluster's.

    Raises:
        InputError: a resource does not suffice. The message names it, how much is asked and how much there is.
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
    ):  # an attacker computes on one thread, so more of them than cores would only take turns
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
    """How many of ``wanted`` shares fit beside the others; -1 if the others alone do not fit.

    The cluster's total does not tell: a share of up to 1 must lie on one GPU, and any share on one node. So two
    half-free GPUs hold no whole share. Each share goes where the least room is left, as Ray does on a node.
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
