"""``exsim verify --url`` at a suspect that does not want to be verified: never a verdict, never a crash, never without
end, and nothing of what it says moves the terminal's cursor."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from simulator.cli import main
from simulator.models import build, save_model
from simulator.ownership import suspect
from simulator.ownership.key import KeySamples, save_key
from simulator.seeding import generator_for
from simulator.service.http import HttpClient, Unreachable
from simulator.tensorfile import read_tensors, write_tensors

JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def answering(reply: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that takes a request and then does what ``reply`` does."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                while b"\r\n\r\n" not in client.recv(1 << 16):
                    pass
                reply(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def whole(body: bytes, head: bytes = JSON) -> Callable[[socket.socket], None]:
    return lambda client: client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def drip(start: bytes) -> Callable[[socket.socket], None]:
    """A byte at a time, each long before any timeout of the socket."""

    def reply(client: socket.socket) -> None:
        client.sendall(start)
        while True:
            client.sendall(b" ")
            time.sleep(0.05)

    return reply


def flood(client: socket.socket) -> None:
    client.sendall(JSON + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


BOMB = gzip.compress(b"[" + b" " * (1 << 28) + b"]")
INFO = {"shape": [1, 8, 8], "labels": "soft", "max_batch": 9, "max_bytes": 9}

HOSTILE: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "nested": (whole(b"[" * 100_000), "nested too deeply"),
    "nested in a refusal": (whole(b"[" * 100_000, b"HTTP/1.1 400 No\r\n"), "refused with status 400"),
    "a gzip bomb": (whole(BOMB, JSON + b"Content-Encoding: gzip\r\n"), "packed (gzip)"),
    "a flood": (flood, "longer than"),
    "a head without end": (drip(b"HTTP/1.1 200 OK\r\nX-A: "), "took longer than 1 s"),
    "a body without end": (drip(JSON + b"Content-Length: 100000\r\n\r\n"), "took longer than 1 s"),
    "chunks without end": (drip(JSON + b"Transfer-Encoding: chunked\r\n\r\n"), "took longer than 1 s"),
    "escapes": (whole(b'{"detail": "\\u001b[2J\\u001b]0;owned\\u0007\\u202e"}', b"HTTP/1.1 400 No\r\n"), "\\x1b[2J"),
    "raw escapes": (whole(b"\x1b[2J\x9b31m", b"HTTP/1.1 400 No\r\n"), "\\x1b[2J"),
    "a long number": (whole(b"9" * 100_000), "no JSON"),
    "classes without end": (whole(json.dumps({**INFO, "classes": 10**15}).encode()), "classes"),
    "a list of lists": (whole(b"[" + b"[]," * 300_000 + b"[]]"), "not an answer of a door"),
    "not HTTP": (lambda client: client.sendall(b"\0" * 1000), "not reachable"),
    "a redirect": (whole(b"", b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n"), "status 302"),
    "nothing": (lambda _: None, "not reachable"),
}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    save_key(
        KeySamples(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64), 10), tmp_path / "k"
    )
    return tmp_path / "k"


@pytest.mark.parametrize("foreign", [False, True], ids=["door", "foreign"])
@pytest.mark.parametrize(("reply", "word"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_suspect_ends_in_one_line_and_no_verdict(
    reply: Any, word: str, foreign: bool, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(suspect, "REPLY_SECONDS", 1.0)
    monkeypatch.setattr(suspect, "PATIENCE", 0.0)
    with answering(reply) as url:
        status = main(["verify", "--url", url, "--key", str(key), *(["--answer-field", "label"] if foreign else [])])
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err[:-1].isprintable()
    assert foreign or word in err


def test_a_gzip_bomb_takes_no_memory() -> None:
    assert len(BOMB) < 1 << 19
    with answering(whole(BOMB, JSON + b"Content-Encoding: gzip\r\n")) as url:
        tracemalloc.start()
        with pytest.raises(Unreachable, match="packed"):
            HttpClient(url, patience=0).send("GET", "/v1/model")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_client_that_is_told_when_to_come_again_does() -> None:
    seen: list[float] = []

    def reply(client: socket.socket) -> None:
        seen.append(time.monotonic())
        head = b"HTTP/1.1 429 No\r\nRetry-After: 1\r\nConnection: close\r\n" if len(seen) == 1 else JSON
        whole(b'{"detail": "too many"}', head)(client)

    with answering(reply) as url:
        assert HttpClient(url, patience=10).send("GET", "/") == {"detail": "too many"}
    assert len(seen) == 2
    assert seen[1] - seen[0] >= 1


@pytest.mark.parametrize("info", ["nested", "escapes", "markup"])
def test_a_keys_metadata_may_say_what_it_likes(info: str, key: Path, tmp_path: Path, capsys: Any) -> None:
    """Nested JSON ended in a crash and exit status 1, which means "not verified"."""
    save_model(build("naivenet", channels=1, size=8, classes=10, generator=generator_for("v")), tmp_path / "m")
    tensors, metadata = read_tensors(key)
    header = json.loads(metadata["exsim"])
    if info == "nested":
        text = (
            metadata["exsim"]
            .replace('"info": {', '"info": {"a": ' + "[" * 90_000 + "]" * 90_000 + ", ")
            .replace(", }", "}")
        )
    else:
        victim = "\x1b[2J\x9b31m\u202e" if info == "escapes" else "[bold]x[/bold][link=http://192.0.2.1]y[/link]"
        header["info"] = {"victim": victim}
        text = json.dumps(header)
    write_tensors(key, tensors, {"exsim": text})
    status = main(["verify", str(tmp_path / "m"), "--key", str(key)])
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), out + err
    assert err[:-1].isprintable()
