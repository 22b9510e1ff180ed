"""YAML files of settings, presets and the user's own: reads them strictly into plain data, sets dotted paths, writes.

This module does not know what the settings mean: see :mod:`simulator.plan.config` for a run's.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from simulator.component import one_of
from simulator.errors import InputError

#: characters that the aliases of a file may add to those that are written
MAX_ALIASED = 250_000


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that is read back as it was."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False)
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML with four changes. ``1e-3`` is a number (YAML 1.1 takes it for text). A day is text, because no setting
    is a date, but a run may be named by one. A key given twice is an error. The aliases of a file may stand for little
    text only."""

    def get_single_node(self) -> yaml.Node | None:
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _check_aliases(root)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise InputError(f"key {key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def _check_aliases(root: yaml.Node) -> None:
    """Checks what aliases stand for by counting: nine levels of nine aliases would build a hundred million values.

    Raises:
        InputError: the aliases stand for too much, or a list or mapping contains itself.
    """
    expanded: dict[int, int] = {}
    under_way: set[int] = set()
    written = 0

    def size(node: yaml.Node) -> int:
        nonlocal written
        if id(node) in under_way:
            raise InputError(f"line {node.start_mark.line + 1}: a list or mapping contains itself")
        if id(node) not in expanded:
            own = 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            under_way.add(id(node))
            children = (part for each in inside for part in (each if isinstance(each, tuple) else (each,)))
            expanded[id(node)] = own + sum(size(child) for child in children)
            under_way.remove(id(node))
            written += own
        return expanded[id(node)]

    aliased = size(root) - written
    if aliased > MAX_ALIASED:
        raise InputError(f"its aliases stand for {aliased:,} characters beside those written, allowed: {MAX_ALIASED:,}")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Safe YAML. It quotes text that :class:`_Loader` would take for a number, e.g. ``'1e-3'``."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )


def presets(package: str = "simulator") -> dict[str, str]:
    """The presets that a package ships: name and first comment line."""
    folder = files(package) / "presets"
    texts = {item.name[:-5]: item.read_text() for item in folder.iterdir() if item.name.endswith(".yaml")}
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(texts.items())}


def read_settings(source: str, package: str = "simulator") -> dict[str, Any]:
    """The plain data of a YAML file, or of a preset that the package ships.

    Raises:
        InputError: no such preset or file, or it is no YAML mapping.
    """
    known, path, source = presets(package), source, as_line(source)
    if source in known:
        text = (files(package) / "presets" / f"{source}.yaml").read_text()
    elif _is_file(path):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: cannot be read as text: {error}") from None
    elif source.endswith((".yaml", ".yml")) or "/" in source:
        raise InputError(f"{source}: {'is a directory' if _is_folder(path) else 'no such file'}; wanted a YAML file")
    else:
        there = f"{source} is a directory; " if _is_folder(path) else ""
        raise InputError(f"{there}no preset or file of that name: {one_of(source, list(known))}")
    data = _parse(text, source)
    if data is None:
        raise InputError(f"{source}: is empty; a configuration is a mapping of settings")
    if not isinstance(data, dict):
        raise InputError(f"{source}: a configuration is a mapping of settings, found {type(data).__name__}")
    return data


def as_line(text: str) -> str:
    """What the user typed, on one line, for an error message."""
    return " ".join(text.split())


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # e.g. the name is longer than the system allows
        return False


def _is_folder(source: str) -> bool:
    try:
        return Path(source).is_dir()
    except OSError:
        return False


def _parse(text: str, source: str) -> Any:
    try:
        return _apart(yaml.load(text, _Loader))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except Exception as error:  # PyYAML lets other errors through, e.g. int()'s of 0x_
        raise InputError(f"{source}: not YAML: {as_line(str(error))}") from None


def _apart(value: Any) -> Any:
    """A copy in which no two places share a list or mapping. PyYAML gives an anchor and its aliases one object, so a
    value set in one place would be set in all."""
    if isinstance(value, dict):
        return {key: _apart(each) for key, each in value.items()}
    return [_apart(each) for each in value] if isinstance(value, list) else value


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted path of nested mappings and lists, e.g. ``watermarks.0.margin=2``.

    Raises:
        InputError: ``override`` is not of this form, or there is no such place.
    """
    path, equals, text = override.partition("=")
    override = as_line(override)
    if not equals or not path:
        raise InputError(f"--set {override}: wanted key=value, as in --set watermarks.0.margin=2")
    set_path(data, path, _parse(text, f"--set {override}"), f"--set {override}")


def set_path(data: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Sets the value at a dotted path. If there is no such place, the error begins with ``what``.

    Raises:
        InputError: the path leads through something that is no mapping or list, or past the end of a list.
    """
    place: Any = data
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(place, list):
            place = place[_position(place, part, what)]
        elif isinstance(place, dict):
            # a component or a data set may stand as its bare name, which becomes a mapping here
            if isinstance(place.get(part), str):
                place[part] = {"name": place[part]}
            place = place.setdefault(part, {})
        else:
            raise InputError(f"{what}: {part!r} is not inside a mapping or a list")
        if isinstance(place, str):
            raise InputError(f"{what}: {part!r} is a plain value; write it as a mapping with 'name' first")
    if isinstance(place, list):
        place[_position(place, last, what)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"{what}: {last!r} is not inside a mapping or a list")


def _position(place: list[Any], part: str, what: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(place):
        raise InputError(f"{what}: {part!r} is not a position in a list of {len(place)} (counted from 0)")
    return int(part)
