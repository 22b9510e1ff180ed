"""Who gets work: workers that are there; and what counts as lost, so that it is done again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ObjectReconstructionFailedError, OwnerDiedError, RayError, RayTaskError

from actors.jobs import ATTEMPTS, Job, Jobs, innermost, is_lost
from actors.workers import Pool


def failed(cause: BaseException) -> RayTaskError:
    """A task's failure, as it arrives when another task had caused it."""
    return RayTaskError("outer", "", RayTaskError("inner", "", cause))


LOST = "00" * 28


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ActorDiedError(), True),
        (OwnerDiedError(LOST, None, ""), True),
        (failed(ObjectReconstructionFailedError(LOST, None, "")), True),
        (failed(ValueError("no")), False),
        # it speaks of another actor, which the one called had asked
        (failed(ActorDiedError()), False),
    ],
    ids=["process", "object", "object that a task was given", "the task itself", "an actor behind it"],
)
def test_what_is_lost_and_what_has_failed(error: RayError, lost: bool) -> None:
    assert is_lost(error) == lost
    assert not isinstance(innermost(error), RayTaskError)


class Worker:
    def __init__(self, broken: bool) -> None:
        if broken:
            raise RuntimeError("out of order")

    def pid(self) -> int:
        return os.getpid()

    def sleep(self) -> None:
        time.sleep(600)

    def fail(self) -> None:
        raise ValueError("no")


class Hall:
    """Starts workers for pools, and ends all of them."""

    def __init__(self) -> None:
        self.broken, self.cpus, self.workers = False, 0.0, []

    def new(self) -> Any:
        self.workers.append(ray.remote(Worker).options(num_cpus=self.cpus).remote(self.broken))
        return self.workers[-1]


@pytest.fixture
def hall(ray_session: None) -> Iterator[Hall]:
    hall = Hall()
    yield hall
    for worker in hall.workers:
        ray.kill(worker)


def idle(pool: Pool, count: int) -> None:
    """Waits until so many are idle."""

    def there() -> bool:
        pool.look()
        return len(pool._idle) == count

    until(there)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ray
def test_work_is_for_those_who_are_there(hall: Hall) -> None:
    pool = Pool(hall.new)
    assert not pool
    pool.fill(1)
    idle(pool, 1)
    hall.cpus = 10**6  # no room for it
    pool.fill(2)
    assert len(hall.workers) == 2
    for _ in range(3):
        worker = pool.take()
        assert worker is hall.workers[0]
        assert not pool
        pool.look()
        assert not pool, "the second cannot come"
        pool.give_back(worker)
    pool.fill(2)
    assert len(hall.workers) == 2, "who is expected is not started again"
    assert pool.lost is None


@pytest.mark.ray
def test_after_a_death_those_who_are_idle_have_to_answer_first(hall: Hall) -> None:
    pool = Pool(hall.new)
    pool.fill(3)
    idle(pool, 3)
    worker = pool.take()
    dead = pool._idle[0]
    os.kill(ray.get(dead.pid.remote()), signal.SIGKILL)
    assert pool.drop(worker), "it was not shed"
    idle(pool, 1)
    until(lambda: not (pool.look() or pool._arriving))
    assert list(pool._idle) == [other for other in hall.workers if other not in (worker, dead)]
    pool.fill(3)
    assert len(hall.workers) == 5


@pytest.mark.ray
def test_one_that_makes_room_has_not_died_by_itself(hall: Hall) -> None:
    pool = Pool(hall.new)
    pool.fill(2)
    idle(pool, 2)
    worker = pool.take()
    lost: list[str] = []
    jobs = Jobs()
    jobs.submit(Job(lambda _: None, lambda _: None, lost.append), [worker.sleep.remote()])
    assert pool.shed(), "the idle one"
    assert not pool
    assert pool.shed(), "the one at work"
    assert not pool.shed(), "there is nobody left"
    until(lambda: bool(jobs.finish_some() or lost))
    assert not pool.drop(worker)
    assert not pool.working


@pytest.mark.ray
@pytest.mark.parametrize("good", [True, False])
def test_a_job_that_has_ended_keeps_nothing_of_what_it_returned(hall: Hall, good: bool) -> None:
    """Its circle of references would hold it until Python looks for circles: an object store full of models."""
    worker, ended = hall.new(), []
    jobs, job = Jobs(), Job(lambda _: ended.append(job), lambda _: ended.append(job), lambda _: ended.append(job))
    jobs.submit(job, [worker.pid.remote() if good else worker.fail.remote()])
    until(lambda: bool(jobs.finish_some() or ended))
    assert ended == [job]
    assert job.refs == []


@pytest.mark.ray
def test_hope_ends_when_nobody_can_be_started(hall: Hall) -> None:
    hall.broken = True
    pool = Pool(hall.new)

    def fill() -> bool:
        pool.look()
        pool.fill(1)
        return pool.lost is not None

    until(fill)
    assert len(hall.workers) == ATTEMPTS
    assert "out of order" in str(pool.lost)
