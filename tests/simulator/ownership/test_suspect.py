"""Suspects that answer as nobody should: whatever they send is one line and exit status 2, never a verdict."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from simulator.cli import main
from simulator.errors import InputError
from simulator.models import build, save_model
from simulator.ownership import suspect
from simulator.ownership.key import KeySamples, save_key
from simulator.ownership.suspect import make_test, suspect_of, verify_url
from simulator.seeding import generator_for
from simulator.service.http import HttpClient
from simulator.service.http_oracle import HttpOracle
from simulator.service.oracle import BudgetExhausted, Oracle
from simulator.training.predict import predict_labels

MODEL = build("linear", channels=1, size=8, classes=4, generator=generator_for("suspect")).eval()
IMAGES = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator_for("images"))
INFO = {"shape": [1, 8, 8], "classes": 4, "labels": "soft", "max_batch": 9, "max_bytes": 9999}
#: deeper than Python's JSON reader goes, and about as deep
DEEP = [f"{'[' * depth}{']' * depth}" for depth in (100_000, *range(800, 1000, 20))]


class Peer(ThreadingHTTPServer):
    """A server that sends the same answer to everything, but for the ``/v1/model`` of a door."""

    answer, status, info = b"", 200, json.dumps(INFO).encode()
    headers: dict[str, str]
    asked = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps the terminal quiet: clients hang up on huge answers."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # a reply is one packet, else the peer waits for an acknowledgement
    server: Peer

    def do_GET(self) -> None:
        self._send(200, self.server.info, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self._send(self.server.status, self.server.answer, self.server.headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal quiet."""


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr("simulator.ownership.suspect.PATIENCE", 0.0)
    server = Peer(("127.0.0.1", 0), Handler)
    server.headers = {}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suspect")
    save_key(KeySamples(IMAGES, predict_labels(MODEL, IMAGES), 4), folder / "key")
    save_model(MODEL, folder / "model")
    return folder


def refused(arguments: list[str], capsys: Any) -> str:
    """The one line of a command that ends with status 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "could not be judged" not in err, "a crash"
    assert len(err.splitlines()) == 1, err
    return str(err)


def rows(row: Any) -> bytes:
    return json.dumps({"key": "k", "charged": 1, "remaining": 1, "probabilities": row}).encode()


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (rows([[]]), "0 probabilities for 4 classes"),
        (rows([]), "0 answers to 1 images"),
        (rows([[0.5, 0.5, 0]]), "3 probabilities for 4 classes"),
        (rows([[1, 0, 0, float("nan")]]), "finite"),
        (rows([[1, 0, 0, 0], [1]]), "2 answers to 1 images"),
        (b'{"key": "k", "charged": 1, "remaining": 1, "probabilities": [[1e999, 0, 0, 0]]}', "finite"),
        (rows([["a", 0, 0, 0]]), "probabilities.0.0"),
        (rows(None), "probabilities"),
        (b"[]", "not an answer of a door"),
        (b"null", "not an answer of a door"),
        (b"\xff\xfe\xff", "no JSON"),
        (b"", "no JSON"),
        (b"1" + b"0" * 5000, "no JSON"),
    ],
)
def test_a_door_that_answers_nonsense_is_no_verdict(
    peer: Peer, files: Path, answer: bytes, word: str, capsys: Any
) -> None:
    peer.answer = answer
    assert word in refused(["verify", "--url", peer.url, "--key", str(files / "key"), "--token", "t"], capsys)


def test_deep_answers_are_no_verdict(peer: Peer, files: Path, capsys: Any) -> None:
    door = ["verify", "--url", peer.url, "--key", str(files / "key"), "--token", "t"]
    for deep in DEEP:
        for answer in (deep, f'{{"detail": {deep}}}', f'{{"a": {deep}}}'):
            peer.answer = answer.encode()
            for status in (200, 400, 429, 503):
                peer.status = status
                refused(door, capsys)
                refused([*door, "--answer-field", "a.b"], capsys)
                refused([*door, "--answer-field", "a"], capsys)
    peer.info = DEEP[0].encode()
    assert "nested too deeply" in refused(door, capsys)


@pytest.mark.parametrize("field", [None, "0", "0.0", "0.a", "0.0.a"])
def test_a_value_deeper_than_can_be_written_is_no_verdict(field: str | None) -> None:
    """How deep a reader and a writer go differs between releases of Python: here is a value that was read."""

    class Deep(HttpClient):
        def send(self, method: str, path: str, **request: Any) -> Any:
            value: list[Any] = [1, 2]
            for _ in range(100_000):
                value = [value, 0]
            return value

    suspect = HttpOracle(Deep("http://deep"), classes=4, shape=(1, 8, 8), budget=1, answer_field=field)
    with pytest.raises(InputError, match="nested too deeply"):
        suspect.query(IMAGES[:1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("status", [200, 302, 500])
def test_a_huge_answer_is_not_read_to_its_end(
    peer: Peer, files: Path, packed: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(suspect, "REPLY_BYTES", 100_000)
    monkeypatch.setattr(requests.Response, "content", property(lambda _: pytest.fail("the whole body was read")))
    peer.status, huge = status, b"[" + b" " * 1_000_000 + b"]"
    peer.answer = gzip.compress(huge) if packed else huge
    peer.headers = {"Content-Encoding": "gzip"} if packed else {}
    peer.headers["Location"] = "http://elsewhere.invalid/"
    found = refused(["verify", "--url", peer.url, "--key", str(files / "key")], capsys)
    assert ("the reply is packed (gzip)" if packed else "longer than 100000 bytes") in found


def test_a_packed_answer_that_is_damaged_is_no_verdict(peer: Peer, files: Path, capsys: Any) -> None:
    peer.answer, peer.headers = b"no gzip", {"Content-Encoding": "gzip"}
    refused(["verify", "--url", peer.url, "--key", str(files / "key")], capsys)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("2", 2),
        ("[[[2]]]", 2),
        ("[0.1, 0.5, 0.5]", 1),
        ("[0, 3, 1e300, 2]", 2),
        ("[1" + "0" * 400 + ", 0.5]", 0),
        ("4", -1),
        ("-1", -1),
        ("[0, 0, 0, 0, 1]", -1),
        ("1" + "0" * 400, -1),
        ("2.0", None),
        ("true", None),
        ("[true, false]", None),
        ("[NaN, 1]", None),
        ("[Infinity, 1]", None),
        ("[]", None),
        ("[[], []]", None),
        ('"2"', None),
        ("null", None),
        ("{}", None),
    ],
)
def test_what_a_foreign_answer_means(peer: Peer, value: str, label: int | None) -> None:
    peer.answer = f'{{"label": {value}}}'.encode()
    client = HttpClient(peer.url, patience=0)
    suspect = HttpOracle(client, classes=4, shape=(1, 8, 8), budget=2, answer_field="label")
    assert isinstance(suspect, Oracle)
    if label is None:
        with pytest.raises(InputError, match="neither a label nor a list of scores"):
            suspect.query(IMAGES[:1])
        return
    wanted = torch.zeros(2, 4)
    if label >= 0:
        wanted[:, label] = 1
    assert torch.equal(suspect.query(IMAGES[:2]), wanted)
    assert (suspect.asked, suspect.remaining, peer.asked) == (2, 0, 2)
    with pytest.raises(BudgetExhausted, match="0 of 2 remain"):
        suspect.query(IMAGES[:1])
    assert peer.asked == 2


def test_a_label_of_no_class_is_an_answer_that_is_not_the_keys(peer: Peer, files: Path, capsys: Any) -> None:
    peer.answer = b'{"label": 999}'
    assert main(["verify", "--url", peer.url, "--key", str(files / "key"), "--answer-field", "label"]) == 1
    assert "0 of 11 answers" in capsys.readouterr().out


def test_the_whole_key_may_be_asked_at_a_url_and_single_samples_of_a_file(peer: Peer, files: Path, capsys: Any) -> None:
    peer.answer = b'{"label": 1}'
    foreign = ["verify", "--url", peer.url, "--key", str(files / "key"), "--answer-field", "label", "--test", "wsr"]
    share = int((predict_labels(MODEL, IMAGES) == 1).sum()) / 60
    assert main([*foreign, "--threshold", "0.999"]) == 1
    assert f"WSR {share:.4f}" in capsys.readouterr().out
    assert peer.asked == 60
    assert "60 images asked, 3 of 3 remain" in refused([*foreign, "--max-queries", "3"], capsys)
    file = ["verify", str(files / "model"), "--key", str(files / "key"), "--test", "wsr_sequential"]
    assert main([*file, "--seed", "4"]) == 0
    assert "5 of 5 answers are the key's" in (out := capsys.readouterr().out)
    assert "(seed 4)" in out
    assert main([*file, "--max-queries", "3"]) == 1
    assert "more queries are needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--test", "wsrr"], ["'wsrr'", "did you mean 'wsr'", "wsr_sequential"]),
        (["--alpha", "0.1"], ["--alpha goes with --url"]),
        (["--test", "wsr", "--alpha", "0.1"], ["wsr", "alpha", "no such setting"]),
        (["--test", "wsr_sequential", "--token", "t"], ["--token goes with --url"]),
        (["--test", "wsr_sequential", "--threshold", "0"], ["benign_wsr", "greater than 0"]),
        (["--test", "wsr_sequential", "--stolen-wsr", "0.1"], ["not above"]),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    files: Path, options: list[str], words: list[str], capsys: Any
) -> None:
    line = refused(["verify", str(files / "model"), "--key", str(files / "key"), *options], capsys)
    assert all(word in line for word in words), line


def test_the_threshold_is_p0_of_the_sequential_test_and_p1_follows() -> None:
    assert make_test("wsr", {"threshold": 0.6, "alpha": None}).params() == {"threshold": 0.6}
    assert make_test("wsr_sequential", {"threshold": 0.6}).params() == {
        "benign_wsr": 0.6,
        "stolen_wsr": 0.8,
        "alpha": 0.05,
        "beta": 0.05,
    }


def test_a_crash_is_no_verdict(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def crash(*_: object) -> None:
        raise MemoryError("too\nmuch")

    monkeypatch.setattr("simulator.ownership.suspect.suspect_of", crash)
    assert main(["verify", str(files / "model"), "--key", str(files / "key")]) == 2
    assert "could not be judged: MemoryError: too much" in capsys.readouterr().err


def test_a_model_in_memory_gives_one_hot_rows_while_its_budget_lasts() -> None:
    suspect = suspect_of(MODEL, 3)
    assert torch.equal(suspect.query(IMAGES[:3]).argmax(1), predict_labels(MODEL, IMAGES[:3]))
    with pytest.raises(BudgetExhausted):
        suspect.query(IMAGES[:1])


def test_a_key_of_another_size_names_its_file(peer: Peer, tmp_path: Path) -> None:
    save_key(KeySamples(IMAGES[..., 1:], torch.zeros(60, dtype=torch.int64), 4), tmp_path / "narrow")
    with pytest.raises(InputError, match=r"narrow: the key's images are \(1, 8, 7\) of 4 classes"):
        verify_url(peer.url, tmp_path / "narrow", token="t")
    assert peer.asked == 0
