"""The plots of a sweep: what survival costs (Pareto front), where in the space it is high (map), and which settings
decide it.

They are drawn like a run's plots: without global state, so the same trials give the same SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from simulator.report.plots import COLOURS, GRID, INK, MARKERS, STYLE, svg_of
from tuning.importance import Importance
from tuning.records import TrialRecord
from tuning.space import Axis, Setting

#: how many numeric dimensions the map pairs with each other
DIMENSIONS = 3
DONE, WINNER, DEFAULT = COLOURS[0], COLOURS[1], COLOURS[2]


def front(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that no other beats in both accuracy drop (less) and worst WSR (more), ordered by drop."""
    best: list[TrialRecord] = []
    for one in sorted((one for one in records if one.done), key=lambda one: (one.drop, -_rate(one), one.number)):
        if not best or _rate(one) > _rate(best[-1]):
            best.append(one)
    return best


def pareto(records: Sequence[TrialRecord], max_drop: float, winner: Setting, default: Setting) -> str:
    """Accuracy drop against worst stolen WSR, each trial with the range over its seeds; SVG.

    A trial that was stopped after some of its attacks stands at the worst WSR of those. The others could only lower it.
    """
    with _styled():
        figure = Figure(figsize=(8.6, 4.6))
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.axvline(100 * max_drop, color=INK, linestyle="--", linewidth=1)
        text = f"allowed drop {100 * max_drop:g}"
        axes.text(100 * max_drop, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        for one in (one for one in records if one.worst_wsr is not None):
            assert one.drop is not None
            drops = [100 * seed.drop for seed in one.found]
            rates = [100 * min(copy.wsr for copy in seed.stolen) for seed in one.found]
            x, y = 100 * one.drop, 100 * _rate(one)
            colour, marker, size = _look(one, winner, default)
            axes.errorbar(
                [x],
                [y],
                xerr=[[x - min(drops)], [max(drops) - x]],
                yerr=[[y - min(rates)], [max(rates) - y]],
                fmt="none",
                ecolor=colour if one.done else GRID,
                elinewidth=0.8,
                alpha=0.35,
            )
            face = colour if one.done else "none"
            axes.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=size, zorder=3)
        line = front(records)
        if line:
            steps = [(100 * (one.drop or 0), 100 * _rate(one)) for one in line]
            axes.step(*zip(*steps, strict=True), where="post", color=DONE, linewidth=1.2, zorder=2)
        axes.set(xlabel="accuracy drop against the benign model, points", ylabel="worst stolen WSR, %", ylim=(-4, 104))
        figure.legend(handles=_legend(front=True), loc="outside right upper")
        return svg_of(figure)


def setting_map(
    records: Sequence[TrialRecord], space: Mapping[str, Axis], winner: Setting, default: Setting
) -> str | None:
    """Where in the space the worst stolen WSR is high, with a panel for each pair of the first three numeric
    dimensions. SVG; None if fewer than two are searched."""
    numeric = [path for path, axis in space.items() if axis.numeric][:DIMENSIONS]
    pairs = list(itertools.combinations(numeric, 2))
    if not pairs:
        return None
    kinds = next((path for path, axis in space.items() if not axis.numeric), None)
    markers = dict(zip(map(str, space[kinds].arguments), MARKERS, strict=False)) if kinds else {}
    with _styled():
        figure = Figure(figsize=(1.9 + 4.1 * len(pairs), 4.3))
        figure.set_layout_engine("constrained")
        for axes, (first, second) in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
            for one in records:
                x, y = float(one.setting[first]), float(one.setting[second])
                marker = markers.get(str(one.setting[kinds]), "o") if kinds else "o"
                if one.done:
                    points = axes.scatter(
                        [x], [y], c=[100 * _rate(one)], vmin=0, vmax=100, cmap="viridis", marker=marker, s=70, zorder=3
                    )
                else:
                    axes.scatter([x], [y], facecolors="none", edgecolors=GRID, marker=marker, s=28)
                for setting, colour in ((default, DEFAULT), (winner, WINNER)):
                    if one.setting == setting:
                        axes.scatter([x], [y], facecolors="none", edgecolors=colour, s=230, linewidths=1.8, zorder=4)
            for path, name in ((first, "x"), (second, "y")):
                _scale(axes, name, space[path], path)
        done = [one for one in records if one.done]
        if done:
            figure.colorbar(points, ax=figure.axes, label="worst stolen WSR, %", pad=0.01)
        handles = [_handle(INK, marker, name) for name, marker in markers.items()]
        handles += [_handle(GRID, "o", "stopped early", hollow=True), _handle(WINNER, "o", "ring: winner", hollow=True)]
        handles.append(_handle(DEFAULT, "o", "ring: default", hollow=True))
        figure.legend(handles=handles, loc="outside lower center", ncols=3 * len(pairs), fontsize=8)
        return svg_of(figure)


def importance_bars(found: Sequence[Importance]) -> str | None:
    """How much worse a forest predicts an outcome when one setting is shuffled. SVG; None if ``found`` is empty."""
    if not found:
        return None
    with _styled():
        figure = Figure(figsize=(9.6, 1.4 + 0.42 * len(found[0].paths)))
        figure.set_layout_engine("constrained")
        for axes, one in zip(figure.subplots(1, len(found), squeeze=False, sharey=True).flat, found, strict=True):
            order = list(reversed(range(len(one.paths))))
            names = [one.paths[at].rpartition(".")[2].replace("_", " ") for at in order]
            means = [one.means[at] for at in order]
            axes.barh(names, means, xerr=[one.deviations[at] for at in order], color=DONE, ecolor=GRID)
            axes.set(title=f"{one.outcome} ({one.trials} trials)", xlabel="loss of R² when it is shuffled")
            axes.grid(axis="y", visible=False)
        return svg_of(figure)


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.style.context(["default", STYLE]):
        yield


def _rate(one: TrialRecord) -> float:
    assert one.worst_wsr is not None
    return one.worst_wsr


def _look(one: TrialRecord, winner: Setting, default: Setting) -> tuple[str, str, float]:
    if one.setting == winner:
        return WINNER, "*", 15
    if one.setting == default:
        return DEFAULT, "D", 9
    return (DONE, "o", 7) if one.done else (GRID, "v", 6)


def _scale(axes: Axes, name: str, axis: Axis, path: str) -> None:
    """Sets up a dimension's axis with plain numbers. It is logarithmic if its domain is."""
    label = path.rpartition(".")[2].replace("_", " ")
    which: Any = axes.xaxis if name == "x" else axes.yaxis
    if axis.logarithmic:
        axes.set_xscale("log") if name == "x" else axes.set_yscale("log")
        low, high = (float(value) for value in axis.arguments[:2])
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digit in (1, 2, 5)
            if 0.99 * low <= digit * 10.0**power <= 1.01 * high
        ]
        which.set_ticks(ticks)
        which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        which.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label) if name == "x" else axes.set_ylabel(label)


def _legend(*, front: bool) -> list[Line2D]:
    handles = [
        _handle(WINNER, "*", "winner"),
        _handle(DEFAULT, "D", "default setting"),
        _handle(DONE, "o", "all attacks measured"),
        _handle(GRID, "v", "stopped early:\nat most this", hollow=True),
    ]
    return [*handles, Line2D([], [], color=DONE, label="Pareto front")] if front else handles


def _handle(colour: str, marker: str, label: str, *, hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    size = 11 if marker == "*" else 7
    return Line2D([], [], color=colour, marker=marker, markersize=size, markerfacecolor=face, linestyle="", label=label)
