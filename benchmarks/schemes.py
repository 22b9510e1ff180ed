"""What marking a model costs: each scheme's whole training against plain training of the same recipe.

The schemes and their settings are a preset's; each embeds its watermark once a round, key candidates included, and the
key filter left out, which costs the same for all. Plain training stands at both ends of a round, and the ratio is to
their mean. One thread, whose CPU time is taken. ``python -m benchmarks.schemes [PRESET] [ROUNDS]`` asks another preset,
such as ``schemes-fashion-mnist`` (its data must be there).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from benchmarks.measure import Line, Outcome, Spread, machine
from simulator.context import Context
from simulator.experiment.owner import build_owner_model
from simulator.experiment.preflight import prepare
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.config import read_config
from simulator.plan.subjects import Marked, Trained
from simulator.seeding import generator_for
from simulator.training.fit import fit
from simulator.training.predict import use_one_thread
from simulator.watermarks.base import OwnerTask

PLAIN = "no watermark"
DEVICE = torch.device("cpu")


def plain(spec: Trained, world: World, number: int) -> tuple[Classifier, float]:
    """A benign model, and the CPU seconds of its training."""
    start = time.thread_time()
    generator = generator_for("benchmark", PLAIN, number)
    model = build_owner_model(spec, world.dataset, DEVICE, generator)
    fit(model, world.dataset.owner.images, world.dataset.owner.labels, spec.training, Context(generator))
    return model, time.thread_time() - start


def marked(spec: Marked, world: World, benign: Classifier, number: int) -> float:
    """The CPU seconds of a scheme's embedding."""
    start = time.thread_time()
    task = OwnerTask(
        world.dataset, spec.training, benign, lambda drawn: build_owner_model(spec, world.dataset, DEVICE, drawn)
    )
    spec.watermark.embed(task, Context(generator_for("benchmark", spec.id, number)))
    return time.thread_time() - start


def run(preset: str = "schemes", rounds: int = 3, overrides: Sequence[str] = ()) -> Outcome:
    """Embeds every scheme of a preset in turn, ``rounds`` times.

    Args:
        preset: a preset's name, or a file.
        overrides: of its settings, as after ``--set``.
    """
    use_one_thread()
    config = read_config(preset, [*overrides, "seeds=[0]", "scenarios=[]"])
    plan, world = prepare(config, None)
    (spec,) = plan.benigns
    times: dict[str, list[float]] = {PLAIN: []}
    ratios: dict[str, list[float]] = {}
    benign, _ = plain(spec, world, 0)  # warms up
    for number in range(rounds):
        benign, before = plain(spec, world, number)
        found = {}
        # every other round runs backwards, so that no scheme always follows the same one
        for victim in plan.victims[:: -1 if number % 2 else 1]:
            found[_name(victim, plan.victims)] = marked(victim, world, benign, number)
        _, after = plain(spec, world, number)
        times[PLAIN].append((before + after) / 2)
        for name, seconds in found.items():
            times.setdefault(name, []).append(seconds)
            ratios.setdefault(name, []).append(seconds / times[PLAIN][-1])
    order = [PLAIN, *(_name(victim, plan.victims) for victim in plan.victims)]
    lines = [Line(name, Spread.of(times[name]), Spread.of(ratios[name]) if name in ratios else None) for name in order]
    return Outcome(
        title=f"Watermark schemes: {config.name}, {config.architecture}, {len(world.dataset.owner)} images",
        unit="CPU s",
        rounds=rounds,
        lines=tuple(lines),
        note="Whole trainings without the key filter, one thread.",
    )


def _name(victim: Marked, every: Sequence[Marked]) -> str:
    """The scheme's name, with a number where it stands there several times."""
    name = victim.watermark.name
    alike = [other.id for other in every if other.watermark.name == name]
    return name if len(alike) == 1 else f"{name} {alike.index(victim.id) + 1}"


if __name__ == "__main__":
    console = Console()
    console.print(machine(), highlight=False)
    preset, rounds = [*sys.argv[1:], "schemes", "3"][:2] if len(sys.argv) != 2 else [sys.argv[1], "3"]
    console.print(run(preset, int(rounds)).table())
