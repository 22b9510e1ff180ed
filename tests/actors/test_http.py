"""The HTTP door: who is let in, what is answered and charged, what is refused, and its schema.

The door's class, its routes and its client are tested over real HTTP on uvicorn in this process, with the ledger
beside them (``tests/actors/door.py``). Serve's HTTP proxy belongs to the whole of a Ray cluster, and the session's one
runs Serve without it, so the proxy is tested as users start it: ``exsim serve`` in a process of its own
(``test_serve.py``).
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from actors.http import ledger_key
from actors.http_body import MAX_BODY
from simulator.training.predict import predict
from tests.actors.door import GOOD, MODEL, NPY, Site, npy

# -- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [GOOD, GOOD.astype(np.float32) / 255], ids=["uint8", "float32"])
@pytest.mark.parametrize("form", ["npy", "fortran", "json"])
def test_answers_are_the_models_to_the_bit(site: Site, images: np.ndarray, form: str) -> None:
    token = site.open()
    body: Any = {"npy": images, "fortran": np.asfortranarray(images)}.get(form)
    reply = site.ask(token, body if body is not None else {"images": images.tolist(), "dtype": str(images.dtype)})
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert (found["charged"], found["remaining"]) == (4, 996)
    expected = predict(MODEL, torch.from_numpy(images)).numpy()
    assert np.array_equal(np.array(found["probabilities"], np.float32), expected)


@pytest.mark.parametrize("labels", ["hard", "top-3", "round-1"])
def test_the_accounts_answer_policy_holds(site: Site, labels: str) -> None:
    rows = np.array(site.ask(site.open(labels)).json()["probabilities"])
    assert rows.sum(1) == pytest.approx(np.ones(4), abs=1e-5)
    if labels == "round-1":
        assert not np.array_equal(rows, predict(MODEL, torch.from_numpy(GOOD)).numpy())
    else:
        assert ((rows > 0).sum(1) == (1 if labels == "hard" else 3)).all()


def test_the_budget_is_exact_and_its_end_says_what_is_left(site: Site) -> None:
    token = site.open(budget=10)
    assert [site.ask(token).json()["remaining"] for _ in range(2)] == [6, 2]
    over = site.ask(token)
    assert (over.status_code, over.headers["Content-Type"]) == (429, "application/problem+json")
    problem = over.json()
    assert (problem["status"], problem["asked"], problem["remaining"], problem["budget"]) == (429, 4, 2, 10)
    assert "4 images asked, 2 of 10 remain" in problem["detail"]
    assert site.ask(token, GOOD[:2]).json()["remaining"] == 0
    assert site.ask(token, GOOD[:1]).json()["remaining"] == 0
    headers = {"Authorization": f"Bearer {token}"}
    account = requests.get(site.url + "/v1/account", headers=headers, timeout=60).json()
    assert {name: account[name] for name in ("budget", "spent", "remaining")} == {
        "budget": 10,
        "spent": 10,
        "remaining": 0,
    }
    assert site.spent(token) == 10


def test_many_clients_at_once_spend_the_budget_to_the_last_image(site: Site) -> None:
    token = site.open(budget=50)
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: site.ask(token, GOOD[:3]), range(24)))
    codes = [reply.status_code for reply in replies]
    assert (codes.count(200), codes.count(429)) == (16, 8)
    assert sum(reply.json()["charged"] for reply in replies if reply.status_code == 200) == site.spent(token) == 48


def test_a_retry_under_its_key_is_free_and_other_images_are_refused(site: Site) -> None:
    token = site.open(budget=4)
    first = site.ask(token, Idempotency_Key="a name").json()
    again = site.ask(token, Idempotency_Key="a name").json()
    named = site.ask(token, {"images": GOOD.tolist(), "key": "a name"}).json()
    assert (first["charged"], again["charged"], named["charged"]) == (4, 0, 0)
    assert first["probabilities"] == again["probabilities"] == named["probabilities"]
    other = site.ask(token, GOOD[::-1].copy(), Idempotency_Key="a name")
    assert (other.status_code, other.json()["title"]) == (409, "Key reused")
    assert site.spent(token) == 4


def test_keys_are_numbers_of_the_ledger() -> None:
    assert [ledger_key(text) for text in ("0", "7", str(2**63 - 1))] == [0, 7, 2**63 - 1]
    hashed = [ledger_key(text) for text in ("a", "b", "07", "-1", "٣", str(2**63), "9" * 255, "")]
    assert len(set(hashed)) == len(hashed)
    assert all(2**62 <= number < 2**63 for number in [*hashed, ledger_key(None), ledger_key(None)])
    assert ledger_key("a") == hashed[0]
    assert ledger_key(None) != ledger_key(None)


# -- who and what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer guess", "Bearer", "Basic dG9rZW4=", "Bearer t\xf6ken"])
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/account", "/v1/model"])
def test_nobody_gets_in_without_a_token(site: Site, path: str, header: str | None) -> None:
    headers = {**NPY, **({"Authorization": header.encode("latin-1")} if header else {})}
    method = "POST" if path == "/v1/predict" else "GET"
    reply = requests.request(method, site.url + path, data=npy(GOOD), headers=headers, timeout=60)
    assert (reply.status_code, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert reply.json()["status"] == 401


def huge_npy() -> bytes:
    """A header that speaks of a thousand billion images, and no data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 1, 8, 8)})
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=GOOD)
    return file.getvalue()


def nested(value: Any, *shape: int) -> Any:
    return value if not shape else [nested(value, *shape[1:])] * shape[0]


MALFORMED: dict[str, tuple[Any, str]] = {
    "another size": (np.zeros((2, 1, 9, 8), np.uint8), "allowed: (1..4096, 1, 8, 8)"),
    "no image": (np.zeros((0, 1, 8, 8), np.uint8), "shape (0, 1, 8, 8)"),
    "too many": (np.zeros((4097, 1, 8, 8), np.uint8), "shape (4097"),
    "float64": (np.zeros((2, 1, 8, 8)), "float64"),
    "big endian": (np.zeros((2, 1, 8, 8), ">f4"), ">f4"),
    "a NaN": (np.full((1, 1, 8, 8), np.nan, np.float32), "not finite"),
    "above 1": (np.full((1, 1, 8, 8), 1.5, np.float32), "outside [0, 1]"),
    "a pickle": (npy(np.array([{"a": 1}], object)), "type object"),
    "an archive": (npz(), "not a .npy file"),
    "more than it holds": (huge_npy(), "bytes of data for the shape"),
    "less than it holds": (npy(GOOD) + b"x", "bytes of data for the shape"),
    "no bytes": (b"", "not a .npy file"),
    "noise": (bytes(range(256)), "not a .npy file"),
    "a header that is no literal": (npy(GOOD).replace(b"'descr'", b"((((((("), "not a .npy file"),
    "JSON of nothing": ({}, "images: Field required"),
    "JSON null": (None, "body"),
    "text for a number": ({"images": [[[["1"]]]]}, "valid number"),
    "three levels": ({"images": nested(1, 2, 8, 8)}, "valid array"),
    "ragged": ({"images": [[[[1, 2], [3]]]]}, "one length"),
    "a fraction of uint8": ({"images": nested(0.5, 1, 1, 8, 8)}, "integers 0..255"),
    "uint8 of 256": ({"images": nested(256, 1, 1, 8, 8)}, "integers 0..255"),
    "float32 of 1e300": ({"images": nested(1e300, 1, 1, 8, 8), "dtype": "float32"}, "outside [0, 1]"),
    "another dtype": ({"images": nested(1, 1, 1, 8, 8), "dtype": "int8"}, "dtype"),
    "an unknown field": ({"images": nested(1, 1, 1, 8, 8), "labels": [1]}, "labels"),
    "an empty key": ({"images": nested(1, 1, 1, 8, 8), "key": ""}, "key"),
}


@pytest.mark.parametrize(("body", "word"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_images_are_refused_in_one_line_and_free(site: Site, body: Any, word: str) -> None:
    token = site.open()
    if body is None:
        reply = site.ask(token, b"null", Content_Type="application/json")
    else:
        reply = site.ask(token, body)
    assert (reply.status_code, reply.headers["Content-Type"]) == (422, "application/problem+json")
    detail = reply.json()["detail"]
    assert word in detail
    assert len(detail.splitlines()) == 1
    assert site.spent(token) == 0
    assert site.ask(token).status_code == 200


def test_bodies_of_another_type_size_or_key_are_refused_and_free(site: Site) -> None:
    token = site.open()
    assert site.ask(token, npy(GOOD), Content_Type="text/plain").status_code == 415
    assert site.ask(token, b"\0" * (MAX_BODY + 1)).status_code == 413
    headers = {"Authorization": f"Bearer {token}", **NPY}
    # of unknown length: chunks are counted as they come
    chunks = (b"\0" * (1 << 20) for _ in range(MAX_BODY // (1 << 20) + 1))
    assert requests.post(site.url + "/v1/predict", data=chunks, headers=headers, timeout=60).status_code == 413
    both = site.ask(token, {"images": GOOD.tolist(), "key": "a"}, Idempotency_Key="b")
    assert (both.status_code, "header" in both.json()["detail"]) == (422, True)
    assert site.ask(token, Idempotency_Key="k" * 256).status_code == 422
    assert site.spent(token) == 0
    assert requests.get(site.url + "/nonsense", timeout=60).json()["status"] == 404
    assert requests.get(site.url + "/v1/predict", timeout=60).json()["status"] == 405


# -- the schema ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(site: Site) -> Any:
    return schemathesis.openapi.from_url(site.url + "/openapi.json")


VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        ("GET /healthz", VALID),
        ("GET /v1/model", VALID),
        ("GET /v1/account", VALID),
        ("POST /v1/predict", VALID),
        ("POST /v1/predict", INVALID),
    ],
    ids=str,
)
def test_nothing_that_the_schema_allows_or_forbids_is_a_server_error(
    site: Site, api: Any, operation: str, mode: GenerationMode
) -> None:
    """All of schemathesis's checks but one: to the schema, any bytes are a .npy file."""
    method, path = operation.split()
    token, excluded = site.open(budget=100), [CHECKS.get_one("positive_data_acceptance")]

    @given(api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=12 if method == "POST" else 1, suppress_health_check=list(HealthCheck))
    def fuzz(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, excluded_checks=excluded)

    fuzz()
    assert site.ask(site.open()).status_code == 200


def test_the_schema_says_what_is_asked(site: Site) -> None:
    found = requests.get(site.url + "/openapi.json", timeout=60).json()
    body = found["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/octet-stream"}
    images = body["application/json"]["schema"]["properties"]["images"]
    assert (images["maxItems"], images["items"]["maxItems"], images["items"]["items"]["minItems"]) == (4096, 1, 8)
    assert found["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
