"""A run's directory: what is where, and what of it is already done.

run.json  config.yaml  results/  detections/  models/  keys/  ledger/  queries/  transfer/  report/  logs/  .lock

One process works in it at a time, by a lock on ``.lock`` (see :func:`simulator.files.try_lock` for network file
systems), which the system takes from a process that ends, however it ends.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from simulator.checkpoint import CheckpointFolder
from simulator.data.dataset import Images
from simulator.errors import InputError
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.theft import Theft
from simulator.files import LOCK, Folder, locked, write_atomically
from simulator.models import load_model, save_model
from simulator.ownership.key import load_key, save_key
from simulator.plan.config import RunConfig, read_config
from simulator.plan.subjects import OwnerModel, Plan, Scenario
from simulator.records.rows import Row, read_rows
from simulator.service.ledger import Ledger
from simulator.service.log import restore
from simulator.tensorfile import read_tensors, write_tensors


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Everything is written atomically, so a killed run leaves whole files or none."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig, out: Path | None) -> RunDirectory:
        """A new directory: ``out``, or ``runs/<time>_<name>``.

        Raises:
            InputError: it exists and is not empty, cannot be written, or another process is just making it.
        """
        path = out or _unused(Path("runs") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}_{config.name}")
        try:
            _demand_unused(path)
            path.mkdir(parents=True, exist_ok=True)
            with locked(path):
                _demand_unused(path)  # it may have been made since
                (path / "logs").mkdir(exist_ok=True)
                write_atomically(path / "config.yaml", config.to_yaml().encode())
        except OSError as error:
            raise InputError(f"{path}: cannot write the run directory there: {error.strerror}") from None
        return cls(path.resolve())

    @classmethod
    def resume(cls, path: Path) -> tuple[RunDirectory, RunConfig]:
        """An earlier run's directory and configuration.

        Raises:
            InputError: it is no run directory, or not writable.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: not a run directory (it has no config.yaml)")
        if not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot write the run directory there: permission denied")
        (path / "logs").mkdir(exist_ok=True)
        return cls(path.resolve()), read_config(str(path / "config.yaml"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps every other process from working in the directory, inside the block.

        Raises:
            InputError: another process does so now.
        """
        with locked(self.path):
            yield

    def discard(self) -> None:
        """Removes the directory of a run that could not begin; once there is a model or a row, everything stays."""
        if not any(any((self.path / part).glob("*")) for part in ("models", "results")):
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def ledger(self) -> Path:
        """The query account."""
        return self.path / "ledger" / "ledger.log"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The state of work under way."""
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def query_log(self) -> Folder:
        """The parts of the query log."""
        return Folder(self.path / "queries", ".parquet")

    def restore_query_log(self, plan: Plan, ledger: Ledger) -> None:
        """Adds to the query log what kills have swallowed (see :func:`simulator.service.log.restore`)."""
        restore(self.path / "queries", ledger, plan.attacks)

    @cached_property
    def _secret(self) -> bytes:
        """The run's own secret, from which the accounts' tokens are made; readable by the owner alone."""
        file = self.path / "ledger" / "secret"
        if not file.exists():
            if self.ledger.exists() and self.ledger.stat().st_size:
                raise InputError(f"{file}: missing; without it the accounts of this run cannot be used any more")
            write_atomically(file, secrets.token_hex(32).encode(), mode=0o600)
        return file.read_bytes()

    def tokens(self, scenario: Scenario) -> dict[str, str]:
        """The secret token of each of a scenario's accounts."""
        return {account: self.token(account) for account in scenario.accounts}

    def token(self, account: str) -> str:
        """The secret token of an account; the same when the run is resumed."""
        return hmac.new(self._secret, account.encode(), hashlib.sha256).hexdigest()

    def save_owner(self, spec: OwnerModel, owner: TrainedOwner) -> None:
        """Writes an owner's model, key (with what it was filtered from, so that a WSR before the filter can be had
        later) and triggers; the model last, as the sign that all is there."""
        if owner.candidates is not None:
            save_key(owner.candidates, self.path / "keys" / f"{spec.id}.candidates.safetensors")
        if owner.key is not None and owner.triggers is not None:
            save_key(owner.key, self.path / "keys" / f"{spec.id}.safetensors")
            save_key(owner.triggers, self.path / "keys" / f"{spec.id}.triggers.safetensors")
        header = {"seconds": owner.seconds, "started": owner.started.isoformat(), "false_trigger": owner.false_trigger}
        save_model(owner.model, self._model(spec.id), {"owner": json.dumps(header)})

    def has_owner(self, spec: OwnerModel) -> bool:
        """Whether :meth:`save_owner` has written this model."""
        return self._model(spec.id).exists()

    def check_owners(self, plan: Plan) -> None:
        """Sees that every model and key of the owner's that lies here can be read.

        Raises:
            InputError: one is damaged.
        """
        for spec in (*plan.benigns, *plan.victims):
            try:
                self.load_owner(spec)
            except InputError as error:
                file = self._model(spec.id)
                raise InputError(f"{error}; remove {file}, and the model is trained again") from None

    def load_owner(self, spec: OwnerModel) -> TrainedOwner | None:
        """What :meth:`save_owner` wrote, or None if the model is not trained yet."""
        if not self.has_owner(spec):
            return None
        model, metadata = load_model(self._model(spec.id))
        try:
            header = json.loads(metadata["owner"])
        except (KeyError, ValueError):
            raise InputError(f"{self._model(spec.id)}: not an owner's model of a run") from None
        marked = spec.watermark is not None
        return TrainedOwner(
            model,
            load_key(self.path / "keys" / f"{spec.id}.safetensors") if marked else None,
            load_key(self.path / "keys" / f"{spec.id}.triggers.safetensors") if marked else None,
            header["false_trigger"],
            header["seconds"],
            datetime.fromisoformat(header["started"]),
        )

    def save_test(self, test: Images, held_out: Images | None = None) -> None:
        """Lays the test images, and the attacker's where benign clients need them, ready for a collector in another
        process, until :meth:`clear_test`."""
        tensors = {"images": test.images, "labels": test.labels}
        if held_out is not None:
            tensors |= {"held_out": held_out.images, "held_out_labels": held_out.labels}
        write_tensors(self.path / "checkpoints" / "test.safetensors", tensors, {"kind": "test"})

    def load_test(self) -> tuple[Images, Images | None]:
        """What :meth:`save_test` wrote."""
        tensors, _ = read_tensors(self.path / "checkpoints" / "test.safetensors", "the run's test images")
        held_out = Images(tensors["held_out"], tensors["held_out_labels"]) if "held_out" in tensors else None
        return Images(tensors["images"], tensors["labels"]), held_out

    def clear_test(self) -> None:
        """Removes what :meth:`save_test` wrote."""
        self.checkpoints.clear("test")

    def save_theft(self, scenario: Scenario, theft: Theft) -> None:
        """Writes a stolen model, and its transfer set if that was kept."""
        about = {"scenario": scenario.id, "victim": scenario.victim.id}
        save_model(theft.model, self._model(f"stolen-{scenario.id}"), {"stolen": json.dumps(about)})
        for account, transfer_set in theft.transfer_sets.items():
            write_atomically(self.path / "transfer" / f"{account}.safetensors", transfer_set)

    def rows(self) -> list[Row]:
        """The rows so far; none for a run that has not measured anything."""
        return read_rows(self.path) if any((self.path / "results").glob("*.parquet")) else []

    def open_scenarios(self, plan: Plan) -> list[Scenario]:
        """The scenarios that lack a row, or have a failed one, in the order of the plan."""
        good = {
            (row.scenario_id, row.role, row.watermark, row.watermark_params)
            for row in self.rows()
            if row.status == "ok"
        }

        def done(scenario: Scenario) -> bool:
            wanted = {
                (scenario.id, "stolen", of.watermark.name, of.watermark.params_json())
                for of in plan.keys_for(scenario)
                if of.watermark is not None
            }
            return wanted <= good

        return [scenario for scenario in plan.scenarios if not done(scenario)]

    def _model(self, name: str) -> Path:
        return self.path / "models" / f"{name}.safetensors"


def _demand_unused(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty directory; resume it with --resume, or name another")


def _unused(path: Path) -> Path:
    """The path, or with a number behind it where another run has begun in the same second."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
