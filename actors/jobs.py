"""Remote calls under way: what to do when one ends, fails, or is lost with its process or its node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from simulator.errors import one_line

#: how often a piece of work is begun, if its process dies or its result is lost
ATTEMPTS = 3
#: seconds between two looks at what has finished
POLL = 0.1
#: of so many jobs one has to end before they are looked at, where that takes less than POLL
BATCH = 32
#: seconds to wait for a service that is starting when the run ends
START_PATIENCE = 60.0

Done = Callable[[Any], None]
Failed = Callable[[str], None]


@dataclass
class Job:
    """One remote call under way, and what to do when it ends. ``lost`` is told when its process died, or when what it
    was given was lost with a node.

    The last of its references tells that it has ended, and is the only one whose value the driver fetches.
    """

    done: Done
    failed: Failed
    lost: Failed
    refs: list[ObjectRef[Any]] = field(default_factory=list)


def innermost(error: BaseException) -> BaseException:
    """What a task failed of: it is wrapped once for each actor that it passed."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def is_lost(error: RayError) -> bool:
    """Whether the same call can succeed when it is made again: the process died or ran out of memory, or an object that
    it was given is gone with its node; and not that the call itself has failed."""
    # a RayTaskError is also of its cause's type, which may be the death of another actor than the one called
    return not isinstance(error, RayTaskError) or isinstance(innermost(error), ObjectLostError)


class Jobs:
    """The jobs of a run."""

    def __init__(self) -> None:
        self._jobs: dict[ObjectRef[Any], Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, job: Job, refs: Sequence[ObjectRef[Any]]) -> None:
        """Takes over a call that has been made."""
        job.refs = list(refs)
        self._jobs[refs[-1]] = job

    def finish_some(self) -> None:
        """Waits a moment for jobs to end, and goes on from those that have."""
        if not self._jobs:
            time.sleep(POLL)
            return
        # one look costs time for every job: where they are many, it is worth waiting until some have ended
        jobs = list(self._jobs)
        for ref in ray.wait(jobs, num_returns=1 + len(jobs) // BATCH, timeout=POLL)[0]:
            self._finish(ref)

    def _finish(self, ref: ObjectRef[Any]) -> None:
        job = self._jobs.pop(ref)
        try:
            value = ray.get(ref)
        except RayError as error:
            why = one_line(innermost(error))
            if is_lost(error):
                job.lost(why[:200])
            else:
                job.failed(why)
        else:
            job.done(value)
        finally:
            # `done` may hold its job, and both what the call returned: a model, that would lie in the object store
            # until Python looks for such circles
            job.refs = []


class Deployment:
    """The service as it starts, in a thread of its own: the run goes on meanwhile."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: Callable[[], Any]) -> None:
        try:
            self._result = start()
        except BaseException as error:
            self._error = error

    def handle(self) -> Any:
        """The service's handle, or None while it starts.

        Raises:
            BaseException: what kept it from starting.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def wait(self) -> None:
        """Waits until it has started, or could not."""
        self._thread.join(START_PATIENCE)
