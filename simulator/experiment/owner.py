"""The owner's side: trains the benign model and the marked victims, and chooses the keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from simulator.analysis.agreement import accuracy
from simulator.checkpoint import NO_CHECKPOINT, Checkpoint
from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.experiment.theft import build_surrogate
from simulator.experiment.world import World
from simulator.models import Classifier, build
from simulator.ownership.key import KeySamples
from simulator.plan.subjects import Marked, OwnerModel
from simulator.progress import Progress, silent
from simulator.seeding import generator_for
from simulator.training.fit import fit
from simulator.training.predict import predict_labels
from simulator.watermarks.base import Embedding, OwnerTask, PhaseListener, unheard


@dataclass(frozen=True)
class TrainedOwner:
    """An owner's model with all that belongs to it.

    Attributes:
        key: the filtered key; None for the benign model.
        triggers: a sample of the triggers trained on, for pools that ask for some.
        false_trigger: the rate at which near misses get the watermark's label, in [0, 1].
        seconds: training time, key and filter included.
        candidates: the samples that the key was filtered from; None without a filter.
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
    if not isinstance(spec, Marked):
        generator = generator_for("owner", spec.training_id)
        model = build_owner_model(spec, dataset, device, generator)
        fit(
            model,
            dataset.owner.images,
            dataset.owner.labels,
            spec.training,
            Context(generator, progress, checkpoint),
        )
        return TrainedOwner(model, None, None, None, time.perf_counter() - clock, started)
    assert benign is not None
    embedding = _embed(spec, world, benign, device, progress, checkpoint)
    if not spec.watermark.marks:
        return TrainedOwner(embedding.model, None, None, None, time.perf_counter() - clock, started)
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
    """A marked victim between two phases of its training: test accuracy, and WSR on key candidates, in [0, 1]."""

    accuracy: float
    wsr: float
    seconds: float


class _PhaseOver(Exception):
    """Raised by the phase listener to stop training once the phase has been measured."""


def train_phase(
    spec: Marked,
    world: World,
    benign: Classifier,
    until: str,
    device: torch.device,
    progress: Progress = silent,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> HalfTrained:
    """Trains a marked victim to the end of one of its scheme's :meth:`~Watermark.phases` and measures it.

    :func:`train_owner` with the same checkpoint continues from there, and gives the same model as without the stop.
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
    spec: Marked,
    world: World,
    benign: Classifier,
    device: torch.device,
    progress: Progress,
    checkpoint: Checkpoint,
    on_phase: PhaseListener = unheard,
) -> Embedding:
    """The marked victim and its key candidates."""
    benign.to(device)
    task = OwnerTask(
        world.dataset,
        spec.training,
        benign,
        lambda drawn: build_owner_model(spec, world.dataset, device, drawn),
        on_phase,
    )
    return spec.watermark.embed(task, Context(generator_for("owner", spec.training_id), progress, checkpoint))


def _false_trigger(embedding: Embedding) -> float | None:
    """The rate, in [0, 1], at which near misses get the watermark's label; None if there are no near misses."""
    if embedding.near_misses is None or embedding.near_miss_labels is None:
        return None
    answers = predict_labels(embedding.model, embedding.near_misses)
    return float((answers == embedding.near_miss_labels).double().mean())


def _filtered(
    spec: Marked,
    world: World,
    embedding: Embedding,
    benign: Classifier,
    device: torch.device,
    progress: Progress,
) -> KeySamples:
    """The key: the embedding's candidates after the two-stage filter."""
    rule = spec.key_filter
    if rule.stages == "none":
        return rule.select(embedding.candidates, victim=embedding.model, surrogate=embedding.model, benign=benign)
    generator = generator_for("filter", spec.id)
    pool = world.pool(rule.pool, rule.queries, generator)
    surrogate = rule.surrogate(
        embedding.model,
        pool.take(torch.arange(len(pool))[: rule.queries]),
        lambda drawn: build_surrogate(rule.architecture or spec.architecture, world.dataset, device, drawn),
        Context(generator, progress),
    )
    return rule.select(embedding.candidates, victim=embedding.model, surrogate=surrogate, benign=benign)
