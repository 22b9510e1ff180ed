"""Who gets work: workers that have answered; who replaces them; and what counts as lost, so that it is done again."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectReconstructionFailedError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors import workers as module
from actors.failures import innermost, is_lost
from actors.workers import ATTEMPTS, Workers
from simulator.errors import InputError
from simulator.experiment.schedule import WorkFailed

LOST = "00" * 28
#: CPUs that no cluster has
NOWHERE = 10**6
#: seconds in which whatever is tested has to happen
PATIENCE = 60.0


def failed(cause: BaseException) -> RayTaskError:
    """A task's failure, as it arrives when another task had caused it."""
    return RayTaskError("outer", "", RayTaskError("inner", "", cause))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ActorDiedError(), True),
        (ActorUnavailableError("cut off", None), True),
        (OwnerDiedError(LOST, None, ""), True),
        (failed(ObjectReconstructionFailedError(LOST, None, "")), True),
        (failed(ValueError("no")), False),
        # it speaks of another actor, which the one called had asked
        (failed(ActorDiedError()), False),
    ],
    ids=["process", "its node, maybe", "object", "object that a task was given", "the task itself", "an actor behind"],
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

    def wait_for(self, file: Path) -> int:
        """Its process, when the file is there."""
        while not file.exists():
            time.sleep(0.02)
        return os.getpid()

    def die_unless(self, file: Path) -> int:
        """Dies, but for the time after somebody else has died of it."""
        if not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, error: Exception) -> None:
        raise error

    def lose(self) -> None:
        """Fails of an object that was lost with its node."""
        raise ObjectReconstructionFailedError(LOST, None, "")

    def array(self) -> np.ndarray[Any, Any]:
        return np.zeros(10**6)


class Hall:
    """Starts workers, and ends all of them."""

    def __init__(self) -> None:
        self.broken, self.workers = False, list[Any]()
        #: what those to come ask for, the last one for all that follow
        self.cpus = [0]

    def new(self) -> Any:
        cpus = self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0]
        self.workers.append(ray.remote(Worker).options(num_cpus=cpus).remote(self.broken))
        return self.workers[-1]

    async def pids(self, *which: int) -> list[int]:
        return [await self.workers[one].pid.remote() for one in which]

    async def dead(self, number: int) -> bool:
        """Whether one has been killed; it is given some time for that."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                ray.get(self.workers[number].__ray_ready__.remote(), timeout=0.1)
            except GetTimeoutError:
                pass
            except RayActorError:
                return True
            await asyncio.sleep(0.05)
        return False


@pytest.fixture
def hall(ray_session: None) -> Iterator[Hall]:
    hall = Hall()
    yield hall
    for worker in hall.workers:
        ray.kill(worker)


def scene(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(play(), PATIENCE))


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.02)


def pid(worker: Any) -> Awaitable[int]:
    found: Awaitable[int] = worker.pid.remote()
    return found


class Begun:
    """Counts how often a piece of work was begun."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def nothing() -> None:
    """Who asks does not need to know when it is begun."""


@pytest.mark.ray
def test_work_is_for_those_who_have_answered(hall: Hall) -> None:
    async def play() -> None:
        hall.cpus = [0, NOWHERE]
        workers = Workers("worker", hall.new, 2)
        assert not workers.working
        await until(lambda: workers.working)
        found = {await workers.do(pid, nothing) for _ in range(5)}
        found |= set(await asyncio.gather(*(workers.do(pid, nothing) for _ in range(5))))
        assert found == set(await hall.pids(0))
        workers.fill()
        assert len(hall.workers) == 2, "who is expected is not started again"

    scene(play)


@pytest.mark.ray
def test_workers_that_were_started_before_count(hall: Hall) -> None:
    async def play() -> None:
        early = hall.new()
        workers = Workers("worker", hall.new, 2, [early])
        await workers.ready()
        assert len(hall.workers) == 2
        assert {await workers.do(pid, nothing) for _ in range(2)} == set(await hall.pids(0, 1))

    scene(play)


@pytest.mark.ray
def test_one_that_dies_is_replaced_and_another_does_its_work(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers, begun = Workers("worker", hall.new, 2), Begun()
        await workers.ready()
        before = await hall.pids(0, 1)
        found = await workers.do(lambda one: one.die_unless.remote(tmp_path / "died"), begun)
        assert begun.count == 2
        assert found in [*before, *await hall.pids(2)]
        await workers.ready()
        assert len(hall.workers) == 3
        await until(lambda: len(workers._idle) == 2)

    scene(play)


@pytest.mark.ray
def test_work_that_kills_its_workers_is_given_up(hall: Hall) -> None:
    async def play() -> None:
        workers, begun = Workers("worker", hall.new, 1), Begun()
        with pytest.raises(WorkFailed, match=r"^its process died: ActorDiedError"):
            await workers.do(lambda one: one.die.remote(), begun)
        assert begun.count == ATTEMPTS
        assert await workers.do(pid, nothing) in await hall.pids(ATTEMPTS)
        assert len(hall.workers) == ATTEMPTS + 1

    scene(play)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "times"), [(ValueError("no"), ATTEMPTS), (InputError("no"), 1)], ids=["a passing want", "wrong input"]
)
def test_work_that_fails_keeps_its_worker(hall: Hall, error: Exception, times: int) -> None:
    async def play() -> None:
        workers, begun = Workers("worker", hall.new, 1), Begun()
        with pytest.raises(WorkFailed, match=f"^{type(error).__name__}: no$"):
            await workers.do(lambda one: one.fail.remote(error), begun)
        assert begun.count == times
        assert await workers.do(pid, nothing) in await hall.pids(0)
        assert len(hall.workers) == 1

    scene(play)


@pytest.mark.ray
def test_work_that_lacks_an_object_is_done_by_another_worker(hall: Hall) -> None:
    async def play() -> None:
        workers, begun = Workers("worker", hall.new, 1), Begun()
        await workers.ready()

        async def call(worker: Any) -> Any:
            return await (worker.lose.remote() if begun.count == 1 else worker.pid.remote())

        assert await workers.do(call, begun) in await hall.pids(1)
        assert await hall.dead(0)

    scene(play)


@pytest.mark.ray
@pytest.mark.parametrize("dead", [4, 6], ids=["some", "all"])
def test_good_work_does_not_fail_by_idle_workers_that_died_with_their_node(hall: Hall, dead: int) -> None:
    """They had answered before, so their deaths are no failed starts, however many they are."""
    assert dead > ATTEMPTS

    async def play() -> None:
        workers = Workers("worker", hall.new, 6)
        await workers.ready()
        pids = await hall.pids(*range(6))
        for one in pids[:dead]:
            os.kill(one, signal.SIGKILL)
        for _ in range(7):
            assert await workers.do(pid, nothing) not in pids[:dead]
        await workers.ready()
        assert len(hall.workers) == 6 + dead
        assert len(workers._idle) == 6

    scene(play)


@pytest.mark.ray
def test_one_that_makes_room_is_idle_if_one_is(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        hall.cpus = [0, 0, NOWHERE]
        workers, begun = Workers("worker", hall.new, 3), Begun()
        await until(lambda: len(workers._idle) == 2)
        file = tmp_path / "file"
        work = asyncio.create_task(workers.do(lambda one: one.wait_for.remote(file), begun))
        await until(lambda: begun.count == 1)
        (busy,) = workers._busy
        at_work = hall.workers.index(busy)
        workers.paused = True
        assert workers.shed(), "the idle one"
        assert await hall.dead(1 - at_work)
        assert await hall.dead(2), "one that had not come"
        assert workers.working
        assert workers.shed(), "the one at work"
        assert not workers.shed(), "there is nobody left"
        await until(lambda: workers.waiting)
        assert not workers.working
        assert len(hall.workers) == 3, "nobody is started meanwhile"
        hall.cpus = [0]
        file.touch()
        workers.paused = False
        workers.fill()
        assert await work in await hall.pids(3, 4, 5)
        assert begun.count == 2

    scene(play)


@pytest.mark.ray
def test_work_whose_workers_make_room_is_not_given_up(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers, begun, file = Workers("worker", hall.new, 1), Begun(), tmp_path / "file"
        work = asyncio.create_task(workers.do(lambda one: one.wait_for.remote(file), begun))
        for count in range(1, ATTEMPTS + 3):
            await until(lambda count=count: begun.count == count)  # type: ignore[misc]
            assert workers.shed()
        file.touch()
        assert await work in await hall.pids(-1)
        assert begun.count == ATTEMPTS + 3

    scene(play)


@pytest.mark.ray
def test_while_paused_nobody_is_started(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers = Workers("worker", hall.new, 1)
        await workers.ready()
        workers.paused = True
        work = asyncio.create_task(workers.do(lambda one: one.die_unless.remote(tmp_path / "died"), nothing))
        await until(lambda: workers.waiting and not workers.working)
        workers.fill()
        await asyncio.sleep(0.2)
        assert len(hall.workers) == 1
        assert not work.done()
        workers.paused = False
        workers.fill()
        assert await work in await hall.pids(1)

    scene(play)


@pytest.mark.ray
def test_hope_ends_for_all_who_wait_when_nobody_can_be_started(hall: Hall) -> None:
    async def play() -> None:
        hall.broken = True
        workers, begun = Workers("worker", hall.new, 1), Begun()
        words = "^no worker could be started: .*RuntimeError: out of order$"
        waiting = [workers.do(pid, begun, priority) for priority in (1.0, 0.0)]
        for found in await asyncio.gather(*waiting, return_exceptions=True):
            with pytest.raises(WorkFailed, match=words):
                raise found  # type: ignore[misc]
        assert len(hall.workers) == ATTEMPTS
        with pytest.raises(WorkFailed, match=words):  # and for those who come later
            await workers.do(pid, begun)
        await workers.ready()
        assert begun.count == 0
        assert len(hall.workers) == ATTEMPTS

    scene(play)


@pytest.mark.ray
def test_where_one_works_the_others_need_not_start(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers = Workers("worker", hall.new, 4, [hall.new()])
        hall.broken = True
        await workers.ready()
        waiting = asyncio.gather(*(workers.do(pid, nothing) for _ in range(6)))
        await until(lambda: workers._failures >= ATTEMPTS or len(hall.workers) == 4)
        assert len(await waiting) == 6

    scene(play)


@pytest.mark.ray
def test_the_least_value_goes_first(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers, order = Workers("worker", hall.new, 1), list[float]()
        await workers.ready()

        async def ask(priority: float) -> None:
            await workers.do(pid, lambda: order.append(priority), priority)

        # one is idle, and all begin to wait in one turn of the loop
        await asyncio.gather(*(ask(priority) for priority in (3.0, -1.0, 2.0, -5.0)))
        assert order == [-5.0, -1.0, 2.0, 3.0]
        # none is idle
        order.clear()
        file, busy = tmp_path / "file", Begun()
        work = asyncio.create_task(workers.do(lambda one: one.wait_for.remote(file), busy))
        await until(lambda: busy.count == 1)
        late = []
        for priority in (0.0, 7.0, -7.0):
            late.append(asyncio.create_task(ask(priority)))
            await asyncio.sleep(0.01)
        file.touch()
        await asyncio.gather(work, *late)
        assert order == [-7.0, 0.0, 7.0]

    scene(play)


@pytest.mark.ray
def test_who_waits_no_more_is_passed_over(hall: Hall, tmp_path: Path) -> None:
    async def play() -> None:
        workers, busy, file = Workers("worker", hall.new, 1), Begun(), tmp_path / "file"
        work = asyncio.create_task(workers.do(lambda one: one.wait_for.remote(file), busy))
        await until(lambda: busy.count == 1)
        gone = asyncio.create_task(workers.do(pid, busy, -1.0))
        stays = asyncio.create_task(workers.do(pid, busy))
        await until(lambda: workers.waiting)
        gone.cancel()
        file.touch()
        assert await work == await stays
        assert gone.cancelled()
        assert busy.count == 2
        assert not workers.waiting
        assert await workers.do(pid, nothing) == await work

    scene(play)


def test_one_whose_answer_is_lost_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may live, and would keep its share of the cluster."""
    started: list[Any] = []
    killed: list[Any] = []

    class Mute:
        """A worker that is there, and whose first answer does not arrive."""

        def __init__(self) -> None:
            self.mute = not started
            started.append(self)
            self.__ray_ready__ = self.pid = self

        def remote(self) -> asyncio.Future[int]:
            answer = asyncio.get_running_loop().create_future()
            if self.mute:
                answer.set_exception(ActorUnavailableError("cut off", None))
            else:
                answer.set_result(7)
            return answer

    monkeypatch.setattr(module.ray, "kill", killed.append)

    async def play() -> None:
        workers = Workers("worker", Mute, 1)
        assert await workers.do(pid, nothing) == 7
        assert killed == started[:1]
        assert len(started) == 2

    scene(play)


@pytest.mark.ray
@pytest.mark.parametrize("good", [True, False])
def test_work_that_has_ended_keeps_nothing_of_what_it_returned(hall: Hall, good: bool) -> None:
    """A circle of references would hold it until Python looks for circles: an object store full of models."""
    asked: list[str] = []
    results: list[weakref.ref[Any]] = []

    async def call(worker: Any) -> Any:
        reference = worker.array.remote() if good else worker.fail.remote(ValueError("no"))
        asked.append(reference.hex())
        found = await reference
        results.append(weakref.ref(found))
        return found

    async def play() -> None:
        workers = Workers("worker", hall.new, 1)
        await workers.ready()
        gc.collect()
        gc.disable()
        try:
            if good:
                size = (await workers.do(call, nothing)).size
                assert size == 10**6
            else:
                with pytest.raises(WorkFailed):
                    await workers.do(call, nothing)
            assert len(asked) == (1 if good else ATTEMPTS)
            known = ray._private.worker.global_worker.core_worker.get_all_reference_counts
            await until(lambda: not set(asked) & known().keys())
            await until(lambda: all(each() is None for each in results))
        finally:
            gc.enable()

    scene(play)
