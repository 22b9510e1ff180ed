"""What a plan will cost, before it runs: images trained on and answered, time, and memory.

The model of the cost:

- A training step on an image costs as much as three forward passes: one forward, two backward. Answering and measuring
  cost one. Image passes are counted by architecture.
- Seconds for one image are measured on this machine (:func:`calibrate`), about a second for each architecture, on one
  thread, as an actor computes. Operations are counted by torch's own counter on tensors without data.
- Not counted: starting processes, reading data, making pools and triggers, an attack's own search (k-center, a bandit's
  policy), the generator of a data-free attack, and the way of a query through the service. docs/cluster.md compares
  estimates with runs.

Each component says how many images it trains on: see ``Watermark.passes`` and ``Attack.trained_images``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from simulator.data.dataset import Outline
from simulator.models import build
from simulator.models.classifier import parameter_count
from simulator.plan.config import RunConfig, StageConfig
from simulator.plan.subjects import POOL, Marked, OwnerModel, Removed, Stolen
from simulator.plan.tree import Plan
from simulator.training.predict import predict, to_input
from simulator.training.recipe import Recipe, cross_entropy

#: operations of a training step over those of a forward pass
BACKWARD = 3
#: bytes a parameter takes in training: itself, its gradient, and an optimiser's two moments
TRAINED = 16
#: resident bytes of a process with torch and Ray in it before it computes anything, measured
PROCESS = 750 << 20
#: operations a second that a GPU is assumed to sustain on small images; not measured, its peak is many times that
GPU_RATE = 1e12
#: seconds of measuring for each architecture
CALIBRATION_PATIENCE = 0.4
#: most operations of a measured step, about half a second of a core; a step has two images in any case
STEP = 10**10
#: most images of a measured step
IMAGES = 256


@dataclass
class Work:
    """Image passes by architecture: trained (forward and backward) and answered (forward)."""

    trained: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)

    def add(self, other: Work) -> None:
        """Adds another's work to this."""
        self.trained.update(other.trained)
        self.answered.update(other.answered)

    @property
    def architectures(self) -> set[str]:
        """Every architecture that has work."""
        return set(self.trained) | set(self.answered)


@dataclass(frozen=True)
class Speed:
    """The speed of one architecture: seconds to train on one image, seconds to answer one, operations of a forward
    pass."""

    train: float
    answer: float
    operations: int

    def seconds(self, name: str, work: Work) -> float:
        """Seconds that this architecture's part of the work takes on one thread."""
        return self.train * work.trained[name] + self.answer * work.answered[name]


@dataclass(frozen=True)
class Estimate:
    """What a run costs.

    Attributes:
        owners, thefts: seconds on one thread of each owner's model, and of each theft and removal, in the plan's order.
        serving, measuring: seconds on one thread of all answers of the victims, and of all measuring.
        memory: bytes of an actor that trains, by architecture.
        queries: victim images at most.
        trained: images that are trained on, counted once an epoch.
        operations: floating-point operations, all together.
    """

    owners: tuple[float, ...]
    thefts: tuple[float, ...]
    serving: float
    measuring: float
    memory: dict[str, int]
    queries: int
    trained: int
    operations: float

    @property
    def seconds(self) -> float:
        """Seconds of everything on one thread."""
        return sum(self.owners) + sum(self.thefts) + self.serving + self.measuring

    def wall(self, attackers: int, trainers: int, replicas: int, collectors: int, threads: float) -> float:
        """The least wall-clock seconds with so many actors at once on so many threads.

        The owner's models come first. Then the thefts are shared out evenly among the attackers, but take no less than
        the longest theft. Serving and measuring go on meanwhile.
        """

        def shared(parts: Iterable[float], workers: int) -> float:
            found = list(parts)
            return max(sum(found) / workers, max(found, default=0.0))

        thefts = max(shared(self.thefts, attackers), self.serving / replicas, self.measuring / collectors)
        return max(shared(self.owners, trainers) + thefts, self.seconds / max(threads, 1))

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        parts = {"owner": self.owners, "thefts": self.thefts, "serving": [self.serving], "measuring": [self.measuring]}
        shares = ", ".join(f"{name} {span(sum(seconds))}" for name, seconds in parts.items())
        gpu = self.operations / (GPU_RATE * 3600)
        each = ", ".join(f"{name} {size / 2**30:.1f} GB" for name, size in self.memory.items())
        return [
            f"estimate: {self.trained:,} images trained on (once an epoch), {self.operations / 1e12:.3g} Tflop",
            f"time: {self.seconds / 3600:.3g} CPU-hours of this machine ({shares}); or about {gpu:.2g} GPU-hours at an "
            f"assumed {GPU_RATE / 1e12:g} Tflop/s",
            f"memory of an actor that trains: {each}",
        ]


def span(seconds: float) -> str:
    """Seconds as text: ``7 s``, ``12 min``, ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def estimate(config: RunConfig, plan: Plan, data: Outline, speeds: dict[str, Speed]) -> Estimate:
    """The estimate of a plan, with the speeds of all architectures that :func:`architectures` names."""
    owners = [owner_work(spec, data) for spec in plan.owners]
    thefts = [theft_work(scenario, data) for scenario in plan.scenarios]
    serving, measuring = Work(), Work()
    for scenario in plan.scenarios:
        serving.answered[scenario.victim.architecture] += scenario.budget
        last = scenario.stages[-1].architecture or scenario.victim.architecture
        points = 1 + len(scenario.stages[0].curve)
        measuring.answered[last] += points * len(plan.keys_for(scenario)) * (data.test + config.key_filter.keep)
    for copy in plan.after:
        measuring.answered[copy.architecture] += len(plan.keys_for(copy)) * (data.test + config.key_filter.keep)
    for spec in plan.victims:
        measuring.answered[spec.architecture] += 2 * (data.test + config.key_filter.keep)
    total = Work()
    removals = [removal_work(removed, data) for removed in plan.removals]
    for part in (*owners, *thefts, *removals, serving, measuring):
        total.add(part)

    def seconds(work: Work) -> float:
        return sum(speeds[name].seconds(name, work) for name in work.architectures)

    operations = sum(
        speeds[name].operations * (BACKWARD * total.trained[name] + total.answered[name])
        for name in total.architectures
    )
    batch = max([config.training.batch_size, *(_recipe(stage).batch_size for stage in _stages(plan))])
    return Estimate(
        owners=tuple(seconds(work) for work in owners),
        thefts=tuple(seconds(work) for work in (*thefts, *removals)),
        serving=seconds(serving),
        measuring=seconds(measuring),
        memory={name: memory(name, data, batch) for name in sorted(total.trained)},
        queries=sum(scenario.budget for scenario in plan.scenarios),
        trained=sum(total.trained.values()),
        operations=float(operations),
    )


def architectures(plan: Plan) -> list[str]:
    """Every architecture of a plan."""
    owners = {spec.architecture for spec in plan.benigns}
    filters = {spec.key_filter.architecture for spec in plan.victims}
    thieves = {stage.architecture for stage in _stages(plan)}
    washed = {removed.architecture for removed in plan.removals}
    return sorted(name for name in owners | filters | thieves | washed if name)


def _stages(plan: Plan) -> list[StageConfig]:
    return [stage for scenario in plan.scenarios for stage in scenario.stages]


def owner_work(spec: OwnerModel, data: Outline) -> Work:
    """The work of training one of the owner's models, and of its key filter."""
    work = Work()
    if not isinstance(spec, Marked):
        work.trained[spec.architecture] += data.owner * spec.training.epochs
        return work
    work.trained[spec.architecture] += round(data.owner * spec.watermark.passes(spec.training))
    rule = spec.key_filter
    if rule.stages != "none":
        work.trained[rule.architecture or spec.architecture] += rule.queries * rule.training.epochs
        work.answered[spec.architecture] += rule.queries
    return work


def theft_work(scenario: Stolen, data: Outline) -> Work:
    """The work of all stages of a theft. Answers of stolen models are in it; those of the victim to the first stage are
    not."""
    work, before = Work(), ""
    pools = {"attacker": data.attacker, "owner": data.owner, **data.foreign}
    for number, stage in enumerate(scenario.stages):
        name = stage.architecture or scenario.victim.architecture
        if number:
            work.answered[before] += stage.budget
        # a part of unknown size counts as many images as are asked
        pool = sum(pools.get(part, stage.budget) for spec in stage.pools for part in spec.parts)
        work.trained[name] += stage.attack.trained_images(stage.budget, pool, stage.curve, stage.labels)
        before = name
    return work


def removal_work(removed: Removed, data: Outline) -> Work:
    """The work of a removal."""
    work = Work()
    pools = {"attacker": data.attacker, "owner": data.owner, **data.foreign}
    images = 0
    if removed.pool is not None:
        images = sum(pools.get(part, POOL) for part in removed.pool.parts)
        images = min(images, removed.pool.size or images)
    elif removed.theft is not None and "transfer" in removed.removal.needs:
        images = removed.theft.budget
    work.trained[removed.architecture] += round(removed.removal.passes(images))
    return work


def _recipe(stage: StageConfig) -> Recipe:
    found = getattr(stage.attack, "training", None)
    return found if isinstance(found, Recipe) else Recipe()


def operations(name: str, data: Outline) -> int:
    """Floating-point operations of one image's forward pass: 2 for each multiplication and addition."""
    with torch.device("meta"):
        model = build(name, channels=data.channels, size=data.size, classes=data.classes).eval()
        images = torch.empty(1, data.channels, data.size, data.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(images)
    return int(counter.get_total_flops())


def memory(name: str, data: Outline, batch: int) -> int:
    """Bytes of a process that trains this architecture: torch itself, the parameters with their optimiser, and the
    outputs of all layers of a batch, once for the forward and once for the backward pass."""
    with torch.device("meta"):
        model = build(name, channels=data.channels, size=data.size, classes=data.classes).to("meta").eval()
        images = torch.empty(1, data.channels, data.size, data.size)
    outputs: list[int] = []
    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda _, __, output: outputs.append(4 * output.numel()))
    with torch.no_grad():
        model(images)
    return PROCESS + TRAINED * parameter_count(model) + 2 * batch * sum(outputs)


def calibrate(name: str, data: Outline, batch: int, patience: float = CALIBRATION_PATIENCE) -> Speed:
    """Measures one architecture on this machine, on as many threads as torch has now.

    CPU time of this process is measured, so other work on the machine does not count. A batch is cut to what takes a
    moment: for nets with many operations an image, its size hardly changes the time of one.
    """
    passes = operations(name, data)
    batch = max(2, min(batch, IMAGES, STEP // (BACKWARD * max(1, passes))))  # normalisation needs two
    model = build(name, channels=data.channels, size=data.size, classes=data.classes)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, data.channels, data.size, data.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(batch) % data.classes
    optimizer = Recipe().build(model.parameters())
    device = torch.device("cpu")

    def step() -> None:
        loss = cross_entropy(model, to_input(images, device), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.random.fork_rng():
        train = _fastest(step, patience) / batch
        answer = _fastest(lambda: predict(model, images), patience / 2) / batch
    return Speed(train, answer, passes)


def _fastest(step: object, patience: float) -> float:
    """Median of the CPU seconds of a step, over as many steps as ``patience`` seconds allow. The first step warms up,
    and counts only if there is no time for another."""
    assert callable(step)
    found: list[float] = []
    until = time.process_time() + patience
    while not found or (len(found) < 50 and time.process_time() < until):
        clock = time.process_time()
        step()
        found.append(time.process_time() - clock)
    later = sorted(found[1:] or found)
    return later[len(later) // 2]
