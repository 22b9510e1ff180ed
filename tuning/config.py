"""A sweep's configuration: a run configuration, the searched fields, the objective, the search, and the holdout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from simulator.component import Settings, describe
from simulator.errors import InputError
from simulator.plan.config import RunConfig, ScenarioConfig, Seed, check_config
from simulator.plan.settings_file import apply_override, dump_yaml, read_settings, set_path
from tuning.objective import Objective
from tuning.space import Axis, default_setting, grid

LOGGERS = ("tensorboard", "csv", "json", "mlflow", "wandb")


class Search(Settings):
    """How settings are chosen.

    Attributes:
        method: ``random``; ``grid`` (every combination); ``optuna`` (TPE on the scalarised value); ``optuna-pareto``
            (TPE on accuracy drop and worst WSR as two objectives).
        seed: decides the choice of settings alone. The trainings and thefts do not depend on it.
    """

    method: Literal["random", "grid", "optuna", "optuna-pareto"] = "random"
    seed: Seed = 0


class Halving(Settings):
    """Synchronous successive halving. At every rung a trial waits for the others of its bracket; then the best go on.

    So what is stopped depends on results alone, not on which trial is first.

    Attributes:
        bracket: trials that are compared with each other.
        keep: the fraction that goes on after each stage, rounded up. Stages are ``phase 1`` (of a watermark trained in
            phases), ``victim`` and ``attack`` (each attack, unless ``attack 2`` and so on say otherwise). A stage that
            is not named is no rung.
    """

    bracket: int = Field(8, ge=2)
    keep: Mapping[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=lambda: {"phase 1": 0.75, "victim": 0.75, "attack": 0.75}
    )


class Holdout(Settings):
    """Seeds and attacks that the search does not see. The attacks are added to those of the search."""

    seeds: tuple[Seed, ...] = (100, 101, 102)
    scenarios: tuple[ScenarioConfig, ...] = ()


def _search(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


def _loggers(value: object) -> object:
    return {name: {} for name in value} if isinstance(value, list) else value


class SweepConfig(Settings):
    """Everything that decides a sweep's trials, and how it is run.

    Attributes:
        base: the run configuration. A trial uses its one watermark and its scenarios, but not its seeds.
        space: the searched fields: one of Tune's domains for each dotted path.
        trials: how many settings are tried, the default setting included. A grid tries all combinations if not given.
        seeds: a trial is computed for each of them, side by side.
        halving: when trials are stopped early; null runs every trial to its end.
        concurrent: trials under way at once; ``auto`` takes as many as there are trainers and attackers.
        storage_path: where Tune writes, e.g. TensorBoard's files: a local or shared folder or a bucket's URI; the
            sweep's own directory if not given. Rows and models always go to the sweep's directory.
        loggers: any of ``tensorboard, csv, json, mlflow, wandb``, with the arguments of Ray's callback.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    base: RunConfig
    space: Mapping[str, Axis]
    objective: Objective = Objective()
    search: Annotated[Search, BeforeValidator(_search)] = Search()
    trials: int | None = Field(None, ge=1)
    seeds: tuple[Seed, ...] = (0, 1)
    halving: Halving | None = Halving()
    holdout: Holdout = Holdout()
    concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    storage_path: str | None = None
    loggers: Annotated[Mapping[str, Mapping[str, Any]], BeforeValidator(_loggers)] = Field(
        default_factory=lambda: {"tensorboard": {}}
    )

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        if len(self.base.watermarks) != 1 or not self.base.scenarios:
            raise InputError(
                f"base: a sweep needs one watermark and a scenario or more, found {len(self.base.watermarks)} and "
                f"{len(self.base.scenarios)}"
            )
        if not self.base.watermarks[0].marks:
            raise InputError("base: a sweep judges a watermark by its WSR, and an unmarked model has none")
        if any(entry.then for entry in (*self.base.scenarios, *self.holdout.scenarios)):
            raise InputError("base: 'then': a sweep measures copies as they were stolen; leave it out")
        for name, seeds in (("seeds", self.seeds), ("holdout.seeds", self.holdout.seeds)):
            if not seeds or len(set(seeds)) < len(seeds):
                raise InputError(f"{name}: {list(seeds)} must be at least one, all different")
        if set(self.seeds) & set(self.holdout.seeds):
            raise InputError(f"holdout.seeds: {list(self.holdout.seeds)} must be others than seeds, {list(self.seeds)}")
        unknown = sorted(set(self.loggers) - set(LOGGERS))
        if unknown:
            raise InputError(f"loggers: {unknown[0]!r} is not one of {', '.join(LOGGERS)}")
        if self.search.method != "grid" and self.trials is None:
            raise InputError(f"trials: search {self.search.method!r} needs a number of trials")
        wrong = sorted(set(self.halving.keep if self.halving else ()) - {*self.stages(), "attack"})
        if wrong:
            raise InputError(f"halving.keep: {wrong[0]!r} is not one of {', '.join([*self.stages(), 'attack'])}")
        return self

    def stages(self) -> list[str]:
        """The stages of a trial, in order: the phases of its victim's training, ``victim``, ``attack 1``, ..."""
        return [*self.base.watermarks[0].phases(), "victim", *(f"attack {at + 1}" for at in range(self.attacks()))]

    def attacks(self) -> int:
        """How many thefts a trial has in the search."""
        return sum(len(entry.expand()) for entry in self.base.scenarios)

    def rungs(self) -> dict[str, float]:
        """The stages at which trials wait, and the fraction that goes on. The last stage is none of them."""
        keep = dict(self.halving.keep) if self.halving else {}
        for at in range(self.attacks()) if "attack" in keep else ():
            keep.setdefault(f"attack {at + 1}", keep["attack"])
        return {stage: keep[stage] for stage in self.stages()[:-1] if stage in keep}

    def count(self) -> int:
        """How many trials there are at most."""
        if self.search.method != "grid":
            assert self.trials is not None
            return self.trials
        return min(len(grid(self.base, self.space)), self.trials or 2**31)

    def run_config(self, part: Literal["search", "holdout"]) -> RunConfig:
        """The run configuration of the search or of the holdout, before a setting is applied."""
        data = json.loads(self.base.to_json()) | {"controls": False, "seeds": list(self.seeds)}
        if part == "holdout":
            more = [entry.model_dump(mode="json") for entry in self.holdout.scenarios]
            data |= {"seeds": list(self.holdout.seeds), "scenarios": [*data["scenarios"], *more]}
        return check_config(data, self.name)

    def default(self) -> dict[str, Any]:
        """The searched fields as the base configuration has them."""
        return default_setting(self.base, self.space)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that :func:`read_sweep` reads back to an equal one."""
        data = self.model_dump(mode="json")
        data["space"] = {path: {axis["domain"]: axis["arguments"]} for path, axis in data["space"].items()}
        return dump_yaml(data)


def read_sweep(source: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """The configuration of a sweep: a preset's name or a YAML file, with ``key.path=value`` overrides applied.

    ``base`` is a run preset's name, a run configuration's file, or a mapping. The mapping is a whole run configuration,
    or ``from:`` with a name or file and replacements by dotted path.

    Raises:
        InputError: no such preset or file, not YAML, or a wrong key or value.
    """
    data = read_settings(source, "tuning")
    base = data.get("base", "digits")
    if isinstance(base, str) or (isinstance(base, dict) and "from" in base):
        data["base"] = _derived({"from": base} if isinstance(base, str) else base)
    if isinstance(data["base"], dict):
        data.setdefault("name", f"{data['base'].get('name', 'run')}-sweep")
    for override in overrides:
        apply_override(data, override)
    source = " ".join(source.split())
    if isinstance(data["base"], dict):
        data["base"] = json.loads(check_config(data["base"], f"{source}: base").to_json())
    try:
        return SweepConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise InputError(f"{source}: {describe(error, SweepConfig)}") from None
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{source}: {error}") from None


def _derived(base: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(base["from"], str):
        raise InputError(f"base.from: {base['from']!r} is not a preset's name or a file")
    data = read_settings(base["from"])
    for path, value in base.items():
        if path != "from":
            set_path(data, path, value, f"base: {path}")
    return data
