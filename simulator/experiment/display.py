"""Shows the progress of a run: live on a terminal (rich), otherwise as one plain line every 30 seconds.

All progress listeners write to one :class:`Display`, a table of tasks under way. In a Ray run they post to an actor,
whose table is copied here a few times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from simulator.progress import Progress
from simulator.records.rows import Row

#: seconds between two plain lines
PLAIN_INTERVAL = 30.0


@dataclass(frozen=True)
class Task:
    """One piece of work under way. A theft also has ``budget`` and ``spent``, in images."""

    label: str
    phase: str = "starting"
    done: int = 0
    total: int = 1
    budget: int | None = None
    spent: int = 0

    def line(self) -> str:
        """One line, e.g. ``knockoff soft patches from deeptracer: train 3/10, 2000/2000 images``."""
        images = f", {self.spent}/{self.budget} images" if self.budget is not None else ""
        return f"{self.label}: {self.phase} {self.done}/{self.total}{images}"


@dataclass
class Display:
    """Draws a run's tasks and counts its rows. Use it as a context.

    Args:
        total: scenarios and victims that will be measured.
        quiet: draw nothing but notes.
        noun: the word behind the count, e.g. ``trials ended``.
    """

    console: Console
    total: int
    quiet: bool = False
    noun: str = "measured"
    tasks: dict[str, Task] = field(default_factory=dict)
    finished: int = 0
    failures: int = 0
    status: str = ""
    _live: Live | None = None
    _started: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    @contextmanager
    def task(self, label: str, budget: int | None = None, spent: Callable[[], int] = lambda: 0) -> Iterator[Progress]:
        """Shows a task inside the block and yields its progress listener. ``spent`` returns the images charged so
        far."""
        self.update(label, Task(label, budget=budget))

        def listen(phase: str, done: int, total: int) -> None:
            self.update(label, replace(self.tasks[label], phase=phase, done=done, total=total, spent=spent()))

        try:
            yield listen
        finally:
            self.tasks.pop(label, None)

    def update(self, name: str, task: Task) -> None:
        """Shows a task as it stands now."""
        self.tasks[name] = task
        self.tick()

    def replace_all(self, tasks: dict[str, Task], status: str = "") -> None:
        """Shows these tasks and no others."""
        self.tasks, self.status = dict(tasks), status
        self.tick()

    def rows(self, rows: Sequence[Row]) -> None:
        """Counts one measured model, given its rows. A failure or a warning is printed at once."""
        self.finished += 1
        for row in rows:
            if row.status == "failed":
                self.failures += 1
                self.note(f"failed: {row.attack or 'training'} on {row.victim}: {row.error}", "bold red")
            if row.warning:
                self.note(f"WARNING: {row.victim}: {row.warning}", "bold yellow")

    def note(self, text: str, style: str = "") -> None:
        """Prints one line that stays."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def tick(self) -> None:
        """Prints the plain line if it is due and there is no live view."""
        now = time.monotonic()
        if self._live or self.quiet or now - self._last_line < PLAIN_INTERVAL:
            return
        self._last_line = now
        under_way = "; ".join(task.line() for task in self.tasks.values()) or self.status
        self.note(f"[{now - self._started:.0f} s] {self.finished}/{self.total} {self.noun}; {under_way}")

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for task in list(self.tasks.values()):
            share = f"{task.spent}/{task.budget} images" if task.budget is not None else ""
            bar = ProgressBar(total=max(task.total, 1), completed=task.done, width=20)
            table.add_row(
                Text(task.label, overflow="ellipsis", no_wrap=True),
                bar,
                f"{task.phase} {task.done}/{task.total}",
                share,
            )
        seconds = time.monotonic() - self._started
        failed = f", {self.failures} failed" if self.failures else ""
        status = f"  {self.status}" if self.status else ""
        return Group(
            table, Text(f"{self.finished}/{self.total} {self.noun}{failed}, {seconds:.0f} s{status}", style="dim")
        )
