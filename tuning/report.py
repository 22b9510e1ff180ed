"""The report of a sweep, from its directory alone: a table for the terminal, ``table.md``, plots and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulator.component import describe
from simulator.errors import InputError
from simulator.records.provenance import RunInfo, read_run_info
from simulator.report.page import NONE, Column, markdown_table, write_page
from tuning.config import SweepConfig, read_sweep
from tuning.importance import importances
from tuning.recommend import Candidate, Figures, Recommendation, ranked
from tuning.records import TrialRecord, read_trials

#: how many trials the terminal's table shows
SHOWN = 12

LEGEND = (
    "Means over the seeds; drop: accuracy below the benign model's, in points; WSR: watermark success rate. "
    "worst: the lowest WSR of the models that the search's attacks stole. value: worst (or what the objective "
    "aggregates) less the penalty for a drop beyond the limit; bound: its lower confidence bound over the seeds, by "
    "which trials are ranked. A trial that was stopped early has the figures of what was measured of it."
)


@dataclass(frozen=True)
class Found:
    """All data of a report. ``chosen`` is None until the sweep has ended."""

    info: RunInfo
    config: SweepConfig
    records: list[TrialRecord]
    chosen: Recommendation | None


def _part(at: int, heading: str) -> Column[tuple[str, ...]]:
    return Column(heading, heading, lambda line: line[at], text=at < 2)


_HEADINGS = ("setting", "measured on", "drop", "victim WSR %", "worst WSR %", "mean WSR %", "value", "bound")
#: the columns of :func:`confirmation`
CONFIRMED = [_part(at, heading) for at, heading in enumerate(_HEADINGS)]


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


def columns(config: SweepConfig) -> list[Column[TrialRecord]]:
    """The columns of a sweep's table: the searched fields, then the results."""
    names = {path: path.rpartition(".")[2] for path in config.space}
    doubled = {name for name in names.values() if list(names.values()).count(name) > 1}

    def setting(path: str) -> Column[TrialRecord]:
        heading = path if names[path] in doubled else names[path].replace("_", " ")
        text = not config.space[path].numeric
        return Column(path, heading, lambda one: _value(one.setting[path]), text)

    return [
        Column("trial", "trial", lambda one: str(one.number)),
        *(setting(path) for path in config.space),
        Column("seeds", "seeds", lambda one: str(len(one.seeds))),
        Column("drop", "drop", lambda one: _points(one.drop)),
        Column("victim_wsr", "victim WSR %", lambda one: _rate(one.victim_wsr)),
        Column("worst_wsr", "worst WSR %", lambda one: _rate(one.worst_wsr)),
        Column("mean_wsr", "mean WSR %", lambda one: _rate(one.mean_wsr)),
        Column("benign_wsr", "benign WSR %", lambda one: _rate(one.benign_wsr)),
        Column("value", "value", lambda one: NONE if one.value is None else f"{one.value:.3f}"),
        Column("bound", "bound", lambda one: NONE if one.value_lower is None else f"{one.value_lower:.3f}"),
        Column("ended", "ended", _ended, text=True),
    ]


def in_order(config: SweepConfig, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials in the table's order: those that ran to their end, best first; the stopped ones, furthest first; the
    failed ones."""
    stages = ["none", *config.stages()]
    rest = [one for one in records if not one.done]
    rest.sort(key=lambda one: (one.status == "failed", -stages.index(one.stage), -(one.value or -1e9), one.number))
    return [*ranked(config, records), *rest]


def write_sweep_report(path: Path) -> Path:
    """Writes ``report/`` and returns the path of its ``index.html``.

    Raises:
        InputError: see :func:`read`.
    """
    from tuning import plots

    found = read(path)
    config, records = found.config, found.records
    default = config.default()
    winner = dict(found.chosen.winner.setting) if found.chosen else {}
    return write_page(
        path / "report",
        Path(__file__).parent / "templates" / "sweep.html",
        found.info,
        markdown(found),
        {
            "pareto": plots.pareto(records, config.objective.max_drop, winner, default),
            "map": plots.setting_map(records, config.space, winner, default),
            "importance": plots.importance_bars(importances(records, config.space)),
        },
        alarms=[] if found.info.status == "done" else [f"this sweep is not complete (status: {found.info.status})"],
        columns=columns(config),
        records=in_order(config, records),
        confirmed=CONFIRMED,
        confirmation=confirmation(found.chosen) if found.chosen else [],
        verdict=found.chosen.verdict() if found.chosen else "",
        notes=notes(found),
        legend=LEGEND,
        config=config.to_yaml(),
        winner=winner,
    )


def markdown(found: Found) -> str:
    """The whole table as GitHub-flavoured Markdown, and the confirmation below."""
    text = [*markdown_table(columns(found.config), in_order(found.config, found.records)), "", LEGEND, ""]
    if found.chosen:
        text += [*markdown_table(CONFIRMED, confirmation(found.chosen)), "", found.chosen.verdict(), *notes(found)]
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
    for part in CONFIRMED:
        below.add_column(part.heading, justify="left" if part.text else "right")
    for line in confirmation(found.chosen):
        below.add_row(*line)
    console.print(below)
    console.print(Text(found.chosen.verdict(), style="bold"), soft_wrap=True)
    for note in notes(found):
        console.print(Text(note), soft_wrap=True)


def confirmation(chosen: Recommendation) -> list[tuple[str, ...]]:
    """Rows of text for the winner and the default setting: their figures in the search, and on fresh seeds and
    attacks."""
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
    """Sentences that a reader must know before believing the recommendation."""
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
    waits = sorted(one.wait_seconds for one in found.records)
    said.append(
        f"{chosen.trials} trials, {chosen.stopped} stopped early, {chosen.failed} failed; in the "
        f"{chosen.search_seconds:.0f} s of search no worker had anything to do for {chosen.idle_seconds:.1f} s "
        f"({chosen.idle_seconds / max(chosen.trials, 1):.2f} s a trial). Overhead of a trial beyond its work: median "
        f"{costs[len(costs) // 2]:.2f} s, at most {costs[-1]:.2f} s; waiting for a worker: median "
        f"{waits[len(waits) // 2]:.2f} s."
    )
    return said


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
