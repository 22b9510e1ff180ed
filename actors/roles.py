"""The actors that compute: trainers on the owner's side, attackers on the other, the collector between them.

Each is a plain class; the shells at the bottom make actors of them. They live as long as the run, because starting a
process with torch in it costs seconds. A trainer sees everything the owner has; an attacker only its own world, without
the test images, and the service's handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.board import Posting
from actors.devices import Placement, settle
from simulator.checkpoint import TimedCheckpoint
from simulator.detectors.base import Detector
from simulator.experiment.collector import Collector
from simulator.experiment.owner import HalfTrained, TrainedOwner, train_owner, train_phase
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft, run_scenario
from simulator.experiment.world import World
from simulator.models import from_bytes, to_bytes
from simulator.ownership.key import KeySamples
from simulator.plan.config import RunConfig
from simulator.plan.subjects import OwnerModel, Scenario
from simulator.records.rows import Row
from simulator.training.predict import use_one_thread

if TYPE_CHECKING:  # Serve takes a second of a processor's time to import: the trainer and the collector do without it
    from ray.serve.handle import DeploymentHandle

    from actors.replica import Replica
    from actors.transport import ServeTransport

#: how often a call to the collector is made again after its death
MEASURE_RETRIES = 9
#: of an owner's model what others need: its weights for whoever trains on from them, the triggers for thieves; and,
#: for the driver, its seconds
Parts = tuple[bytes, KeySamples | None, float]


def _parts(owner: TrainedOwner) -> Parts:
    return to_bytes(owner.model), owner.triggers, owner.seconds


class Trainer:
    """Trains the owner's models."""

    def __init__(self, world: World, board: ActorHandle[Any], keeper: ActorHandle[Any], placement: Placement) -> None:
        self._world, self._board, self._keeper = world, board, keeper
        self._device = settle(placement)

    def train(self, spec: OwnerModel, benign: bytes | None) -> tuple[TrainedOwner, float]:
        """Trains a model of the owner's; a marked one needs the benign model as bytes. Also the seconds, for who waits.

        What is returned lies on this node until :meth:`CollectorService.keep_owner` has written it.
        """
        start = from_bytes(benign) if benign is not None else None
        progress, checkpoint = Posting(self._board, spec.id), kept(self._keeper, spec.id)
        owner = train_owner(spec, self._world, start, self._device, progress, checkpoint)
        owner.model.cpu()
        return owner, owner.seconds

    def train_phase(self, spec: OwnerModel, benign: bytes, phase: str) -> HalfTrained:
        """See :func:`simulator.experiment.owner.train_phase`; :meth:`train` goes on from there, in any trainer."""
        progress, checkpoint = Posting(self._board, spec.id), kept(self._keeper, spec.id)
        found = train_phase(spec, self._world, from_bytes(benign), phase, self._device, progress, checkpoint)
        checkpoint.load()  # comes after the last write, which nobody waited for
        return found


class Attacker:
    """Runs one scenario after another. It starts while the service is starting, so it learns of it with the first."""

    def __init__(self, world: World, board: ActorHandle[Any], keeper: ActorHandle[Any], placement: Placement) -> None:
        import actors.replica  # noqa: F401  now, and not when the first scenario waits for it

        self._world, self._board, self._keeper = world, board, keeper
        self._transport: ServeTransport | None = None
        self._device = settle(placement)

    def run(
        self,
        service: DeploymentHandle[Replica],
        scenario: Scenario,
        tokens: dict[str, str],
        triggers: KeySamples | None,
        record: bool,
        detectors: Sequence[Detector] = (),
    ) -> tuple[Theft, int]:
        """See :func:`simulator.experiment.theft.run_scenario`; also the number of its queries, for the driver."""
        if self._transport is None:
            from actors.transport import ServeTransport

            self._transport = ServeTransport(service)
        theft = run_scenario(
            scenario,
            self._world,
            self._transport,
            tokens,
            triggers,
            self._device,
            Posting(self._board, scenario.id),
            record=record,
            detectors=detectors,
            checkpoint=kept(self._keeper, scenario.id),
        )
        theft.model.cpu()
        return theft, theft.queries


class CollectorService:
    """The collector and the run directory, in one process on the driver's node.

    It may be killed at any moment: what it was given is on disk before it is measured, a row that is written again
    replaces itself, and a collector that is started again reads the owner's models and keys when it needs them.

    What it returns lies on the driver's node, where it outlives the node of whoever made it.
    """

    def __init__(self, path: str, config: RunConfig, dataset_name: str) -> None:
        use_one_thread()
        self._directory = RunDirectory(Path(path))
        test, held_out = self._directory.load_test()
        self._collector = Collector(Path(path), config, dataset_name, test, held_out)

    def load_owner(self, spec: OwnerModel) -> Parts:
        """An owner's model that is on disk."""
        owner = self._directory.load_owner(spec)
        assert owner is not None
        return _parts(owner)

    def keep_owner(self, spec: OwnerModel, owner: TrainedOwner) -> Parts:
        """Writes an owner's model to disk."""
        self._directory.save_owner(spec, owner)
        self._directory.checkpoints.clear(spec.id)
        return _parts(owner)

    def measure_owner(self, spec: OwnerModel) -> list[Row]:
        """Measures an owner's model that is on disk; a benign one has rows with each key only."""
        owner = self._directory.load_owner(spec)
        assert owner is not None
        return self._know(spec, owner)

    def benign_accuracy(self, spec: OwnerModel) -> float:
        """The accuracy of a benign model that has been added, in [0, 1]."""
        self._know_from_disk(spec)
        return self._collector.accuracy(spec)

    def add_stolen(self, scenario: Scenario, theft: Theft, charged: int, keys: Sequence[OwnerModel]) -> list[Row]:
        """Keeps a stolen model on disk and measures it."""
        self._directory.save_theft(scenario, theft)
        self._directory.checkpoints.clear(scenario.id)
        for spec in (*keys, scenario.victim):
            self._know_from_disk(spec)
        return self._collector.add_stolen(scenario, replace(theft, transfer_sets={}), charged, keys)

    def add_failure(self, scenario: Scenario, error: str, queries: int, keys: Sequence[OwnerModel]) -> list[Row]:
        """See :meth:`Collector.add_failure`."""
        return self._collector.add_failure(scenario, error, queries, keys)

    def add_owner_failure(self, spec: OwnerModel, error: str) -> list[Row]:
        """See :meth:`Collector.add_owner_failure`."""
        return self._collector.add_owner_failure(spec, error)

    def _know(self, spec: OwnerModel, owner: TrainedOwner) -> list[Row]:
        if owner.key is None:
            self._collector.add_benign(spec, owner.model, owner.seconds, owner.started)
            return []
        self._know_from_disk(spec.benign)
        return self._collector.add_victim(spec, owner.model, owner.key, owner.seconds, owner.started)

    def _know_from_disk(self, spec: OwnerModel) -> None:
        if spec not in self._collector:
            owner = self._directory.load_owner(spec)
            assert owner is not None
            self._know(spec, owner)


def kept(keeper: ActorHandle[Any], name: str) -> TimedCheckpoint:
    """The checkpoint of one piece of work at the keeper. Nobody waits for a write: a lost one costs some work again, as
    does one that is left out because the keeper has not done with the last."""
    last: list[ObjectRef[Any]] = []

    def read() -> bytes | None:
        reference: Any = keeper.read.remote(name)
        data: bytes | None = ray.get(reference)
        return data

    def write(data: bytes) -> None:
        if last and not ray.wait(last, timeout=0)[0]:
            return
        last[:] = [keeper.write.remote(name, data)]

    return TimedCheckpoint(read, write)


TrainerActor = ray.remote(Trainer)
AttackerActor = ray.remote(Attacker)
# A model that kills whoever measures it, by its size, must not do so for ever: the call is lost after some deaths.
CollectorActor = ray.remote(max_restarts=-1, max_task_retries=MEASURE_RETRIES)(CollectorService)
