"""The report of a sweep, from its directory alone: a table for the terminal, ``table.md``, plots and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import simulator.report
from simulator.component import describe
from simulator.errors import InputError
from simulator.report import facts, markdown_cell
from simulator.results import RunInfo, read_run_info
from tuning.config import SweepConfig, read_sweep
from tuning.importance import importances
from tuning.recommend import Candidate, Figures, Recommendation, ranked
from tuning.records import TrialRecord, read_trials

NONE = "–"
#: trials that the terminal's table shows
SHOWN = 12

LEGEND = (
    "Means over the seeds; drop: accuracy below the benign model's, in points; WSR: watermark success rate. "
    "worst: the lowest WSR of the models that the search's attacks stole. value: worst (or what the objective "
    "aggregates) less the penalty for a drop beyond the limit; bound: its lower confidence bound over the seeds, by "
    "which trials are ranked. A trial that was stopped early has the figures of what was measured of it."
)


@dataclass(frozen=True)
class Column:
    """A column of the table of trials."""

    heading: str
    cell: Callable[[TrialRecord], str]
    text: bool = False


@dataclass(frozen=True)
class Found:
    """All that a report is made of. ``chosen`` is None while the sweep has not come to its end."""

    info: RunInfo
    config: SweepConfig
    records: list[TrialRecord]
    chosen: Recommendation | None


def read(path: Path) -> Found:
    """A sweep's directory.

    Raises:
        InputError: it is no sweep's, holds no trial yet, or a file of it is damaged.
    """
    sweep = path / "sweep"
    if not (sweep / "trials.parquet").is_file():
        raise InputError(f"{path} holds no trials yet: there is nothing to report")
    chosen = None
    try:
        if (sweep / "recommendation.json").is_file():
            chosen = Recommendation.model_validate_json((sweep / "recommendation.json").read_bytes())
    except ValidationError as error:
        raise InputError(f"{sweep / 'recommendation.json'}: {describe(error)}") from None
    records = read_trials(sweep / "trials.parquet")
    return Found(read_run_info(path), read_sweep(str(sweep / "config.yaml")), records, chosen)


def columns(config: SweepConfig) -> list[Column]:
    """The columns of a sweep's table: the searched fields, then what came of them."""
    names = {path: path.rpartition(".")[2] for path in config.space}
    doubled = {name for name in names.values() if list(names.values()).count(name) > 1}

    def setting(path: str) -> Column:
        heading = path if names[path] in doubled else names[path].replace("_", " ")
        text = not config.space[path].numeric
        return Column(heading, lambda one: _value(one.setting[path]), text)

    return [
        Column("trial", lambda one: str(one.number)),
        *(setting(path) for path in config.space),
        Column("seeds", lambda one: str(len(one.seeds))),
        Column("drop", lambda one: _points(one.drop)),
        Column("victim WSR %", lambda one: _rate(one.victim_wsr)),
        Column("worst WSR %", lambda one: _rate(one.worst_wsr)),
        Column("mean WSR %", lambda one: _rate(one.mean_wsr)),
        Column("benign WSR %", lambda one: _rate(one.benign_wsr)),
        Column("value", lambda one: NONE if one.value is None else f"{one.value:.3f}"),
        Column("bound", lambda one: NONE if one.value_lower is None else f"{one.value_lower:.3f}"),
        Column("ended", _ended, text=True),
    ]


def in_order(config: SweepConfig, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that ran to their end, best first; those that were stopped, the furthest first; those that failed."""
    stages = ["none", *config.stages()]
    rest = [one for one in records if not one.done]
    rest.sort(key=lambda one: (one.status == "failed", -stages.index(one.stage), -(one.value or -1e9), one.number))
    return [*ranked(config, records), *rest]


def write_sweep_report(path: Path) -> Path:
    """Writes ``report/`` and returns the path of its ``index.html``.

    Raises:
        InputError: see :func:`read`.
    """
    from simulator.plots import inline
    from tuning import plots

    found = read(path)
    config, records = found.config, found.records
    default = config.default()
    winner = dict(found.chosen.winner.setting) if found.chosen else {}
    drawn = {
        "pareto": plots.pareto(records, config.objective.max_drop, winner, default),
        "map": plots.setting_map(records, config.space, winner, default),
        "importance": plots.importance_bars(importances(records, config.space)),
    }
    report = path / "report"
    report.mkdir(exist_ok=True)
    for name, svg in drawn.items():
        file = report / f"{name}.svg"
        if svg is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(svg, encoding="utf-8")
    (report / "table.md").write_text(markdown(found), encoding="utf-8")
    page = report / "index.html"
    inlined = {name: inline(svg, name) for name, svg in drawn.items() if svg}
    page.write_text(_page(found, inlined), encoding="utf-8")
    return page


def markdown(found: Found) -> str:
    """The whole table as GitHub-flavoured Markdown, and the confirmation below."""
    shown = columns(found.config)
    text = ["| " + " | ".join(column.heading for column in shown) + " |"]
    text.append("| " + " | ".join("---" if column.text else "---:" for column in shown) + " |")
    for one in in_order(found.config, found.records):
        text.append("| " + " | ".join(markdown_cell(column.cell(one)) for column in shown) + " |")
    text += ["", LEGEND, ""]
    if found.chosen:
        text += ["| setting | measured on | drop | victim WSR % | worst WSR % | mean WSR % | value | bound |"]
        text += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        text += ["| " + " | ".join(line) + " |" for line in confirmation(found.chosen)]
        text += ["", found.chosen.verdict(), *notes(found)]
    return "\n".join(text).rstrip() + "\n"


def print_sweep(path: Path, console: Console) -> None:
    """The best trials, and the winner beside the default setting, on the terminal."""
    found = read(path)
    order = in_order(found.config, found.records)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_style="")
    for column in columns(found.config):
        table.add_column(column.heading, justify="left" if column.text else "right", overflow="fold")
    for one in order[:SHOWN]:
        style = "red" if one.status == "failed" else "" if one.done else "dim"
        table.add_row(*(Text(column.cell(one)) for column in columns(found.config)), style=style)
    hidden = f" {len(order) - SHOWN} more in report/table.md." if len(order) > SHOWN else ""
    table.caption = Text(LEGEND + hidden, style="dim", justify="left")
    console.print(table)
    if found.chosen is None:
        return
    below = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for at, heading in enumerate(_CONFIRMATION):
        below.add_column(heading, justify="left" if at < 2 else "right")
    for line in confirmation(found.chosen):
        below.add_row(*line)
    console.print(below)
    console.print(Text(found.chosen.verdict(), style="bold"), soft_wrap=True)
    for note in notes(found):
        console.print(Text(note), soft_wrap=True)


_CONFIRMATION = ("setting", "measured on", "drop", "victim WSR %", "worst WSR %", "mean WSR %", "value", "bound")


def confirmation(chosen: Recommendation) -> list[tuple[str, ...]]:
    """Winner and default setting as the search saw them and as they are where nothing was chosen: rows of text."""
    rows = []
    both = [("winner", chosen.winner), ("default", chosen.default)]
    for name, candidate in both[:1] if chosen.same else both:
        rows += [_figures(name, where, figures, candidate) for where, figures in _measured(candidate)]
    return rows


def _measured(candidate: Candidate) -> list[tuple[str, Figures | None]]:
    found: list[tuple[str, Figures | None]] = [("the search's seeds", candidate.searched)]
    found.append(("fresh seeds", candidate.fresh))
    return [*found, ("fresh seeds, unseen attacks", candidate.unseen)] if candidate.unseen else found


def _figures(name: str, where: str, figures: Figures | None, candidate: Candidate) -> tuple[str, ...]:
    if figures is None:
        why = "stopped early" if where.startswith("the search") else f"failed: {candidate.error}"
        return (name, f"{where}: {why}", *[NONE] * 6)
    return (
        name,
        where,
        _points(figures.drop),
        _rate(figures.victim_wsr),
        _rate(figures.worst_wsr),
        _rate(figures.mean_wsr),
        f"{figures.value:.3f}",
        f"{figures.value_lower:.3f}",
    )


def notes(found: Found) -> list[str]:
    """What a reader must know before believing the recommendation."""
    chosen, objective = found.chosen, found.config.objective
    said: list[str] = []
    if chosen is None:
        return said
    if not chosen.feasible:
        said.append(
            f"No trial kept the accuracy drop within {100 * objective.max_drop:g} points; the winner has the best "
            "value."
        )
    fresh = chosen.winner.fresh
    if fresh is not None and chosen.feasible and fresh.drop > objective.max_drop:
        said.append(
            f"On fresh seeds the winner's accuracy drop is {100 * fresh.drop:.1f} points, more than the "
            f"{100 * objective.max_drop:g} allowed."
        )
    costs = sorted(one.overhead_seconds for one in found.records)
    said.append(
        f"{chosen.trials} trials, {chosen.stopped} stopped early, {chosen.failed} failed; in the "
        f"{chosen.search_seconds:.0f} s of search no worker had anything to do for {chosen.idle_seconds:.1f} s "
        f"({chosen.idle_seconds / max(chosen.trials, 1):.2f} s a trial). Overhead of a trial beyond its work: median "
        f"{costs[len(costs) // 2]:.2f} s, at most {costs[-1]:.2f} s."
    )
    return said


def _page(found: Found, svgs: dict[str, str]) -> str:
    folders = [Path(__file__).parent / "templates", Path(simulator.report.__file__).parent / "templates"]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    alarms = [] if found.info.status == "done" else [f"this sweep is not complete (status: {found.info.status})"]
    return environment.get_template("sweep.html").render(
        info=found.info,
        facts=facts(found.info),
        alarms=alarms,
        columns=columns(found.config),
        records=in_order(found.config, found.records),
        headings=_CONFIRMATION,
        confirmation=confirmation(found.chosen) if found.chosen else [],
        verdict=found.chosen.verdict() if found.chosen else "",
        notes=notes(found),
        legend=LEGEND,
        svgs=svgs,
        config=found.config.to_yaml(),
        winner=dict(found.chosen.winner.setting) if found.chosen else {},
    )


def _ended(one: TrialRecord) -> str:
    if one.done:
        return "done"
    return f"failed: {one.error}" if one.status == "failed" else f"after {one.stage}"


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    """An accuracy drop in percentage points."""
    return NONE if value is None else f"{100 * value:.2f}"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
