"""The computations of a run as plain functions: train the owner's models, steal, each a function of its inputs alone.

Nothing here knows where it runs. The plain loop (:mod:`simulator.local`) and the Ray actors call the same functions
with the same inputs, which is why their rows are equal.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import nn

from simulator.attacks.base import NO_SNAPSHOTS, Snapshots
from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, State
from simulator.data import Dataset, Images
from simulator.detectors.base import Detection, Detector, watches
from simulator.metrics import accuracy
from simulator.models import Classifier, build, from_bytes, to_bytes
from simulator.oracle import AllowanceOracle, ModelOracle, Oracle, ServiceOracle, SharedOracle, Transport
from simulator.plan import OwnerModel, Scenario
from simulator.pools import Pool, PoolSpec, build_pool
from simulator.progress import Progress, prefixed, silent
from simulator.seeding import generator_for
from simulator.training import fit, predict_labels
from simulator.watermarks.base import Embedding, OwnerTask, PhaseListener, unheard
from simulator.watermarks.key import KeySamples


@dataclass(frozen=True)
class World:
    """The images of a run: the victim's data set, and by name the foreign ones that pools draw from, as
    :func:`simulator.pools.without_test_images` left them: an attacker's view, without a test part, cannot clean them.
    """

    dataset: Dataset
    foreign: Mapping[str, Images] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the victim's images."""
        return (self.dataset.channels, self.dataset.size, self.dataset.size)

    def for_attackers(self) -> World:
        """The same without the test part, and so without anything keys are made of."""
        nothing = Images(self.dataset.test.images[:0], self.dataset.test.labels[:0])
        return replace(self, dataset=replace(self.dataset, test=nothing))

    def pool(self, spec: PoolSpec, count: int, generator: torch.Generator, triggers: KeySamples | None = None) -> Pool:
        """The query pool of a specification (see :func:`simulator.pools.build_pool`)."""
        return build_pool(
            spec,
            dataset=self.dataset,
            count=count,
            generator=generator,
            foreign=lambda name: self.foreign[name],
            triggers=None if triggers is None else Images(triggers.images, triggers.labels),
        )


@dataclass(frozen=True)
class TrainedOwner:
    """An owner's model with all that belongs to it.

    Attributes:
        key: the filtered key; None for the benign model.
        triggers: a sample of the triggers trained on, for pools that ask for some.
        false_trigger: the rate at which near misses get the watermark's label, in [0, 1].
        seconds: of training it, key and filter included.
        candidates: what the key was filtered from; None where no filter chose.
    """

    model: Classifier
    key: KeySamples | None
    triggers: KeySamples | None
    false_trigger: float | None
    seconds: float
    started: datetime
    candidates: KeySamples | None = None


def build_owner_model(
    spec: OwnerModel, dataset: Dataset, device: torch.device, generator: torch.Generator
) -> Classifier:
    """A fresh model of the victim's architecture; it normalises with the owner's own mean and deviation."""
    model = build(
        spec.architecture,
        channels=dataset.channels,
        size=dataset.size,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        generator=generator,
    )
    return model.to(device)


def build_surrogate(
    architecture: str, dataset: Dataset, device: torch.device, generator: torch.Generator
) -> Classifier:
    """A fresh model of a thief, who does not know the owner's normalisation."""
    model = build(
        architecture, channels=dataset.channels, size=dataset.size, classes=dataset.classes, generator=generator
    )
    return model.to(device)


def train_owner(
    spec: OwnerModel,
    world: World,
    benign: Classifier | None,
    device: torch.device,
    progress: Progress = silent,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> TrainedOwner:
    """Trains the benign model, or (given the benign one) a marked victim with its key."""
    started, clock = datetime.now(UTC), time.perf_counter()
    dataset = world.dataset
    if spec.watermark is None:
        generator = generator_for("owner", spec.training_id)
        model = build_owner_model(spec, dataset, device, generator)
        fit(
            model,
            dataset.owner.images,
            dataset.owner.labels,
            spec.training,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        return TrainedOwner(model, None, None, None, time.perf_counter() - clock, started)
    assert benign is not None
    embedding = _embed(spec, world, benign, device, progress, checkpoint)
    false_trigger = _false_trigger(embedding)
    info = {"victim": spec.id, "dataset": dataset.name, "false_trigger": false_trigger}
    key = _filtered(spec, world, embedding, benign, device, progress)
    return TrainedOwner(
        embedding.model,
        replace(key, info={**key.info, **info}),
        KeySamples(embedding.triggers, embedding.trigger_labels, dataset.classes, info),
        false_trigger,
        time.perf_counter() - clock,
        started,
        None if key.info.get("filter") == "none" else embedding.candidates,
    )


@dataclass(frozen=True)
class HalfTrained:
    """A marked victim between two phases of its training: accuracy and WSR on key candidates, rates in [0, 1]."""

    accuracy: float
    wsr: float
    seconds: float


class _PhaseOver(Exception):
    """Ends a training where it has been measured."""


def train_phase(
    spec: OwnerModel,
    world: World,
    benign: Classifier,
    until: str,
    device: torch.device,
    progress: Progress = silent,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> HalfTrained:
    """Trains a marked victim to the end of one of its scheme's :meth:`~Watermark.phases` and measures it.

    :func:`train_owner` with the same checkpoint goes on from there, to the same model as without an interruption.
    """
    clock, test = time.perf_counter(), world.dataset.test
    found: list[HalfTrained] = []

    def listen(phase: str, model: Classifier, probe: Callable[[], KeySamples]) -> None:
        if phase == until:
            key = probe()
            right = accuracy(predict_labels(model, test.images), test.labels)
            wsr = accuracy(predict_labels(model, key.images), key.labels)
            found.append(HalfTrained(right, wsr, time.perf_counter() - clock))
            raise _PhaseOver

    with suppress(_PhaseOver):
        _embed(spec, world, benign, device, progress, checkpoint, listen)
    return found[0]


def _embed(
    spec: OwnerModel,
    world: World,
    benign: Classifier,
    device: torch.device,
    progress: Progress,
    checkpoint: Checkpoint,
    on_phase: PhaseListener = unheard,
) -> Embedding:
    """The marked victim and its key candidates."""
    assert spec.watermark is not None
    benign.to(device)
    task = OwnerTask(
        world.dataset,
        spec.training,
        benign,
        lambda drawn: build_owner_model(spec, world.dataset, device, drawn),
        checkpoint,
        on_phase,
    )
    return spec.watermark.embed(task, generator=generator_for("owner", spec.training_id), progress=progress)


def _false_trigger(embedding: Embedding) -> float | None:
    """How often near misses are answered as if they were triggers."""
    if embedding.near_misses is None or embedding.near_miss_labels is None:
        return None
    answers = predict_labels(embedding.model, embedding.near_misses)
    return float((answers == embedding.near_miss_labels).double().mean())


def _filtered(
    spec: OwnerModel,
    world: World,
    embedding: Embedding,
    benign: Classifier,
    device: torch.device,
    progress: Progress,
) -> KeySamples:
    """The key: the embedding's candidates after the two-stage filter."""
    rule = spec.key_filter
    assert rule is not None
    if rule.stages == "none":
        return rule.select(embedding.candidates, victim=embedding.model, surrogate=embedding.model, benign=benign)
    generator = generator_for("filter", spec.id)
    pool = world.pool(rule.pool, rule.queries, generator)
    surrogate = rule.surrogate(
        embedding.model,
        pool.take(torch.arange(len(pool))[: rule.queries]),
        lambda drawn: build_surrogate(rule.architecture or spec.architecture, world.dataset, device, drawn),
        generator=generator,
        progress=progress,
    )
    return rule.select(embedding.candidates, victim=embedding.model, surrogate=surrogate, benign=benign)


def steal(
    scenario: Scenario,
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
        listener = prefixed(progress, f"stage {number + 1}") if len(scenario.stages) > 1 else progress
        for count, spec in enumerate(stage.pools):
            allowance = oracle.remaining // (len(stage.pools) - count)
            stolen = stage.attack.extract(
                AllowanceOracle(oracle, allowance),
                surrogate,
                world.pool(spec, 1 if stage.attack.data_free else allowance, generator, triggers),
                generator=generator,
                progress=listener,
                checkpoint=checkpoint if single else NO_CHECKPOINT,
                snapshots=snapshots,
            )
            assert isinstance(stolen, Classifier)
            surrogate = stolen
        model = surrogate.eval()
    assert model is not None
    return model


@dataclass(frozen=True)
class Theft:
    """What an attacker brings home.

    Attributes:
        queries: victim images it asked and was answered, by its own count.
        transfer_sets: what each account asked and was answered, as a safetensors file, if that is kept.
        snapshots: the model at stages of the budget: number of queries, and model.
        detections: what each detector has found of each account.
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
    """Keeps the models of the stages of a budget."""

    at: tuple[int, ...]
    models: dict[int, Classifier] = field(default_factory=dict)

    def take(self, queries: int, model: nn.Module) -> None:
        """See :class:`simulator.attacks.base.Snapshots`."""
        assert isinstance(model, Classifier)
        self.models[queries] = copy.deepcopy(model).cpu().eval()


class AttackerCheckpoint:
    """An attacker's checkpoint: the attack's state together with its oracles' counters and its curve."""

    def __init__(self, inner: Checkpoint, oracles: Sequence[ServiceOracle], curve: Curve) -> None:
        self._inner, self._oracles, self._curve = inner, oracles, curve

    def load(self) -> State | None:
        """See :class:`Checkpoint`; sets the oracles and the curve back to where they were."""
        state = self._inner.load()
        if state is not None:
            for oracle, counters in zip(self._oracles, state.pop("oracles"), strict=True):
                oracle.restore(*counters)
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
        self._inner.save({**state, **models, "curve": list(self._curve.models), "oracles": counters})


def run_scenario(
    scenario: Scenario,
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

    With ``record``, the transfer sets are kept; with ``detectors``, each account is watched. What was asked before an
    attack went on from a checkpoint would be missing from both, so the checkpoint is left alone then: a theft that is
    started again begins anew, and pays nothing twice.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    if record or detectors:
        checkpoint = NO_CHECKPOINT
    oracles = [
        ServiceOracle(
            transport,
            account,
            tokens[account],
            labels=scenario.stages[0].labels,
            classes=world.dataset.classes,
            shape=world.shape,
            budget=budget,
            record=record,
            watched=watches(detectors),
        )
        for account, budget in scenario.accounts.items()
    ]
    oracle = oracles[0] if len(oracles) == 1 else SharedOracle(oracles)
    curve = Curve(scenario.stages[0].curve)
    keeper = AttackerCheckpoint(checkpoint, oracles, curve)
    model = steal(scenario, world, oracle, triggers, device, progress, keeper, curve)
    transfer_sets = {each.account: each.transfer_set() for each in oracles if each.asked} if record else {}
    queries = sum(each.asked for each in oracles)
    seconds = time.perf_counter() - clock
    found = tuple(detection for each in oracles for detection in each.detections())
    return Theft(model, queries, seconds, started, transfer_sets, tuple(sorted(curve.models.items())), found)
