"""SECURITY.md promises what is tested: every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    missing = []
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [] if name in functions else [f"{file}::{name}"]
    assert not missing


def test_every_promise_names_its_test() -> None:
    section = PAGE.split("## What is promised")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) > 20
    assert not [row for row in rows if "::test_" not in row]


def test_the_pages_that_it_refers_to_exist() -> None:
    assert not [page for page in re.findall(r"\]\(([\w/.-]+)\)", PAGE) if not (ROOT / page).is_file()]
