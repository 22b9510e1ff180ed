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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from simulator.checkpoint import CheckpointFolder
from simulator.data.dataset import Images
from simulator.detectors.base import first_noticed
from simulator.errors import InputError
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.removal import Washed
from simulator.experiment.theft import Theft
from simulator.files import LOCK, Folder, locked, write_atomically
from simulator.models import Classifier, load_model, save_model
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.plan.config import RunConfig, read_config
from simulator.plan.subjects import Marked, OwnerModel, Plan, Removed, Stolen, Subject
from simulator.records.detections import detectors_json
from simulator.records.rows import Row, read_rows
from simulator.service.ledger import Ledger
from simulator.service.log import restore
from simulator.tensorfile import read_tensors, write_tensors


@dataclass(frozen=True)
class Copy:
    """A thief's model with what is measured of it.

    Attributes:
        queries: victim images that its theft was answered, by the thief's own count; 0 without a theft.
        seconds: of making it from its parent.
        snapshots: the model at stages of the budget: number of queries, and model.
        detectors: that watched its accounts, as in a row.
        noticed: images after which the first of them noticed it; None for never.
    """

    model: Classifier
    queries: int
    seconds: float
    started: datetime
    snapshots: tuple[tuple[int, Classifier], ...] = ()
    detectors: str | None = None
    noticed: int | None = None


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

    def restore_query_log(self, attacks: Mapping[str, str]) -> None:
        """Adds to the query log what kills have swallowed (see :func:`simulator.service.log.restore`). No other ledger
        has the log open now.

        Args:
            attacks: the attack behind each account.
        """
        ledger = Ledger(self.ledger)
        restore(self.path / "queries", ledger, attacks)
        ledger.close()

    @cached_property
    def _secret(self) -> bytes:
        """The run's own secret, from which the accounts' tokens are made; readable by the owner alone."""
        file = self.path / "ledger" / "secret"
        if not file.exists():
            if self.ledger.exists() and self.ledger.stat().st_size:
                raise InputError(f"{file}: missing; without it the accounts of this run cannot be used any more")
            write_atomically(file, secrets.token_hex(32).encode(), mode=0o600)
        return file.read_bytes()

    def tokens(self, theft: Stolen) -> dict[str, str]:
        """The secret token of each of a theft's accounts."""
        return {account: self.token(account) for account in theft.accounts}

    def token(self, account: str) -> str:
        """The secret token of an account; the same when the run is resumed."""
        return hmac.new(self._secret, account.encode(), hashlib.sha256).hexdigest()

    def has(self, subject: Subject) -> bool:
        """Whether a model, and all that belongs to it, lies here."""
        file = self._model(subject.file)
        if isinstance(subject, OwnerModel):
            return file.exists()
        try:  # earlier versions kept no counts beside a copy, which cannot be measured without them
            return "copy" in _metadata(file)
        except InputError:  # absent, or damaged: it is made again, and pays nothing twice
            return False

    def save_owner(self, spec: OwnerModel, owner: TrainedOwner) -> None:
        """Writes an owner's model, key (with what it was filtered from, so that a WSR before the filter can be had
        later) and triggers; the model last, as the sign that all is there."""
        if owner.candidates is not None:
            save_key(owner.candidates, self.path / "keys" / f"{spec.id}.candidates.safetensors")
        if owner.key is not None and owner.triggers is not None:
            save_key(owner.key, self.path / "keys" / f"{spec.id}.safetensors")
            save_key(owner.triggers, self.path / "keys" / f"{spec.id}.triggers.safetensors")
        header = {
            "seconds": owner.seconds,
            "started": owner.started.isoformat(),
            "false_trigger": owner.false_trigger,
            "diagnostics": dict(owner.diagnostics),
        }
        save_model(owner.model, self._model(spec.file), {"owner": json.dumps(header)})

    def check_owners(self, plan: Plan) -> None:
        """Sees that every model and key of the owner's that lies here can be read.

        Raises:
            InputError: one is damaged.
        """
        for spec in plan.owners:
            try:
                self.load_owner(spec)
            except InputError as error:
                file = self._model(spec.file)
                raise InputError(f"{error}; remove {file}, and the model is trained again") from None

    def load_owner(self, spec: OwnerModel) -> TrainedOwner | None:
        """What :meth:`save_owner` wrote, or None if the model is not trained yet."""
        if not self._model(spec.file).exists():
            return None
        model, header = self._load(spec, "owner")
        marked = isinstance(spec, Marked) and spec.watermark.marks
        return TrainedOwner(
            model,
            self.load_key(spec) if marked else None,
            self.load_triggers(spec) if marked else None,
            header["false_trigger"],
            header["seconds"],
            datetime.fromisoformat(header["started"]),
            diagnostics=header.get("diagnostics", {}),
        )

    def load_key(self, spec: OwnerModel) -> KeySamples:
        """A victim's key."""
        return load_key(self.path / "keys" / f"{spec.id}.safetensors")

    def load_triggers(self, spec: OwnerModel) -> KeySamples:
        """A victim's triggers, for pools that ask for some."""
        return load_key(self.path / "keys" / f"{spec.id}.triggers.safetensors")

    def load_model(self, subject: Subject) -> Classifier:
        """A model that lies here, without what belongs to it."""
        return load_model(self._model(subject.file))[0]

    def save_theft(self, theft: Stolen, made: Theft) -> None:
        """Writes a stolen model, the models of its budget curve, and its transfer sets if they were kept; the model
        last, as the sign that all is there."""
        for account, transfer_set in made.transfer_sets.items():
            write_atomically(self.path / "transfer" / f"{account}.safetensors", transfer_set)
        for queries, model in made.snapshots:
            save_model(model, self._model(f"{theft.file}-q{queries}"), {"stolen": json.dumps({"scenario": theft.id})})
        header = {
            "queries": made.queries,
            "seconds": made.seconds,
            "started": made.started.isoformat(),
            "snapshots": [queries for queries, _ in made.snapshots],
            "detectors": detectors_json(tuple(dict.fromkeys(each.detector for each in made.detections))),
            "noticed": first_noticed(made.detections),
        }
        self._save_copy(theft, made.model, header)

    def save_washed(self, subject: Removed, made: Washed) -> None:
        """Writes a model after a removal."""
        self._save_copy(subject, made.model, {"seconds": made.seconds, "started": made.started.isoformat()})

    def _save_copy(self, subject: Stolen | Removed, model: Classifier, header: dict[str, Any]) -> None:
        about = {"scenario": subject.id, "victim": subject.owner.id}
        save_model(model, self._model(subject.file), {"copy": json.dumps(header), "stolen": json.dumps(about)})

    def load_copy(self, subject: Stolen | Removed) -> Copy:
        """What :meth:`save_theft` or :meth:`save_washed` wrote. A washed copy has its theft's queries."""
        model, header = self._load(subject, "copy")
        theft = subject.theft
        count = header if isinstance(subject, Stolen) else self._header(theft, "copy") if theft else {"queries": 0}
        return Copy(
            model,
            count["queries"],
            header["seconds"],
            datetime.fromisoformat(header["started"]),
            tuple((q, load_model(self._model(f"{subject.file}-q{q}"))[0]) for q in header.get("snapshots", ())),
            header.get("detectors"),
            header.get("noticed"),
        )

    def _load(self, subject: Subject, kind: str) -> tuple[Classifier, dict[str, Any]]:
        return load_model(self._model(subject.file))[0], self._header(subject, kind)

    def _header(self, subject: Subject, kind: str) -> dict[str, Any]:
        file = self._model(subject.file)
        try:
            return dict(json.loads(_metadata(file)[kind]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file}: not a model of this run") from None

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

    def rows(self) -> list[Row]:
        """The rows so far; none for a run that has not measured anything."""
        return read_rows(self.path) if any((self.path / "results").glob("*.parquet")) else []

    def open_copies(self, plan: Plan) -> list[Stolen | Removed]:
        """The thefts and removals that lack a row, or have a failed one, in the order of the plan."""
        good = {
            (row.scenario_id, row.role, row.watermark, row.watermark_params)
            for row in self.rows()
            if row.status == "ok"
        }

        def done(copy: Stolen | Removed) -> bool:
            marks = [of.watermark for of in plan.keys_for(copy)]
            return {(copy.id, copy.role, mark.name, mark.params_json()) for mark in marks} <= good

        return [copy for copy in plan.copies if not done(copy)]

    def _model(self, name: str) -> Path:
        return self.path / "models" / f"{name}.safetensors"


def _metadata(file: Path) -> Mapping[str, str]:
    """The texts in the head of a safetensors file; its tensors are not read."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable model: {' '.join(str(error).split())}") from None


def _demand_unused(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty directory; resume it with --resume, or name another")


def _unused(path: Path) -> Path:
    """The path, or with a number behind it where another run has begun in the same second."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
