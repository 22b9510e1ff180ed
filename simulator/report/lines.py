"""Turns rows into the lines of a report: merges seeds, puts each stolen copy beside its control, and names all doubts.

A line stands for rows that differ only in their seed. The control of a stolen line is the same attack on the benign
victim, measured with the same key: it shows the WSR without any theft from a watermarked victim. The control of a
victim is the benign model measured with the victim's key. A model after a removal, or behind an evasion, has a line
below the one it was made from, and its control went the same way.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from simulator.component import BENIGN
from simulator.records.rows import Row, sorted_rows

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Line:
    """Rows that differ only in their seed (or one failed row), and the rows of their controls, of any status."""

    rows: tuple[Row, ...]
    controls: tuple[Row, ...] = ()

    @property
    def row(self) -> Row:
        """The first row, for the columns that all of them share."""
        return self.rows[0]

    @property
    def failed(self) -> bool:
        return self.row.status == "failed"

    @property
    def is_control(self) -> bool:
        return is_control(self.row)

    @property
    def good_controls(self) -> tuple[Row, ...]:
        """The controls that did not fail."""
        return tuple(row for row in self.controls if row.status == "ok")


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (``None`` for one value) of a rate over ``n`` rows."""

    mean: float
    sd: float | None
    n: int


def is_control(row: Row) -> bool:
    """Whether the row is a model stolen from the benign victim, or a removal or an evasion of that or of the benign
    model."""
    return row.role not in ("benign", "victim") and row.victim == BENIGN


def thresholds(rows: Iterable[Row]) -> list[float]:
    """The WSRs above which models count as stolen, ascending. There is one, unless several tests or runs are shown."""
    return sorted({row.threshold for row in rows if row.threshold is not None})


def stat(values: Iterable[float | None]) -> Stat | None:
    """Mean and sample standard deviation of the values that are known, ``None`` if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of a report in the order of :func:`simulator.records.rows.sorted_rows`.

    A failed row is a line of its own. Controls stand inside the lines they belong to; a control that failed, or that
    belongs to no line, is a line too, so no row is ever lost.
    """
    ordered = sorted_rows(rows)
    measured = [row for row in ordered if row.status == "ok" and not is_control(row)]
    failed = [row for row in ordered if row.status == "failed"]
    victims = {row.victim: row for row in ordered if row.role == "victim"}

    def same(row: Row) -> tuple[Hashable, ...]:
        # two victims of one watermark may differ in architecture, and a stolen copy's row does not name its victim's
        source = victims.get(row.victim)
        return (row.role, *_setting(row), source.architecture if source else None)

    found = [Line(group) for rows_ in _group(measured, same).values() for group in _by_seed(rows_)]
    found += [Line((row,)) for row in failed]
    settings = _group(ordered, _setting)
    found = [replace(line, controls=_controls(line, settings[_setting(line.row)])) for line in found]
    paired = {row.identity for line in found for row in line.controls}
    orphans = [row for row in ordered if is_control(row) and row.status == "ok" and row.identity not in paired]
    found += [Line(group) for rows_ in _group(orphans, _setting).values() for group in _by_seed(rows_)]
    place = {row.identity: index for index, row in enumerate(ordered)}
    return sorted(found, key=lambda line: place[line.row.identity])


def doubts(found: Sequence[Line]) -> list[str]:
    """Sentences that a reader must know before believing the table: warnings, false claims, missing controls."""
    labels = Labels(found)
    notes: list[str] = []
    for line in found:
        of_row = [(row, row.warning) for row in line.rows if row.warning]
        notes += [f"{labels.full(line)}, seed {row.seed}: {warning}" for row, warning in of_row]
        unsaid = [row for row in line.rows if row.verified is False and "not verified" not in (row.warning or "")]
        if line.row.role == "victim" and unsaid:
            notes.append(f"{labels.full(line)} is itself not verified: its watermark was not embedded")
        innocent = [row for row in (*line.rows, *line.controls) if is_control(row) or row.role == "benign"]
        accused = sorted({row.seed for row in innocent if row.verified})
        if accused and line.row.role != "victim":  # the benign model has a line of its own
            seeds = ", ".join(map(str, accused))
            notes.append(f"false claim: the control of {labels.full(line)} is verified as stolen (seed {seeds})")
        if line.row.role not in ("benign", "victim") and not (line.is_control or line.failed or line.good_controls):
            notes.append(f"{labels.full(line)} has no control: its WSR cannot be judged")
    return list(dict.fromkeys(notes))


class Labels:
    """Short names for watermarks and attacks. They name only the parameters in which the lines of a report differ."""

    def __init__(self, found: Sequence[Line]) -> None:
        rows = [row for line in found for row in (*line.rows, *line.controls)]
        self._watermark = _differing((row.watermark, row.watermark_params) for row in rows)
        self._attack = _differing((row.attack or "", row.attack_params) for row in rows)
        self._removal = _differing((row.removal or "", row.removal_params) for row in rows)
        self._evasion = _differing((row.evasion or "", row.evasion_params) for row in rows)
        stolen = [row for row in rows if row.origin == "stolen"]
        self.datasets = len({row.dataset for row in rows}) > 1
        self.tests = len({row.test for row in rows}) > 1
        self._pools = len({row.pool for row in stolen}) > 1
        self._architectures = len({row.architecture for row in stolen}) > 1

    def watermark(self, row: Row) -> str:
        """The watermark's name, e.g. ``"deeptracer(margin=2)"``."""
        return _named(row.watermark, row.watermark_params, self._watermark)

    def attack(self, row: Row) -> str:
        """The attack's name, e.g. ``"knockoff(adaptive) then pruning(ratio=0.4) behind outliers(lof)"``. A model that
        was
        not stolen has its role."""
        name = f"{row.origin}{' model' if row.origin == 'benign' else ''}"
        if row.attack is not None:
            name = _named(row.attack, row.attack_params, self._attack)
        if row.stage is not None and row.stage > 1:
            name += f", stage {row.stage}"
        if row.removal is not None:
            name += f" then {self.removal(row)}"
        if row.evasion is not None:
            name += f" behind {_named(row.evasion, row.evasion_params, self._evasion)}"
        return f"control: {name}" if is_control(row) else name

    def removal(self, row: Row) -> str:
        """``"pruning(ratio=0.4)"``; empty for a model that nothing was removed from."""
        return _named(row.removal or "", row.removal_params, self._removal)

    def panel(self, row: Row) -> str:
        """The watermark; also the data set and the ownership test, if the report holds several."""
        varied = [row.dataset if self.datasets else None, row.test if self.tests else None]
        return ", ".join(part for part in (self.watermark(row), *varied) if part)

    def series(self, row: Row) -> str:
        """The attack with its answers; also pool and architecture, if they vary."""
        varied = [row.pool if self._pools else None, row.architecture if self._architectures else None]
        return ", ".join(part for part in (self.attack(row), row.labels, *varied) if part)

    def full(self, line: Line) -> str:
        """The full name of a line, for warnings and errors."""
        row = line.row
        budget = None if row.budget is None else f"{row.budget} queries"
        return ", ".join(part for part in (self.panel(row), self.series(row), budget) if part)


def _setting(row: Row) -> tuple[Hashable, ...]:
    """The columns that a row and its control share, without the seed."""
    return (
        *(row.dataset, row.watermark, row.watermark_params, row.architecture, row.attack, row.attack_params),
        *(row.labels, row.pool, row.stage, row.removal, row.removal_params, row.evasion, row.evasion_params),
        *(row.budget, row.test),
    )


def _controls(line: Line, same_setting: Sequence[Row]) -> tuple[Row, ...]:
    if line.row.role == "benign" or line.is_control:
        return ()
    seeds = {row.seed for row in line.rows}
    innocent: Callable[[Row], bool] = (lambda row: row.role == "benign") if line.row.role == "victim" else is_control
    return tuple(row for row in same_setting if row.seed in seeds and innocent(row))


def _by_seed(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """Splits a group in which a seed occurs twice, because it holds several victims, or settings that no column
    shows."""
    splits: list[Callable[[Row], Hashable]] = [lambda _: None, lambda row: row.victim, lambda row: row.scenario_id]
    groups: list[tuple[Row, ...]] = []
    for split in splits:
        groups = [tuple(group) for group in _group(rows, split).values()]
        if all(len({row.seed for row in group}) == len(group) for group in groups):
            break
    return groups


def _group(rows: Iterable[Row], key: Callable[[Row], T]) -> dict[T, list[Row]]:
    groups: dict[T, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _differing(named: Iterable[tuple[str, str | None]]) -> dict[str, set[str]]:
    """For every name, the parameters that vary between its occurrences."""
    seen: dict[str, list[dict[str, object]]] = {}
    for name, params in dict.fromkeys(named):
        seen.setdefault(name, []).append(_params(params))
    return {
        name: {key for params in all_ for key in params if any(other.get(key) != params[key] for other in all_)}
        for name, all_ in seen.items()
    }


def _named(name: str, params: str | None, differing: dict[str, set[str]]) -> str:
    values = _params(params)
    shown = [_value(key, values[key]) for key in sorted(differing.get(name, set()) & values.keys())]
    return f"{name}({', '.join(shown)})" if shown else name


def _params(text: str | None) -> dict[str, object]:
    """The parameters in a row's JSON by their dotted paths. Those of several stages, a list, become
    ``stage1.epochs``."""
    values = json.loads(text or "{}")
    if isinstance(values, list):
        values = {f"stage{at}": stage for at, stage in enumerate(values, 1)}
    return dict(_leaves("", values))


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Every entry of nested mappings, by its dotted path."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(f"{path}.{key}" if path else key, entry)
    else:
        yield path, value


def _value(key: str, value: object) -> str:
    return value if isinstance(value, str) else f"{key}={json.dumps(value)}"  # a word explains itself
