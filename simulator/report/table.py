"""The report of a run: a table for the terminal, ``table.md``, the plots, and one self-contained HTML page.

It reads only the run directory, so a report can be made again anywhere and at any time, also of a run that still goes
on. Its figures come from ``results/`` and ``run.json``; ``config.yaml`` is shown unchanged.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from simulator.errors import InputError
from simulator.files import demand_plain
from simulator.records.provenance import RunInfo, read_run_info
from simulator.records.rows import Row, read_rows
from simulator.report import page, removals
from simulator.report.account import audit_run
from simulator.report.lines import Labels, Line, doubts, lines, stat, thresholds
from simulator.report.page import NONE, Column, markdown_cell, printable
from simulator.service.audit import Audit

LEGEND = (
    "WSR: watermark success rate with its 95 % Wilson interval; several seeds: mean ± standard deviation. "
    "control: the same attack on a benign victim, measured with the same key (of a victim: the benign model). "
    "verified: WSR above the threshold."
)
FILTERED = (
    "The 0 of a benign model and the 100 of a victim are by construction and have no interval: the key filter drops "
    "what this benign model answers, and keeps only what this victim does."
)


def columns(found: Sequence[Line]) -> list[Column[Line]]:
    """The columns that are filled in at least one line."""
    labels = Labels(found)
    every = [
        Column("dataset", "dataset", lambda line: line.row.dataset if labels.datasets else NONE, text=True),
        Column("watermark", "watermark", lambda line: labels.watermark(line.row), text=True),
        Column("attack", "attack", lambda line: labels.attack(line.row), text=True),
        Column("pool", "pool", lambda line: line.row.pool or NONE, text=True),
        Column("labels", "labels", lambda line: line.row.labels or NONE, text=True),
        Column("architecture", "architecture", lambda line: line.row.architecture, text=True),
        Column("budget", "budget", lambda line: _count(line.row.budget)),
        Column("queries", "queries", _queries),
        Column("seeds", "seeds", lambda line: f"seed {line.row.seed}" if line.failed else str(len(line.rows))),
        Column("accuracy", "accuracy %", lambda line: "failed" if line.failed else _rate(line.rows, "accuracy")),
        Column("test", "test", lambda line: line.row.test if labels.tests else NONE, text=True),
        Column("wsr", "WSR %", lambda line: _wsr(line.rows)),
        Column("key", "key samples", _key),
        Column("control", "control WSR %", _control),
        Column("verified", "verified", _verified),
        Column("agreement", "agreement %", lambda line: _rate(line.rows, "agreement")),
        Column("detected_at", "noticed after", _noticed),
        Column("flagged_benign", "flagged benign %", lambda line: _rate(line.rows, "flagged_benign")),
        Column("flagged_key", "flagged key %", lambda line: _rate(line.rows, "flagged_key")),
        Column("flagged_auc", "flag AUC %", lambda line: _rate(line.rows, "flagged_auc")),
        Column("false_alarms", "false alarms %", lambda line: _rate(line.rows, "false_alarms")),
        Column("false_trigger", "false trigger %", lambda line: _rate(line.rows, "false_trigger")),
    ]
    needed = ("watermark", "attack", "accuracy", "wsr", "control", "verified")
    return [column for column in every if column.key in needed or any(column.cell(line) != NONE for line in found)]


# Only victims have these rates. Where space is short, they stand beside the victim, not in columns.
_OF_VICTIMS = {"false_trigger": "false trigger", "false_alarms": "false alarms"}

# Columns that leave a narrow terminal, first to last. Those that tell lines apart move into the attack's cell. The size
# of a key moves into the watermark's cell, because no verdict can be judged without it.
_GOES = (
    *("flagged_auc", "queries", "agreement", "seeds", "architecture", "pool", "dataset", "test"),
    *("flagged_benign", "flagged_key", "key", "verified", "labels"),
)


def _noticed(line: Line) -> str:
    """The number of answered images after which a detector noticed the theft: the median over the seeds with a
    notice."""
    watched = [row for row in line.rows if row.role == "stolen" and row.detectors is not None]
    times = [row.detected_at for row in watched if row.detected_at is not None]
    if not watched:
        return NONE
    if not times:
        return "never"
    part = f" ({len(times)} of {len(watched)})" if len(watched) > 1 else ""
    return f"{_count(round(statistics.median(times)))}{part}"


def render_table(rows: Iterable[Row], *, width: int = 120) -> Table:
    """The rows as a table at most ``width`` characters wide.

    Columns that do not fit are left out, first those that say the same of every attack. A note below the table names
    them.
    """
    found = lines(rows)
    shown = [column for column in columns(found) if column.key not in _OF_VICTIMS]
    legend = _legend(found)
    apart = {column.key for column in shown} - set(_constant(found, shown))
    moved: list[Column[Line]] = []
    constant: list[str] = []
    hidden: list[str] = []
    console = Console(width=1000)
    for key in (*_constant(found, shown), *_GOES, None):
        table = _rich(found, shown, moved, _notes(legend, constant, hidden))
        if key is None or Measurement.get(console, console.options, table).maximum <= width:
            break
        for column in [column for column in shown if column.key == key]:
            shown.remove(column)
            values = {column.cell(line) for line in found if line.row.origin == "stolen"}
            if len(values) == 1:
                constant.append(f"{column.heading} {values.pop()}")
            elif key in apart and (column.text or key == "key"):
                moved.append(column)
            else:
                hidden.append(column.heading.removesuffix(" %"))
    return table


def markdown_table(rows: Iterable[Row], account: str | None = None) -> str:
    """The whole table as GitHub-flavoured Markdown, with its legend, the doubts and the errors below.

    Args:
        account: what an audit says of the query account.
    """
    found = lines(rows)
    text = [*page.markdown_table(columns(found), found), "", _legend(found), ""]
    if after := removals.outcomes(found):
        shown = removals.columns(Labels(found))
        text += ["## After the theft", "", *page.markdown_table(shown, after), "", removals.legend(after), ""]
    text += [f"- **Warning:** {markdown_cell(note)}" for note in doubts(found)]
    text += [f"- **Failed:** {markdown_cell(error)}" for error in _errors(found)]
    text += [] if account is None else [f"- {markdown_cell(account)}"]
    return "\n".join(text).rstrip() + "\n"


def write_report(run_dir: Path, account: Audit | None = None) -> Path:
    """Write ``report/`` and return the path of its ``index.html``.

    Args:
        account: the audit of the run's query account, if it was made already.

    Raises:
        InputError: ``run_dir`` is no run, holds no row yet, or holds a symbolic link or a file that cannot be read.
    """
    from simulator.report import plots  # matplotlib takes a while to import, and a table in the terminal does without

    demand_plain(run_dir)
    info, rows = read_run_info(run_dir), read_rows(run_dir)
    if not rows:
        raise InputError(f"{run_dir} holds no results yet: there is nothing to report")
    account = account or audit_run(run_dir)
    found = lines(rows)
    shown = [column for column in columns(found) if column.key not in _OF_VICTIMS]
    told = {f"{row.victim}: {row.warning}" for row in rows if row.warning}  # doubts repeats these under the line's name
    alike = [column for column in shown if column.key in _ALIKE and len({column.cell(line) for line in found}) == 1]
    shown = [column for column in shown if column not in alike]
    before = [column for column in shown if column.key in _SETTING]
    after, labels = removals.outcomes(found), Labels(found)
    drawn = {"wsr_vs_accuracy": plots.wsr_vs_accuracy(found), "budget": plots.budget_curves(found)}
    drawn["after_the_theft"] = plots.after_the_theft(after, labels) if after else None
    return page.write_page(
        run_dir / "report",
        Path(__file__).parent / "templates" / "report.html",
        info,
        markdown_table(rows, account.line()),
        drawn,
        more=[("query account", account.line().removeprefix("account: "))],
        alarms=[*_alarms(info, found, account), *(each for each in info.warnings if each not in told), *doubts(found)],
        classes=_classes,
        cell=_page_cell,
        columns=shown,
        before=before,
        after=[column for column in shown if column not in before],
        outcomes=after,
        outcome_columns=removals.columns(labels),
        outcome_legend=removals.legend(after),
        sections=[
            (origin, [line for line in found if line.row.origin == origin]) for origin in ("benign", "victim", "stolen")
        ],
        models=sum(len(line.rows) for line in found if not line.failed),
        legend=" ".join([_legend(found), *_said_once(alike, found[0])]),
        config=_config(run_dir),
        threshold=" or ".join(f"{100 * threshold:g} %" for threshold in thresholds(rows)) or "the threshold",
    )


_ALIKE = ("architecture", "seeds")  #: columns left out of the page if they say the same of every line
_SETTING = ("dataset", "watermark", "attack", "pool", "labels", "architecture", "budget", "queries", "seeds")


def _alarms(info: RunInfo, found: Sequence[Line], account: Audit) -> list[str]:
    notes = [] if account.agrees else [account.line()]
    if info.status != "done":
        notes.append(f"this run is not complete (status: {info.status}); the table holds what it has measured so far")
    failures = sum(line.failed for line in found)
    if failures:
        notes.append(f"{failures} {'row' if failures == 1 else 'rows'} failed; see the table for the errors")
    if info.git_dirty:
        notes.append("the code had changes that were not committed: the commit below is not what ran")
    return notes


def _legend(found: Sequence[Line]) -> str:
    """The legend. It explains rates that the key filter alone decides, if there are any."""
    made = any(row.by_construction for line in found for row in line.rows)
    return f"{LEGEND} {FILTERED}" if made else LEGEND


def _said_once(alike: Sequence[Column[Line]], line: Line) -> list[str]:
    said = ", ".join(f"{column.heading} {column.cell(line)}" for column in alike)
    return [f"All lines: {said}."] if said else []


def _notes(legend: str, constant: Sequence[str], hidden: Sequence[str]) -> str:
    same = f" All attacks: {', '.join(constant)}." if constant else ""
    return legend + same + (f" Not shown at this width: {', '.join(hidden)}." if hidden else "")


def _rich(found: Sequence[Line], shown: Sequence[Column[Line]], moved: Sequence[Column[Line]], notes: str) -> Table:
    caption = Text(notes, style="dim", justify="left")
    for note in doubts(found):
        caption.append(f"\nwarning: {printable(note)}", style="not dim yellow")
    for error in _errors(found):
        caption.append(f"\nfailed: {printable(error)}", style="not dim red")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_style="")
    for column in shown:
        # names may wrap, numbers may not
        limit = {"watermark": 24, "attack": 30, "pool": 14, "architecture": 14}.get(column.key)
        align: Any = "left" if column.text else "right"
        heading = Text(_HEADINGS.get(column.key, column.heading))
        table.add_column(heading, justify=align, max_width=limit, no_wrap=not column.text, overflow="fold")
    for line, following in zip(found, [*found[1:], None], strict=False):  # a run without rows has no line
        cells = [Text(_cell(line, column, moved), style=_style(line, column)) for column in shown]
        ends = following is None or following.row.origin != line.row.origin
        table.add_row(*cells, style="red" if line.failed else "", end_section=ends)
    return table


_HEADINGS = {
    "key": "key\nsamples",
    "control": "control\nWSR %",
    "agreement": "agree-\nment %",
    "architecture": "archi-\ntecture",
}


def _cell(line: Line, column: Column[Line], moved: Sequence[Column[Line]]) -> str:
    if column.key == "watermark":
        sizes = [other.cell(line) for other in moved if other.key == "key"]
        return printable(", ".join([column.cell(line), *(f"key {size}" for size in sizes if size != NONE)]))
    if column.key != "attack":
        return printable(column.cell(line))
    also = [value for value in (other.cell(line) for other in moved if other.key != "key") if value != NONE]
    text = printable(", ".join([column.cell(line), *also]))
    rates = [f"{label.replace(' ', chr(10))} {rate} %" for label, rate in _of_victims(line).items()]
    return ", ".join([text, *rates])


def _page_cell(line: Line, column: Column[Line]) -> list[str]:
    """A cell of the page: its text, then the lines in small letters below (intervals, and rates that only victims
    have)."""
    text = column.cell(line)
    if column.key == "wsr" and text.endswith("]"):
        value, _, interval = text.partition(" ")
        return [value, interval]
    return (
        [text, *(f"{name} {rate} %" for name, rate in _of_victims(line).items())] if column.key == "attack" else [text]
    )


def _of_victims(line: Line) -> dict[str, str]:
    """The rates that only victims have, by their names."""
    rates = {label: _rate(line.rows, key) for key, label in _OF_VICTIMS.items()}
    return {label: rate for label, rate in rates.items() if rate != NONE}


def _claim(line: Line, column: Column[Line]) -> str:
    """What a cell says about the verdict: ``yes``, ``partly``, ``false-claim``, or nothing."""
    if column.key == "control" and any(row.verified for row in line.controls):
        return "false-claim"
    claimed = [row.verified for row in line.rows if row.verified is not None]
    if column.key != "verified" or not any(claimed):
        return ""
    if line.row.role == "benign" or line.is_control:
        return "false-claim"
    return "yes" if all(claimed) else "partly"


def _style(line: Line, column: Column[Line]) -> str:
    return {"yes": "green", "partly": "yellow", "false-claim": "bold red", "": ""}[_claim(line, column)]


def _classes(line: Line, column: Column[Line]) -> str:
    kind = "name" if column.key == "watermark" else "" if column.text else "number"
    place = column.key if column.key in ("wsr", "control") else ""
    return " ".join(part for part in (kind, place, _claim(line, column)) if part)


def _constant(found: Sequence[Line], shown: Sequence[Column[Line]]) -> list[str]:
    stolen = [line for line in found if line.row.origin == "stolen"]
    return [
        column.key
        for column in shown
        if column.key in ("pool", "labels", "queries", "budget", "seeds", "key", "architecture")
        and len({column.cell(line) for line in (found if column.key in ("key", "architecture") else stolen)}) <= 1
    ]


def _rate(rows: Sequence[Row], field: str) -> str:
    """A rate in percent, e.g. ``"91.2"``, or ``"91.2 ± 0.4"`` for several seeds."""
    value = stat(getattr(row, field) for row in rows)
    if value is None:
        return NONE
    return f"{100 * value.mean:.1f}" + ("" if value.sd is None else f" ± {100 * value.sd:.1f}")


def _wsr(rows: Sequence[Row]) -> str:
    """As :func:`_rate`, but ``"45.3 [38.1, 52.7]"`` for one seed, and ``"100.0"`` if the key filter alone decides
    it."""
    if all(row.by_construction for row in rows):
        return f"{100 * (rows[0].wsr or 0):.1f}"
    low, high = rows[0].wsr_low, rows[0].wsr_high
    text = _rate(rows, "wsr")
    return text if len(rows) > 1 or low is None or high is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def _key(line: Line) -> str:
    """How many samples the key has; ``"90–100"`` if that varies over the seeds."""
    sizes = [row.key_samples for row in line.rows if row.key_samples is not None]
    return NONE if not sizes else str(sizes[0]) if len({*sizes}) == 1 else f"{min(sizes)}–{max(sizes)}"


def _control(line: Line) -> str:
    if line.good_controls:
        # no interval, so that the column stays readable; the data has a row for it
        rows = line.good_controls
        return _wsr(rows) if all(row.by_construction for row in rows) else _rate(rows, "wsr")
    return "failed" if line.controls else NONE


def _verified(line: Line) -> str:
    claimed = [row.verified for row in line.rows if row.verified is not None]
    if len(claimed) > 1:
        return f"{sum(claimed)} of {len(claimed)}"
    return ("yes" if claimed[0] else "no") if claimed else NONE


def _queries(line: Line) -> str:
    known = sorted({row.queries for row in line.rows if row.queries is not None})
    return NONE if not known else str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"


def _count(value: int | None) -> str:
    return NONE if value is None else str(value)


def _errors(found: Sequence[Line]) -> list[str]:
    labels = Labels(found)
    return [f"{labels.full(line)}, seed {line.row.seed}: {line.row.error}" for line in found if line.failed]


def _config(run_dir: Path) -> str:
    try:
        return (run_dir / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{run_dir / 'config.yaml'} cannot be read: {error}") from None
