"""After the theft: what the strongest removal that a thief can afford leaves of a watermark.

Of each model that was washed, the owner's or a stolen copy, all removals are compared with the model as it was before
them. A removal is *within the allowed loss* if it costs no more accuracy than the configuration's ``accuracy_loss``.
The strongest is that of the lowest WSR among these, and of those alike the one that costs least.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulator.records.rows import Row
from simulator.report.lines import Labels, Line, stat
from simulator.report.page import NONE, Column

#: the loss of accuracy that is allowed where the rows do not say it
ALLOWED = 0.035

LEGEND = (
    "The strongest removal is the one that leaves the lowest WSR among those that cost no more accuracy than {allowed} "
    "points; its control went through the same theft and the same removal, from the benign model. A thief does not "
    "know the key, and cannot tell which removal this is."
)


@dataclass(frozen=True)
class Outcome:
    """A model, and what its removals did to it.

    Attributes:
        source: the model before any removal.
        removals: each with the accuracy that it cost, in [-1, 1], the mean over the seeds.
        allowed: the loss of accuracy that a thief accepts, in [0, 1].
    """

    source: Line
    removals: tuple[tuple[Line, float], ...]
    allowed: float

    @property
    def within(self) -> tuple[tuple[Line, float], ...]:
        """The removals within the allowed loss, the strongest first."""
        found = [(line, loss) for line, loss in self.removals if loss <= self.allowed + 1e-9]
        return tuple(sorted(found, key=lambda each: (_wsr(each[0]), each[1])))


def outcomes(found: Sequence[Line]) -> list[Outcome]:
    """One for each measured model that has removals, in the order of the lines; controls stand within them."""
    rows = {_place(row): row for line in found for row in line.rows if row.status == "ok"}
    places = {row.identity: at for at, line in enumerate(found) for row in line.rows}
    groups: dict[int, list[tuple[Line, float]]] = {}
    for line in found:
        if line.row.role != "removed" or line.failed or line.is_control or all(row.wsr is None for row in line.rows):
            continue
        sources = [(_source(row, rows), row) for row in line.rows]
        losses = [
            source.accuracy - row.accuracy
            for source, row in sources
            if source is not None and source.accuracy is not None and row.accuracy is not None
        ]
        if losses:
            at = next(places[source.identity] for source, _ in sources if source is not None)
            groups.setdefault(at, []).append((line, statistics.fmean(losses)))
    return [Outcome(found[at], tuple(group), _allowed(group)) for at, group in sorted(groups.items())]


def columns(labels: Labels) -> list[Column[Outcome]]:
    """The columns of the table."""

    def strongest(each: Outcome) -> Line | None:
        return each.within[0][0] if each.within else None

    def rate(line: Line | None, rows: Iterable[Row], field: str) -> str:
        value = stat(getattr(row, field) for row in rows) if line is not None else None
        spread = "" if value is None or value.sd is None else f" ± {100 * value.sd:.1f}"
        return NONE if value is None else f"{100 * value.mean:.1f}{spread}"

    def of(each: Outcome, field: str, *, control: bool = False) -> str:
        line = strongest(each)
        return rate(line, () if line is None else line.good_controls if control else line.rows, field)

    return [
        Column("watermark", "watermark", lambda each: labels.panel(each.source.row), text=True),
        Column("model", "model", lambda each: labels.series(each.source.row), text=True),
        Column("before", "accuracy %", lambda each: rate(each.source, each.source.rows, "accuracy")),
        Column("wsr_before", "WSR %", lambda each: rate(each.source, each.source.rows, "wsr")),
        Column("count", "within the loss", lambda each: f"{len(each.within)} of {len(each.removals)}"),
        Column("removal", "strongest removal", lambda each: _named(strongest(each), labels), text=True),
        Column("cost", "it costs", lambda each: f"{100 * each.within[0][1]:.1f}" if each.within else NONE),
        Column("wsr", "WSR left %", lambda each: of(each, "wsr")),
        Column("control", "control WSR %", lambda each: of(each, "wsr", control=True)),
        Column("verified", "verified", lambda each: _verified(strongest(each)), text=True),
    ]


def legend(found: Sequence[Outcome]) -> str:
    """What the table shows, with the allowed loss."""
    return LEGEND.format(allowed=" or ".join(f"{100 * loss:g}" for loss in sorted({each.allowed for each in found})))


def _place(row: Row) -> tuple[str, ...]:
    return (row.scenario_id, row.watermark, row.watermark_params, row.victim, row.test)


def _source(row: Row, rows: Mapping[tuple[str, ...], Row]) -> Row | None:
    """The row of the model before any removal; None where it is not there."""
    found: Row | None = row
    while found is not None and found.role == "removed":
        found = rows.get((found.parent or "", *_place(found)[1:]))
    return found


def _allowed(group: Sequence[tuple[Line, float]]) -> float:
    said = group[0][0].row.allowed_loss
    return ALLOWED if said is None else said


def _wsr(line: Line) -> float:
    value = stat(row.wsr for row in line.rows)
    return 1.0 if value is None else value.mean


def _named(line: Line | None, labels: Labels) -> str:
    return "none is within the loss" if line is None else labels.removal(line.row)


def _verified(line: Line | None) -> str:
    claimed = [] if line is None else [row.verified for row in line.rows if row.verified is not None]
    if len(claimed) > 1:
        return f"{sum(claimed)} of {len(claimed)}"
    return ("yes" if claimed[0] else "no") if claimed else NONE
