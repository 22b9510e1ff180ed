"""The public surface: ``import simulator as exsim``. What is here is kept stable; everything else may move.

Example::

    import simulator as exsim

    config = exsim.load_config("digits", ["scenarios.0.budget=500"])
    rows = exsim.run(config)
    rows.to_pandas().query("role == 'stolen'")[["attack", "labels", "accuracy", "wsr"]]
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from simulator.experiment.local import run_config
from simulator.experiment.owner import train_owner
from simulator.experiment.preflight import prepare
from simulator.experiment.theft import steal as run_stages
from simulator.experiment.world import World
from simulator.models import Classifier, load_model
from simulator.ownership.base import Verdict
from simulator.ownership.key import KeySamples, load_key
from simulator.ownership.suspect import verify_model
from simulator.ownership.wsr import Wsr
from simulator.plan.config import RunConfig, check_config, read_config
from simulator.plan.subjects import Marked
from simulator.records.parquet import arrow_schema
from simulator.records.rows import Row, read_rows
from simulator.report.table import render_table, write_report
from simulator.service.oracle import ModelOracle
from simulator.training.predict import choose_device

if TYPE_CHECKING:
    import pandas

#: columns of the text that stands for rows
WIDTH = 120


class Rows(Sequence[Row]):
    """The rows of a run, one a measured model, in the order of the report.

    Example: ``rows[0].wsr``, ``len(rows)``, ``rows.to_pandas().groupby("attack").wsr.mean()``.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return Rows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def to_arrow(self) -> pa.Table:
        """An Arrow table with the columns of ``results/*.parquet``."""
        return pa.Table.from_pylist([row.model_dump() for row in self._rows], schema=arrow_schema(Row))

    def to_pandas(self) -> pandas.DataFrame:
        """A pandas frame with the columns of ``results/*.parquet``."""
        frame: pandas.DataFrame = self.to_arrow().to_pandas()
        return frame

    def __rich__(self) -> Table:
        return render_table(self._rows, width=WIDTH)

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(self.__rich__())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


class Run:
    """A finished or unfinished run, opened for reading.

    Example::

        run = exsim.Run("runs/20261124-101500_digits")
        copy = run.model(next(row for row in run.rows if row.role == "stolen"))

    Raises:
        InputError: the directory is no run's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = Rows(read_rows(self.path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self.rows)} rows)"

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was started with."""
        return read_config(str(self.path / "config.yaml"))

    def model(self, row: Row) -> Classifier:
        """The model that a row measured, on the CPU, in evaluation mode.

        Raises:
            InputError: the model was not kept, as after a failure.
        """
        role, name = row.role, row.scenario_id
        if role == "guarded":  # the model behind the evasion, which has no file of its own
            role, name = "removed" if row.removal else row.origin, str(row.parent)
        prefix = f"{role}-" if role in ("stolen", "removed") else ""
        return load_model(self.path / "models" / f"{prefix}{name}.safetensors")[0]

    def key(self, row: Row) -> KeySamples:
        """The key of a victim's row.

        Raises:
            InputError: it is no victim's row, or the key is damaged.
        """
        return load_key(self.path / "keys" / f"{row.scenario_id}.safetensors")

    def report(self) -> Path:
        """Writes the table, the plots and the page; returns the page's path."""
        return write_report(self.path)


@dataclass(frozen=True)
class Victim:
    """A trained victim, its key, and what it was compared with.

    Attributes:
        model: the marked model.
        key: its filtered key; the owner's secret.
        benign: the same task learned without the watermark.
    """

    model: Classifier
    key: KeySamples
    benign: Classifier
    _config: RunConfig
    _world: World


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file.

    Example: ``load_config("digits", ["seeds=[0,1,2]", "watermarks.0.margin=2"])``.

    Args:
        overrides: ``key.path=value``, as ``--set`` of the command line takes them.

    Raises:
        InputError: no such preset or file, or a wrong key or value.
    """
    return read_config(source, overrides)


def run(config: RunConfig, out: str | Path | None = None, data: str | Path | None = None) -> Rows:
    """Runs a configuration in this process, without Ray; a failed scenario is a row with its error.

    Args:
        out: the run directory; ``runs/<time>_<name>`` if not given.
        data: where data sets lie.

    Raises:
        InputError: the configuration does not fit the data, or the directory cannot be written.
    """
    return Rows(run_config(config, None if out is None else Path(out), None if data is None else Path(data)))


def train_victim(
    watermark: str | Mapping[str, Any] = "deeptracer",
    dataset: str | Mapping[str, Any] = "digits",
    *,
    seed: int = 0,
    data: str | Path | None = None,
    **settings: Any,
) -> Victim:
    """Trains a benign model and a marked one, and chooses the key.

    Example: ``train_victim({"name": "deeptracer", "margin": 2.0}, "digits", training={"epochs": 10})``.

    Args:
        watermark: a scheme's name, or a mapping with its settings.
        dataset: a data set's name, or a mapping with its settings.
        data: where data sets lie.
        settings: of the run's configuration: ``architecture``, ``training``, ``key_filter`` and so on.

    Raises:
        InputError: a wrong setting.
    """
    plain = {"name": "api", "dataset": dataset, "watermarks": [watermark], "seeds": [seed], **settings}
    config = check_config(plain, "train_victim")
    plan, world = prepare(config, None if data is None else Path(data))
    device = choose_device(config.device)
    (spec,) = plan.victims
    benign = train_owner(spec.benign, world, None, device)
    owner = train_owner(spec, world, benign.model, device)
    assert owner.key is not None
    return Victim(owner.model, owner.key, benign.model, config, world)


def steal(
    victim: Victim, attack: str | Mapping[str, Any] = "knockoff", *, marked: bool = True, **stage: Any
) -> Classifier:
    """Steals a copy of a victim in this process; gives the copy that a run of the same settings gives.

    Example: ``steal(victim, "knockoff", pool="patches", labels="hard", budget=2000)``.

    Args:
        attack: an attack's name, or a mapping with its settings.
        marked: steal from the marked model; false for the control, which steals from the benign one.
        stage: ``pool``, ``labels``, ``budget``, ``architecture`` and so on, as in a scenario.

    Raises:
        InputError: a wrong setting.
    """
    plain = victim._config.model_dump(mode="json")
    config = check_config({**plain, "scenarios": [{"attack": attack, **stage}], "controls": True}, "steal")
    plan, world = prepare(config)
    theft = next(each for each in plan.scenarios if isinstance(each.victim, Marked) == marked)
    oracle = ModelOracle(
        victim.model if marked else victim.benign,
        labels=theft.stages[0].labels,
        classes=world.dataset.classes,
        shape=world.shape,
        budget=theft.budget,
    )
    return run_stages(theft, world.for_attackers(), oracle, None, choose_device(config.device))


def verify(suspect: Classifier, key: KeySamples, *, threshold: float = 0.2) -> Verdict:
    """Asks a suspect the key's samples and judges the answers by the watermark success rate.

    Example: ``verify(steal(victim), victim.key).verified``.

    Args:
        threshold: the WSR, in (0, 1), above which the suspect counts as stolen; 0.2 is DeepTracer's.
    """
    return verify_model(suspect, key, Wsr(threshold=threshold))


__all__ = ["Rows", "Run", "Victim", "load_config", "run", "steal", "train_victim", "verify"]
