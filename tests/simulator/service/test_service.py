from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.seeding import generator_for
from simulator.service.answers import answer_policy
from simulator.service.ledger import Ledger, Terms, digest_of, hash_token
from simulator.service.local import LocalTransport
from simulator.service.query import MAX_BATCH, MAX_BYTES, MalformedQuery, Query, check_form, check_images
from simulator.service.victim import HALF_TOLERANCE, VictimService
from simulator.training.predict import predict

BUDGET = 100


@pytest.fixture
def model() -> Classifier:
    return build("linear", channels=1, size=4, classes=3, generator=generator_for("service")).eval()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "log")
    for labels in ("soft", "hard", "top-2"):
        ledger.open(labels, Terms("v", labels, BUDGET, hash_token("secret")))
    return ledger


@pytest.fixture
def transport(model: Classifier, ledger: Ledger) -> LocalTransport:
    service = VictimService(torch.device("cpu"))
    assert "v" not in service
    service.add("v", model)
    assert "v" in service
    return LocalTransport(service, ledger)


def test_victims_asked_longest_ago_make_room_and_may_come_again(model: Classifier, ledger: Ledger) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    service, asked = VictimService(torch.device("cpu"), room=2 * size), query(images(2))
    for name in ("first", "second"):
        service.add(name, model)
    answers = service.answer("first", "soft", asked)
    pending = service.answering("second", "soft", asked)
    service.answer("first", "soft", asked)
    service.add("third", model)
    assert [name in service for name in ("first", "second", "third")] == [True, False, True]
    assert np.array_equal(pending(), answers), "who has it goes on with it"
    service.add("second", model)
    assert np.array_equal(service.answer("second", "soft", asked), answers)
    small = VictimService(torch.device("cpu"), room=1)
    small.add("v", model)
    assert "v" in small, "the one that is asked is kept in any case"


def images(count: int, dtype: Any = np.uint8, *words: object) -> NDArray[Any]:
    drawn = torch.randint(0, 256, (count, 1, 4, 4), generator=generator_for("images", *words)).numpy()
    return drawn.astype(np.uint8) if dtype == np.uint8 else (drawn / 255).astype(dtype)


def query(pictures: Any, key: Any = 0, account: str = "soft", token: str = "secret") -> Query:
    return Query(account, token, key, pictures)


def with_value(value: float) -> NDArray[np.float32]:
    pictures = images(2, np.float32)
    pictures[1, 0, 3, 2] = value
    return pictures


MALFORMED = {
    "none": None,
    "a list": [[[[0] * 4] * 4]],
    "a tensor": torch.zeros(1, 1, 4, 4, dtype=torch.uint8),
    "float64": images(2, np.float64),
    "float16": images(2, np.float16),
    "int64": images(2).astype(np.int64),
    "int8": images(2).astype(np.int8),
    "bool": images(2) > 100,
    "complex": images(2).astype(np.complex64),
    "objects": images(2).astype(object),
    "big endian": images(2, np.float32).astype(">f4"),
    "one image, no batch": images(1)[0],
    "flat": images(2).reshape(2, 16),
    "five dimensions": images(2)[None],
    "channels": np.repeat(images(2), 3, axis=1),
    "size": np.zeros((2, 1, 5, 5), np.uint8),
    "not square": np.zeros((2, 1, 4, 5), np.uint8),
    "channels last": np.zeros((2, 4, 4, 1), np.uint8),
    "empty": images(0),
    "too many": np.zeros((MAX_BATCH + 1, 1, 4, 4), np.uint8),
    "nan": with_value(np.nan),
    "infinite": with_value(np.inf),
    "negative": with_value(-1e-6),
    "above one": with_value(1.0001),
    "0 to 255 as floats": images(2).astype(np.float32),
}


@pytest.mark.parametrize("pictures", MALFORMED.values(), ids=MALFORMED)
def test_malformed_images_are_refused_and_charge_nothing(
    pictures: Any, transport: LocalTransport, ledger: Ledger
) -> None:
    with pytest.raises(MalformedQuery, match=r"^query (of|with) .*; allowed: \(1\.\.4096, 1, 4, 4\)") as caught:
        transport.send(query(pictures))
    assert isinstance(caught.value, InputError)
    assert len(str(caught.value).splitlines()) == 1
    assert (ledger.spent("soft"), ledger.grants("soft")) == (0, {})
    # the service lives on, and the key is still free
    assert transport.send(query(images(2))).shape == (2, 3)


@pytest.mark.parametrize("key", ["0", 0.0, None, True, np.int64(0), (0,)])
def test_a_key_that_is_no_integer_is_refused_and_charges_nothing(
    key: Any, transport: LocalTransport, ledger: Ledger
) -> None:
    with pytest.raises(MalformedQuery, match="is not an integer"):
        transport.send(query(images(2), key))
    assert ledger.all_spent() == {"soft": 0, "hard": 0, "top-2": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        query(images(2), account="nobody"),
        query(images(2), token="Secret"),
        query(images(2), key=-1),
        query(images(BUDGET + 1)),
    ],
)
def test_a_query_that_nobody_pays_for_is_refused_and_charges_nothing(
    wrong: Query, transport: LocalTransport, ledger: Ledger
) -> None:
    with pytest.raises(InputError) as caught:
        transport.send(wrong)
    assert len(str(caught.value).splitlines()) == 1
    assert ledger.all_spent() == {"soft": 0, "hard": 0, "top-2": 0}


@pytest.mark.parametrize("labels", ["soft", "hard", "top-2"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_answers_are_the_models_own_under_the_accounts_mode(
    labels: str, dtype: Any, transport: LocalTransport, ledger: Ledger, model: Classifier
) -> None:
    pictures = images(30, dtype)
    answers = transport.send(query(pictures, account=labels))
    assert answers.dtype == np.float32
    assert answers.shape == (30, 3)
    wanted = answer_policy(labels)(predict(model, torch.from_numpy(pictures)))
    assert torch.equal(torch.from_numpy(answers), wanted)
    assert ledger.grants(labels) == {0: (30, digest_of(pictures.tobytes()))}


def test_a_retry_gives_the_same_answer_and_charges_nothing(transport: LocalTransport, ledger: Ledger) -> None:
    first = query(images(60, np.uint8, 1), 0)
    answer = transport.send(first)
    transport.send(query(images(40, np.uint8, 2), 1))
    assert ledger.spent("soft") == BUDGET
    again = transport.send(replace(first, images=first.images.copy()))
    assert np.array_equal(again, answer)
    assert ledger.spent("soft") == BUDGET


def test_a_used_key_with_other_images_is_refused(transport: LocalTransport, ledger: Ledger) -> None:
    transport.send(query(images(2, np.uint8, 1)))
    for other in (images(2, np.uint8, 2), images(1, np.uint8, 1), images(2, np.float32, 1)):
        with pytest.raises(InputError, match="was used for other images"):
            transport.send(query(other))
    assert ledger.spent("soft") == 2


def test_the_memory_layout_of_the_images_does_not_matter(transport: LocalTransport, ledger: Ledger) -> None:
    pictures = images(6)
    answer = transport.send(query(pictures))
    frozen = pictures.copy()
    frozen.flags.writeable = False  # as Ray's zero-copy arrays are
    backwards = pictures[::-1].copy()[::-1]
    strided = np.repeat(pictures, 2, axis=0)[::2]
    columns = np.asfortranarray(pictures)
    for same in (frozen, backwards, strided, columns):
        assert np.array_equal(transport.send(query(same)), answer)
    assert ledger.spent("soft") == 6
    # numpy takes a single image backwards for contiguous, torch refuses its stride: after it was paid
    assert np.array_equal(transport.send(query(pictures[:1][::-1], 1)), answer[:1])
    assert ledger.spent("soft") == 7


def test_a_list_of_queries_is_answered_in_its_order(transport: LocalTransport, ledger: Ledger) -> None:
    queries = [query(images(count, np.uint8, count), count) for count in (3, 1, 2)]
    answers = transport.send_all(queries)
    assert [len(rows) for rows in answers] == [3, 1, 2]
    assert all(np.array_equal(rows, transport.send(asked)) for rows, asked in zip(answers, queries, strict=True))
    assert ledger.spent("soft") == 6


def test_one_service_answers_for_several_victims(model: Classifier, ledger: Ledger) -> None:
    other = build("linear", channels=3, size=8, classes=5, generator=generator_for("other"))
    service = VictimService(torch.device("cpu"))
    service.add("v", model)
    service.add("w", other)
    ledger.open("w", Terms("w", "soft", 10, hash_token("secret")))
    transport = LocalTransport(service, ledger)
    assert transport.send(query(np.zeros((2, 3, 8, 8), np.uint8), account="w")).shape == (2, 5)
    with pytest.raises(MalformedQuery, match=r"3, 8, 8"):
        transport.send(query(images(2), key=1, account="w"))


def test_the_ends_of_the_range_and_the_largest_batch_are_allowed() -> None:
    ends = np.array([0.0, -0.0, 1.0, 0.5], np.float32).reshape(1, 1, 2, 2)
    assert check_images(ends, 1, 2) is ends
    largest = np.zeros((MAX_BATCH, 1, 1, 1), np.uint8)
    assert check_images(largest, 1, 1) is largest


def test_an_answer_that_does_not_fit_into_a_message_is_refused_before_it_is_paid_for(ledger: Ledger) -> None:
    service = VictimService(torch.device("cpu"))
    service.add("v", build("linear", channels=1, size=4, classes=20_000, generator=generator_for("wide")))
    transport = LocalTransport(service, ledger)
    most = MAX_BYTES // 80_000
    with pytest.raises(MalformedQuery, match=rf"of {most + 1} images; allowed: 1\.\.{most}, with 20000 classes"):
        transport.send(query(images(most + 1)))
    assert ledger.spent("soft") == 0
    assert transport.send(query(images(most))).nbytes <= MAX_BYTES


@pytest.mark.parametrize("account", [None, 3, b"soft", ["soft"]])
def test_names_must_be_text(account: Any) -> None:
    check_form(query(images(1)))
    for wrong in (query(images(1), account=account), query(images(1), token=account)):
        with pytest.raises(MalformedQuery, match="allowed: text"):
            check_form(wrong)


def conv_service(**options: Any) -> VictimService:
    service = VictimService(torch.device("cpu"), **options)
    service.add("v", build("naivenet", channels=1, size=8, classes=10, generator=generator_for("half")))
    return service


def pictures8(count: int) -> NDArray[np.uint8]:
    drawn: NDArray[np.uint8] = torch.randint(0, 256, (count, 1, 8, 8), generator=generator_for("8")).byte().numpy()
    return drawn


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_answers_are_near_the_full_ones_and_the_same_every_time(half: torch.dtype) -> None:
    full, service = conv_service(), conv_service(precision="half", half=half)
    asked = query(pictures8(300))
    expected, answers = full.answer("v", "soft", asked), service.answer("v", "soft", asked)
    assert answers.dtype == np.float32
    assert 0 < np.abs(answers - expected).max() <= HALF_TOLERANCE
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)
    assert np.array_equal(service.answer("v", "soft", replace(asked, key=1)), answers)


def test_without_a_gpu_half_precision_is_full_precision() -> None:
    asked = query(pictures8(30))
    plain = conv_service().answer("v", "soft", asked)
    assert np.array_equal(conv_service(precision="half").answer("v", "soft", asked), plain)
    # the type alone asks for nothing
    assert np.array_equal(conv_service(half=torch.float16).answer("v", "soft", asked), plain)


def test_what_half_precision_cannot_hold_is_answered_in_full() -> None:
    service = conv_service(precision="half", half=torch.float16)
    model = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("half"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(300)
    service.add("loud", model)
    answers = service.answer("loud", "soft", query(pictures8(20)))
    assert np.array_equal(answers, predict(model, torch.from_numpy(pictures8(20))).numpy())
    assert np.isfinite(answers).all()


def test_noise_depends_on_the_key_and_not_on_when_or_where_it_is_answered(model: Classifier, tmp_path: Path) -> None:
    """Two services with ledgers and tokens of their own, asked in another order and twice, give the same answers."""
    pictures = images(20)
    found = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 2, 1, 0)]):
        ledger = Ledger(tmp_path / str(number))
        service = VictimService(torch.device("cpu"))
        service.add("v", model)
        for account in ("a", "b"):
            ledger.open(account, Terms("v", "noise-1 then round-3", BUDGET, hash_token(f"secret {number}")))
        transport = LocalTransport(service, ledger)
        found.append({key: transport.send(query(pictures, key, "a", f"secret {number}")) for key in order})
        assert ledger.spent("a") == 60
        other = transport.send(query(pictures, 0, "b", f"secret {number}"))
        assert not np.array_equal(other, found[-1][0]), "another account has other noise"
        ledger.close()
    assert all(np.array_equal(found[0][key], found[1][key]) for key in range(3))
    assert not np.array_equal(found[0][0], found[0][1]), "another key has other noise"
