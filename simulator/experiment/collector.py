"""The collector keeps every model that is made, and measures it. It alone holds the keys and the test images.

Everything that it measures lies in the run directory. So a restarted collector, or a second one on the same directory,
measures the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from simulator.analysis.agreement import accuracy, agreement
from simulator.component import BENIGN
from simulator.context import Context
from simulator.data.images import Images
from simulator.detectors.base import Detection
from simulator.detectors.clients import alarm_rate, watch_clients
from simulator.experiment.guarding import Asked, guarded
from simulator.experiment.owner import TrainedOwner
from simulator.experiment.removal import Washed
from simulator.experiment.rundir import Copy, RunDirectory
from simulator.experiment.theft import Theft
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.ownership.wsr import small_key
from simulator.plan.config import RunConfig, StageConfig
from simulator.plan.subjects import Guarded, Marked, OwnerModel, Removed, Stolen, Subject, Suspect
from simulator.records.detections import Source, detectors_json, write_detections
from simulator.records.rows import Row, write_row
from simulator.seeding import generator_for
from simulator.training.predict import predict_labels


class Collector:
    """Keeps models in a run directory and measures them with the owner's keys and test images.

    Args:
        config: the run's configuration.
        dataset_name: the data set's name in the rows.
        test: the held-out images, which nobody else has.
        held_out: the attacker's images, which benign clients ask if detectors are configured.
        device: where models are measured.
        world: what suspects have for their evasions, where there are some: an attacker's view.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        dataset_name: str,
        test: Images,
        held_out: Images | None = None,
        device: torch.device | None = None,
        world: World | None = None,
    ) -> None:
        self._directory, self._config, self._dataset, self._test = directory, config, dataset_name, test
        self._world = world
        self._held_out, self._device = held_out, device or torch.device("cpu")
        self._config_json = config.to_json()
        self._labels: dict[str, Tensor] = {}
        self._keys: dict[str, KeySamples] = {}

    # -- keeping -----------------------------------------------------------------------------------------------------

    def keep(self, subject: Subject, made: TrainedOwner | Theft | Washed) -> None:
        """Writes a model and all that came with it to the run directory, and removes its checkpoint."""
        if isinstance(made, TrainedOwner):
            assert isinstance(subject, OwnerModel)
            self._directory.save_owner(subject, made)
        elif isinstance(made, Theft):
            assert isinstance(subject, Stolen)
            if made.detections:
                found: dict[Source, Sequence[Detection]] = {"attack": made.detections}
                write_detections(
                    self._directory.path, subject.id, subject.victim.id, found, self._config_json, subject.attack
                )
            self._directory.save_theft(subject, made)
        else:
            assert isinstance(subject, Removed)
            self._directory.save_washed(subject, made)
        self._directory.checkpoints.clear(subject.id)

    # -- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, subject: Subject, keys: Sequence[Marked], charged: int = 0) -> list[Row]:
        """Measures a kept model with each of the keys; returns the rows that were written.

        A victim gives two rows: its own, and its benign model's with the same key.

        Args:
            keys: the victims whose keys concern it (see :meth:`simulator.plan.tree.Plan.keys_for`).
            charged: images that the ledger charged for its theft. If the thief's own count differs, the rows are
                failures, because no figure of such a run can be trusted.
        """
        if isinstance(subject, Marked):
            return self._measure_victim(subject)
        assert isinstance(subject, Suspect)
        copy = self._directory.load_copy(subject)
        if copy.queries != charged:
            error = f"the attacker counts {copy.queries} answered images, the ledger charged {charged}"
            return self.fail(subject, error, keys, charged)
        asked = self._asked(subject, copy)
        rows = [row for of in keys for row in self._copy_rows(subject, of, copy, asked)]
        return [self._write(row) for row in rows]

    def fail(self, subject: Subject, error: str, keys: Sequence[Marked], queries: int = 0) -> list[Row]:
        """Writes the rows of a model that could not be made."""
        columns: dict[str, Any] = {"status": "failed", "error": " ".join(error.split())}
        if isinstance(subject, Marked):
            return [self._write(Row(**self._owner_columns(subject, subject), **columns))]
        assert isinstance(subject, Suspect)
        return [self._write(Row(**self._copy_columns(subject, of), queries=queries, **columns)) for of in keys]

    def accuracy(self, spec: OwnerModel) -> float:
        """The test accuracy, in [0, 1], of a kept owner's model."""
        return accuracy(self._labels_of(spec), self._test.labels)

    # -- the owner's models ------------------------------------------------------------------------------------------

    def _measure_victim(self, spec: Marked) -> list[Row]:
        benign, owner = self._owner(spec.benign), self._owner(spec)
        self._labels.pop(spec.id, None)  # the victim may have been trained again
        unmarked = self._owner_row(spec.benign, spec, benign)
        marked = self._owner_row(spec, spec, owner)
        warnings = self._warnings(marked, unmarked, self._key(spec) if spec.watermark.marks else None)
        warnings += owner.diagnostics.get("warnings", [])
        marked = marked.model_copy(
            update={
                "false_trigger": owner.false_trigger,
                "diagnostics": json.dumps(owner.diagnostics, sort_keys=True) if owner.diagnostics else None,
                "warning": "; ".join(warnings) or None,
                **self._false_alarms(spec, owner.model),
            }
        )
        return [self._write(unmarked), self._write(marked)]

    def _owner(self, spec: OwnerModel) -> TrainedOwner:
        owner = self._directory.load_owner(spec)
        assert owner is not None, f"{spec.id} is not kept"
        owner.model.to(self._device)
        return owner

    def _labels_of(self, spec: OwnerModel) -> Tensor:
        """The labels ``(N,)`` that an owner's model gives the test images."""
        if spec.id not in self._labels:
            self._labels[spec.id] = predict_labels(self._owner(spec).model, self._test.images)
        return self._labels[spec.id]

    def _key(self, spec: Marked) -> KeySamples:
        if spec.id not in self._keys:
            self._keys[spec.id] = self._directory.load_key(spec)
        return self._keys[spec.id]

    def _owner_columns(self, spec: OwnerModel, of: Marked) -> dict[str, Any]:
        return {
            "scenario_id": spec.id,
            "role": spec.role,
            "victim": BENIGN if spec.control else spec.id,
            "parent": spec.parent.id if spec.parent else None,
            "threshold": self._config.verification.threshold,
            "dataset": self._dataset,
            "watermark": of.watermark.name,
            "watermark_params": of.watermark.params_json(),
            "architecture": spec.architecture,
            "seed": spec.seed,
        }

    def _owner_row(self, spec: OwnerModel, of: Marked, owner: TrainedOwner) -> Row:
        labels = self._labels_of(spec)
        return Row(
            **self._owner_columns(spec, of),
            accuracy=accuracy(labels, self._test.labels),
            agreement=agreement(labels, self._labels_of(of.benign)),
            **self._verdict_columns(Asked(owner.model), of),
            seconds=owner.seconds,
            started=owner.started,
            finished=datetime.now(UTC),
        )

    # -- the thieves' models -----------------------------------------------------------------------------------------

    def _asked(self, subject: Suspect, copy: Copy) -> Asked:
        """The copy as it is asked: through its evasion, if it has one."""
        model = copy.model.to(self._device)
        if not isinstance(subject, Guarded):
            return Asked(model)
        assert self._world is not None, "no images for an evasion"
        return guarded(subject, model, self._world)

    def _copy_rows(self, subject: Suspect, of: Marked, copy: Copy, asked: Asked) -> Iterable[Row]:
        """The rows of one copy with one key: those of its budget curve, then its own."""
        columns = self._copy_columns(subject, of)
        for queries, model in copy.snapshots:
            point = {"scenario_id": f"{subject.id}-q{queries}", "budget": queries}
            then = replace(copy, model=model, queries=queries)
            yield self._copy_row({**columns, **point}, subject, of, then, self._asked(subject, then))
        yield self._copy_row(columns, subject, of, copy, asked)

    def _copy_row(self, columns: dict[str, Any], subject: Suspect, of: Marked, copy: Copy, asked: Asked) -> Row:
        labels, noticed = asked.labels(self._test.images), copy.noticed
        return Row(
            **columns,
            **asked.flags(self._test.images, self._key(of).images if of.watermark.marks else None),
            queries=copy.queries if subject.theft else None,
            detectors=copy.detectors,
            detected_at=noticed if noticed is not None and noticed <= copy.queries else None,
            accuracy=accuracy(labels, self._test.labels),
            agreement=agreement(labels, self._labels_of(subject.owner)),
            **self._verdict_columns(asked, of),
            seconds=asked.seconds or copy.seconds,
            started=copy.started,
            finished=datetime.now(UTC),
        )

    def _copy_columns(self, subject: Suspect, of: Marked) -> dict[str, Any]:
        assert subject.parent is not None
        washed = next((each for each in subject.lineage if isinstance(each, Removed)), None)
        return {
            "scenario_id": subject.id,
            "role": subject.role,
            "victim": BENIGN if subject.control else subject.owner.id,
            "parent": subject.parent.id,
            "threshold": self._config.verification.threshold,
            "dataset": self._dataset,
            "watermark": of.watermark.name,
            "watermark_params": of.watermark.params_json(),
            "architecture": subject.architecture,
            "seed": subject.seed,
            **(_theft_columns(subject.theft) if subject.theft else {}),
            **(_removal_columns(washed.chain) if washed else {}),
            **(_evasion_columns(subject) if isinstance(subject, Guarded) else {}),
            "allowed_loss": self._config.accuracy_loss if isinstance(subject, Removed) else None,
        }

    def _verdict_columns(self, asked: Asked, of: Marked) -> dict[str, Any]:
        test = self._config.ownership_test
        if not of.watermark.marks:
            return {"test": test.name}
        key = self._key(of)
        evidence = key.evidence()
        result = test.judge(asked.suspect(len(key)), evidence, Context(generator_for("judge", of.id)))
        stages, note = of.key_filter.stages, key.info.get("filter")
        return {
            "test": test.name,
            "key_filter": stages if note == stages else f"{stages}: {note}",
            "wsr": result.statistic,
            "wsr_low": result.low,
            "wsr_high": result.high,
            "key_samples": result.samples,
            "p_value": result.p_value,
            "verified": result.verified,
        }

    def _write(self, row: Row) -> Row:
        write_row(self._directory.path, row, self._config_json)
        return row

    # -- alarms and warnings -----------------------------------------------------------------------------------------

    def _false_alarms(self, spec: Marked, model: Classifier) -> dict[str, Any]:
        """Simulates the benign clients of a victim; returns the columns about them."""
        detectors, clients = self._config.detectors, self._config.benign_clients
        if not detectors or not clients.count:
            return {}
        found: dict[Source, list[Detection]] = {
            "test": watch_clients(detectors, clients, self._test, self._labels_of(spec), spec.id, "test")
        }
        if self._held_out is not None:
            labels = predict_labels(model, self._held_out.images)
            found["held-out"] = watch_clients(detectors, clients, self._held_out, labels, spec.id, "held-out")
        write_detections(self._directory.path, spec.id, spec.id, found, self._config_json)
        rates = [rate for several in found.values() if (rate := alarm_rate(several)) is not None]
        return {"detectors": detectors_json(detectors), "false_alarms": sum(rates) / len(rates)}

    def _warnings(self, victim: Row, benign: Row, key: KeySamples | None) -> list[str]:
        """The warnings about a victim: lost accuracy, a key that the filter could not choose or left too small, a
        watermark that is not verified, benign clients that are too alike."""
        found = []
        assert victim.accuracy is not None
        assert benign.accuracy is not None
        drop = benign.accuracy - victim.accuracy
        if drop > self._config.accuracy_tolerance:
            hint = " (margin too large?)" if "margin" in json.loads(victim.watermark_params) else ""
            found.append(
                f"accuracy {victim.accuracy:.4f} is {drop:.4f} below the benign model's, more than the "
                f"{self._config.accuracy_tolerance} allowed: the watermark harms the task{hint}"
            )
        if key is None:
            return [*found, *self._alike_clients()]
        if key.info.get("filter") not in ("none", "first", "both"):
            found.append(f"key filter: {key.info.get('filter')}")
        if victim.verified is False:
            found.append("the victim's own watermark is not verified")
        doubt = small_key(len(key), key.classes, self._config.verification)
        if doubt is not None:
            found.append(doubt)
        return [*found, *self._alike_clients()]

    def _alike_clients(self) -> list[str]:
        """Warnings for image sources of which each benign client asks more than half: then any two clients share most
        queries."""
        clients = self._config.benign_clients
        if not self._config.detectors or not clients.count:
            return []
        sources = {"test": self._test, "held-out": self._held_out}
        return [
            f"each benign client asks {min(clients.queries, len(images))} of the {len(images)} {name} images: the "
            f"{clients.count} clients share most of theirs and are not independent"
            for name, images in sources.items()
            if images is not None and 2 * clients.queries > len(images)
        ]


def _theft_columns(theft: Stolen) -> dict[str, Any]:
    last, stages = theft.stages[-1], theft.stages
    single = stages[0].attack.params() | ({"accounts": last.accounts} if last.accounts > 1 else {})
    return {
        "attack": theft.attack,
        "attack_params": json.dumps([_stage_params(s) for s in stages] if len(stages) > 1 else single, sort_keys=True),
        "labels": "+".join(dict.fromkeys(stage.labels for stage in stages)),
        "pool": " then ".join(dict.fromkeys(stage.pool_label for stage in stages)),
        "stage": len(stages),
        "budget": theft.budget,
        "accounts": last.accounts,
    }


def _stage_params(stage: StageConfig) -> dict[str, Any]:
    """One of several stages, as an entry of ``attack_params``."""
    return {
        "attack": stage.attack.name,
        **stage.attack.params(),
        "pool": stage.pool_label,
        "labels": stage.labels,
        "architecture": stage.architecture,
        "budget": stage.budget,
    }


def _removal_columns(chain: Sequence[Removed]) -> dict[str, Any]:
    """The removal columns. ``removal_params`` is an object for one removal, a list of objects for several."""
    params = [{**each.removal.params(), **({"pool": each.pool.label} if each.pool else {})} for each in chain]
    return {
        "removal": "+".join(each.removal.name for each in chain),
        "removal_params": json.dumps(params if len(params) > 1 else params[0], sort_keys=True),
    }


def _evasion_columns(subject: Guarded) -> dict[str, Any]:
    params = {**subject.evasion.params(), **({"pool": subject.pool.label} if subject.pool else {})}
    return {"evasion": subject.evasion.name, "evasion_params": json.dumps(params, sort_keys=True)}
