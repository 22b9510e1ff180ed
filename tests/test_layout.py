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
#: who may import whom: each room, and the rooms below it that it knows. "ground" are the modules of simulator/ itself.
ROOMS: dict[str, set[str]] = {
    "ground": set(),
    "data": {"ground"},
    "models": {"ground"},
    "training": {"ground", "models"},
    "transforms": {"ground"},
    "detectors": {"ground", "data"},
    "service": {"ground", "models", "training", "detectors"},
    "ownership": {"ground", "data", "models", "training", "service"},
    "attacks": {"ground", "data", "models", "training", "transforms", "service"},
    "watermarks": {"ground", "data", "models", "training", "transforms", "ownership"},
    "removals": {"ground", "data", "models", "training", "transforms", "service", "watermarks"},
    "evasions": {"ground", "data", "models", "training", "transforms", "service"},
    "analysis": {"ground", "data", "models", "training", "service", "ownership", "watermarks"},
    "plan": {
        *("ground", "data", "models", "training", "detectors", "service"),
        *("ownership", "attacks", "watermarks", "removals", "evasions"),
    },
    "records": {"ground", "detectors"},
    "report": {"ground", "records", "service"},
}
ROOMS["experiment"] = ROOMS.keys() - {"report"}
ROOMS["actors"] = ROOMS.keys() - {"report"}
ROOMS["tuning"] = ROOMS.keys() - {"cli"}
ROOMS["cli"] = set(ROOMS)
#: modules that only pass a name on: the old places of two functions, the public surface, and ``python -m simulator``
PASSING_ON = {"simulator.config", "simulator.local", "simulator.api", "simulator", "simulator.__main__"}
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


def module_name(path: Path) -> str:
    """``simulator/data/pool.py`` is ``simulator.data.pool``; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room that a module lies in."""
    package, *rest = module.split(".")
    if package != "simulator":
        return package
    return rest[0] if rest and (ROOT / package / rest[0]).is_dir() else "ground"


def targets(node: ast.AST, known: set[str]) -> Iterator[str]:
    """The project's modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in known else node.module
    return


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those inside functions or ``if TYPE_CHECKING``."""
    for node in tree.body:
        yield from (node.body if isinstance(node, ast.Try) else [node])


def graph(*, everywhere: bool) -> dict[str, set[str]]:
    """Which module imports which, everywhere in its text or only when it is imported."""
    paths = {module_name(path): path for package in BANNED for path in modules(package)}
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if everywhere else at_import(tree)
        found[name] = {other for node in nodes for other in targets(node, set(paths)) if other in paths} - {name}
    return found


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The modules from which a walk along the arrows leads back to them."""
    reached = {name: set(others) for name, others in arrows.items()}
    changed = True
    while changed:
        changed = False
        for others in reached.values():
            more = set().union(*(reached[other] for other in others), others) if others else others
            changed |= len(more) > len(others)
            others |= more
    return sorted(name for name, others in reached.items() if name in others)


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


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(module_name(path)) for package in BANNED for path in modules(package)}
    assert rooms <= ROOMS.keys()


def test_no_import_goes_up() -> None:
    """Arrows point down in the table, those inside functions, too."""
    wrong = [
        f"{name} imports {other}"
        for name, others in graph(everywhere=True).items()
        for other in sorted(others)
        if name not in PASSING_ON and room_of(other) not in {room_of(name), *ROOMS[room_of(name)]}
    ]
    assert wrong == []


def test_the_table_has_no_circle() -> None:
    assert circles({room: {*below} for room, below in ROOMS.items()}) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph(everywhere=False)) == []


def test_a_circle_and_an_arrow_up_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    known = {"simulator.data.pool", "tuning.sweep"}
    (node,) = ast.parse("from tuning import sweep").body
    assert list(targets(node, known)) == ["tuning.sweep"]
    assert room_of("simulator.files") == "ground"
    assert room_of("simulator.data.pool") == "data"


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
