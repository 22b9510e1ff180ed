"""The search space: dotted paths of a run configuration, each with one of Tune's domains, and their enumeration.

space:
  watermarks.0.margin: {loguniform: [0.5, 10]}
  watermarks.0.centroid: {choice: [batch, learnable]}
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import model_validator
from ray import tune
from ray.tune.search.sample import Domain

from simulator.component import Settings, one_of
from simulator.errors import InputError
from simulator.plan.config import RunConfig, check_config
from simulator.plan.settings_file import set_path
from simulator.plan.subjects import short_hash
from simulator.seeding import seed_of

#: values of searched fields by dotted path, of JSON's types
Setting = dict[str, Any]

#: Tune's numeric domains, with the arguments of each
NUMERIC = {
    "uniform": ("lower", "upper"),
    "quniform": ("lower", "upper", "q"),
    "loguniform": ("lower", "upper"),
    "qloguniform": ("lower", "upper", "q"),
    "randn": ("mean", "sd"),
    "qrandn": ("mean", "sd", "q"),
    "randint": ("lower", "upper"),
    "qrandint": ("lower", "upper", "q"),
    "lograndint": ("lower", "upper"),
    "qlograndint": ("lower", "upper", "q"),
}
LISTS = ("choice", "grid")
#: significant digits of a sampled number: settings that differ by less are one setting
DIGITS = 4
#: settings that all trials share, so they cannot be searched
SHARED = (
    *("name", "seeds", "dataset", "device", "resources", "verification", "controls", "accuracy_tolerance"),
    "accuracy_loss",
    *("save_transfer_sets", "sync_ledger", "query_log", "detectors", "benign_clients"),
)


class Axis(Settings):
    """One searched field: a domain's name and its arguments, as in ``{loguniform: [0.5, 10]}``."""

    domain: str
    arguments: tuple[Any, ...]

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: object) -> object:
        if isinstance(value, Mapping) and set(value) == {"domain", "arguments"}:
            return {"domain": value["domain"], "arguments": tuple(value["arguments"])}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise InputError(f"{value!r} is not a domain; allowed: one of {', '.join((*NUMERIC, *LISTS))} with a list")
        ((name, arguments),) = value.items()
        if not isinstance(arguments, list | tuple):
            raise InputError(f"{name}: {arguments!r} is not a list of arguments")
        return {"domain": name, "arguments": tuple(arguments)}

    @model_validator(mode="after")
    def _known(self) -> Axis:
        name, arguments = self.domain, self.arguments
        if name not in (*NUMERIC, *LISTS):
            raise InputError(f"domain {one_of(name, [*NUMERIC, *LISTS])}")
        if name in LISTS:
            if not arguments or len({json.dumps(value) for value in arguments}) < len(arguments):
                raise InputError(f"{name}: {list(arguments)} must be at least one value, all different")
            return self
        wanted = NUMERIC[name]
        if len(arguments) != len(wanted) or not all(_is_number(value) for value in arguments):
            raise InputError(f"{name}: {list(arguments)} must be numbers: [{', '.join(wanted)}]")
        if wanted[0] == "lower" and not arguments[0] < arguments[1]:
            raise InputError(f"{name}: lower {arguments[0]} is not below upper {arguments[1]}")
        if "log" in name and not arguments[0] > 0:
            raise InputError(f"{name}: lower {arguments[0]} must be above 0")
        if "q" in wanted and not arguments[-1] > 0:
            raise InputError(f"{name}: q {arguments[-1]} must be above 0")
        if "int" in name and not all(isinstance(value, int) for value in arguments):
            raise InputError(f"{name}: {list(arguments)} must be whole numbers")
        return self

    @property
    def tune(self) -> Domain:
        """The axis as Tune's own domain. A grid becomes a choice."""
        if self.domain in LISTS:
            listed: Domain = tune.choice(list(self.arguments))
            return listed
        domain: Domain = getattr(tune, self.domain)(*self.arguments)
        return domain

    @property
    def logarithmic(self) -> bool:
        """Whether its plots have a logarithmic axis."""
        return "log" in self.domain

    @property
    def numeric(self) -> bool:
        """Whether all its values are numbers."""
        return self.domain in NUMERIC or all(_is_number(value) for value in self.arguments)

    def examples(self) -> list[Any]:
        """Values for a test whether the field takes the domain: the ends of a range, or every entry of a list."""
        if self.domain in LISTS:
            return list(self.arguments)
        if "randn" in self.domain:
            return [float(self.arguments[0])]
        low, high = self.arguments[:2]
        return [low, high - 1] if "int" in self.domain and "q" not in self.domain else [rounded(low), rounded(high)]

    def sample(self, random: np.random.RandomState) -> Any:
        """One value, drawn as Tune draws it."""
        return rounded(self.tune.sample(random_state=random))

    def contains(self, value: Any) -> bool:
        """Whether the domain can give this value."""
        if self.domain in LISTS:
            return value in self.arguments
        if not _is_number(value) or "randn" in self.domain:
            return _is_number(value)
        return bool(self.arguments[0] <= value <= self.arguments[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(value: Any) -> Any:
    """A number as plain Python, with fractions cut to :data:`DIGITS` digits. Any other value stays as it is."""
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def setting_id(setting: Setting) -> str:
    """A trial's id: a hash of its setting. So the same setting is the same trial, also in a resumed sweep."""
    return short_hash(setting)


def applied(base: RunConfig, setting: Setting) -> RunConfig:
    """The run configuration with the searched fields set.

    Raises:
        InputError: no such field, or it refuses the value.
    """
    data = json.loads(base.to_json())
    for path, value in setting.items():
        set_path(data, path, copy.deepcopy(value), f"space: {path}")
    return check_config(data, f"space: {', '.join(f'{path}={value}' for path, value in setting.items())}")


def value_at(base: RunConfig, path: str) -> Any:
    """The value that the base configuration has at a dotted path.

    Raises:
        InputError: there is no such field.
    """
    place: Any = json.loads(base.to_json())
    for part in path.split("."):
        inside = isinstance(place, list) and part.isdecimal() and int(part) < len(place)
        if not inside and not (isinstance(place, dict) and part in place):
            there = list(place) if isinstance(place, dict) else [str(at) for at in range(len(place or ()))]
            raise InputError(f"space: {path}: {one_of(part, there)}" if there else f"space: {path}: no such setting")
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place


def default_setting(base: RunConfig, space: Mapping[str, Axis]) -> Setting:
    """The base configuration's values of the searched fields."""
    return {path: value_at(base, path) for path in sorted(space)}


def check_space(base: RunConfig, space: Mapping[str, Axis]) -> Iterator[RunConfig]:
    """Tries every axis on the base configuration; yields the configurations, so that they can be checked on the data.

    Raises:
        InputError: an axis does not fit. The message names the path, the value, and what is allowed.
    """
    if not space:
        raise InputError("space: nothing is searched; give at least one dotted path with a domain")
    for path, axis in space.items():
        if path.partition(".")[0] in SHARED:
            raise InputError(f"space: {path}: cannot be searched: all trials share {', '.join(SHARED)}")
        value_at(base, path)
        for value in axis.examples():
            config = applied(base, {path: value})
            if len(config.watermarks) != 1 or _attacks(config) != _attacks(base):
                raise InputError(f"space: {path}: {value!r} changes the number of watermarks or of scenarios")
            yield config


def _attacks(config: RunConfig) -> int:
    return sum(len(entry.expand()) for entry in config.scenarios)


def grid(base: RunConfig, space: Mapping[str, Axis]) -> list[Setting]:
    """The default setting, then every combination of the axes' values.

    Raises:
        InputError: an axis has no list of values.
    """
    for path, axis in space.items():
        if axis.domain not in LISTS:
            raise InputError(f"space: {path}: search 'grid' takes {' or '.join(LISTS)}, found {axis.domain}")
    paths = sorted(space)
    every = itertools.product(*(space[path].arguments for path in paths))
    return _unique([default_setting(base, space), *(dict(zip(paths, values, strict=True)) for values in every)])


def random(base: RunConfig, space: Mapping[str, Axis], trials: int, seed: int) -> list[Setting]:
    """The default setting, then random ones. An axis with a grid takes its values in turn.

    The i-th setting depends on the seed and on i alone. A repeated setting is drawn again. If a hundred draws give no
    new one, the result has fewer than ``trials``.
    """
    paths = sorted(space)
    combinations = list(itertools.product(*(space[path].arguments for path in paths if space[path].domain == "grid")))
    found = [default_setting(base, space)]
    for number in range(trials - 1):
        turn = dict(
            zip(
                [path for path in paths if space[path].domain == "grid"],
                combinations[number % len(combinations)],
                strict=True,
            )
        )
        for draw in range(100):
            source = np.random.RandomState(seed_of("sweep", seed, number, draw) % 2**32)
            setting = {path: turn[path] if path in turn else space[path].sample(source) for path in paths}
            if setting not in found:
                found.append(setting)
                break
    return found


def _unique(settings: list[Setting]) -> list[Setting]:
    return list({setting_id(setting): setting for setting in settings}.values())
