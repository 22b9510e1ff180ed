"""The thief's side: run a scenario against a prediction service."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from torch import nn

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, State
from simulator.context import NO_SNAPSHOTS, Context, Snapshots
from simulator.data.dataset import Dataset
from simulator.detectors.base import Detection, Detector, detections, watches
from simulator.experiment.world import World
from simulator.models import Classifier, build, from_bytes, to_bytes
from simulator.ownership.key import KeySamples
from simulator.plan.subjects import Stolen
from simulator.progress import Progress, silent
from simulator.seeding import generator_for
from simulator.service.oracle import (
    AllowanceOracle,
    Listener,
    ModelOracle,
    Oracle,
    ServiceOracle,
    SharedOracle,
    Transport,
)
from simulator.service.recording import Recording


def build_surrogate(
    architecture: str, dataset: Dataset, device: torch.device, generator: torch.Generator
) -> Classifier:
    """A fresh model of a thief, who does not know the owner's normalisation."""
    model = build(
        architecture, channels=dataset.channels, size=dataset.size, classes=dataset.classes, generator=generator
    )
    return model.to(device)


def steal(
    scenario: Stolen,
    world: World,
    oracle: Oracle,
    triggers: KeySamples | None,
    device: torch.device,
    progress: Progress = silent,
    checkpoint: Checkpoint = NO_CHECKPOINT,
    snapshots: Snapshots = NO_SNAPSHOTS,
) -> Classifier:
    """Runs the stages of a scenario and returns the last stolen model, in evaluation mode.

    The first stage queries ``oracle``; each further one queries the model that the stage before it stole. Only an
    attack of one stage and one round keeps its state in ``checkpoint``; the others start again from the beginning.
    """
    single = len(scenario.stages) == 1 and len(scenario.stages[0].pools) == 1
    dataset = world.dataset
    model: Classifier | None = None
    for number, stage in enumerate(scenario.stages):
        generator = generator_for("steal", scenario.id, number)
        if model is not None:
            oracle = ModelOracle(
                model, labels=stage.labels, classes=dataset.classes, shape=world.shape, budget=stage.budget
            )
        surrogate = build_surrogate(stage.architecture or scenario.victim.architecture, dataset, device, generator)
        context = Context(generator, progress, checkpoint if single else NO_CHECKPOINT, snapshots)
        if len(scenario.stages) > 1:
            context = context.phase(f"stage {number + 1}")
        for count, spec in enumerate(stage.pools):
            allowance = oracle.remaining // (len(stage.pools) - count)
            stolen = stage.attack.extract(
                AllowanceOracle(oracle, allowance),
                surrogate,
                world.pool(spec, 1 if stage.attack.data_free else allowance, generator, triggers),
                context,
            )
            assert isinstance(stolen, Classifier)
            surrogate = stolen
        model = surrogate.eval()
    assert model is not None
    return model


@dataclass(frozen=True)
class Theft:
    """The result of a theft.

    Attributes:
        queries: victim images that the attacker was answered, by its own count.
        transfer_sets: images and answers of each account, as a safetensors file; empty if they are not kept.
        snapshots: ``(queries, model)`` at stages of the budget.
        detections: the finding of each detector about each account.
    """

    model: Classifier
    queries: int
    seconds: float
    started: datetime
    transfer_sets: Mapping[str, bytes] = field(default_factory=dict)
    snapshots: tuple[tuple[int, Classifier], ...] = ()
    detections: tuple[Detection, ...] = ()


@dataclass
class Curve:
    """Keeps the model at each stage of the budget."""

    at: tuple[int, ...]
    models: dict[int, Classifier] = field(default_factory=dict)

    def take(self, queries: int, model: nn.Module) -> None:
        """See :class:`simulator.context.Snapshots`."""
        assert isinstance(model, Classifier)
        self.models[queries] = copy.deepcopy(model).cpu().eval()


class AttackerCheckpoint:
    """An attacker's checkpoint: the attack's state together with its oracles' counters, their listeners' states, and
    its curve."""

    def __init__(self, inner: Checkpoint, oracles: Sequence[ServiceOracle], curve: Curve) -> None:
        self._inner, self._oracles, self._curve = inner, oracles, curve

    def load(self) -> State | None:
        """See :class:`Checkpoint`; also restores the oracles, their listeners and the curve."""
        state = self._inner.load()
        if state is not None:
            for oracle, counters in zip(self._oracles, state.pop("oracles"), strict=True):
                oracle.restore(*counters)
            for prefix, listener in self._listeners():
                names = [name for name in state if name.startswith(prefix)]
                listener.restore({name.removeprefix(prefix): state.pop(name) for name in names})
            for queries in state.pop("curve"):
                data = state.pop(f"curve.{queries}")
                self._curve.models[queries] = from_bytes(data.numpy().tobytes())
        return state

    def due(self) -> bool:
        """See :class:`Checkpoint`."""
        return self._inner.due()

    def save(self, state: State) -> None:
        """See :class:`Checkpoint`."""
        models = {
            f"curve.{queries}": torch.frombuffer(bytearray(to_bytes(model)), dtype=torch.uint8)
            for queries, model in self._curve.models.items()
        }
        counters = [list(oracle.counters()) for oracle in self._oracles]
        heard = {
            prefix + name: value for prefix, listener in self._listeners() for name, value in listener.state().items()
        }
        self._inner.save({**state, **models, **heard, "curve": list(self._curve.models), "oracles": counters})

    def _listeners(self) -> Iterator[tuple[str, Listener]]:
        """Every listener with the prefix of its entries' names, e.g. ``listener.0.1.``."""
        for number, oracle in enumerate(self._oracles):
            for place, listener in enumerate(oracle.listeners):
                yield f"listener.{number}.{place}.", listener


def run_scenario(
    scenario: Stolen,
    world: World,
    transport: Transport,
    tokens: Mapping[str, str],
    triggers: KeySamples | None,
    device: torch.device,
    progress: Progress = silent,
    *,
    record: bool = False,
    detectors: Sequence[Detector] = (),
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> Theft:
    """Runs a scenario against a prediction service, whose accounts are already open; ``tokens`` has the secret of each.

    With ``record``, the transfer sets are kept; with ``detectors``, each account is watched. Both are in the
    checkpoint, so a resumed theft gives the same as an uninterrupted one.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    watched = {account: watches(detectors) for account in scenario.accounts}
    recorded = {account: Recording(world.dataset.classes) for account in scenario.accounts if record}
    oracles = [
        ServiceOracle(
            transport,
            account,
            tokens[account],
            labels=scenario.stages[0].labels,
            classes=world.dataset.classes,
            shape=world.shape,
            budget=budget,
            listeners=[*(watch for _, watch in watched[account]), *([recorded[account]] if record else [])],
        )
        for account, budget in scenario.accounts.items()
    ]
    oracle = oracles[0] if len(oracles) == 1 else SharedOracle(oracles)
    curve = Curve(scenario.stages[0].curve)
    keeper = AttackerCheckpoint(checkpoint, oracles, curve)
    model = steal(scenario, world, oracle, triggers, device, progress, keeper, curve)
    transfer_sets = {each.account: recorded[each.account].transfer_set() for each in oracles if record and each.asked}
    queries = sum(each.asked for each in oracles)
    seconds = time.perf_counter() - clock
    found = tuple(detection for account in watched for detection in detections(account, watched[account]))
    return Theft(model, queries, seconds, started, transfer_sets, tuple(sorted(curve.models.items())), found)
