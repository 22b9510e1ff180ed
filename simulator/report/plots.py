"""The plots of a report: WSR against accuracy, after removals too, and both against the query budget.

They use :class:`matplotlib.figure.Figure` alone: no pyplot, no global state, no display. The same rows give the same
SVG, byte for byte. A marker's colour and shape show the attack. A hollow marker is a control.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulator.records.rows import Row
from simulator.report.lines import Labels, Line, is_control, stat, thresholds
from simulator.report.removals import Outcome

#: Okabe and Ito's palette for the colour-blind, without yellow and black, which vanish on light or dark
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">")
INK, PAPER, GRID = "#1f2328", "#ffffff", "#8b949e"
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "text.parse_math": False},
    **{"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK},
    **{"figure.facecolor": PAPER, "axes.facecolor": PAPER, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": GRID, "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "exsim"},
}
#: most points of WSR by which a control is moved
JITTER = 1.5
#: points of accuracy that a removal may cost and still be shown where it lies
DEAREST = 30
_BARE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def wsr_vs_accuracy(found: Sequence[Line]) -> str:
    """An SVG with a panel for each watermark and a point, with the Wilson interval of its WSR, for each measured model.

    Controls often share a WSR of 0, so each is moved up or down by at most :data:`JITTER`, always by the same amount.
    A WSR that is by construction has no interval.
    """
    labels = Labels(found)
    rows = [row for row in _rows(found) if row.accuracy is not None and row.wsr is not None]
    panels = _panels(rows, labels)
    looks = _looks(sorted({_attack(row) for row in rows if row.role not in ("benign", "victim")}))
    with matplotlib.style.context(["default", STYLE]):
        columns = min(3, max(1, len(panels)))
        down = -(-len(panels) // columns) or 1
        width = {1: 6.7, 2: 4.4, 3: 3.3}[columns]
        figure = Figure(figsize=(1.9 + width * columns, 4.6 if down == 1 else 3.4 * down))
        figure.set_layout_engine("constrained")
        grid = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
        for at, axes in enumerate(grid.flat):
            axes.set_visible(at < len(panels))
        for axes, (title, members) in zip(grid.flat, panels.items(), strict=False):
            axes.set(title=title, ylim=(-4, 104))
            _thresholds(axes, members)
            for row in members:
                _point(axes, row, looks)
        for at, axes in enumerate(grid.flat):
            if at % columns == 0:
                axes.set_ylabel("WSR, %")
            if at + columns >= len(panels):
                axes.set_xlabel("accuracy, %")
                axes.xaxis.set_tick_params(labelbottom=True)
        handles = [_handle(look, label=name) for name, look in looks.items()]
        handles += [_handle((INK, "*"), label="victim"), _handle((INK, "*"), label="benign model", hollow=True)]
        if any(is_control(row) for row in rows):
            handles.append(_handle((INK, "o"), label="hollow: control, stolen\nfrom the benign model", hollow=True))
        figure.legend(handles=handles, loc="outside right upper")
        return svg_of(figure)


def budget_curves(found: Sequence[Line]) -> str | None:
    """WSR and accuracy against the query budget, with a row of panels for each watermark. SVG; None if no budget
    varies.

    A curve is an attack with its answers, pool and architecture. Its control is dotted and hollow. Several seeds are
    drawn as their mean with one standard deviation, a single seed with its Wilson interval.
    """
    labels = Labels(found)
    curves: dict[tuple[str, str], list[Line]] = {}
    usable = [line for line in found if line.row.origin == "stolen" and not line.is_control and not line.failed]
    for line in sorted(usable, key=lambda line: line.row.budget or 0):
        if line.row.budget:
            curves.setdefault((labels.panel(line.row), labels.series(line.row)), []).append(line)
    curves = {key: points for key, points in curves.items() if len({point.row.budget for point in points}) > 1}
    if not curves:
        return None
    panels = sorted({panel for panel, _ in curves})
    looks = _looks(sorted({series for _, series in curves}))
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(11.4, 3.7 if len(panels) == 1 else 3.1 * len(panels)))
        figure.set_layout_engine("constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False, sharex=True, sharey="col")
        for (panel, series), points in curves.items():
            left, right = grid[panels.index(panel)]
            for pick, hollow in ((lambda line: line.rows, False), (lambda line: line.good_controls, True)):
                measured = [group for group in map(pick, points) if group]
                _curve(left, measured, "wsr", looks[series], hollow)
                _curve(right, measured, "accuracy", looks[series], hollow)
        budgets = sorted({line.row.budget or 0 for points in curves.values() for line in points})
        for panel, (left, right) in zip(panels, grid, strict=True):
            _thresholds(left, [line.row for (name, _), points in curves.items() if name == panel for line in points])
            left.set(title=panel, ylabel="WSR, %", ylim=(-4, 104))
            right.set(title=panel, ylabel="accuracy, %")
            for axes in (left, right):
                axes.set_xscale("log")
                if len(budgets) <= 8:
                    axes.set_xticks(budgets, [f"{budget:,}".replace(",", "\u202f") for budget in budgets])
                    axes.minorticks_off()
        for axes in grid[-1]:
            axes.set_xlabel("query budget")
        handles = [_handle(look, label=series, line="-") for series, look in looks.items()]
        handles.append(_handle((INK, "o"), label="dotted, hollow: control", line=":", hollow=True))
        figure.legend(handles=handles, loc="outside right upper")
        return svg_of(figure)


def inline(svg: str, name: str) -> str:
    """An SVG made fit for a page: transparent, in the page's text colour, without addresses.

    ``name`` is put before every id: several plots in one page would else share the ids of letters and markers.
    """
    body = svg[svg.index("<svg") :].replace(f"fill: {PAPER}", "fill: none").replace(INK, "currentColor")
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body, count=2).replace("xlink:href=", "href=")
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to a group's id
    body = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{name}-", body)
    return re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)


def _rows(found: Iterable[Line]) -> list[Row]:
    rows = [row for line in found for row in (*line.rows, *line.controls) if row.status == "ok"]
    return list({row.identity: row for row in rows}.values())  # one control may serve two lines


def _panels(rows: Sequence[Row], labels: Labels) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(labels.panel(row), []).append(row)
    return panels


def _attack(row: Row) -> str:
    name = row.attack or row.origin
    name += f" then {row.removal}" if row.removal else ""
    return f"{name} behind {row.evasion}" if row.evasion else name


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {name: (COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(names)}


def _jitter(row: Row) -> float:
    """How far a control is moved, in points. A row always gets the same value, whatever is drawn beside it."""
    return JITTER * (zlib.crc32("/".join(row.identity[:-1]).encode()) / 2**31 - 1) if is_control(row) else 0.0


def _point(axes: Axes, row: Row, looks: dict[str, tuple[str, str]]) -> None:
    assert row.accuracy is not None
    assert row.wsr is not None
    colour, marker = looks.get(_attack(row), (INK, "*"))
    hollow = is_control(row) or row.role == "benign"
    low = row.wsr if row.wsr_low is None else min(row.wsr_low, row.wsr)
    high = row.wsr if row.wsr_high is None else max(row.wsr_high, row.wsr)
    bars = None if row.by_construction else [[100 * (row.wsr - low)], [100 * (high - row.wsr)]]
    face = "none" if hollow else colour
    style: dict[str, Any] = {"color": colour, "markerfacecolor": face, "markersize": 12 if marker == "*" else 7}
    if is_control(row):
        style["alpha"] = 0.75
    place = 100 * row.wsr + _jitter(row)
    drawn = axes.errorbar([100 * row.accuracy], [place], yerr=bars, fmt=marker, elinewidth=1, **style)
    for bar in drawn.lines[2]:
        bar.set_alpha(0.55)


def _curve(
    axes: Axes, groups: Sequence[tuple[Row, ...]], field: str, look: tuple[str, str], hollow: bool = False
) -> None:
    x, y, below, above = [], [], [], []
    for group in groups:
        rate = stat(getattr(row, field) for row in group)
        if rate is None:
            continue
        low, high = rate.mean - (rate.sd or 0), rate.mean + (rate.sd or 0)
        if rate.n == 1 and field == "wsr":
            low = rate.mean if group[0].wsr_low is None else min(group[0].wsr_low, rate.mean)
            high = rate.mean if group[0].wsr_high is None else max(group[0].wsr_high, rate.mean)
        x.append(float(group[0].budget or 0))
        y.append(100 * rate.mean)
        below.append(100 * (rate.mean - max(0.0, low)))
        above.append(100 * (min(1.0, high) - rate.mean))
    colour, marker = look
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linestyle": ":" if hollow else "-"}
    if x:
        face = "none" if hollow else colour
        alpha = 0.75 if hollow else 1.0
        axes.errorbar(x, y, yerr=[below, above], elinewidth=1, markerfacecolor=face, alpha=alpha, **style)


def _thresholds(axes: Axes, rows: Iterable[Row]) -> None:
    """Draws the line above which a model counts as stolen. Its label stands outside the axes, where no point can be."""
    for threshold in thresholds(rows):
        axes.axhline(100 * threshold, color=INK, linestyle="--", linewidth=1)
        place = axes.get_yaxis_transform()
        text = f"threshold\n{100 * threshold:g} %"
        axes.text(1.01, 100 * threshold, text, transform=place, va="center", fontsize=8)


def _handle(look: tuple[str, str], *, label: str, line: Literal["-", ":", ""] = "", hollow: bool = False) -> Line2D:
    colour, marker = look
    face = "none" if hollow else colour
    size = 11 if marker == "*" else 7
    return Line2D(
        [], [], color=colour, marker=marker, markersize=size, markerfacecolor=face, linestyle=line, label=label
    )


def svg_of(figure: Figure) -> str:
    """A figure as SVG, without the date and other parts that change from one drawing to the next."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_BARE)
    return buffer.getvalue()


def after_the_theft(found: Sequence[Outcome], labels: Labels) -> str:
    """WSR against accuracy of every removal, one panel a washed model, SVG.

    The star is the model before any removal; the shaded part is what a thief can afford. Hollow are the controls. What
    costs more than :data:`DEAREST` points stands at the left edge.
    """
    found = sorted(found, key=lambda each: labels.panel(each.source.row))  # a victim beside its copies
    looks = _looks(sorted({line.row.removal or "" for each in found for line, _ in each.removals}))
    with matplotlib.style.context(["default", STYLE]):
        columns = min(2 if len(found) < 7 else 4, len(found))
        down = -(-len(found) // columns)
        figure = Figure(figsize=(2.0 + 2.9 * columns, 1.0 + 2.7 * down))
        figure.set_layout_engine("constrained")
        grid = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
        for at, axes in enumerate(grid.flat):
            axes.set_visible(at < len(found))
        before = [stat(row.accuracy for row in each.source.rows) for each in found]
        left = max(0.0, min(100 * rate.mean for rate in before if rate is not None) - DEAREST)
        for at, (axes, each, rate) in enumerate(zip(grid.flat, found, before, strict=False)):
            assert rate is not None
            name = each.source.row.attack or each.source.row.role
            axes.set(title=f"{labels.panel(each.source.row)}, {name}", ylim=(-4, 104), xlim=(left - 1.5, 101.5))
            axes.axvspan(100 * (rate.mean - each.allowed), 101.5, color=GRID, alpha=0.25, linewidth=0)
            _thresholds(axes, each.source.rows)
            for line, _ in each.removals:
                for group, hollow in ((line.good_controls, True), (line.rows, False)):
                    _removal(axes, group, looks[line.row.removal or ""], left, hollow=hollow)
            _removal(axes, each.source.rows, (INK, "*"), left)
            if at % columns == 0:
                axes.set_ylabel("WSR, %")
            if at + columns >= len(found):
                axes.set_xlabel("accuracy, %")
                axes.xaxis.set_tick_params(labelbottom=True)
        handles: list[Line2D | Patch] = [_handle(look, label=name) for name, look in looks.items()]
        handles.append(_handle((INK, "*"), label="before any removal"))
        handles.append(_handle((INK, "o"), label="hollow: control", hollow=True))
        handles.append(Patch(color=GRID, alpha=0.25, label="within the\nallowed loss"))
        figure.legend(handles=handles, loc="outside right upper")
        return svg_of(figure)


def _removal(axes: Axes, rows: Iterable[Row], look: tuple[str, str], left: float, *, hollow: bool = False) -> None:
    colour, marker = look
    points = [
        (max(left, 100 * row.accuracy), 100 * row.wsr)
        for row in rows
        if row.accuracy is not None and row.wsr is not None
    ]
    size = 12 if marker == "*" else 4 if hollow else 7
    style: dict[str, Any] = {"markersize": size, "markerfacecolor": "none" if hollow else colour, "linestyle": ""}
    for x, y in points:
        axes.plot([x], [y], color=colour, marker=marker, alpha=0.6 if hollow else 0.9, **style)
