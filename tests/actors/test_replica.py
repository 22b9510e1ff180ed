"""The prediction service on Serve: the same answers as in process, exact accounts, refusals, and kills."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import serve

from actors.conversation import Busy
from actors.devices import Placement
from actors.ledger import LedgerActor, LedgerService
from actors.replica import MAX_PER_ACCOUNT, Replica, deploy
from actors.stores import Shelf, ShelfActor
from actors.transport import ServeTransport, direct
from simulator.errors import InputError
from simulator.models import build, save_model
from simulator.seeding import generator_for
from simulator.service.ledger import Ledger, Terms, hash_token
from simulator.service.local import LocalTransport
from simulator.service.log import QueryLog
from simulator.service.oracle import ServiceOracle
from simulator.service.query import Query
from simulator.service.victim import VictimService
from simulator.training.predict import predict

MODEL = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("victim"))
WIDE = build("linear", channels=1, size=8, classes=4100, generator=generator_for("wide"))
IMAGES = torch.randint(256, (700, 1, 8, 8), dtype=torch.uint8, generator=generator_for("images"))
TOKEN = "s3cret"


#: objects of this process, for :class:`Here`
OBJECTS: dict[str, Any] = {}


class Here:
    """An object of this process whose methods are called as an actor's are. Serve's local mode pickles it, so it holds
    a name and not the object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=getattr(OBJECTS[self.name], method))


@dataclass
class Service:
    """A deployed service and what belongs to it; ``wait`` is what turns a reply of the ledger's into its value."""

    handle: Any
    ledger: Any
    name: str
    wait: Any
    accounts: int = field(default=0)

    def open(self, labels: str = "soft", budget: int = 1000, victim: str = "v") -> str:
        """A new account's name."""
        self.accounts += 1
        account = f"attacker-{self.accounts}"
        self.wait(self.ledger.open.remote({account: Terms(victim, labels, budget, hash_token(TOKEN))}))
        return account

    def spent(self, account: str) -> int:
        return int(self.wait(self.ledger.spent.remote([account])))

    def ask(self, query: Query) -> np.ndarray:
        return ServeTransport(self.handle).send_all([query])[0]

    def oracle(self, account: str, labels: str = "soft", budget: int = 1000, window: int = 4) -> ServiceOracle:
        transport = ServeTransport(self.handle, window=window)
        return ServiceOracle(transport, account, TOKEN, labels=labels, classes=10, shape=(1, 8, 8), budget=budget)


def shelved(run: Path) -> str:
    """A run directory with the models in it."""
    save_model(MODEL, run / "models" / "v.safetensors")
    save_model(WIDE, run / "models" / "wide.safetensors")
    return str(run)


@pytest.fixture(scope="module")
def on_ray(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service on the session's Ray."""
    ledger = LedgerActor.remote(str(tmp_path_factory.mktemp("ledger") / "ledger.log"), False)
    shelf = ShelfActor.remote(shelved(tmp_path_factory.mktemp("shelf")))
    handle = deploy("test-victim", ledger, shelf, Placement(False, 0.5))
    yield Service(handle, ledger, "test-victim", ray.get)
    serve.delete("test-victim")
    ray.kill(ledger)
    ray.kill(shelf)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """The same deployment in Serve's local testing mode, without any Ray."""
    OBJECTS["ledger"] = LedgerService(str(tmp_path_factory.mktemp("ledger") / "ledger.log"), False)
    OBJECTS["shelf"] = Shelf(shelved(tmp_path_factory.mktemp("shelf")))
    app: Any = serve.deployment(Replica)
    app = app.bind(Here("ledger"), Here("shelf"), Placement(False, 0.5))
    handle = serve.run(app, name="local", route_prefix=None, _local_testing_mode=True)
    return Service(handle, Here("ledger"), "local", asyncio.run)


@pytest.fixture(params=["in_process", pytest.param("on_ray", marks=pytest.mark.ray)])
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue(request.param)
    return found


def plain_answers(images: torch.Tensor, labels: str, folder: Path, account: str = "a") -> torch.Tensor:
    """What the plain loop's oracle answers."""
    local, ledger = VictimService(torch.device("cpu")), Ledger(folder / "plain.log")
    local.add("v", MODEL)
    ledger.open(account, Terms("v", labels, len(images), hash_token(TOKEN)))
    oracle = ServiceOracle(
        LocalTransport(local, ledger), account, TOKEN, labels=labels, classes=10, shape=(1, 8, 8), budget=len(images)
    )
    answers = oracle.query(images)
    ledger.close()
    return answers


@pytest.mark.parametrize("labels", ["soft", "hard", "top-3", "noise-1 then round-2"])
@pytest.mark.parametrize("images", [IMAGES, IMAGES.float() / 255], ids=["uint8", "float32"])
def test_answers_are_those_of_the_plain_loop_to_the_bit(
    service: Service, labels: str, images: torch.Tensor, tmp_path: Path
) -> None:
    account = service.open(labels)
    answers = service.oracle(account, labels).query(images)
    assert torch.equal(answers, plain_answers(images, labels, tmp_path, account))
    assert service.spent(account) == len(images)


GOOD = IMAGES[:4].numpy()
MALFORMED: dict[str, Any] = {
    "a size": np.zeros((2, 1, 9, 8), np.uint8),
    "a channel count": np.zeros((2, 3, 8, 8), np.uint8),
    "no batch axis": np.zeros((1, 8, 8), np.uint8),
    "no image": np.zeros((0, 1, 8, 8), np.uint8),
    "too many": np.zeros((4097, 1, 8, 8), np.uint8),
    "float64": np.zeros((2, 1, 8, 8)),
    "int64": np.zeros((2, 1, 8, 8), np.int64),
    "text": np.full((2, 1, 8, 8), "x"),
    "a list": [[0] * 8] * 8,
    "nothing": None,
    "a NaN": np.full((1, 1, 8, 8), np.nan, np.float32),
    "infinity": np.full((1, 1, 8, 8), np.inf, np.float32),
    "above 1": np.full((1, 1, 8, 8), 1.5, np.float32),
    "below 0": np.full((1, 1, 8, 8), -0.1, np.float32),
}


@pytest.mark.parametrize("images", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_query_is_refused_and_free_and_the_service_lives(service: Service, images: Any) -> None:
    account = service.open()
    with pytest.raises(InputError, match="allowed: ") as caught:
        service.ask(Query(account, TOKEN, 0, images))
    assert "\n" not in str(caught.value)
    assert service.spent(account) == 0
    assert service.ask(Query(account, TOKEN, 0, GOOD)).shape == (4, 10)


@pytest.mark.parametrize("key", ["0", 0.0, True, None, -1])
def test_a_key_that_is_no_natural_number_is_refused(service: Service, key: Any) -> None:
    account = service.open()
    with pytest.raises(InputError, match="key"):
        service.ask(Query(account, TOKEN, key, GOOD))
    assert service.spent(account) == 0


def test_the_ledgers_refusals_reach_the_client_and_charge_nothing(service: Service) -> None:
    account = service.open(budget=6)
    with pytest.raises(InputError, match="unknown account or wrong token"):
        service.ask(Query(account, "guess", 0, GOOD))
    with pytest.raises(InputError, match="unknown account or wrong token"):
        service.ask(Query("nobody", TOKEN, 0, GOOD))
    assert service.spent(account) == 0
    first = service.ask(Query(account, TOKEN, 0, GOOD))
    with pytest.raises(InputError, match="4 images asked, 2 of 6 remain"):
        service.ask(Query(account, TOKEN, 1, GOOD))
    with pytest.raises(InputError, match="key 0 was used for other images"):
        service.ask(Query(account, TOKEN, 0, GOOD[::-1]))
    assert np.array_equal(service.ask(Query(account, TOKEN, 0, GOOD)), first)
    assert service.spent(account) == 4


def test_refusals_and_log_entries_are_those_of_the_plain_loop(in_process: Service, tmp_path: Path) -> None:
    account, folder = in_process.open(budget=6), tmp_path / "ledger.log"
    queries: list[Any] = [
        Query(account, TOKEN, 0, GOOD),
        Query(account, TOKEN, 0, GOOD),
        Query(account, TOKEN, 0, GOOD[::-1]),
        Query(account, TOKEN, 1, GOOD),
        Query(account, "guess", 2, GOOD),
        Query("nobody", TOKEN, 2, GOOD),
        Query(account, TOKEN, cast(Any, "2"), GOOD),
        Query(account, TOKEN, 2, cast(Any, None)),
        "no query",
        Query(account, TOKEN, 3, GOOD[:2]),
    ]
    local, ledger = VictimService(torch.device("cpu")), Ledger(folder)
    local.add("v", MODEL)
    ledger.open(account, Terms("v", "soft", 6, hash_token(TOKEN)))
    found: list[list[Any]] = []
    logs = []
    for place in ("process", "replica"):
        parts: list[bytes] = []
        log = QueryLog(lambda _, data, parts=parts: parts.append(data), {account: "knockoff"})  # type: ignore[misc]
        if place == "process":
            transport = LocalTransport(local, ledger, log)
            answers: list[Any] = []
            for query in queries:
                try:
                    answers.append(transport.send(query))
                except InputError as refusal:
                    answers.append(refusal)
        else:
            replica = Replica(cast(Any, Here("ledger")), cast(Any, Here("shelf")), Placement(False, 0.5))
            replica._log = log
            answers = asyncio.run(replica.answer(queries))
        log.close()
        found.append([(type(each), str(each)) if isinstance(each, InputError) else each.tolist() for each in answers])
        table = pq.read_table(io.BytesIO(parts[0]))
        logs.append(table.drop_columns(["time", "latency"]).to_pylist())
    assert found[0] == found[1]
    assert logs[0] == logs[1]
    assert [entry["outcome"] for entry in logs[0]] == [
        *("answered", "repeated", "refused", "refused", "refused", "refused"),
        *("malformed", "malformed", "answered"),
    ]
    assert in_process.spent(account) == ledger.spent(account) == 6
    ledger.close()


def test_a_refused_query_in_a_window_of_good_ones_is_the_error(service: Service) -> None:
    account = service.open(budget=10)
    queries = [Query(account, TOKEN, key, GOOD) for key in range(4)]
    with pytest.raises(InputError, match="remain"):
        ServeTransport(service.handle).send_all(queries)
    assert service.spent(account) == 8


def test_eight_clients_at_once_get_their_own_answers(service: Service, tmp_path: Path) -> None:
    expected = plain_answers(IMAGES, "soft", tmp_path)
    accounts = [service.open() for _ in range(8)]
    start = threading.Barrier(8)

    def steal(number: int) -> bool:
        oracle, order = service.oracle(accounts[number]), torch.arange(len(IMAGES)).roll(number * 50)
        start.wait()
        answers = torch.cat([oracle.query(IMAGES[part]) for part in order.split(300)])
        return torch.allclose(answers, expected[order], rtol=0, atol=1e-6)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(steal, range(8)))
    assert [service.spent(account) for account in accounts] == [700] * 8


def test_answers_of_many_classes_are_cut_to_fit_into_messages(service: Service) -> None:
    """4,100 float32 probabilities for each of 256 images are 4.2 MB, more than gRPC takes."""
    account = service.open(victim="wide")
    transport = ServeTransport(service.handle)
    oracle = ServiceOracle(transport, account, TOKEN, labels="soft", classes=4100, shape=(1, 8, 8), budget=1000)
    answers = oracle.query(IMAGES[:300])
    parts = [predict(WIDE, part) for part in IMAGES[:300].split(191)]
    assert torch.equal(answers, torch.cat(parts))
    assert service.spent(account) == 300
    with pytest.raises(InputError, match=r"query of 300 images; allowed: 1\.\.191, with 4100 classes each"):
        service.ask(Query(account, TOKEN, 9, IMAGES[:300].numpy()))
    assert service.spent(account) == 300


def test_large_images_of_a_long_query_set_travel_in_several_messages(service: Service) -> None:
    """4,096 float32 images of 8x8 are 1 MiB a query: at most three of them go into one message."""
    account = service.open(budget=8000)
    queries = [Query(account, TOKEN, key, np.full((2000, 1, 8, 8), key / 4, np.float32)) for key in range(4)]
    answers = ServeTransport(service.handle).send_all(queries)
    assert [rows.shape for rows in answers] == [(2000, 10)] * 4
    assert service.spent(account) == 8000


def test_without_the_private_option_the_default_transport_is_used(service: Service) -> None:
    """A Ray that does not know ``_by_reference`` refuses it with a TypeError, as it does any unknown option."""
    with pytest.raises(TypeError):
        service.handle.options(_no_such_option=False)
    asked: list[dict[str, Any]] = []

    class Older:
        """The handle of a Ray without the option."""

        answer = service.handle.answer

        def options(self, **options: Any) -> Any:
            asked.append(options)
            raise TypeError("unexpected keyword argument '_by_reference'")

    older: Any = Older()
    assert direct(older) is older
    account = service.open()
    answers = ServeTransport(older).send_all([Query(account, TOKEN, key, GOOD) for key in range(6)])
    assert all(np.array_equal(rows, answers[0]) for rows in answers)
    assert asked == [{"_by_reference": False}] * 2
    assert service.spent(account) == 24


def test_a_flood_of_messages_is_sent_away_unpaid_and_others_are_answered(service: Service) -> None:
    greedy, modest = service.open(budget=300_000), service.open()
    flood = [
        direct(service.handle).answer.remote([Query(greedy, TOKEN, key, np.zeros((4000, 1, 8, 8), np.uint8))])
        for key in range(5 * MAX_PER_ACCOUNT)
    ]
    assert service.oracle(modest).query(IMAGES).shape == (700, 10)
    answers = [response.result(timeout_s=60)[0] for response in flood]
    refused = [answer for answer in answers if isinstance(answer, Busy)]
    assert refused
    assert all(isinstance(answer, Busy) or answer.shape == (4000, 10) for answer in answers)
    assert service.spent(greedy) == 4000 * (len(answers) - len(refused))
    assert service.ask(Query(greedy, TOKEN, 99, GOOD)).shape == (4, 10)


def test_a_greedy_client_gets_about_as_much_as_each_modest_one(in_process: Service) -> None:
    """By first come, first served, 60 messages under way would get it 60 times as much."""
    greedy, modest = in_process.open(budget=10**6), [in_process.open(budget=10**6) for _ in range(10)]
    replica = Replica(cast(Any, Here("ledger")), cast(Any, Here("shelf")), Placement(False, 0.5))
    images, rounds = np.zeros((200, 1, 8, 8), np.uint8), 12

    async def ask(account: str, key: int) -> bool:
        (answer,) = await replica.answer([Query(account, TOKEN, key, images)])
        return not isinstance(answer, Busy)

    async def flood(keys: Iterator[int]) -> None:
        while True:
            await ask(greedy, next(keys))
            await asyncio.sleep(0.001)

    async def scene() -> None:
        keys = itertools.count()
        floods = [asyncio.create_task(flood(keys)) for _ in range(60)]
        await asyncio.sleep(0.05)

        async def steal(account: str) -> None:
            for key in range(rounds):
                assert await ask(account, key)

        await asyncio.gather(*(steal(account) for account in modest))
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)

    asyncio.run(scene())
    assert [in_process.spent(account) for account in modest] == [rounds * 200] * 10
    assert in_process.spent(greedy) <= 2 * MAX_PER_ACCOUNT * rounds * 200


def replica_pid(app: str) -> int:
    """The process of the application's only replica."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    found = [actor for actor in actors if f"::{app}#" in actor["name"]]
    assert len(found) == 1, found
    replica = ray.get_actor(found[0]["name"], found[0]["namespace"])
    return int(ray.get(replica.__ray_call__.remote(lambda _: os.getpid())))


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_killed_between_paying_and_answering_costs_nothing_twice(on_ray: Service, tmp_path: Path) -> None:
    many = IMAGES.repeat(40, 1, 1, 1)
    account, pid = on_ray.open(budget=len(many)), replica_pid(on_ray.name)
    oracle = on_ray.oracle(account, budget=len(many))
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(oracle.query, many)
        while not on_ray.spent(account):
            assert not answers.done()
        os.kill(pid, signal.SIGKILL)
        assert on_ray.spent(account) < len(many), "the kill came too late to test anything"
        found = answers.result(timeout=120)
    assert torch.equal(found, plain_answers(many, "soft", tmp_path))
    assert on_ray.spent(account) == len(many)
    assert replica_pid(on_ray.name) != pid
