"""What the coupling loss adds to a training step: DeepTracer with it and without it, and training with no watermark.

Whole steps of :func:`~simulator.training.fit.fit` are timed (draw the mosaics, forward, loss, backward, Adam), in turns
of a few dozen, all sides in every round. Training is one thread, and its CPU time is taken, so that other work on the
machine counts as little as can be.
"""

from __future__ import annotations

import time
from typing import get_args

import torch

from benchmarks.measure import Line, Outcome, Spread, Target
from simulator.context import Context
from simulator.data.dataset import Images
from simulator.models import Classifier, build
from simulator.training.fit import fit
from simulator.training.predict import use_one_thread
from simulator.training.recipe import Objective, Recipe
from simulator.watermarks.deeptracer import Coupling, DeepTracer
from simulator.watermarks.parts.coupling import CentroidRule, Centroids
from simulator.watermarks.parts.diagnostics import Course
from simulator.watermarks.parts.mosaic import Mosaics

#: of a step with the coupling loss against one of the same watermark without it
TARGET = Target("at most", 1.15)
BATCH, RATIO, CLASSES, LABEL = 64, 0.1, 10, 5
PLAIN, WITHOUT = "no watermark", "watermark, coupling_weight 0"


class Side:
    """One way of training, with a model of its own that goes on learning from turn to turn."""

    def __init__(self, data: Images, scheme: DeepTracer | None) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(0)
        self._model: Classifier = build("naivenet", channels=1, size=28, classes=CLASSES, generator=self._generator)
        self._companions: dict[str, torch.nn.Module] = {}
        self._objective: Objective | None = None  # the recipe's
        if scheme is not None:
            centroids = Centroids(scheme.centroid, CLASSES, scheme.centroid_momentum)
            mosaics = Mosaics(data, range(scheme.source_classes))
            coupling = Coupling(1.0, centroids, Course(2))
            self._objective = scheme.objective(mosaics, LABEL, RATIO, coupling, self._generator)
            self._companions = {"centroids": centroids}

    def turn(self) -> float:
        """CPU milliseconds a step."""
        recipe = Recipe(epochs=1, batch_size=BATCH)
        images, labels = self._data.images, self._data.labels
        start = time.thread_time()
        fit(
            self._model,
            images,
            labels,
            recipe,
            Context(self._generator),
            objective=self._objective,
            companions=self._companions,
        )
        return 1e3 * (time.thread_time() - start) / (len(images) // BATCH)


def run(rounds: int = 20, steps: int = 20) -> Outcome:
    """Alternates the sides.

    Args:
        rounds: how often.
        steps: of each side in a round.
    """
    use_one_thread()
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (BATCH * steps, 1, 28, 28), dtype=torch.uint8, generator=drawn)
    data = Images(pixels, torch.arange(len(pixels)) % CLASSES)
    default = DeepTracer().centroid
    rules: dict[str, CentroidRule] = {f"with it, {rule} centroids": rule for rule in get_args(CentroidRule)}
    sides = {PLAIN: Side(data, None), WITHOUT: Side(data, DeepTracer(coupling_weight=0.0))}
    sides |= {name: Side(data, DeepTracer(centroid=rule)) for name, rule in rules.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        # every other round runs backwards, so that no side always follows the same one
        for name in list(sides)[:: 1 if number % 2 else -1]:
            elapsed = sides[name].turn()
            if number:  # the first round warms up
                times[name].append(elapsed)
    lines = []
    for name, measured in times.items():
        ratios = [one / base for one, base in zip(measured, times[WITHOUT], strict=True)]
        target = TARGET if rules.get(name) == default else None
        lines.append(Line(name, Spread.of(measured), None if name == WITHOUT else Spread.of(ratios), target))
    return Outcome(
        title=f"Coupling loss: naivenet 28x28, batch {BATCH}, watermark ratio {RATIO:g}",
        unit="CPU ms a step",
        rounds=rounds,
        lines=tuple(lines),
        note=f"Whole training steps, {steps} in a turn, one thread.",
    )
