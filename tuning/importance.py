"""Says which searched settings decide an outcome: permutation importance in a random forest (Breiman, 2001)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuning.records import TrialRecord
from tuning.space import Axis

#: the fewest trials for which anything is said
LEAST = 8
TREES, REPEATS = 100, 10


@dataclass(frozen=True)
class Importance:
    """The loss of R², on the trials themselves, when a setting's column is shuffled: mean and deviation by path.

    With few trials this says which settings the forest used, not how sure that is. Trials that were stopped before they
    had the outcome are left out.
    """

    outcome: str
    trials: int
    paths: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]


def importances(records: Sequence[TrialRecord], space: Mapping[str, Axis]) -> list[Importance]:
    """The importances for the accuracy drop (of all trials with a whole victim) and for the worst WSR (of all that ran
    to their end). An outcome with too few trials, or the same in all, is left out."""
    found = []
    for name, field in (("accuracy drop", "drop"), ("worst stolen WSR", "worst_wsr")):
        usable = [one for one in records if one.done or (field == "drop" and one.benign_wsr is not None)]
        outcomes = np.array([getattr(one, field) for one in usable], dtype=float)
        if len(usable) >= LEAST and outcomes.std() > 0:
            found.append(_importance(name, usable, outcomes, space))
    return found


def _importance(
    name: str, records: Sequence[TrialRecord], outcomes: np.ndarray, space: Mapping[str, Axis]
) -> Importance:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    paths = tuple(space)
    columns = [[_number(one.setting[path], space[path]) for path in paths] for one in records]
    table = np.array(columns, dtype=float)
    forest = RandomForestRegressor(TREES, random_state=0).fit(table, outcomes)
    shuffled = permutation_importance(forest, table, outcomes, n_repeats=REPEATS, random_state=0)
    return Importance(
        name, len(records), paths, tuple(shuffled.importances_mean.tolist()), tuple(shuffled.importances_std.tolist())
    )


def _number(value: object, axis: Axis) -> float:
    """A setting's value for the forest: a number as it is, anything else by its place in the axis's list."""
    if axis.numeric:
        return float(str(value))
    values = list(axis.arguments)
    return float(values.index(value)) if value in values else -1.0
