"""What an attacker can infer of the source classes without asking mosaics: two attempts of DeepTracer's appendix.

*Prediction distribution* (Yang et al., AAAI 2026, Fig. 14). The attacker compares what a marked and an unmarked model
answer to clean images of the source classes: are mistakes of the marked one drawn to the target? The paper shows two
histograms and calls them nearly identical. Here, with e(l) the share of source images that a model takes for a class l
which is not their own,

    excess(l) = e_marked(l) - mean over unmarked models of e(l),

and the attacker names the label of the largest excess. How far e varies between unmarked models says whether that means
anything.

*Selection strategy* (Table 15). The attacker runs the owner's own choice of sources on the stolen model, with images of
its own, labelled as that model labels them, and hopes to hit the same classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.models import Classifier
from simulator.training.predict import predict_labels
from simulator.watermarks.parts.selection import adaptive_sources


@dataclass(frozen=True)
class Excess:
    """One label of the prediction distribution.

    Attributes:
        label: the label.
        marked: the share of source images that the marked model takes for it, in [0, 1].
        unmarked: the mean of that share over the unmarked models.
        spread: its standard deviation over the unmarked models; None with fewer than two.
    """

    label: int
    marked: float
    unmarked: float
    spread: float | None

    @property
    def excess(self) -> float:
        """By how much the marked model's share is larger."""
        return self.marked - self.unmarked


def predictions(model: Classifier, data: Images, classes: int) -> Tensor:
    """How many images of each class get each label, ``(K, K)`` int64: rows are true classes, columns answers."""
    pairs = data.labels * classes + predict_labels(model, data.images)
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def prediction_distribution(marked: Tensor, unmarked: Sequence[Tensor], sources: Sequence[int]) -> list[Excess]:
    """The table of Fig. 14, the largest excess first: its label is what the attacker names as the target.

    Args:
        marked: the :func:`predictions` of the marked model.
        unmarked: those of unmarked models, at least one.
        sources: the classes whose images the attacker has.
    """
    shares = [_mistakes(counts, sources) for counts in (marked, *unmarked)]
    table = []
    for label in range(len(marked)):
        own, *others = (float(share[label]) for share in shares)
        spread = statistics.stdev(others) if len(others) > 1 else None
        table.append(Excess(label, own, statistics.fmean(others), spread))
    return sorted(table, key=lambda row: -row.excess)


def _mistakes(counts: Tensor, sources: Sequence[int]) -> Tensor:
    """The share of images of the sources that get each label which is not their own, ``(K,)`` float64."""
    rows = counts[list(sources)].double()
    wrong = rows.clone()
    wrong[torch.arange(len(rows)), list(sources)] = 0
    return wrong.sum(0) / rows.sum()


@dataclass(frozen=True)
class Selection:
    """What the owner's choice of sources gives with another model or other images.

    Attributes:
        data: whose images.
        found: the classes that are chosen, ascending.
        hits: how many of them are source classes.
        exact: whether all are.
    """

    data: str
    found: tuple[int, ...]
    hits: int
    exact: bool


def infer_sources(
    model: Classifier, data: str, images: Tensor, sources: Sequence[int], generator: torch.Generator
) -> Selection:
    """Runs the choice of sources on a model, with images that have the labels it gives them.

    Args:
        data: a name for the images.
        images: ``(N, C, H, W)``, as the model takes them.
        sources: the owner's.
    """
    held = Images(images, predict_labels(model, images))
    found = adaptive_sources(model, held, model.spec.classes, len(sources), generator)
    hits = len({*found} & {*sources})
    return Selection(data, found, hits, hits == len(sources))
