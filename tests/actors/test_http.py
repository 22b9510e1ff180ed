"""The HTTP door: who is let in, what is charged, what is refused, its schema, and theft and verification through it.

The door's class, its routes and its client are tested over real HTTP on uvicorn in this process, with the ledger
beside them. Serve's HTTP proxy belongs to the whole of a Ray cluster, and the session's one runs Serve without it, so
the proxy is tested as users start it: ``exsim serve`` in a process of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from actors.devices import Placement
from actors.http import Door, build_app, ledger_key
from actors.http_body import MAX_BODY
from actors.ledger import LedgerService
from actors.serving import account_names, held, prepare
from actors.stores import Shelf
from actors.victim import Victim
from simulator.attacks.knockoff import Knockoff
from simulator.cli import main
from simulator.errors import InputError
from simulator.http_oracle import HttpClient, ModelInfo, connect
from simulator.ledger import Ledger, Terms, digest_of, hash_token
from simulator.models import build, load_model, save_model
from simulator.oracle import BudgetExhausted, ServiceOracle
from simulator.pools import Pool
from simulator.seeding import generator_for
from simulator.service import MAX_BATCH, LocalTransport, VictimService
from simulator.training import Recipe, predict, predict_labels
from simulator.watermarks.key import KeySamples, save_key

ROOT = Path(__file__).parents[2]
MODEL = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("victim")).eval()
IMAGES = torch.randint(256, (700, 1, 8, 8), dtype=torch.uint8, generator=generator_for("images"))
GOOD = IMAGES[:4].numpy()
NPY = {"Content-Type": "application/octet-stream"}


class Here:
    """An object of this process whose methods are called as an actor's are."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, method))


@dataclass
class Site:
    """A door that is open, and how to open accounts at it."""

    url: str
    ledger: LedgerService
    app: Any
    accounts: dict[str, str]

    def open(self, labels: str = "soft", budget: int = 1000) -> str:
        """A new account's token."""
        name = f"account-{len(self.accounts)}"
        token = f"token of {name}"
        self.accounts[hash_token(token)] = name
        self.ledger._ledger.open(name, Terms("v", labels, budget, hash_token(token)))
        return token

    def spent(self, token: str) -> int:
        return self.ledger._ledger.spent(self.accounts[hash_token(token)])

    def ask(self, token: str | None, body: Any = GOOD, path: str = "/v1/predict", **headers: str) -> requests.Response:
        """An array as .npy, bytes as they are, anything else as JSON."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        kind = {"json": body}
        if isinstance(body, np.ndarray):
            body = npy(body)
        if isinstance(body, bytes):
            kind, headers = {"data": body}, {**NPY, **headers}
        return requests.post(self.url + path, headers=headers, timeout=60, **kind)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("door")
    save_model(MODEL, folder / "models" / "v.safetensors")
    ledger = LedgerService(str(folder / "ledger.log"), False)
    victim = Victim(Here(ledger), Here(Shelf(str(folder))), Placement(False, 0.5))  # type: ignore[arg-type]
    info = ModelInfo(shape=[1, 8, 8], classes=10, labels="soft", max_batch=MAX_BATCH, max_bytes=MAX_BODY)
    door = Door(victim, Here(ledger), info, {})
    app = build_app(door)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield Site(f"http://127.0.0.1:{listening.getsockname()[1]}", ledger, app, door._accounts)
    server.should_exit = True
    thread.join()
    listening.close()


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


# -- theft and verification through it -------------------------------------------------------------------------------


def test_an_attack_of_ours_steals_through_it_what_it_would_in_process_and_a_second_start_is_free(
    site: Site, tmp_path: Path
) -> None:
    token = site.open(budget=400)
    attack = Knockoff(training=Recipe(epochs=1, batch_size=64))

    def steal(oracle: ServiceOracle) -> torch.Tensor:
        assert (oracle.labels, oracle.classes, oracle.shape, oracle.remaining) == ("soft", 10, (1, 8, 8), 400)
        surrogate = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("thief"))
        pool = Pool("pool", IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64))
        stolen = attack.extract(oracle, surrogate, pool, generator=generator_for("theft"))
        return predict(stolen, IMAGES)

    over_http = steal(connect(site.url, token, session="one"))
    assert site.spent(token) == 400
    assert torch.equal(over_http, steal(connect(site.url, token, session="one", budget=400)))
    assert site.spent(token) == 400
    ledger, service = Ledger(tmp_path / "log"), VictimService(torch.device("cpu"))
    service.add("v", MODEL)
    ledger.open("a", Terms("v", "soft", 400, hash_token("t")))
    local = LocalTransport(service, ledger)
    here = ServiceOracle(local, "a", "t", labels="soft", classes=10, shape=(1, 8, 8), budget=400)
    assert torch.equal(over_http, steal(here))
    ledger.close()
    with pytest.raises(BudgetExhausted, match="0 of 400 remain"):
        connect(site.url, token, budget=5).query(IMAGES[:1])


@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_the_adversarial_robustness_toolbox_steals_through_it_as_it_is(site: Site) -> None:
    pytest.importorskip("art", reason="needs the optional dependencies [peers]")
    from benchmarks.art_over_http import steal

    token = site.open(budget=100)
    found = steal(site.url, token, budget=60, epochs=1)
    assert (found["charged"], found["remaining"]) == (60, 40)
    with pytest.raises(requests.HTTPError, match="429"):
        steal(site.url, token, budget=60, epochs=1)
    assert site.spent(token) == 100 - 40


def test_a_client_that_is_refused_says_so_in_one_line(site: Site) -> None:
    for url, token, word in (
        (site.url, "guess", "status 401"),
        ("http://127.0.0.1:1", "guess", "not reachable"),
        ("ftp://127.0.0.1", "guess", "no address"),
        (site.url, "a\nb", "printable ASCII"),
        (site.url + "/elsewhere", "guess", "status 404"),
        ("http://", "guess", "http://"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            connect(url, token, patience=0)
        assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of 60 samples: one that the model answers always, one never, and one of another size."""
    folder, labels = tmp_path_factory.mktemp("keys"), predict_labels(MODEL, IMAGES[:60])
    save_key(KeySamples(IMAGES[:60], labels, 10), folder / "hits")
    save_key(KeySamples(IMAGES[:60], (labels + 1) % 10, 10), folder / "misses")
    save_key(KeySamples(IMAGES[:60, :, 1:, 1:], labels, 10), folder / "small")
    save_key(KeySamples(IMAGES[:60], labels, 11), folder / "eleven")
    return folder


@pytest.mark.parametrize(
    ("key", "options", "status", "spent", "words"),
    [
        ("hits", [], 0, 5, ["VERIFIED", "5 of 5 answers", "55 of the key's 60 samples saved", "decided above 2.94"]),
        ("misses", [], 1, 11, ["not verified", "0 of 11 answers", "49 of", "decided below -2.94"]),
        ("hits", ["--max-queries", "3"], 1, 3, ["not verified", "3 queries", "undecided", "more queries"]),
        ("hits", ["--stolen-wsr", "0.21"], 0, 60, ["VERIFIED", "60 queries, 0 of", "the whole key's WSR"]),
        ("misses", ["--alpha", "0.01", "--beta", "0.01"], 1, 16, ["not verified", "16 queries"]),
    ],
)
def test_verification_stops_when_it_knows(
    site: Site, keys: Path, key: str, options: list[str], status: int, spent: int, words: list[str], capsys: Any
) -> None:
    token = site.open("hard")
    arguments = ["verify", "--url", site.url, "--key", str(keys / key), "--token", token, *options]
    assert main(arguments) == status
    out = capsys.readouterr().out
    assert all(word in out for word in words), out
    assert site.spent(token) == spent
    assert main(arguments) == status  # the same samples under the same keys
    assert site.spent(token) == spent


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--token", "guess"], "status 401"),
        (["--key", "small"], "(1, 7, 7)"),
        (["--key", "eleven"], "11 classes"),
        (["--key", "missing"], "no such file"),
        (["--stolen-wsr", "0.1"], "not above"),
        (["--alpha", "0.7"], "alpha"),
        (["--threshold", "1"], "benign_wsr"),
        (["--url", "http://"], "http://"),
        (["--url", "nonsense"], "no address"),
        (["--budget-of-2"], "0 of 2 remain"),
        (["some.safetensors"], "one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_verification_that_cannot_be_is_one_line(
    site: Site, keys: Path, arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(keys)
    token = site.open("hard", budget=2 if "--budget-of-2" in arguments else 100)
    arguments = [argument for argument in arguments if argument != "--budget-of-2"]
    assert main(["verify", "--url", site.url, "--key", "hits", "--token", token, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), word in err) == ("", 1, True), err


def test_options_of_a_suspect_behind_a_url_do_not_go_with_a_file(keys: Path, capsys: Any) -> None:
    assert main(["verify", "model", "--key", str(keys / "hits"), "--max-queries", "3"]) == 2
    assert "--max-queries goes with --url" in capsys.readouterr().err
    assert main(["verify", "--key", str(keys / "hits")]) == 2
    assert "MODEL or --url" in capsys.readouterr().err


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    """An API of another kind, as TensorFlow Serving's: ``instances`` in, ``predictions`` out, and a label beside."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/v1/models/m:predict")
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        rows = predict(MODEL, torch.tensor(body["instances"], dtype=torch.float32))
        best = [{"label": int(label)} for label in rows.argmax(1)]
        return {"predictions": rows.tolist(), "best": best, "text": "seven"}

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/models/m:predict"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.mark.parametrize(
    ("field", "status", "word"),
    [
        ("predictions", 0, "5 of 5"),
        ("best.0.label", 0, "5 of 5"),
        ("scores", 2, "it has the fields predictions, best, text"),
        ("best.1", 2, "has no '1'"),
        ("text", 2, "'seven' is neither a label nor a list of scores"),
    ],
)
def test_a_foreign_api_is_verified_by_the_field_of_its_answer(
    foreign: str, keys: Path, field: str, status: int, word: str, capsys: Any
) -> None:
    arguments = ["--answer-field", field, "--images-field", "instances"]
    assert main(["verify", "--url", foreign, "--key", str(keys / "hits"), *arguments]) == status
    assert word in "".join(capsys.readouterr())


def test_something_that_is_no_door_is_said_to_be_none(foreign: str) -> None:
    with pytest.raises(InputError, match="status 405"):
        HttpClient(foreign, patience=0).send("GET", "")


# -- exsim serve -----------------------------------------------------------------------------------------------------


def offer(folder: Path, names: list[str], budget: int = 9, labels: str = "soft") -> Any:
    return prepare(b"model", "model-1", MODEL.spec, folder, labels, budget, names)


def test_the_directory_keeps_tokens_and_balances(tmp_path: Path) -> None:
    first = offer(tmp_path, ["ann", "bob"])
    assert first.fresh == {"ann", "bob"}
    assert first.remaining == {"ann": 9, "bob": 9}
    assert first.tokens_file.stat().st_mode & 0o077 == 0
    assert first.tokens["ann"] not in first.ledger.read_text()
    again = offer(tmp_path, ["ann", "cid"])
    assert (again.fresh, again.tokens["ann"]) == ({"cid"}, first.tokens["ann"])
    assert any("token " + again.tokens["cid"] in line for line in again.lines("http://x"))
    assert not any(first.tokens["ann"] in line for line in again.lines("http://x"))
    # a token file that was moved to a safe place
    again.tokens_file.unlink()
    third = offer(tmp_path, ["ann"])
    assert (third.tokens, third.terms["ann"]) == ({}, first.terms["ann"])


@pytest.mark.parametrize(
    ("change", "word"), [({"budget": 10}, "budget 9, not 10"), ({"labels": "hard"}, "labels soft, not hard")]
)
def test_an_account_keeps_its_terms(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    offer(tmp_path, ["ann"])
    with pytest.raises(InputError, match=word):
        offer(tmp_path, ["ann"], **change)


def test_one_process_at_a_time_serves_from_a_directory(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(InputError, match="another exsim serve"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_accounts_by_number_or_by_name() -> None:
    assert account_names(None, []) == ["account-1"]
    assert account_names(2, []) == ["account-1", "account-2"]
    assert account_names(None, ["ann", "bob"]) == ["ann", "bob"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(MODEL, tmp_path / "model")
    (tmp_path / "text").write_text("no model")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "missing"], "missing: cannot be read"),
        (["--model", "text"], "not a safetensors file"),
        (["--budget", "0"], "--budget 0"),
        (["--labels", "sofft"], "--labels: 'sofft' is not one of"),
        (["--labels", "top-0"], "--labels"),
        (["--accounts", "0"], "--accounts 0"),
        (["--accounts", "2", "--account", "ann"], "one of them"),
        (["--account", "ann", "--account", "ann"], "twice"),
        (["--account", "../ann"], "'../ann'"),
        (["--port", "70000"], "70000"),
        (["--port", "BUSY"], "in use"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--dir", "text"], "text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_one_line(
    folder: Path, arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        arguments = [str(busy.getsockname()[1]) if argument == "BUSY" else argument for argument in arguments]
        assert main(["serve", "--model", "model", "--budget", "9", "--port", "0", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), word in err) == ("", 1, True), err


@pytest.mark.ray
def test_a_cluster_whose_serve_runs_already_is_refused(
    ray_session: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its proxy is somebody else's, here: none."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    monkeypatch.chdir(folder)
    assert main(["serve", "--model", "model", "--budget", "9", "--port", "0"]) == 2
    assert "Ray Serve runs on this cluster already" in capsys.readouterr().err


#: as a terminal starts it: a shell's background job, which tests may be, has SIGINT ignored
AS_FROM_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('simulator', run_name='__main__', alter_sys=True)"
)


@pytest.mark.slow
def test_a_model_is_served_asked_and_ended_and_its_balance_is_kept(folder: Path) -> None:
    """Through Serve's own HTTP proxy, in a Ray of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", AS_FROM_A_TERMINAL, "serve", "--model", "model", "--budget", "10"]
    command += ["--port", "0", "--dir", "kept"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        said = [process.stdout.readline() for _ in range(4)]  # type: ignore[union-attr]
        found = re.search(r"http://127\.0\.0\.1:\d+", said[0])
        assert found, [*said, *process.communicate(timeout=60)]
        url, token = found[0], json.loads((folder / "kept" / "tokens.json").read_bytes())["account-1"]
        assert said[1].split() == f"account-1: 10 of 10 images left, token {token}".split()
        oracle = connect(url, token)
        rows = oracle.query(IMAGES[:4])
        assert torch.equal(rows, predict(load_model(folder / "model")[0], IMAGES[:4]))
        oracle.budget = 100
        with pytest.raises(BudgetExhausted, match="6 of 10 remain"):
            oracle.query(IMAGES[:20])
        assert requests.get(url + "/v1/account", timeout=60).status_code == 401
        with held(folder), pytest.raises(InputError, match="another exsim serve"), held(folder / "kept"):
            pass
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches all processes that it started
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, ""), out + err
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(requests.ConnectionError):
        requests.get(url + "/healthz", timeout=5)
    data = (folder / "model").read_bytes()
    victim = f"model-{digest_of(data)[:12]}"
    again = prepare(data, victim, MODEL.spec, folder / "kept", "soft", 10, ["account-1"])
    assert (again.remaining, again.tokens, again.fresh) == ({"account-1": 6}, {"account-1": token}, frozenset())
