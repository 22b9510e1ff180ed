"""What the reports of runs and of sweeps share: columns, the Markdown table, the plots' files and the HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simulator.files import write_atomically
from simulator.records.provenance import RunInfo

NONE = "–"

Of = TypeVar("Of")


@dataclass(frozen=True)
class Column(Generic[Of]):
    """A column of a table: its name in the code, its heading, and the function that gives a line's cell. Text stands
    left, numbers right."""

    key: str
    heading: str
    cell: Callable[[Of], str]
    text: bool = False


def printable(text: str) -> str:
    """Text as one line without control characters. An error may hold a traceback, or the escape codes of a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def markdown_cell(text: str) -> str:
    """Text, escaped for a cell of a Markdown table."""
    escaped = html.escape(printable(text), quote=False)
    for letter in "\\|*_`[]~":
        escaped = escaped.replace(letter, "\\" + letter)
    return escaped


def markdown_table(columns: Sequence[Column[Of]], lines: Sequence[Of]) -> list[str]:
    """A table as lines of GitHub-flavoured Markdown."""
    return [
        "| " + " | ".join(markdown_cell(column.heading) for column in columns) + " |",
        "| " + " | ".join("---" if column.text else "---:" for column in columns) + " |",
        *("| " + " | ".join(markdown_cell(column.cell(line)) for column in columns) + " |" for line in lines),
    ]


def facts(info: RunInfo) -> list[tuple[str, str]]:
    """The provenance of a run, as names and values for its page."""
    took = NONE if info.finished is None else str(info.finished - info.started).partition(".")[0]
    commit = NONE if info.git_commit is None else info.git_commit + (" + changes" if info.git_dirty else "")
    return [
        ("status", info.status),
        ("mode", {"ray": "on Ray", "local": "local, without Ray"}[info.mode]),
        ("started", f"{info.started:%Y-%m-%d %H:%M:%S %Z}"),
        ("took", took),
        ("command", " ".join(info.argv)),
        ("seeds", ", ".join(map(str, info.seeds))),
        ("commit", commit),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
        ("host", f"{info.host.hostname}, {info.host.cpus or '?'} CPUs, {info.host.platform}"),
        ("config SHA-256", info.config_sha256),
    ]


def write_page(
    report: Path,
    template: Path,
    info: RunInfo,
    markdown: str,
    drawn: Mapping[str, str | None],
    more: Sequence[tuple[str, str]] = (),
    **values: Any,
) -> Path:
    """Writes a report's folder; returns the path of its ``index.html``.

    Args:
        template: which extends ``base.html``.
        markdown: what ``table.md`` holds.
        drawn: SVGs by name, each a file of its own; one that could not be drawn is None, and its old file goes.
        more: facts beside those of ``info``: names and values.
        values: what the template asks for; the inlined plots are ``svgs``, and ``info`` and ``facts`` are there.
    """
    from simulator.report import plots  # imported late: matplotlib takes a while, and the terminal's table does without

    for name, svg in drawn.items():
        file = report / f"{name}.svg"
        if svg is None:
            file.unlink(missing_ok=True)
        else:
            write_atomically(file, svg.encode())
    write_atomically(report / "table.md", markdown.encode())
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    svgs = {name: plots.inline(svg, name) for name, svg in drawn.items() if svg}
    page = report / "index.html"
    text = environment.get_template(template.name).render(info=info, facts=[*facts(info), *more], svgs=svgs, **values)
    write_atomically(page, text.encode())
    return page
