"""Where a sweep's settings come from: a list made beforehand, or a searcher that learns from the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from simulator.errors import InputError
from tuning.config import SweepConfig
from tuning.space import Axis, Setting, grid, random, rounded

#: the last report of a trial, or None of one that failed
Outcome = Mapping[str, Any] | None


class Proposals(Protocol):
    """Settings in an order that is the same in every start of a sweep."""

    @property
    def total(self) -> int:
        """How many settings there are."""
        ...

    def ready(self, number: int) -> bool:
        """Whether the setting of this number can be named yet."""
        ...

    def propose(self, number: int) -> Setting:
        """The setting of this number; asked for in order."""
        ...

    def learn(self, number: int, outcome: Outcome) -> None:
        """What became of a setting."""
        ...


class Listed:
    """Settings that are known before anything runs: random ones, or a grid."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = list(settings)

    @property
    def total(self) -> int:
        """See :class:`Proposals`."""
        return len(self._settings)

    def ready(self, number: int) -> bool:
        """Always."""
        return True

    def propose(self, number: int) -> Setting:
        """See :class:`Proposals`."""
        return self._settings[number]

    def learn(self, number: int, outcome: Outcome) -> None:
        """Nothing."""


class Learned:
    """Settings proposed by Optuna, through Tune's own :class:`OptunaSearch`.

    Optuna is told of a whole batch at once, in the order of its numbers, and only then asked for the next: what it
    proposes depends on the results alone, and a sweep that is started again proposes the same settings. A trial that
    was stopped is told with what it is sure to reach (``guaranteed``: a WSR that was not measured counts as 0).

    Args:
        pareto: two objectives, accuracy drop and the WSR that the objective aggregates (worst or mean), in place of the
            scalarised value. Halving compares by one number, and goes on doing so by the value.
        batch: of proposals between which nothing is learned.
    """

    def __init__(self, config: SweepConfig, *, pareto: bool, batch: int) -> None:
        try:
            import optuna
            from ray.tune.search.optuna import OptunaSearch
        except ImportError:
            raise InputError("search: optuna is not installed; pip install 'extraction-simulator[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._objective, self._pareto, self._batch = config.objective, pareto, batch
        self._by_mean = config.objective.aggregate == "mean"
        assert config.trials is not None
        self.total = config.trials
        default = config.default()
        inside = all(axis.contains(default[path]) for path, axis in config.space.items())
        self._search = OptunaSearch(
            space=OptunaSearch.convert_search_space({path: axis.tune for path, axis in sorted(config.space.items())}),
            metric=["drop", "floor"] if pareto else "guaranteed",
            mode=["min", "max"] if pareto else "max",
            points_to_evaluate=[default] if inside else None,
            seed=config.search.seed,
        )
        self._axes: Mapping[str, Axis] = config.space
        self._outcomes: dict[int, Outcome] = {}
        self._told = 0

    def ready(self, number: int) -> bool:
        """Whether all batches before this one have been told."""
        return self._told >= number // self._batch * self._batch

    def propose(self, number: int) -> Setting:
        """See :class:`Proposals`."""
        found = self._search.suggest(str(number))
        assert found is not None
        return {path: rounded(found[path]) for path in sorted(self._axes)}

    def learn(self, number: int, outcome: Outcome) -> None:
        """See :class:`Proposals`."""
        self._outcomes[number] = outcome
        end = min(self._told + self._batch, self.total)
        if all(one in self._outcomes for one in range(self._told, end)):
            for one in range(self._told, end):
                self._search.on_trial_complete(str(one), result=self._values(self._outcomes[one]))
            self._told = end

    def _values(self, outcome: Outcome) -> dict[str, Any]:
        if outcome is None:
            return {"guaranteed": self._objective.worst, "drop": 1.0, "floor": 0.0}
        whole, wsr = outcome["stage"] == outcome["last_stage"], "mean_wsr" if self._by_mean else "worst_wsr"
        return {
            "guaranteed": outcome["guaranteed"],
            "drop": outcome["drop"],
            "floor": outcome[wsr] if whole else 0.0,
        }


def proposals(config: SweepConfig) -> Listed | Learned:
    """The proposals that a sweep's configuration asks for.

    Raises:
        InputError: a grid over something that is no list, or Optuna is not installed.
    """
    search = config.search
    if search.method == "grid":
        return Listed(grid(config.base, config.space)[: config.trials])
    assert config.trials is not None
    if search.method == "random":
        return Listed(random(config.base, config.space, config.trials, search.seed))
    batch = config.halving.bracket if config.halving else 1
    return Learned(config, pareto=search.method == "optuna-pareto", batch=batch)
