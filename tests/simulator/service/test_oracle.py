from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from simulator.checkpoint import from_bytes, to_bytes
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.seeding import generator_for
from simulator.service.answers import answer_policy
from simulator.service.ledger import Ledger, Terms, digest_of, hash_token
from simulator.service.local import LocalTransport
from simulator.service.oracle import (
    CHUNK,
    MAX_BYTES,
    AllowanceOracle,
    BudgetExhausted,
    Listener,
    ModelOracle,
    Oracle,
    ServiceOracle,
    SharedOracle,
)
from simulator.service.query import Query
from simulator.service.recording import Recording
from simulator.service.victim import VictimService
from simulator.training.predict import predict

BUDGET = 1000
SHAPE = (1, 4, 4)


class Shop:
    """A victim, its ledger, and oracles with an account there."""

    def __init__(self, path: Path) -> None:
        self.model = build("linear", channels=1, size=4, classes=3, generator=generator_for("oracle")).eval()
        self.ledger = Ledger(path)
        service = VictimService(torch.device("cpu"))
        service.add("v", self.model)
        self.transport = LocalTransport(service, self.ledger)

    def oracle(self, labels: str = "soft", budget: int = BUDGET, listener: Listener | None = None) -> ServiceOracle:
        self.ledger.open(labels, Terms("v", labels, budget, hash_token("secret")))
        return ServiceOracle(
            self.transport,
            labels,
            "secret",
            labels=labels,
            classes=3,
            shape=SHAPE,
            budget=budget,
            listeners=[listener] if listener else [],
        )


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "log")


def images(count: int, *words: object, dtype: torch.dtype = torch.uint8) -> Tensor:
    drawn = torch.randint(0, 256, (count, 1, 4, 4), generator=generator_for("images", *words), dtype=torch.uint8)
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


class Recorder:
    """A transport that only notes what it was sent."""

    def __init__(self) -> None:
        self.sent: list[Query] = []

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        self.sent += queries
        return [np.full((len(query.images), 2), 0.5, np.float32) for query in queries]


@pytest.mark.parametrize("labels", ["soft", "hard", "top-2", "round-1"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_both_oracles_give_the_models_answers(labels: str, dtype: torch.dtype, shop: Shop) -> None:
    asked = images(40, dtype=dtype)
    wanted = answer_policy(labels)(predict(shop.model, asked if dtype == torch.uint8 else asked.float()))
    model_oracle = ModelOracle(shop.model, labels=labels, classes=3, shape=SHAPE, budget=40)
    for oracle in (shop.oracle(labels, 40), model_oracle):
        assert isinstance(oracle, Oracle)
        assert (oracle.labels, oracle.classes, oracle.shape, oracle.remaining) == (labels, 3, SHAPE, 40)
        answers = oracle.query(asked.float() if dtype == torch.float64 and oracle is model_oracle else asked)
        assert answers.dtype == torch.float32
        assert torch.equal(answers, wanted)
        torch.testing.assert_close(answers.sum(1), torch.ones(40))
        assert oracle.remaining == 0


def test_a_query_set_is_cut_into_numbered_chunks(shop: Shop) -> None:
    oracle = shop.oracle()
    first = oracle.query(images(2 * CHUNK + 88))
    assert {key: count for key, (count, _) in shop.ledger.grants("soft").items()} == {0: CHUNK, 1: CHUNK, 2: 88}
    oracle.query(images(1))
    assert list(shop.ledger.grants("soft")) == [0, 1, 2, 3]
    assert (oracle.asked, shop.ledger.spent("soft"), oracle.remaining) == (601, 601, 399)
    assert torch.equal(first, predict(shop.model, images(2 * CHUNK + 88)))


@pytest.mark.parametrize(
    ("side", "dtype", "sizes"),
    [(512, torch.uint8, [4, 1]), (512, torch.float32, [1] * 5), (600, torch.float32, [1] * 5)],
)
def test_large_images_go_in_smaller_chunks(side: int, dtype: torch.dtype, sizes: list[int]) -> None:
    transport = Recorder()
    oracle = ServiceOracle(transport, "a", "t", labels="soft", classes=2, shape=SHAPE, budget=10)
    assert oracle.query(torch.zeros(5, 3, side, side, dtype=dtype)).shape == (5, 2)
    assert [len(query.images) for query in transport.sent] == sizes
    assert all(query.images.nbytes <= MAX_BYTES or len(query.images) == 1 for query in transport.sent)


@pytest.mark.parametrize(("classes", "sizes"), [(3072, [256, 44]), (3073, [255, 45]), (100_000, [7] * 42 + [6])])
def test_wide_answers_come_in_smaller_chunks(classes: int, sizes: list[int]) -> None:
    transport = Recorder()
    oracle = ServiceOracle(transport, "a", "t", labels="soft", classes=classes, shape=SHAPE, budget=300)
    oracle.query(images(300))
    assert [len(query.images) for query in transport.sent] == sizes
    assert all(4 * classes * size <= MAX_BYTES for size in sizes)


@given(st.lists(st.integers(0, 700), max_size=6))
def test_any_sequence_of_queries_has_consecutive_keys_and_an_exact_count(counts: list[int]) -> None:
    transport = Recorder()
    oracle = ServiceOracle(transport, "a", "t", labels="soft", classes=2, shape=SHAPE, budget=BUDGET)
    asked = 0
    for count in counts:
        if count > BUDGET - asked:
            with pytest.raises(BudgetExhausted):
                oracle.query(images(count))
        else:
            assert oracle.query(images(count)).shape == (count, 2)
            asked += count
        assert (oracle.asked, oracle.remaining) == (asked, BUDGET - asked)
    assert [query.key for query in transport.sent] == list(range(len(transport.sent)))
    assert sum(len(query.images) for query in transport.sent) == asked
    assert all(1 <= len(query.images) <= CHUNK for query in transport.sent)


def test_asking_for_more_than_remains_charges_nothing(shop: Shop) -> None:
    oracle = shop.oracle(budget=300)
    model_oracle = ModelOracle(shop.model, labels="soft", classes=3, shape=SHAPE, budget=300)
    for asked in (oracle, model_oracle):
        asked.query(images(10))
        with pytest.raises(BudgetExhausted, match="291 images asked, 290 of 300 remain") as caught:
            asked.query(images(291))
        assert isinstance(caught.value, InputError)
        assert asked.remaining == 290
    assert shop.ledger.spent("soft") == 10
    assert list(shop.ledger.grants("soft")) == [0]
    assert len(oracle.query(images(290))) == 290
    assert oracle.query(images(0)).shape == (0, 3)


def test_an_attack_that_starts_again_pays_nothing_twice(shop: Shop) -> None:
    def attack() -> list[Tensor]:
        oracle = shop.oracle()
        return [oracle.query(images(count, count)) for count in (300, 1, 30)]

    first, spent = attack(), shop.ledger.spent("soft")
    assert all(torch.equal(one, other) for one, other in zip(first, attack(), strict=True))
    assert shop.ledger.spent("soft") == spent == 331


def test_a_refused_query_set_is_not_counted(shop: Shop) -> None:
    oracle = shop.oracle()
    with pytest.raises(InputError, match="outside"):
        oracle.query(images(4).float())
    assert (oracle.asked, shop.ledger.spent("soft")) == (0, 0)


def test_gradients_do_not_reach_the_victim(shop: Shop) -> None:
    asked = images(3, dtype=torch.float32).requires_grad_()
    assert not shop.oracle().query(asked).requires_grad


@pytest.mark.parametrize(
    "kinds",
    [
        ["uint8"],
        ["float"],
        ["uint8", "uint8", "float"],
        ["float", "channels last", "uint8"],
        ["channels last"],
    ],
    ids=" and ".join,
)
def test_the_transfer_set_proves_what_was_paid_for(kinds: list[str], shop: Shop) -> None:
    """The ledger's digests can be computed again from the file."""
    recording, answers = Recording(3), []
    oracle = shop.oracle(listener=recording)
    for number, kind in enumerate(kinds):
        asked = images(260 + number, number, dtype=torch.uint8 if kind == "uint8" else torch.float32)
        if kind == "channels last":
            asked = asked.expand(-1, 1, -1, -1).contiguous(memory_format=torch.channels_last)
        answers.append(oracle.query(asked))
    kept = load(recording.transfer_set())
    assert set(kept) == {"images", "answers", "chunks", "uint8"}
    assert torch.equal(kept["answers"], torch.cat(answers))
    assert len(kept["images"]) == shop.ledger.spent("soft") == kept["chunks"].sum()
    digests = {}
    for key, (part, bytes_asked) in enumerate(
        zip(kept["images"].split(kept["chunks"].tolist()), kept["uint8"].tolist(), strict=True)
    ):
        if bytes_asked and part.dtype != torch.uint8:
            part = (part * 255).round().to(torch.uint8)
        digests[key] = (len(part), digest_of(part.contiguous().numpy().tobytes()))
    assert digests == shop.ledger.grants("soft")


def test_what_was_asked_is_kept_as_it_was(shop: Shop) -> None:
    recording, asked = Recording(3), images(5)
    shop.oracle(listener=recording).query(asked)
    before = asked.clone()
    asked.zero_()
    assert torch.equal(load(recording.transfer_set())["images"], before)


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=6), st.sets(st.integers(0, 6)))
def test_a_recording_that_goes_on_from_a_checkpoint_is_the_unbroken_one(
    batches: list[tuple[int, bool]], cuts: set[int]
) -> None:
    """It is cut before the batches of these numbers; what it had in a checkpoint is never changed afterwards."""
    whole, broken = Recording(2), Recording(2)
    for number, (count, as_float) in enumerate(batches):
        if number in cuts:
            kept = to_bytes(state := broken.state())
            broken.hear(images(3), torch.zeros(3, 2))
            assert to_bytes(state) == kept
            broken = Recording(2)
            broken.restore(from_bytes(kept))
        asked = images(count, number, dtype=torch.float32 if as_float else torch.uint8)
        for recording in (whole, broken):
            recording.hear(asked, torch.full((count, 2), 0.5) + number)
    assert broken.transfer_set() == whole.transfer_set()


def test_a_checkpoint_packs_what_was_heard_once(shop: Shop) -> None:
    recording = Recording(3)
    oracle = shop.oracle(listener=recording)
    for number in range(3):
        oracle.query(images(20, number))
    first = recording.state()
    oracle.query(images(5))
    second = recording.state()
    assert second["images.0"] is first["images.0"]
    assert (len(first["images.0"]), len(second["images.1"]), second["packs"]) == (60, 5, 2)


def test_a_thief_who_asked_nothing_has_an_empty_transfer_set(shop: Shop) -> None:
    kept = load(Recording(3).transfer_set())
    assert {name: len(tensor) for name, tensor in kept.items()} == {"images": 0, "answers": 0, "chunks": 0, "uint8": 0}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.lists(st.integers(0, 90), max_size=6))
def test_colluding_attackers_get_every_answer_in_order_within_their_own_budgets(
    budgets: list[int], counts: list[int]
) -> None:
    transport = Recorder()
    oracles = [
        ServiceOracle(transport, str(number), "t", labels="soft", classes=2, shape=SHAPE, budget=budget)
        for number, budget in enumerate(budgets)
    ]
    shared: Oracle = SharedOracle(oracles)
    assert isinstance(shared, Oracle)
    asked: list[Tensor] = []
    for count in counts:
        before = shared.remaining
        if count > before:
            with pytest.raises(BudgetExhausted, match=f"{count} images asked, {before} remain"):
                shared.query(images(count))
            assert shared.remaining == before
        else:
            asked.append(images(count, len(asked)))
            assert shared.query(asked[-1]).shape == (count, 2)
            assert shared.remaining == before - count
    sent = [query.images for query in transport.sent]
    assert np.array_equal(np.concatenate([*sent, images(0).numpy()]), torch.cat([*asked, images(0)]).numpy())
    assert all(oracle.remaining >= 0 for oracle in oracles)
    assert sum(oracle.asked for oracle in oracles) == sum(map(len, asked))


def test_colluding_attackers_spend_their_budgets_evenly(shop: Shop) -> None:
    oracles = []
    for name in ("a", "b", "c"):
        shop.ledger.open(name, Terms("v", "soft", 40, hash_token("secret")))
        oracles.append(ServiceOracle(shop.transport, name, "secret", labels="soft", classes=3, shape=SHAPE, budget=40))
    shared = SharedOracle(oracles)
    answers = torch.cat([shared.query(images(60, 1)), shared.query(images(60, 2))])
    torch.testing.assert_close(answers, predict(shop.model, torch.cat([images(60, 1), images(60, 2)])))
    assert shop.ledger.all_spent() == {"a": 40, "b": 40, "c": 40}


def test_an_allowance_is_a_part_of_the_budget(shop: Shop) -> None:
    whole = shop.oracle(budget=100)
    for _ in range(2):
        part: Oracle = AllowanceOracle(whole, 30)
        assert isinstance(part, Oracle)
        assert (part.labels, part.classes, part.shape, part.remaining) == ("soft", 3, SHAPE, 30)
        part.query(images(10))
        with pytest.raises(BudgetExhausted, match="21 images asked, 20 remain in this round"):
            part.query(images(21))
        part.query(images(20))
        assert part.remaining == 0
    assert (whole.remaining, shop.ledger.spent("soft")) == (40, 60)
    AllowanceOracle(whole, 10).query(images(0))
    assert whole.remaining == 40


def test_a_restored_oracle_goes_on_where_the_checkpoint_was_taken(shop: Shop) -> None:
    first = shop.oracle()
    first.query(images(300))
    kept = first.counters()
    first.query(images(50, "lost"))
    second = shop.oracle()
    second.restore(*kept)
    assert second.remaining == BUDGET - 300
    assert torch.equal(second.query(images(50, "lost")), predict(shop.model, images(50, "lost")))
    assert (second.asked, shop.ledger.spent("soft")) == (350, 350)


def test_channels_last_images_are_the_same_query(shop: Shop) -> None:
    model: Classifier = build("linear", channels=3, size=4, classes=2, generator=generator_for("rgb"))
    oracle = ModelOracle(model, labels="soft", classes=2, shape=SHAPE, budget=20)
    asked = torch.rand(10, 3, 4, 4, generator=generator_for("pixels"))
    assert torch.equal(oracle.query(asked), oracle.query(asked.contiguous(memory_format=torch.channels_last)))
