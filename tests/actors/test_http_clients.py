"""Theft and verification through the HTTP door, and through an API of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from fastapi import FastAPI

from simulator.attacks.knockoff import Knockoff
from simulator.cli import main
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import build
from simulator.ownership.key import KeySamples, save_key
from simulator.seeding import generator_for
from simulator.service.http import HttpClient, connect
from simulator.service.ledger import Ledger, Terms, hash_token
from simulator.service.local import LocalTransport
from simulator.service.oracle import BudgetExhausted, ServiceOracle
from simulator.service.victim import VictimService
from simulator.training.predict import predict, predict_labels
from simulator.training.recipe import Recipe
from tests.actors.door import IMAGES, MODEL, Site, listening


def test_an_attack_of_ours_steals_through_it_what_it_would_in_process_and_a_second_start_is_free(
    site: Site, tmp_path: Path
) -> None:
    token = site.open(budget=400)
    attack = Knockoff(training=Recipe(epochs=1, batch_size=64))

    def steal(oracle: ServiceOracle) -> torch.Tensor:
        assert (oracle.labels, oracle.classes, oracle.shape, oracle.remaining) == ("soft", 10, (1, 8, 8), 400)
        surrogate = build("naivenet", channels=1, size=8, classes=10, generator=generator_for("thief"))
        pool = Pool("pool", IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64))
        stolen = attack.extract(oracle, surrogate, pool, Context(generator_for("theft")))
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
        ("hits", ["--stolen-wsr", "0.21"], 0, 60, ["VERIFIED", "60 queries, 0 of", "from 18 hits on"]),
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
    app = FastAPI()

    @app.post("/v1/models/m:predict")
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        rows = predict(MODEL, torch.tensor(body["instances"], dtype=torch.float32))
        best = [{"label": int(label)} for label in rows.argmax(1)]
        return {"predictions": rows.tolist(), "best": best, "text": "seven"}

    with listening(app) as url:
        yield f"{url}/v1/models/m:predict"


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
