"""Plug-ins: distributions that a test installs for itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PlugIn = Callable[..., Path]


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlugIn]:
    """``plug_in("somebody", source, attacks="Idle")`` installs the distribution ``somebody`` 1.0.

    It is one module with an entry point ``somebody:Idle`` in the group ``exsim.attacks``. Its place is the answer. Its
    modules, and the classes in them, are gone after the test.
    """
    root = tmp_path / "site-packages"
    names = []

    def install(name: str, source: str, **points: str) -> Path:
        info = root / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (root / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[exsim.{group}]\n{entry} = {name}:{entry}\n" for group, entry in points.items()]
        (info / "entry_points.txt").write_text("".join(lines))
        names.append(name)
        monkeypatch.syspath_prepend(root)
        return root

    yield install
    for name in names:
        sys.modules.pop(name, None)
    gc.collect()
