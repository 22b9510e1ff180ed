"""The collector: alone holds the keys and the test images, measures every model and writes its row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from simulator.analysis.agreement import accuracy, agreement
from simulator.context import Context
from simulator.data.dataset import Images
from simulator.detectors.base import Detection, first_noticed
from simulator.detectors.clients import alarm_rate, watch_clients
from simulator.experiment.theft import Theft
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.ownership.wsr import small_key
from simulator.plan.config import RunConfig, StageConfig
from simulator.plan.subjects import BENIGN, OwnerModel, Scenario
from simulator.records.detections import Source, detectors_json, write_detections
from simulator.records.rows import Row, write_row
from simulator.seeding import generator_for
from simulator.service.oracle import ModelOracle
from simulator.training.predict import predict_labels


class Collector:
    """Measures models against the owner's keys and test images.

    Args:
        run_dir: the run directory the rows are written to.
        config: of the run.
        dataset_name: as it stands in the rows.
        test: the held-out images, which nobody else has.
        held_out: the attacker's images, for benign clients to ask where detectors are configured.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, dataset_name: str, test: Images, held_out: Images | None = None
    ) -> None:
        self._run_dir, self._config, self._dataset, self._test = run_dir, config, dataset_name, test
        self._held_out = held_out
        self._config_json = config.to_json()
        self._labels: dict[str, Tensor] = {}
        self._keys: dict[str, KeySamples] = {}
        self._benigns: dict[str, tuple[Classifier, float, datetime]] = {}

    def __contains__(self, spec: OwnerModel) -> bool:
        """Whether this model of the owner's has been added."""
        return spec.id in self._labels

    def accuracy(self, spec: OwnerModel) -> float:
        """The test accuracy, in [0, 1], of a model of the owner's that has been added."""
        return accuracy(self._labels[spec.id], self._test.labels)

    def add_benign(self, spec: OwnerModel, model: Classifier, seconds: float, started: datetime) -> None:
        """Takes the benign model of a seed. Its rows follow with each key, which :meth:`add_victim` brings."""
        self._benigns[spec.id] = (model, seconds, started)
        self._labels[spec.id] = predict_labels(model, self._test.images)

    def add_victim(
        self, spec: OwnerModel, model: Classifier, key: KeySamples, seconds: float, started: datetime
    ) -> list[Row]:
        """Takes a marked victim and its key; measures it and the benign model with that key."""
        self._keys[spec.id] = key
        self._labels[spec.id] = predict_labels(model, self._test.images)
        benign_model, benign_seconds, benign_started = self._benigns[spec.benign.id]
        benign = self._owner_row(spec.benign, spec, benign_model, benign_seconds, benign_started)
        victim = self._owner_row(spec, spec, model, seconds, started)
        warnings = self._warnings(victim, benign, key)
        victim = victim.model_copy(
            update={
                "false_trigger": key.info.get("false_trigger"),
                "warning": "; ".join(warnings) or None,
                **self._false_alarms(spec, model),
            }
        )
        return [self._write(benign), self._write(victim)]

    def add_stolen(self, scenario: Scenario, theft: Theft, charged: int, keys: Sequence[OwnerModel]) -> list[Row]:
        """Measures a stolen model with each key that concerns it.

        ``charged`` is what the ledger says that the account spent; where the attacker's own count differs, the row is a
        failure, for no figure of such a run can be trusted.
        """
        if theft.queries != charged:
            error = f"the attacker counts {theft.queries} answered images, the ledger charged {charged}"
            return self.add_failure(scenario, error, charged, keys)
        if theft.detections:
            found: dict[Source, Sequence[Detection]] = {"attack": theft.detections}
            write_detections(self._run_dir, scenario.id, scenario.victim.id, found, self._config_json, scenario.attack)
        rows = []
        for of in keys:
            columns = self._scenario_columns(scenario, of)
            for queries, model in theft.snapshots:
                point = {"scenario_id": f"{scenario.id}-q{queries}", "budget": queries}
                rows.append(self._stolen_row({**columns, **point}, scenario, of, model, queries, theft))
            rows.append(self._stolen_row(columns, scenario, of, theft.model, theft.queries, theft))
        return [self._write(row) for row in rows]

    def _stolen_row(
        self,
        columns: dict[str, Any],
        scenario: Scenario,
        of: OwnerModel,
        model: Classifier,
        queries: int,
        theft: Theft,
    ) -> Row:
        labels = predict_labels(model, self._test.images)
        noticed = first_noticed(theft.detections)
        return Row(
            **columns,
            queries=queries,
            detectors=detectors_json(tuple(dict.fromkeys(each.detector for each in theft.detections))),
            detected_at=noticed if noticed is not None and noticed <= queries else None,
            accuracy=accuracy(labels, self._test.labels),
            agreement=agreement(labels, self._labels[scenario.victim.id]),
            **self._verdict_columns(model, of),
            seconds=theft.seconds,
            started=theft.started,
            finished=datetime.now(UTC),
        )

    def add_failure(self, scenario: Scenario, error: str, queries: int, keys: Sequence[OwnerModel]) -> list[Row]:
        """Writes the rows of a scenario that failed."""
        columns: dict[str, Any] = {"queries": queries, "status": "failed", "error": " ".join(error.split())}
        return [self._write(Row(**self._scenario_columns(scenario, of), **columns)) for of in keys]

    def add_owner_failure(self, spec: OwnerModel, error: str) -> list[Row]:
        """Writes the row of a victim whose training failed."""
        columns = self._owner_columns(spec, spec)
        return [self._write(Row(**columns, status="failed", error=" ".join(error.split())))]

    def _write(self, row: Row) -> Row:
        write_row(self._run_dir, row, self._config_json)
        return row

    def _owner_columns(self, spec: OwnerModel, of: OwnerModel) -> dict[str, Any]:
        marked = of.watermark
        return {
            "scenario_id": spec.id,
            "role": "victim" if spec.watermark else "benign",
            "victim": spec.id if spec.watermark else BENIGN,
            "dataset": self._dataset,
            "watermark": marked.name if marked else BENIGN,
            "watermark_params": marked.params_json() if marked else "{}",
            "architecture": spec.architecture,
            "seed": spec.seed,
        }

    def _owner_row(self, spec: OwnerModel, of: OwnerModel, model: Classifier, seconds: float, started: datetime) -> Row:
        labels = self._labels[spec.id]
        return Row(
            **self._owner_columns(spec, of),
            accuracy=accuracy(labels, self._test.labels),
            agreement=agreement(labels, self._labels[of.benign.id]),
            **self._verdict_columns(model, of),
            seconds=seconds,
            started=started,
            finished=datetime.now(UTC),
        )

    def _scenario_columns(self, scenario: Scenario, of: OwnerModel) -> dict[str, Any]:
        last, stages = scenario.stages[-1], scenario.stages
        assert of.watermark is not None
        params = [_stage_params(stage) for stage in stages]
        single = stages[0].attack.params() | ({"accounts": last.accounts} if last.accounts > 1 else {})
        return {
            "scenario_id": scenario.id,
            "role": "stolen",
            "victim": BENIGN if scenario.control else scenario.victim.id,
            "dataset": self._dataset,
            "watermark": of.watermark.name,
            "watermark_params": of.watermark.params_json(),
            "architecture": last.architecture or scenario.victim.architecture,
            "attack": scenario.attack,
            "attack_params": json.dumps(params if len(stages) > 1 else single, sort_keys=True),
            "labels": "+".join(dict.fromkeys(stage.labels for stage in stages)),
            "pool": " then ".join(dict.fromkeys(stage.pool_label for stage in stages)),
            "stage": len(stages),
            "seed": scenario.seed,
            "budget": scenario.budget,
            "accounts": last.accounts,
        }

    def _verdict_columns(self, model: Classifier, of: OwnerModel) -> dict[str, Any]:
        key = self._keys[of.id].evidence()
        suspect = ModelOracle(model, labels="hard", classes=key.classes, shape=key.shape, budget=len(key))
        result = self._config.ownership_test.judge(suspect, key, Context(generator_for("judge", of.id)))
        return {
            "wsr": result.statistic,
            "wsr_low": result.low,
            "wsr_high": result.high,
            "key_samples": result.samples,
            "p_value": result.p_value,
            "verified": result.verified,
        }

    def _false_alarms(self, spec: OwnerModel, model: Classifier) -> dict[str, Any]:
        """The columns about the benign clients of a victim, simulated on the spot."""
        detectors, clients = self._config.detectors, self._config.benign_clients
        if not detectors or not clients.count:
            return {}
        found: dict[Source, list[Detection]] = {
            "test": watch_clients(detectors, clients, self._test, self._labels[spec.id], spec.id, "test")
        }
        if self._held_out is not None:
            labels = predict_labels(model, self._held_out.images)
            found["held-out"] = watch_clients(detectors, clients, self._held_out, labels, spec.id, "held-out")
        write_detections(self._run_dir, spec.id, spec.id, found, self._config_json)
        rates = [rate for several in found.values() if (rate := alarm_rate(several)) is not None]
        return {"detectors": detectors_json(detectors), "false_alarms": sum(rates) / len(rates)}

    def _warnings(self, victim: Row, benign: Row, key: KeySamples) -> list[str]:
        """What the owner has to know: a victim that lost accuracy, a key that the filter could not choose or of which
        it left too little, benign clients that are all the same."""
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
        if key.info.get("filter") not in ("none", "first", "both"):
            found.append(f"key filter: {key.info.get('filter')}")
        if victim.verified is False:
            found.append("the victim's own watermark is not verified")
        doubt = small_key(len(key), key.classes, self._config.verification)
        if doubt is not None:
            found.append(doubt)
        return [*found, *self._alike_clients()]

    def _alike_clients(self) -> list[str]:
        """Sources of images of which benign clients ask more than half, so that any two share most of their queries."""
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


def _stage_params(stage: StageConfig) -> dict[str, Any]:
    """A stage of several, as it stands in ``attack_params``."""
    return {
        "attack": stage.attack.name,
        **stage.attack.params(),
        "pool": stage.pool_label,
        "labels": stage.labels,
        "architecture": stage.architecture,
        "budget": stage.budget,
    }
