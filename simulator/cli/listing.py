"""``exsim list``: the names that a configuration may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table

from simulator.cli import terminal
from simulator.errors import InputError


def show_list(what: str) -> int:
    """Prints the components of one family, or of all; returns the exit status.

    Raises:
        InputError: there is no such family.
    """
    from simulator.attacks.base import ATTACKS
    from simulator.component import one_of
    from simulator.data.dataset import describe_datasets
    from simulator.detectors.base import DETECTORS
    from simulator.evasions.base import EVASIONS
    from simulator.models import describe_models
    from simulator.ownership.base import OWNERSHIP
    from simulator.plan.settings_file import presets
    from simulator.removals.base import REMOVALS
    from simulator.transforms.base import TRANSFORMS
    from simulator.watermarks.base import WATERMARKS

    families: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "attacks": lambda: _components(ATTACKS),
        "watermarks": lambda: _components(WATERMARKS),
        "removals": lambda: _components(REMOVALS),
        "evasions": lambda: _components(EVASIONS),
        "transforms": lambda: _components(TRANSFORMS),
        "detectors": lambda: _components(DETECTORS),
        "ownership_tests": lambda: _components(OWNERSHIP),
        "models": describe_models,
        "datasets": describe_datasets,
        "presets": lambda: list(presets().items()),
        "sweeps": lambda: list(presets("tuning").items()),
    }
    if what not in (*families, "all"):
        raise InputError(one_of(what, [*families, "all"]))
    console = terminal.console()
    for family, entries in families.items():
        if what in (family, "all"):
            table = Table(title=family, title_justify="left", show_header=False, box=None, padding=(0, 2))
            for name, about in entries():
                table.add_row(name, about)
            console.print(table)
    return 0


def _components(registry: Any) -> list[tuple[str, str]]:
    """Name, first docstring line, paper and settings of every component of a family."""
    entries = []
    for name, cls in registry.classes().items():
        about = (cls.__doc__ or "no description").strip().splitlines()[0]
        fields = ", ".join(f"{key}={_brief(field)}" for key, field in cls.model_fields.items() if key != "name")
        entries.append((name, "\n".join(filter(None, (about + (f" ({cls.paper})" if cls.paper else ""), fields)))))
    return entries


def _brief(field: FieldInfo) -> str:
    """A setting's default, e.g. ``0.5``, ``{...}`` for nested settings, ``(required)`` if it has none."""
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "{...}"
    return str(list(value) if isinstance(value, tuple) else value)
