"""What the scheduler's work becomes as calls to a crew, whose actors are stand-ins here: no Ray is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors import workers
from actors.bench import CrewBench
from simulator.errors import InputError, RunFailed
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import WorkFailed
from simulator.plan.config import RunConfig, check_config
from simulator.plan.tree import Plan, make_plan

BUDGETS = (100, 500, 300, 400, 200)


class Method:
    """A remote method: gives what a function says, a turn of the loop later for each call before it."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer, self.calls = answer, list[Any]()

    def remote(self, *arguments: Any) -> asyncio.Task[Any]:
        self.calls.append(arguments)
        delay = len(self.calls)

        async def later() -> Any:
            for _ in range(delay):
                await asyncio.sleep(0)
            if isinstance(found := self.answer(*arguments), Exception):
                raise found
            return found

        return asyncio.get_running_loop().create_task(later())


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("measure", "", cause)


class Scene:
    """A crew of one attacker, with a plan of thefts of several lengths."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers.ray, "kill", lambda _: None)
        self.config: RunConfig = check_config(
            {
                "name": "bench",
                "dataset": "digits",
                "watermarks": ["deeptracer"],
                "scenarios": [{"attack": "knockoff", "budget": list(BUDGETS)}],
            }
        )
        self.plan: Plan = make_plan(self.config)
        self.directory = RunDirectory.create(self.config, path / "run")
        self.steal = Method(lambda *_: None)
        attacker = type("Attacker", (), {"__ray_ready__": Method(lambda: None), "steal": self.steal})()
        self.ledger = SimpleNamespace(open=Method(lambda *_: 0), spent=Method(lambda *_: 77))
        self.collector = SimpleNamespace(measure=Method(lambda *_: ["row"]), fail=Method(lambda *_: ["failed"]))
        self.crew: Any = SimpleNamespace(
            layout=SimpleNamespace(trainers=0, attackers=1),
            ledger=self.ledger,
            collector=self.collector,
            collectors=[self.collector],
            new_trainer=None,  # there are to be none
            new_attacker=lambda: attacker,
        )

    def play(self, play: Callable[[CrewBench], Any]) -> Any:
        async def run() -> Any:
            bench = CrewBench(self.crew, self.directory, self.config)
            bench.open("the service")
            await bench.attackers.ready()
            return await play(bench)

        return asyncio.run(run())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_of_the_thefts_that_can_be_started_the_longest_goes_first(scene: Scene) -> None:
    """The ledger answers them in the order of the plan, which is not that of their lengths."""
    thefts = [theft for theft in scene.plan.scenarios if not theft.control]
    assert tuple(theft.budget for theft in thefts) == BUDGETS

    async def play(bench: CrewBench) -> None:
        await asyncio.gather(*(bench.make(theft) for theft in thefts))

    scene.play(play)
    assert [arguments[1].budget for arguments in scene.steal.calls] == sorted(BUDGETS, reverse=True)
    # each account was open before its theft began
    assert [set(terms) for terms, _ in scene.ledger.open.calls] == [set(args[1].accounts) for args in scene.steal.calls]


def test_an_account_that_the_ledger_refuses_fails_its_theft_alone(scene: Scene) -> None:
    scene.ledger.open.answer = lambda *_: failed(InputError("open on other terms"))

    async def play(bench: CrewBench) -> None:
        with pytest.raises(WorkFailed, match=r"^InputError: open on other terms$") as caught:
            await bench.make(scene.plan.scenarios[0])
        assert caught.value.queries == 77
        scene.ledger.open.answer = lambda *_: 0
        await bench.make(scene.plan.scenarios[1])

    scene.play(play)
    assert len(scene.steal.calls) == 1
    assert len(scene.ledger.open.calls) == 2, "wrong input is not tried again"


def test_a_model_that_kills_whoever_measures_it_is_a_failed_row(scene: Scene) -> None:
    """By its size, say. The run goes on."""
    theft = scene.plan.scenarios[0]
    scene.collector.measure.answer = lambda *_: ActorDiedError()
    keys = scene.plan.keys_for(theft)
    assert scene.play(lambda bench: bench.measure(theft, keys)) == ["failed"]
    ((subject, why, of, _),) = scene.collector.fail.calls
    assert (subject, of) == (theft, keys)
    assert why.startswith("whoever measured it died, again and again: ActorDiedError")


@pytest.mark.parametrize("method", ["measure", "fail"])
def test_a_collector_that_fails_ends_the_run(scene: Scene, method: str) -> None:
    theft = scene.plan.scenarios[0]
    keys = scene.plan.keys_for(theft)
    getattr(scene.collector, method).answer = lambda *_: failed(OSError("no space left"))
    arguments = (theft, keys) if method == "measure" else (theft, "why", keys, 0)
    with pytest.raises(RunFailed, match=r"^the collector failed: OSError: no space left$"):
        scene.play(lambda bench: getattr(bench, method)(*arguments))


def test_a_theft_waits_for_the_service(scene: Scene) -> None:
    async def play(_: CrewBench) -> None:
        bench = CrewBench(scene.crew, scene.directory, scene.config)
        work = asyncio.create_task(bench.make(scene.plan.scenarios[0]))
        await bench.attackers.ready()
        await asyncio.sleep(0.05)
        assert not bench.serving
        assert scene.steal.calls == []
        bench.open("the service")
        await work
        assert scene.steal.calls[0][0] == "the service"

    scene.play(play)
