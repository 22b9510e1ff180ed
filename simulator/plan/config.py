"""A run's configuration: one YAML file, strict, with ``--set key=value`` overrides.

The file is a preset's name (``digits``) or a path. Everything that can be wrong in it is refused with one line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from simulator.attacks.base import ATTACKS
from simulator.component import Registry, Settings, describe, family_of, one_of
from simulator.data.dataset import DataConfig
from simulator.data.pool import PoolSpec
from simulator.detectors.base import DETECTORS, BenignClients
from simulator.errors import InputError
from simulator.evasions.base import EVASIONS
from simulator.models import ARCHITECTURES
from simulator.ownership.key_filter import KeyFilter
from simulator.ownership.wsr import Verification, Wsr
from simulator.plan.settings_file import apply_override, as_line, dump_yaml, read_settings
from simulator.removals.base import REMOVALS, Removal
from simulator.service.answers import Labels
from simulator.service.victim import Precision
from simulator.training.recipe import Recipe
from simulator.watermarks.base import WATERMARKS


def _many(value: object) -> object:
    """One value where a grid of several is allowed."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _dataset(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Architecture = Annotated[str, AfterValidator(ARCHITECTURES.known)]
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


#: the fields of a scenario of which several values make a grid; those of the first change slowest
GRID = ("architecture", "pool", "labels", "budget", "accounts")


def _siblings(family: Registry[Any], value: object) -> tuple[object, ...]:
    """One component of a family for each combination of a mapping's lists: ``{name: pruning, fraction: [0.2, 0.4]}`` is
    two.

    A field that is a list by itself is left alone. Of a list of components, each may have lists, and so may a component
    that is a setting of another.
    """
    if isinstance(value, list | tuple):
        return tuple(itertools.chain.from_iterable(_siblings(family, each) for each in value))
    if not isinstance(value, Mapping):
        return (value,)
    cls = family.classes().get(str(value.get("name")))
    fields = cls.model_fields if cls else {}
    choices: dict[str, tuple[object, ...]] = {}
    for name, given in value.items():
        inner = family_of(fields[name]) if name in fields else None
        if inner is not None:
            choices[name] = _siblings(inner, given)
        elif isinstance(given, list) and name in fields and not _takes_a_list(fields[name].annotation):
            choices[name] = tuple(given)
        if not choices.get(name, (None,)):
            raise InputError(f"{name}: an empty list {_DOES_NOTHING.get(family.kind, 'names nothing')}")
    grid = itertools.product(*choices.values())
    return tuple({**value, **dict(zip(choices, values, strict=True))} for values in grid)


_DOES_NOTHING = {"removal": "removes nothing", "evasion": "hides nothing", "transform": "changes nothing"}


def _takes_a_list(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list) or any(map(_takes_a_list, get_args(annotation)))


class Then(Settings):
    """What a thief does to a model that it holds: removals, or evasions before it.

    Attributes:
        removal: one removal, or several; a list in place of a setting is several, too. All are applied to the same
            model, side by side.
        evasion: one evasion, or several, likewise. The model stays as it is, and is asked through each of them.
        pool: the images that the thief has for it; what needs none leaves it alone.
        then: what is done to each result of a removal.
    """

    removal: Annotated[tuple[REMOVALS.field(), ...], BeforeValidator(partial(_siblings, REMOVALS))] = ()  # type: ignore[valid-type]
    evasion: Annotated[tuple[EVASIONS.field(), ...], BeforeValidator(partial(_siblings, EVASIONS))] = ()  # type: ignore[valid-type]
    pool: PoolField = PoolSpec(parts={"attacker": 1.0})
    then: tuple[Then, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> Then:
        if self.removal and self.evasion:
            raise InputError("'removal' and 'evasion' are both given; an entry of 'then' has one of them")
        if not (self.removal or self.evasion):
            raise InputError("removal: an empty list removes nothing; give a removal, or an evasion in its place")
        if self.evasion and self.then:
            raise InputError("then: nothing follows an evasion, which makes no new model")
        return self


def _removals(then: Iterable[Then]) -> Iterator[Removal]:
    """Every removal of a tree."""
    for entry in then:
        yield from entry.removal
        yield from _removals(entry.then)


class ScenarioConfig(Settings):
    """A grid of scenarios: every field but ``attack`` may be a list, and all combinations are run.

    ``stages`` describes a theft from a theft in place of the other fields: each stage but the first queries the model
    stolen by the stage before, which costs no victim query.

    ``then`` says what is done to each stolen copy. A scenario with nothing but ``then`` steals nothing: the thief has
    the victim's model itself, as after a leak.
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
    then: tuple[Then, ...] = ()

    @property
    def leaked(self) -> bool:
        """Whether nothing is stolen: the thief has the victim's model itself."""
        return self.attack is None and self.stages is None

    @model_validator(mode="after")
    def _one_kind(self) -> ScenarioConfig:
        if (self.attack is not None and self.stages is not None) or (self.leaked and not self.then):
            raise InputError("a scenario has either 'attack' or 'stages', or only 'then'")
        # to_yaml writes the defaults out: they say nothing
        fields = type(self).model_fields.items()
        other = any(getattr(self, name) != field.default for name, field in fields if name not in ("stages", "then"))
        if self.leaked and other:
            raise InputError("a scenario without 'attack' or 'stages' has no other key than 'then'")
        if self.stages is not None and (len(self.stages) < 2 or other):
            raise InputError("'stages' needs two entries or more, and no other key beside it but 'then'")
        if self.stages is not None and any(stage.curve or stage.accounts > 1 for stage in self.stages):
            raise InputError("stages: 'curve' and 'accounts' are for scenarios of one stage")
        for field in GRID:
            if not getattr(self, field):
                raise InputError(f"{field}: an empty list runs nothing")
        try:
            self.expand()
        except ValidationError as error:
            raise InputError(describe(error)) from None
        return self

    def expand(self) -> list[tuple[StageConfig, ...]]:
        """The stages of every scenario of the grid; none where nothing is stolen."""
        if self.leaked:
            return []
        if self.stages is not None:
            return [self.stages]
        fixed = {name: getattr(self, name) for name in StageConfig.model_fields if name not in GRID}
        points = itertools.product(*(getattr(self, name) for name in GRID))
        return [(StageConfig(**fixed, **dict(zip(GRID, point, strict=True))),) for point in points]


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
        accuracy_loss: what a thief gives up at most for a removal: the report names the strongest removal within it.
        device: ``auto`` uses GPUs where there are any; ``cuda`` demands one.
        save_transfer_sets: keep what every attacker asked and was answered, under ``transfer/``. Where a removal needs
            that, it is kept anyway.
        sync_ledger: wait for the disk at every grant, so that the account survives a crash of the machine.
        query_log: keep a log of every query under ``queries/`` (see :mod:`simulator.service.log`).
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
    accuracy_loss: float = Field(0.035, ge=0, le=1)
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

    @property
    def evades(self) -> bool:
        """Whether some suspect hides behind an evasion."""

        def found(then: tuple[Then, ...]) -> bool:
            return any(entry.evasion or found(entry.then) for entry in then)

        return any(found(scenario.then) for scenario in self.scenarios)

    @property
    def records_thefts(self) -> bool:
        """Whether transfer sets are kept: where that is asked, or where a removal needs them."""
        return self.save_transfer_sets or any(
            "transfer" in removal.needs for entry in self.scenarios for removal in _removals(entry.then)
        )

    @property
    def ownership_test(self) -> Wsr:
        """The test that judges every model of the run."""
        return Wsr(threshold=self.verification.threshold)

    def to_json(self) -> str:
        """The resolved configuration as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that :func:`read_config` reads back to an equal one."""
        return dump_yaml(self.model_dump(mode="json"))


def read_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file, with ``key.path=value`` overrides applied.

    Raises:
        InputError: no such preset or file, not YAML, or a wrong key or value.
    """
    data = read_settings(source)
    for override in overrides:
        apply_override(data, override)
    return check_config(data, as_line(source))


def check_config(data: Mapping[str, Any], source: str = "config") -> RunConfig:
    """The configuration in plain data.

    Raises:
        InputError: naming the key, the value and what is allowed.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise InputError(f"{source}: {describe(error, RunConfig)}") from None
    except RecursionError:
        raise InputError(f"{source}: values are nested too deeply") from None
    except (TypeError, ValueError, OSError) as error:  # a YAML set, a list inside itself, a path the system refuses
        raise InputError(f"{source}: {error}") from None
