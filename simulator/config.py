"""A run's configuration: one YAML file, strict, with ``--set key=value`` overrides.

The file is a preset's name (``digits``) or a path. Everything that can be wrong in it is refused with one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from simulator.answers import Labels
from simulator.attacks.base import ATTACKS
from simulator.component import Settings, describe, one_of
from simulator.data import DataConfig
from simulator.detectors.base import DETECTORS, BenignClients
from simulator.errors import InputError
from simulator.models import ARCHITECTURES
from simulator.pools import PoolSpec
from simulator.service import Precision
from simulator.training import Recipe
from simulator.verification import Verification
from simulator.watermarks.base import WATERMARKS
from simulator.watermarks.filter import KeyFilter


def _many(value: object) -> object:
    """One value where a grid of several is allowed."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _dataset(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _architecture(name: str) -> str:
    if name not in ARCHITECTURES:
        raise InputError(one_of(name, list(ARCHITECTURES)))
    return name


Architecture = Annotated[str, AfterValidator(_architecture)]
# rows hold 64-bit integers
Budget = Annotated[int, Field(ge=1, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PoolField = Annotated[PoolSpec, BeforeValidator(PoolSpec.parse)]


class StageConfig(Settings):
    """One theft of a scenario: which attack, with which images, answers, architecture and budget (in images).

    Attributes:
        architecture: the victim's own if it is not given.
        rounds: pools in place of ``pool``, asked one after the other with an equal share of the budget each, while the
            stolen model goes on learning: the continuous distribution shift of DeepTracer's Table 13 (c).
        accounts: colluding attackers, each with an account and an equal share of the budget, who pool what they get.
        curve: numbers of queries at which the stolen model is measured, too, ascending.
    """

    attack: ATTACKS.field()  # type: ignore[valid-type]
    pool: PoolField = PoolSpec(parts={"patches": 1.0})
    labels: Labels = "soft"
    architecture: Architecture | None = None
    budget: Budget = 8000
    rounds: tuple[PoolField, ...] = ()
    accounts: int = Field(1, ge=1, le=10_000)
    curve: tuple[Budget, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if self.curve and (self.rounds or list(self.curve) != sorted(set(self.curve)) or self.curve[-1] >= self.budget):
            raise InputError(
                f"curve: {list(self.curve)} must ascend, end below the budget {self.budget}, and not meet 'rounds'"
            )
        if self.accounts > self.budget or len(self.rounds) > self.budget:
            raise InputError(f"budget: {self.budget} images are too few for {self.accounts} accounts or the rounds")
        return self

    @property
    def pools(self) -> tuple[PoolSpec, ...]:
        """Every pool that is asked, in order."""
        return self.rounds or (self.pool,)

    @property
    def pool_label(self) -> str:
        """Its pools as they stand in a row; ``none`` for an attack that needs no data."""
        return "none" if self.attack.data_free else " then ".join(dict.fromkeys(pool.label for pool in self.pools))


class ScenarioConfig(Settings):
    """A grid of scenarios: every field but ``attack`` may be a list, and all combinations are run.

    ``stages`` describes a theft from a theft in place of the other fields: each stage but the first queries the model
    stolen by the stage before, which costs no victim query.
    """

    attack: ATTACKS.field() | None = None  # type: ignore[valid-type]
    pool: Annotated[tuple[PoolField, ...], BeforeValidator(_many)] = (PoolSpec(parts={"patches": 1.0}),)
    labels: Annotated[tuple[Labels, ...], BeforeValidator(_many)] = ("soft",)
    architecture: Annotated[tuple[Architecture | None, ...], BeforeValidator(_many)] = (None,)
    budget: Annotated[tuple[Budget, ...], BeforeValidator(_many)] = (8000,)
    rounds: tuple[PoolField, ...] = ()
    accounts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_many)] = (1,)
    curve: tuple[Budget, ...] = ()
    stages: tuple[StageConfig, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ScenarioConfig:
        if (self.attack is None) == (self.stages is None):
            raise InputError("a scenario has either 'attack' or 'stages'")
        # to_yaml writes the defaults out: they say nothing
        fields = type(self).model_fields.items()
        other = any(getattr(self, name) != field.default for name, field in fields if name != "stages")
        if self.stages is not None and (len(self.stages) < 2 or other):
            raise InputError("'stages' needs two entries or more, and no other key beside it")
        if self.stages is not None and any(stage.curve or stage.accounts > 1 for stage in self.stages):
            raise InputError("stages: 'curve' and 'accounts' are for scenarios of one stage")
        for field in ("pool", "labels", "architecture", "budget", "accounts"):
            if not getattr(self, field):
                raise InputError(f"{field}: an empty list runs nothing")
        try:
            self.expand()
        except ValidationError as error:
            raise InputError(describe(error)) from None
        return self

    def expand(self) -> list[tuple[StageConfig, ...]]:
        """The stages of every scenario of the grid."""
        if self.stages is not None:
            return [self.stages]
        return [
            (
                StageConfig(
                    attack=self.attack,
                    pool=pool,
                    labels=labels,
                    architecture=architecture,
                    budget=budget,
                    rounds=self.rounds,
                    accounts=accounts,
                    curve=self.curve,
                ),
            )
            for architecture in self.architecture
            for pool in self.pool
            for labels in self.labels
            for budget in self.budget
            for accounts in self.accounts
        ]


class Resources(Settings):
    """How a run uses a Ray cluster. Shares are of a GPU where the run uses GPUs, else of a CPU. The defaults fit one.

    Attributes:
        attackers: how many attackers work at once; ``"auto"`` is as many as fit, and without GPUs no more than cores.
        attacker, trainer, victim, collector: share of each actor.
        trainers: how many victims are trained at once.
        replicas: of the prediction service.
        precision: of the victims' answers; ``half`` computes in 16 bits on a GPU, and is ``full`` without one.
        collectors: how many processes measure stolen models, all on the driver's node, where they write the rows.
    """

    attackers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    attacker: float = Field(0.5, gt=0)
    trainer: float = Field(0.25, gt=0)
    trainers: int = Field(1, ge=1)
    victim: float = Field(0.125, gt=0)
    replicas: int = Field(1, ge=1)
    collector: float = Field(0.125, ge=0)
    precision: Precision = "full"
    collectors: int = Field(1, ge=1)


class RunConfig(Settings):
    """Everything that decides a run's rows, and how it is run.

    Attributes:
        name: of the run, in its directory's name and its report.
        seeds: everything is repeated for each.
        dataset: the victim's task.
        architecture, training: of the benign model and of the marked victims.
        watermarks: a victim is trained for each.
        key_filter, verification: how keys are chosen and judged.
        scenarios: the thefts, each from every victim.
        controls: run every theft from the benign model, too.
        accuracy_tolerance: a victim whose accuracy is more than this below the benign model's is reported loudly.
        device: ``auto`` uses GPUs where there are any; ``cuda`` demands one.
        save_transfer_sets: keep what every attacker asked and was answered, under ``transfer/``.
        sync_ledger: wait for the disk at every grant, so that the account survives a crash of the machine.
        query_log: keep a log of every query under ``queries/`` (see :mod:`simulator.querylog`).
        detectors: watch every account with each of them; see the columns ``detected_at`` and ``false_alarms``.
        benign_clients: whom the false alarms are counted on.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_many)] = (0,)
    dataset: Annotated[DataConfig, BeforeValidator(_dataset)]
    architecture: Architecture = "naivenet"
    training: Recipe = Recipe()
    watermarks: tuple[WATERMARKS.field(), ...]  # type: ignore[valid-type]
    key_filter: KeyFilter = KeyFilter()
    verification: Verification = Verification()
    scenarios: tuple[ScenarioConfig, ...] = ()
    controls: bool = True
    accuracy_tolerance: float = Field(0.02, ge=0, le=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resources: Resources = Resources()
    save_transfer_sets: bool = False
    sync_ledger: bool = False
    query_log: bool = False
    detectors: tuple[DETECTORS.field(), ...] = ()  # type: ignore[valid-type]
    benign_clients: BenignClients = BenignClients()

    @model_validator(mode="after")
    def _something_to_do(self) -> RunConfig:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: {list(self.seeds)} must be at least one, all different")
        if self.key_filter.architecture not in (None, *ARCHITECTURES):
            raise InputError(f"key_filter.architecture: {one_of(self.key_filter.architecture, list(ARCHITECTURES))}")
        return self

    def to_json(self) -> str:
        """The resolved configuration as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that :func:`read_config` reads back to an equal one."""
        return dump_yaml(self.model_dump(mode="json"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that is read back as it was."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False)
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which ``1e-3`` is a number (YAML 1.1 takes it for text), a day is text (no setting is a date, but a
    run may be named by one) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise InputError(f"key {key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes text which :class:`_Loader` would take for a number."""


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


def read_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file, with ``key.path=value`` overrides applied.

    Raises:
        InputError: no such preset or file, not YAML, or a wrong key or value.
    """
    data = read_settings(source)
    for override in overrides:
        apply_override(data, override)
    return check_config(data, _line(source))


def read_settings(source: str, package: str = "simulator") -> dict[str, Any]:
    """The plain data of a YAML file, or of a preset that the package ships.

    Raises:
        InputError: no such preset or file, or it is no YAML mapping.
    """
    known, path, source = presets(package), source, _line(source)
    if source in known:
        text = (files(package) / "presets" / f"{source}.yaml").read_text()
    elif _is_file(path):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: cannot be read as text: {error}") from None
    elif source.endswith((".yaml", ".yml")) or "/" in source:
        raise InputError(f"{source}: no such file")
    else:
        raise InputError(f"no preset or file of that name: {one_of(source, list(known))}")
    data = _parse(text, source)
    if not isinstance(data, dict):
        raise InputError(f"{source}: a configuration is a mapping of settings, found {type(data).__name__}")
    return data


def check_config(data: Mapping[str, Any], source: str = "config") -> RunConfig:
    """The configuration in plain data.

    Raises:
        InputError: naming the key, the value and what is allowed.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise InputError(f"{source}: {describe(error)}") from None
    except RecursionError:
        raise InputError(f"{source}: values are nested too deeply") from None
    except (TypeError, ValueError, OSError) as error:  # a YAML set, a list inside itself, a path the system refuses
        raise InputError(f"{source}: {error}") from None


def _line(text: str) -> str:
    """What the user typed, as part of a message of one line."""
    return " ".join(text.split())


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # such as a name longer than the system allows
        return False


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except Exception as error:  # PyYAML lets out what int() says of 0x_, and many others
        raise InputError(f"{source}: not YAML: {_line(str(error))}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted path of nested mappings and lists, e.g. ``watermarks.0.margin=2``.

    Raises:
        InputError: not of this form, or no such place.
    """
    path, equals, text = override.partition("=")
    override = _line(override)
    if not equals or not path:
        raise InputError(f"--set {override}: wanted key=value, as in --set watermarks.0.margin=2")
    set_path(data, path, _parse(text, f"--set {override}"), f"--set {override}")


def set_path(data: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Sets the value at a dotted path; ``what`` begins the error where there is no such place.

    Raises:
        InputError: the path leads through something that is no mapping or list, or past the end of a list.
    """
    place: Any = data
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(place, list):
            place = place[_position(place, part, what)]
        elif isinstance(place, dict):
            # a component or a data set may be written as its bare name
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
