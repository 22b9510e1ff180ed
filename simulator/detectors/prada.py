"""PRADA: Protecting against DNN Model Stealing Attacks (Juuti et al., EuroS&P 2019, arXiv 1805.02628).

The distance of an honest client's query to its earlier queries of the same class is about normally distributed; the
queries that an attack makes out of each other, or out of nothing, lie too near, too far, or in two crowds.

For each class c, by the label answered, a growing set G_c of the client's queries, the distances D_Gc with which they
entered it, and a threshold T_c, at first 0. A query x of class c has the L2 distance ``d(x) = min_{y in G_c} |x − y|``,
which joins D, the client's distances of all classes. If ``d(x) > T_c``, x joins G_c and d(x) joins D_Gc, and

    T_c = max(T_c, mean(D_Gc) − std(D_Gc))

(the first query of a class only opens G_c). Then D' are the distances of D within three standard deviations of its
mean, and with more than 100 of them the client is an attacker if the Shapiro-Wilk statistic W(D') is below δ.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from simulator.checkpoint import State
from simulator.detectors.base import Detector, Watch

#: queries worked through at once: more cost memory, fewer time
BLOCK = 512


class PRADA(Detector):
    """Alarms when a client's distances between queries are not normally distributed.

    Distances are in units of the pixel range, whose scale changes nothing: neither W nor the growth of the sets has a
    unit. Settings are those of the authors' public code, which tests at every tenth query (the paper's algorithm at
    each), leaves out classes with fewer than ten distances, and begins D_Gc with one 0 that stands for the first query.
    δ is the owner's to choose: as high as benign clients allow.

    The growing sets hold every query that entered, 8 bytes a value, until the client is noticed: then nothing more is
    looked at.
    """

    paper: ClassVar[str] = "Juuti et al., EuroS&P 2019"

    name: Literal["prada"] = "prada"
    delta: float = Field(0.95, gt=0, lt=1, description="δ: an alarm at W below it")
    start: int = Field(100, ge=3, description="distances, outliers removed, above which W is looked at")
    every: int = Field(10, ge=1, description="queries between two looks at W")
    outliers: float = Field(3.0, gt=0, description="standard deviations beyond which a distance is left out")
    class_least: int = Field(10, ge=1, description="distances of a class below which it is left out")

    def watch(self) -> Watch:
        """See :meth:`Detector.watch`."""
        return _Watch(self)


@dataclass
class _Class:
    """The growing set of one class. ``kept`` has room for more rows than the ``size`` that are in use."""

    kept: Tensor
    size: int = 1
    threshold: float = 0.0
    distances: int = 0
    # mean and sum of squared deviations of D_Gc, whose first entry is the first query's 0, as Welford updates them
    mean: float = 0.0
    squares: float = 0.0

    def add(self, row: Tensor, distance: float) -> None:
        """Grows by a row, and moves the threshold."""
        if self.size == len(self.kept):
            self.kept = torch.cat([self.kept, torch.empty_like(self.kept)])
        self.kept[self.size] = row
        self.size += 1
        before = distance - self.mean
        self.mean += before / self.size
        self.squares += before * (distance - self.mean)
        self.threshold = max(self.threshold, self.mean - math.sqrt(self.squares / self.size))


def packed(rows: Tensor) -> Tensor:
    """float64 rows in the smallest of uint8 (times 255), float32 and float64 that holds them to the bit."""
    for small in ((rows * 255).round().to(torch.uint8), rows.to(torch.float32)):
        if torch.equal(unpacked(small), rows):
            return small
    return rows


def unpacked(rows: Tensor) -> Tensor:
    """The rows that :func:`packed` was given, in memory of their own."""
    return rows.to(torch.float64) / 255 if rows.dtype == torch.uint8 else rows.to(torch.float64, copy=True)


class _Watch(Watch):
    """One client: its classes, and the distances D with the class of each."""

    def __init__(self, rule: PRADA) -> None:
        self._rule = rule
        self._classes: dict[int, _Class] = {}
        self._distances: list[float] = []
        self._of: list[int] = []

    def see(self, images: Tensor, labels: Tensor) -> None:
        """See :class:`Watch`."""
        for part, classes in zip(images.split(BLOCK), labels.split(BLOCK), strict=True):
            if self.detected_at is not None:
                self.queries += len(part)
                continue
            rows = part.detach().cpu().flatten(1).to(torch.float64)
            self._see(rows / 255 if part.dtype == torch.uint8 else rows, classes.tolist())

    def state(self) -> State:
        """See :class:`Watch`. The growing sets are most of it: a byte a value where uint8 images were asked."""
        sets = {f"set.{label}": packed(known.kept[: known.size]) for label, known in self._classes.items()}
        numbers = [
            [label, known.threshold, known.distances, known.mean, known.squares]
            for label, known in self._classes.items()
        ]
        of = torch.tensor(self._of, dtype=torch.int64)
        distances = torch.tensor(self._distances, dtype=torch.float64)
        return {**super().state(), **sets, "classes": numbers, "distances": distances, "of": of}

    def restore(self, state: State) -> None:
        """See :class:`Watch`."""
        super().restore(state)
        self._distances, self._of, self._classes = state["distances"].tolist(), state["of"].tolist(), {}
        for label, *numbers in state["classes"]:
            kept = unpacked(state[f"set.{label}"])
            self._classes[label] = _Class(kept, len(kept), *numbers)

    def _see(self, rows: Tensor, classes: list[int]) -> None:
        nearest = _Nearest(rows, classes, self._classes)
        for position, label in enumerate(classes):
            self.queries += 1
            if self.detected_at is None:  # else only counted
                self._one(rows[position], label, nearest, position)
                if self.queries % self._rule.every == 0:
                    self._test()
        if self.detected_at is not None:
            self._classes, self._distances, self._of = {}, [], []

    def _one(self, row: Tensor, label: int, nearest: _Nearest, position: int) -> None:
        known = self._classes.get(label)
        if known is None:
            self._classes[label] = _Class(row.clone()[None])
            nearest.entered(position)
            return
        distance = nearest.distance(position)
        known.distances += 1
        self._distances.append(distance)
        self._of.append(label)
        if distance > known.threshold:
            known.add(row, distance)
            nearest.entered(position)

    def _test(self) -> None:
        rule = self._rule
        if len(self._distances) <= rule.start:
            return
        few = [label for label, known in self._classes.items() if known.distances < rule.class_least]
        distances = np.array(self._distances)
        if few:
            distances = distances[~np.isin(self._of, few)]
        if len(distances) > rule.start:
            distances = within(distances, rule.outliers)
        if len(distances) <= rule.start:
            return
        statistic = normality(distances)
        if self.statistic is None or statistic < self.statistic:
            self.statistic = statistic
        if statistic < rule.delta:
            self.detected_at = self.queries


class _Nearest:
    """The distance of each row of a block to its class's growing set, while that grows by rows of the block.

    What is nearest in a set as it is before the block is found by one matrix product a class; the distance to it is
    then the root of the squared differences, so that a query asked twice has the distance 0, and one asked a thousandth
    away, as attacks that estimate slopes do, its own.
    """

    def __init__(self, rows: Tensor, classes: list[int], known: dict[int, _Class]) -> None:
        self._to_sets = np.full(len(rows), np.inf)
        self._among: dict[int, tuple[NDArray[np.float64], int]] = {}
        self._new: dict[int, list[int]] = {}
        labels = np.array(classes)
        self._class = classes
        for label in np.unique(labels).tolist():
            members = np.flatnonzero(labels == label)
            own = rows[torch.from_numpy(members)]
            if label in known:
                kept = known[label].kept[: known[label].size]
                nearest = kept[torch.cdist(own, kept, compute_mode="use_mm_for_euclid_dist").argmin(1)]
                self._to_sets[members] = (own - nearest).norm(dim=1).numpy()
            among = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").numpy()
            self._among |= {int(position): (among[number], number) for number, position in enumerate(members)}
            self._new[label] = []

    def entered(self, position: int) -> None:
        """Notes that the row has entered its class's set."""
        self._new[self._class[position]].append(self._among[position][1])

    def distance(self, position: int) -> float:
        """From the row to the nearest of its class's set."""
        among, _ = self._among[position]
        new = self._new[self._class[position]]
        return float(min(self._to_sets[position], among[new].min() if new else np.inf))


def within(values: NDArray[np.float64], deviations: float) -> NDArray[np.float64]:
    """The values within so many of their standard deviations of their mean."""
    # not below, as the authors' code has it: equal values, whose deviation is 0, would all be left out
    kept: NDArray[np.float64] = values[np.abs(values - values.mean()) <= deviations * values.std()]
    return kept


def normality(values: NDArray[np.float64]) -> float:
    """The Shapiro-Wilk statistic W, in (0, 1]: 1 for a perfect normal sample. Of equal values, or fewer than three, 0:
    no sample of a normal distribution has them."""
    from scipy.stats import shapiro

    if len(values) < 3 or values.min() == values.max():
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # above 5,000 values the p-value is inexact; W, which alone is used, is not
        return float(shapiro(values).statistic)
