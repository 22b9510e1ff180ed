"""Fuzzed configurations: every preset with values replaced, dropped, retyped and misplaced, damaged as text, and
changed by ``--set``. Each must be a valid configuration, which reads back equal and has a plan, or one line of
InputError."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.fuzz_queries import Tally
from simulator.cli import main as exsim
from simulator.errors import InputError
from simulator.plan.config import RunConfig, check_config, read_config
from simulator.plan.settings_file import presets
from simulator.plan.tree import make_plan

#: scenarios, seeds or victims above which a plan would take the fuzzer's time
LARGE = 200
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, -1e308, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30,
    10**400, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "~", "null", "digits", "knockoff", "deeptracer", "patches", "attacker", "soft", "hard", "top-0", "top-5",
    "top-99999999999999999999", "round-2", "auto", "cuda", "naivenet", "resnet18", "x" * 5000, "a\nb", "\0", "\u2028",
    "../../x", "/etc/passwd", "/dev/null", "a.npz", "~", "${HOME}", "{{7*7}}", "1e5", "0x10", "1_000", "é", "٣", "%s%n",
)  # fmt: skip
KEYS = (
    "name",
    "training",
    "epochs",
    "budget",
    "parts",
    "stages",
    "attack",
    "classes",
    "size",
    "",
    "0",
    "__class__",
    "é",
)
#: what YAML lets one write
ODDITIES = (
    "&a [*a]", "*nobody", "!!python/object/apply:os.getcwd []", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]",
    "<<: 1", "? [1]\n: 2", "--- \n---", "%YAML 9.9", "!x y", "2026-01-31", "1:30:00", "0o17", "0b1", ".inf", ".NaN",
    "=", "yes", "{a: 1, a: 2}", "[" * 60, "{" * 300, "'", '"\\ud800"', "|\n  text", ">-\n  text", "\t",
    "\x07", "\ufeff", "- ", "@", "`", "9" * 5000, "-0", "1e999", "!!float nan", "!!int x", "!!timestamp x", "!!null x",
    "# only a remark", "? ",
)  # fmt: skip
FAR = ("a", "0", "-1", "1", "99", "9" * 30, "", " ", "é", "٣", "²", "name", "training", "attack", "epochs", "__class__")


@cache
def source(preset: str) -> str:
    """The text of a preset."""
    return (files("simulator") / "presets" / f"{preset}.yaml").read_text()


@cache
def _data(preset: str, resolved: bool) -> dict[str, Any]:
    """A preset as plain data: as it is written, or with every default written out."""
    data: dict[str, Any] = json.loads(read_config(preset).to_json()) if resolved else yaml.safe_load(source(preset))
    return data


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested mappings and lists, the deepest left out."""
    if len(path) > 30:
        return
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def junk(dice: Random, depth: int = 0) -> Any:
    """A value of any kind, now and then a deep one."""
    kind = dice.random()
    if kind < 0.4:
        return dice.choice(NUMBERS)
    if kind < 0.65:
        return dice.choice(TEXTS)
    if kind < 0.75:
        return dice.choice([None, True, False])
    if kind < 0.77:
        deep: Any = 1
        for _ in range(dice.choice([5, 60, 2000])):
            deep = [deep] if dice.random() < 0.5 else {"a": deep}
        return deep
    inner = [junk(dice, depth + 1) for _ in range(dice.randint(0, 3))] if depth < 3 else []
    return inner if kind < 0.88 else {dice.choice(KEYS): value for value in inner}


def _near(dice: Random, value: Any) -> Any:
    """A value that is likely to be as good as this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return max(1, value + dice.choice([-1, 1, value]))
    if isinstance(value, float):
        return value * dice.choice([0.5, 0.9, 1.1])
    if isinstance(value, list):
        return value[: dice.randint(0, len(value))]
    return dice.choice([value, *TEXTS])


def mutate(dice: Random, data: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to three changes anywhere."""
    data = copy.deepcopy(data)
    for _ in range(dice.choice([1, 1, 2, 3])):
        *parents, key = dice.choice(list(_places(data)) or [("name",)])
        place: Any = data
        for parent in parents:
            place = place[parent]
        change = dice.choice(["replace", "nudge", "nudge", "nudge", "retype", "drop", "add", "misspell", "swap"])
        value = place[key]
        if change == "nudge":
            place[key] = _near(dice, value)
        elif change == "drop":
            del place[key]
        elif change == "retype":
            place[key] = dice.choice([str(value), [value], {"name": value}, {"x": value}, json.dumps(value)])
        elif change == "add" and isinstance(place, dict):
            place[dice.choice(KEYS + TEXTS)] = junk(dice)
        elif change == "misspell" and isinstance(place, dict) and isinstance(key, str):
            place[key[:-1] + dice.choice(["", "x", "S"])] = place.pop(key)
        elif change == "swap":
            place[key] = copy.deepcopy(dice.choice([data, place, _data(dice.choice(sorted(presets())), False)]))
        else:
            place[key] = junk(dice)
    return data


def _damaged(dice: Random, text: str) -> str:
    """The text with something cut out or put in."""
    start = dice.randrange(len(text) + 1)
    piece = dice.choice([*ODDITIES, *TEXTS, ": ", "\n", "  ", "[", "}", ",", "- ", "&a ", "*a", "#"])
    return text[:start] + piece + text[start + dice.choice([0, 0, 1, 5, 40]) :]


def _override(dice: Random, data: dict[str, Any]) -> str:
    """An argument of ``--set``."""
    if dice.random() < 0.15:
        return dice.choice([*ODDITIES, *TEXTS, "=", "=1", "a", "a=", ".=1", "..=1", "a..b=1", "=" * 100])
    path = [str(part) for part in dice.choice(list(_places(data)))]
    if dice.random() < 0.4:
        path.insert(dice.randint(0, len(path)), dice.choice(FAR))
    try:
        text = dice.choice(ODDITIES) if dice.random() < 0.3 else json.dumps(junk(dice))
    except (RecursionError, ValueError):
        text = "[" * 2000
    return f"{'.'.join(path)}={text}"


def _read(dice: Random, folder: Path) -> RunConfig:
    """One fuzzed configuration, read in one of the ways in which a user gives one."""
    preset = dice.choice(sorted(presets()))
    data = _data(preset, dice.random() < 0.5)
    way = dice.choice(["data", "data", "yaml", "text", "set", "set", "cli"])
    if way == "data":
        return check_config(mutate(dice, data))
    if way == "set":
        return read_config(preset, [_override(dice, data) for _ in range(dice.choice([1, 1, 2]))])
    file = folder / "fuzz.yaml"
    if way == "yaml":
        try:
            text = yaml.safe_dump(mutate(dice, data), allow_unicode=dice.random() < 0.5)
        except (RecursionError, ValueError):
            text = "[" * 3000
    else:
        text = _damaged(dice, source(preset))
    file.write_bytes(text.encode(errors="surrogatepass") if dice.random() < 0.95 else text.encode("utf-16"))
    if way == "cli":
        _plan(["plan", str(file), "--set", _override(dice, data)] if dice.random() < 0.5 else ["plan", str(file)])
    return read_config(str(file))


def _plan(arguments: list[str]) -> None:
    """The command line on a configuration: a plan, or one line on stderr and status 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = exsim(arguments)
    lines = err.getvalue().splitlines()
    if (status, len(lines)) not in ((0, 0), (2, 1)):
        raise AssertionError(f"exsim plan: status {status}, {len(lines)} lines on stderr: {lines[:2]}")


def case(dice: Random, folder: Path, tally: Tally) -> None:
    """One configuration, judged."""
    try:
        config = _read(dice, folder)
    except InputError as error:
        text = str(error)
        tally.refused["InputError"] += 1
        if len(text.splitlines()) != 1 or not text.strip():
            tally.faults.append(f"a refusal of {len(text.splitlines())} lines: {text[:200]!r}")
        return
    except Exception as error:  # whatever comes is judged
        tally.refused[type(error).__name__] += 1
        tally.faults.append(f"{type(error).__name__}: {str(error)[:200]!r}")
        return
    tally.answered += 1
    try:
        file = folder / "again.yaml"
        file.write_text(config.to_yaml())
        if read_config(str(file)) != config:
            tally.faults.append("a valid configuration that does not read back equal")
        if len(config.seeds) * len(config.watermarks) * sum(len(each.expand()) for each in config.scenarios) < LARGE:
            make_plan(config)
    except Exception as error:
        tally.faults.append(f"valid, and then {type(error).__name__}: {str(error)[:200]!r}")


def episode(dice: Random, cases: int) -> Tally:
    """A row of cases."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="exsim-fuzz-") as folder:
        for _ in range(cases):
            case(dice, Path(folder), tally)
    return tally
