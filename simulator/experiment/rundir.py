"""A run's directory: where its files lie, and which work is already done.

run.json  config.yaml  results/  detections/  models/  keys/  ledger/  queries/  transfer/  report/  logs/  .lock

One process works in it at a time. It holds a lock on ``.lock``, which the system releases when the process ends,
however it ends (see :func:`simulator.files.try_lock` for network file systems).
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

from simulator.chain import Head, read_head
from simulator.checkpoint import CheckpointFolder
from simulator.data.dataset import Images
from simulator.detectors.base import first_noticed
from simulator.errors import InputError
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.removal import Washed
from simulator.experiment.theft import Theft
from simulator.experiment.world import World
from simulator.files import LOCK, Folder, demand_plain, locked, write_atomically
from simulator.models import Classifier, load_model, save_model
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.plan.config import RunConfig, read_config
from simulator.plan.subjects import Guarded, Marked, OwnerModel, Removed, Stolen, Subject, Suspect
from simulator.plan.tree import Plan
from simulator.records.detections import detectors_json
from simulator.records.provenance import read_run_info
from simulator.records.rows import Row, read_rows
from simulator.service.audit import check_charges
from simulator.service.ledger import Ledger
from simulator.service.log import restore
from simulator.service.recording import TransferSet
from simulator.tensorfile import read_tensors, write_tensors


@dataclass(frozen=True)
class Copy:
    """A thief's model, with what was noted when it was made.

    Attributes:
        queries: victim images that its theft was answered, by the thief's own count. It is 0 without a theft.
        seconds: time of making it from its parent.
        snapshots: ``(queries, model)`` at stages of the budget.
        detectors: the detectors that watched its accounts, as JSON.
        noticed: images after which the first detector noticed it; None if none did.
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
                _demand_unused(path)  # another process may have made it since
                (path / "logs").mkdir(exist_ok=True)
                write_atomically(path / "config.yaml", config.to_yaml().encode())
        except OSError as error:
            raise InputError(f"{path}: cannot write the run directory there: {error.strerror}") from None
        return cls(path.resolve())

    @classmethod
    def resume(cls, path: Path) -> tuple[RunDirectory, RunConfig]:
        """An earlier run's directory and configuration.

        Raises:
            InputError: it is no run directory, or not writable, or holds a symbolic link; or its query account was
                damaged, cut or exchanged, or does not know what the rows say.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: not a run directory (it has no config.yaml)")
        if not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot write the run directory there: permission denied")
        path = path.resolve()
        demand_plain(path)
        directory, config = cls(path), read_config(str(path / "config.yaml"))
        check_charges(path, directory.rows(), directory.account_head())
        (path / "logs").mkdir(exist_ok=True)
        return directory, config

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the directory against other processes inside the block.

        Raises:
            InputError: another process holds the lock.
        """
        with locked(self.path):
            yield

    def discard(self) -> None:
        """Removes the directory of a run that could not begin. A directory with a model or a row stays."""
        if not any(any((self.path / part).glob("*")) for part in ("models", "results")):
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def ledger(self) -> Path:
        """The file of the query ledger."""
        return self.path / "ledger" / "ledger.log"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The state of work under way."""
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def query_log(self) -> Folder:
        """The parts of the query log."""
        return Folder(self.path / "queries", ".parquet")

    def account_head(self) -> Head | None:
        """The head of the account as ``run.json`` has it, from the time when a run last ended here."""
        return read_run_info(self.path).account if (self.path / "run.json").exists() else None

    def settled_head(self) -> Head | None:
        """The head of the account as it lies beside the ledger."""
        return read_head(self.ledger)

    def settle(self, attacks: Mapping[str, str] | None = None) -> None:
        """Brings the account to its end: its head is written up to the last grant, and the query log gets what kills
        have swallowed (see :func:`simulator.service.log.restore`). No other ledger has the log open now.

        Args:
            attacks: the attack behind each account; None where there is no query log.
        """
        ledger = Ledger(self.ledger)
        if attacks is not None:
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
        """The secret token of an account. A resumed run has the same."""
        return hmac.new(self._secret, account.encode(), hashlib.sha256).hexdigest()

    def has(self, subject: Subject) -> bool:
        """Whether a model, and all that belongs to it, lies here."""
        file = self._model(subject.file)
        if isinstance(subject.kept, OwnerModel):
            return file.exists()
        try:  # a copy of an earlier version lacks the counts that measuring needs
            return "copy" in _metadata(file)
        except InputError:  # absent, or damaged: it is made again, and pays nothing twice
            return False

    def save_owner(self, spec: OwnerModel, owner: TrainedOwner) -> None:
        """Writes an owner's model, key and triggers. The model comes last, as the sign that all is there.

        The samples that the key was filtered from are written, too, for a WSR before the filter.
        """
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
        """Checks that every model and key of the owner in this directory can be read.

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

    def load_transfer(self, subject: Removed) -> TransferSet:
        """What the theft that a model goes back to asked and was answered.

        Raises:
            InputError: it was not kept, or is damaged.
        """
        files = map(Folder(self.path / "transfer").read, subject.theft_accounts)
        return TransferSet.of([data for data in files if data is not None], subject.label)

    def load_model(self, subject: Subject) -> Classifier:
        """A model of this directory, without key or counts."""
        return load_model(self._model(subject.file))[0]

    def save_theft(self, theft: Stolen, made: Theft) -> None:
        """Writes a stolen model, the models of its budget curve, and its transfer sets if they were kept. The model
        comes last, as the sign that all is there."""
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

    def load_copy(self, subject: Suspect) -> Copy:
        """What :meth:`save_theft` or :meth:`save_washed` wrote. A washed copy takes over its theft's query count.

        For a suspect behind an evasion this is the model behind it, without the figures of that model's making.
        """
        if isinstance(subject, Guarded):
            behind = subject.kept
            if isinstance(behind, Stolen | Removed):
                copy = self.load_copy(behind)
                return Copy(copy.model, copy.queries, 0.0, copy.started)
            model, header = self._load(behind, "owner")
            return Copy(model, 0, 0.0, datetime.fromisoformat(header["started"]))
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
        """Writes the test images for a collector in another process, until :meth:`clear_test`. ``held_out`` are the
        attacker's images, which benign clients need."""
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
        """Removes what :meth:`save_test` and :meth:`save_world` wrote."""
        self.checkpoints.clear("test")
        World.clear(self.path / "checkpoints")

    def save_world(self, world: World) -> None:
        """Lays the images of suspects ready for a collector in another process, which asks models behind evasions,
        until :meth:`clear_test`."""
        world.write(self.path / "checkpoints")

    def load_world(self) -> World | None:
        """What :meth:`save_world` wrote, without a test part; None if it wrote nothing."""
        return World.read(self.path / "checkpoints")

    def rows(self) -> list[Row]:
        """The rows so far; none if nothing has been measured yet."""
        return read_rows(self.path) if any((self.path / "results").glob("*.parquet")) else []

    def open_copies(self, plan: Plan) -> list[Suspect]:
        """The thefts, removals and evasions that lack a row, or have a failed one, in the order of the plan."""
        good = {
            (row.scenario_id, row.role, row.watermark, row.watermark_params)
            for row in self.rows()
            if row.status == "ok"
        }

        def done(copy: Suspect) -> bool:
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
    """The path, or the path with a number, e.g. ``…_digits-2``, if another run has begun in the same second."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
