"""What all commands share: the terminal, paths as a person types them, and settings that keep Ray quiet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console

#: exit status after Ctrl-C
INTERRUPTED = 130


class Typed(click.Path):
    """A path, or text that may be one or a URI. An empty one, as an unset shell variable leaves it, is no default."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not value.strip():
            self.fail("it is empty; leave the option out, or name a place", param, ctx)
        return super().convert(value, param, ctx)


def console() -> Console:
    """The terminal. For a file or a pipe it is 120 columns wide."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def shown(path: Path) -> str:
    """A path as a person would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def quiet_ray() -> None:
    """Makes the settings that Ray reads at import: no usage report, no deprecation notes on the user's terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
