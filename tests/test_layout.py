"""The rules of the layout: who may import whom, nothing unpickled, documented modules, no download address."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {"simulator": {"ray", "actors", "tuning"}, "actors": {"tuning"}, "tuning": set[str]()}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
COMPOSITION_ROOT = ROOT / "simulator" / "cli"
DOWNLOAD = re.compile(r"""https?://[^\s)"'<>]+\.(?:whl|tgz|tar\.gz)\b""")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Every top-level package that the source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def attributes(source: str) -> set[str]:
    """Every attribute that the source reads, as it is written: ``"torch.load"``."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def project_files() -> list[Path]:
    """What git tracks or would track; outside a git checkout, everything that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("package", BANNED)
def test_a_layer_imports_only_what_is_below_it(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in modules(package)
        if COMPOSITION_ROOT not in path.parents and (found := BANNED[package] & set(imported(path.read_text())))
    }
    assert wrong == {}


def test_an_import_inside_a_function_is_seen() -> None:
    source = "def f():\n    from ray.util import queue\n    import actors.replica, numpy\n"
    assert set(imported(source)) == {"ray", "actors", "numpy"}


@pytest.mark.parametrize("package", BANNED)
def test_nothing_is_unpickled(package: str) -> None:
    """Ruff says so too, but not in the composition root, where its rule is off."""
    assert [path.name for path in modules(package) if UNPICKLERS & set(imported(path.read_text()))] == []
    assert [path.name for path in modules(package) if "torch.load" in attributes(path.read_text())] == []


@pytest.mark.parametrize("package", BANNED)
def test_every_public_module_has_a_docstring(package: str) -> None:
    public = [path for path in modules(package) if path.name == "__init__.py" or not path.name.startswith("_")]
    assert public
    assert [path.name for path in public if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_file_names_a_download_address() -> None:
    found = {path.name: DOWNLOAD.findall(path.read_text(errors="replace")) for path in project_files()}
    assert {name: urls for name, urls in found.items() if urls} == {}
