"""The actors that compute: trainers on the owner's side, attackers on the thief's, the collector between them.

Each is a plain class; the shells at the bottom make actors of them. They live as long as the run, because a process
with torch in it takes seconds to start. A trainer sees everything the owner has. An attacker sees only its own world,
without the test images, and the service's handle.

Models travel through the run directory. A worker takes the model it starts from off the shelf, and hands its own model
to the collector before its call returns. So no finished model is lost with a node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.board import Posting
from actors.devices import Placement, settle
from simulator.checkpoint import TimedCheckpoint
from simulator.detectors.base import Detector
from simulator.experiment.collector import Collector
from simulator.experiment.owner import HalfTrained, TrainedOwner, train_owner, train_phase
from simulator.experiment.removal import Washed, wash
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft, run_scenario
from simulator.experiment.world import World
from simulator.models import Classifier, from_bytes
from simulator.ownership.key import KeySamples
from simulator.plan.config import RunConfig
from simulator.plan.subjects import Marked, OwnerModel, Removed, Stolen, Subject
from simulator.records.rows import Row
from simulator.service.recording import TransferSet
from simulator.training.predict import use_one_thread

if TYPE_CHECKING:  # importing Serve takes a second of CPU time, and trainer and collector do without
    from ray.serve.handle import DeploymentHandle

    from actors.replica import Replica
    from actors.transport import ServeTransport

#: how often a call to the collector is made again after its death, or when it was lost on the way
MEASURE_RETRIES = 19


Given = ParamSpec("Given")


def once(method: Callable[Given, None]) -> Callable[Given, None]:
    """A worker's method that does nothing where Ray repeats a call which this worker has done: its answer was lost on
    the way. A repeated call has the same id."""

    @functools.wraps(method)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> None:
        call, worker = ray.get_runtime_context().get_task_id(), vars(args[0])
        if call is None or call != worker.get("_done"):
            method(*args, **kwargs)
            worker["_done"] = call

    return called


class Trainer:
    """Trains the owner's models."""

    def __init__(self, world: World, board: ActorHandle[Any], keeper: ActorHandle[Any], placement: Placement) -> None:
        self._world, self._board, self._keeper = world, board, keeper
        self._device = settle(placement)

    @once
    def train(self, spec: OwnerModel, shelf: ActorHandle[Any], collector: ActorHandle[Any]) -> None:
        """Trains a model of the owner; returns once the collector has kept it."""
        benign = take(shelf, spec.benign) if isinstance(spec, Marked) else None
        progress, checkpoint = Posting(self._board, spec.id), kept(self._keeper, spec.id)
        owner = train_owner(spec, self._world, benign, self._device, progress, checkpoint)
        owner.model.cpu()
        ray.get(collector.keep.remote(spec, owner))

    def train_phase(self, spec: Marked, shelf: ActorHandle[Any], phase: str) -> HalfTrained:
        """See :func:`simulator.experiment.owner.train_phase`; :meth:`train` goes on from there, in any trainer."""
        benign = take(shelf, spec.benign)
        progress, checkpoint = Posting(self._board, spec.id), kept(self._keeper, spec.id)
        found = train_phase(spec, self._world, benign, phase, self._device, progress, checkpoint)
        checkpoint.load()  # the keeper answers after the last write, so it is not lost
        return found


class Attacker:
    """Runs one theft or removal after another.

    It starts at the same time as the service, so it gets the service's handle with its first theft.
    """

    def __init__(self, world: World, board: ActorHandle[Any], keeper: ActorHandle[Any], placement: Placement) -> None:
        import actors.transport  # noqa: F401  imported now, so that the first theft need not wait for it

        self._world, self._board, self._keeper = world, board, keeper
        self._transport: ServeTransport | None = None
        self._device = settle(placement)

    @once
    def steal(
        self,
        service: DeploymentHandle[Replica],
        theft: Stolen,
        tokens: dict[str, str],
        triggers: KeySamples | None,
        collector: ActorHandle[Any],
        record: bool,
        detectors: Sequence[Detector] = (),
    ) -> None:
        """See :func:`simulator.experiment.theft.run_scenario`; returns when the collector has kept the copy."""
        if self._transport is None:
            from actors.transport import ServeTransport

            self._transport = ServeTransport(service)
        made = run_scenario(
            theft,
            self._world,
            self._transport,
            tokens,
            triggers,
            self._device,
            Posting(self._board, theft.id),
            record=record,
            detectors=detectors,
            checkpoint=kept(self._keeper, theft.id),
        )
        made.model.cpu()
        ray.get(collector.keep.remote(theft, made))

    @once
    def wash(self, subject: Removed, shelf: ActorHandle[Any], collector: ActorHandle[Any]) -> None:
        """See :func:`simulator.experiment.removal.wash`; returns when the collector has kept the result."""
        target = take(shelf, subject.target)
        transfer = take_transfer(shelf, subject) if "transfer" in subject.removal.needs else None
        progress, checkpoint = Posting(self._board, subject.id), kept(self._keeper, subject.id)
        made = wash(subject, target, self._world, transfer, self._device, progress, checkpoint)
        made.model.cpu()
        ray.get(collector.keep.remote(subject, made))


class CollectorService:
    """The collector in a process of its own, on the driver's node.

    It may be killed at any moment: a model is on disk before it is measured, and a row that is written again replaces
    the old one.
    """

    def __init__(self, path: str, config: RunConfig, dataset_name: str) -> None:
        use_one_thread()
        self._directory = RunDirectory(Path(path))
        test, held_out = self._directory.load_test()
        world = self._directory.load_world()
        self._collector = Collector(self._directory, config, dataset_name, test, held_out, world=world)

    def keep(self, subject: Subject, made: TrainedOwner | Theft | Washed) -> None:
        """See :meth:`Collector.keep`."""
        self._collector.keep(subject, made)

    def measure(self, subject: Subject, keys: Sequence[Marked], charged: int = 0) -> list[Row]:
        """See :meth:`Collector.measure`."""
        return self._collector.measure(subject, keys, charged)

    def fail(self, subject: Subject, error: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        """See :meth:`Collector.fail`."""
        return self._collector.fail(subject, error, keys, queries)

    def triggers(self, spec: Marked) -> KeySamples:
        """A victim's triggers, for a thief whose pool holds some."""
        return self._directory.load_triggers(spec)

    def accuracy(self, spec: OwnerModel) -> float:
        """See :meth:`Collector.accuracy`."""
        return self._collector.accuracy(spec)


def take(shelf: ActorHandle[Any], subject: Subject) -> Classifier:
    """Takes a model off the shelf."""
    reference: Any = shelf.get.remote(subject.file)
    return from_bytes(ray.get(reference))


def take_transfer(shelf: ActorHandle[Any], subject: Removed) -> TransferSet:
    """What the theft that a model goes back to asked and was answered, off the shelf."""
    files: Any = [shelf.transfer_set.remote(account) for account in subject.theft_accounts]
    return TransferSet.of([data for data in ray.get(files) if data is not None], subject.label)


def kept(keeper: ActorHandle[Any], name: str) -> TimedCheckpoint:
    """The checkpoint of one piece of work, which the keeper holds.

    Nobody waits for a write, so a lost write costs some work again. A write is skipped while the keeper is busy with
    the last one.
    """
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


# A call that was lost on the way is made again, however often: the worker lives. One that has died stays dead, and its
# work goes to another (actors/workers.py).
TrainerActor = ray.remote(max_task_retries=-1)(Trainer)
AttackerActor = ray.remote(max_task_retries=-1)(Attacker)
# A model that kills whoever measures it, by its size, must not do so for ever: the call is lost after some deaths.
CollectorActor = ray.remote(max_restarts=-1, max_task_retries=MEASURE_RETRIES)(CollectorService)
