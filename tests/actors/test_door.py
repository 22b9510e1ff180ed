"""The door's limits, over real connections: clients that are slow, many, greedy or ambiguous, and the door's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from actors import http_body, http_gate, http_server
from actors.http_body import MAX_JSON, PredictRequest, Refusal, refuse_bombs
from actors.http_gate import BUCKETS, Buckets, Gate, Intake, Limits
from actors.http_server import Server, bound, serving
from simulator.errors import InputError
from tests.actors.door import GOOD, Site, npy, open_door

PREDICT = "POST /v1/predict HTTP/1.1\r\nHost: door\r\nContent-Type: application/octet-stream\r\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A door of its own for each test, because limits are counted."""
    with open_door(tmp_path) as site:
        yield site


@contextlib.contextmanager
def limited(folder: Path, **limits: Any) -> Iterator[Site]:
    with open_door(folder, Limits(**limits)) as site:
        yield site


def raw(site: Site, data: str | bytes = b"") -> socket.socket:
    """A connection on which this was sent."""
    host, port = site.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(data.encode("latin-1") if isinstance(data, str) else data)
    return client


def replied(client: socket.socket) -> bytes:
    """All that comes until the door ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            found += part
    return found


def unfinished(token: str) -> str:
    """The head of a query with a body that never ends, and its first chunk."""
    return f"{PREDICT}Authorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n"


def cut_off(client: socket.socket, data: bytes) -> bool:
    """Whether the door has ended a connection, on which this is sent now."""
    try:
        client.sendall(data)
    except ConnectionError:
        return True
    return False


def open_at(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- slow and many ---------------------------------------------------------------------------------------------------


def test_unfinished_bodies_of_one_account_leave_the_others_served(site: Site) -> None:
    """300 of them ended the service for everybody: the account's places were counted after its bodies were read."""
    greedy, other = site.open(), site.open()
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(raw(site, unfinished(greedy)))
        until(lambda: site.gate.replies[429] == 300 - 16)
        assert requests.get(site.url + "/healthz", timeout=10).json() == {"status": "ok"}
        assert site.ask(other).status_code == 200
        refused = site.ask(greedy)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "16 of this account" in refused.json()["detail"]
    until(lambda: site.gate.under_way == 0)
    assert site.ask(greedy).status_code == 200


def test_a_slow_body_is_given_up_and_charges_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_gate, "BODY_SECONDS", 0.3)
    monkeypatch.setitem(http_server.SECONDS, "head", 0.5)
    token = site.open()
    with raw(site, unfinished(token)) as client:
        assert replied(client).startswith(b"HTTP/1.1 408 ")  # and the connection was ended
    until(lambda: site.gate.under_way == 0)
    assert site.spent(token) == 0
    assert site.ask(token).status_code == 200


def test_a_body_may_take_as_long_as_it_is_large(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    monkeypatch.setattr(http_gate, "BODY_SECONDS", 2.0)
    monkeypatch.setattr(http_gate, "BODY_RATE", 100)
    token, body = site.open(), npy(GOOD)
    with raw(site, f"{PREDICT}Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n") as client:
        for start in range(0, len(body), 100):
            client.sendall(body[start : start + 100])
            time.sleep(0.7)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("start", ["", "GET /healthz HTTP/1.1\r\nX-Slow: "], ids=["silent", "half a head"])
def test_a_head_that_does_not_come_ends_the_connection(start: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(http_server.SECONDS, "head", 0.5)
    with raw(site, start) as client:
        assert replied(client) == b""


def test_a_client_that_drips_its_head_is_cut_off_all_the_same(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(http_server.SECONDS, "head", 0.5)
    with raw(site, "GET /healthz HTTP/1.1\r\nX-Slow: ") as client:
        until(lambda: cut_off(client, b"a"))


def test_a_head_without_end_is_refused(site: Site) -> None:
    with raw(site, "GET /healthz HTTP/1.1\r\nX-Long: " + "a" * (17 << 10)) as client:
        assert replied(client).startswith(b"HTTP/1.1 400 ")


def test_who_does_not_take_a_reply_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(http_server.SECONDS, "reply", 0.5)

    async def huge(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"50000000")]})
        await send({"type": "http.response.body", "body": bytes(50_000_000)})

    place = bound("127.0.0.1", 0)
    server = Server(huge, place)
    with socket.create_connection(place.getsockname(), timeout=30) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: door\r\n\r\n")
        until(lambda: server.connections == 1)
        until(lambda: server.connections == 0)
        assert len(replied(client)) < 50_000_000
    server.close()


def test_a_body_in_chunks_of_one_byte_is_cut_off(site: Site) -> None:
    """A byte of it takes the parser hundreds of times the CPU of a byte in a larger chunk."""
    with raw(site, unfinished(site.open())) as client:
        until(lambda: cut_off(client, b"1\r\na\r\n" * 10_000))
    token, body = site.open(), npy(np.repeat(GOOD, 200, 0))
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    for size in (100, 10_000):
        chunks = (body[start : start + size] for start in range(0, len(body), size))
        assert requests.post(site.url + "/v1/predict", chunks, headers=headers, timeout=30).status_code in (200, 429)
    assert site.spent(token) == 800


def test_a_collection_of_garbage_while_it_is_parsed_ends_no_request(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(0, 5)  # five seconds of CPU between any two looks
    token = site.open()
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    assert site.ask(token).status_code == 200


def test_what_follows_a_refusal_is_read_for_a_while_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REST", 1 << 20)
    with raw(site, unfinished("guess")) as client:
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
        until(lambda: cut_off(client, b"10000\r\n" + b" " * 0x10000 + b"\r\n"))


def test_one_connection_too_many_is_cut_off(tmp_path: Path) -> None:
    with limited(tmp_path, connections=3) as site, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw(site)) for _ in range(3)]
        until(lambda: "exsim_door_connections 3" in requests.get(site.control + "/metrics", timeout=30).text)
        with raw(site) as client:
            assert replied(client) == b""
        assert requests.get(site.control + "/healthz", timeout=30).text == "ok"  # apart from the public port
        clients[0].close()
        until(lambda: "exsim_door_connections 2" in requests.get(site.control + "/metrics", timeout=30).text)
        assert requests.get(site.url + "/healthz", timeout=30).status_code == 200


# -- greedy ----------------------------------------------------------------------------------------------------------


def test_the_room_for_bodies_is_limited_and_given_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_gate, "ACCOUNT_ROOM", 1000)
    token, other = site.open(), site.open()
    full = site.ask(token, np.repeat(GOOD, 10, 0))
    assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
    assert site.ask(token).status_code == site.ask(other).status_code == 200
    monkeypatch.setattr(http_gate, "ROOM", 1000)
    with raw(site, unfinished(token).replace("4\r\nabcd", "320\r\n" + "a" * 800)):
        until(lambda: "exsim_door_body_bytes 800" in requests.get(site.control + "/metrics", timeout=30).text)
        assert site.ask(other).status_code == 503
    until(lambda: site.gate.under_way == 0)
    assert site.ask(other).status_code == 200


@pytest.mark.parametrize("size", [MAX_JSON + 1, 100 << 20])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_and_not_kept(site: Site, size: int, chunked: bool) -> None:
    token = site.open()
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = f"{PREDICT}Authorization: Bearer {token}\r\n{how}\r\n\r\n".replace("octet-stream", "json")
    with raw(site, head) as client:
        if chunked:
            with contextlib.suppress(ConnectionError):
                for _ in range(size // (1 << 20) + 1):
                    client.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    until(lambda: site.gate.under_way == 0)
    assert "exsim_door_body_bytes 0" in requests.get(site.control + "/metrics", timeout=30).text


BOMBS = {
    "tiny images": b'{"images":[' + b",".join([b"[[[0]]]"] * 400_000) + b"]}",
    "empty lists": b'{"images":[' + b",".join([b"[]"] * 1_000_000) + b"]}",
    "nested": b'{"images":' + b"[" * 2_000_000,
    "numbers": b'{"images":[[[[' + b",".join([b"0"] * 2_000_000) + b"]]]]}",
    "fields": b"{" + b",".join(b'"%d":1' % number for number in range(300_000)) + b"}",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS.keys())
def test_json_that_no_query_has_is_refused_before_it_is_parsed(
    site: Site, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million images of one pixel held the service for 8.5 s, uncharged."""
    monkeypatch.setattr(PredictRequest, "model_validate_json", lambda _: pytest.fail("it was parsed"))
    token = site.open()
    reply = site.ask(token, body, Content_Type="application/json")
    assert (reply.status_code, "body: more " in reply.json()["detail"]) == (422, True)
    assert site.spent(token) == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("count", [1, 3, 4096])
def test_a_query_is_no_bomb(shape: tuple[int, int, int], count: int) -> None:
    body = json.dumps({"images": np.zeros((count, *shape), int).tolist(), "dtype": "uint8", "key": "[,:" * 80})
    refuse_bombs(body.encode(), shape, 4096)
    with pytest.raises(Refusal, match="more lists"):
        refuse_bombs(body.replace("0", "[0]").encode() * 2, shape, 4096)


# -- rates and places ------------------------------------------------------------------------------------------------


def test_a_bucket_gives_its_rate_and_a_seconds_worth_at_once() -> None:
    now = 0.0
    buckets = Buckets(4, lambda: now)
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert buckets.take("b") == 0
    now = 0.25
    assert (buckets.take("a"), buckets.take("a")) == (0, 0.25)
    now = 1000.0
    assert [bool(buckets.take("a")) for _ in range(5)] == [False] * 4 + [True]
    slow = Buckets(0.1, lambda: now)
    assert (slow.take("a"), slow.take("a")) == (0, 10)
    assert not any(Buckets(0, lambda: now).take("a") for _ in range(1000))
    for number in range(2 * BUCKETS):
        buckets.take(number)
    assert len(buckets._levels) == BUCKETS


def test_an_account_and_an_address_have_a_rate(tmp_path: Path) -> None:
    with limited(tmp_path / "account", account_rate=0.01) as site:
        token = site.open()
        assert site.ask(token).status_code == 200
        refused = site.ask(token)
        assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")
        assert 90 <= int(refused.headers["Retry-After"]) <= 100
        assert site.ask(site.open()).status_code == 200
        assert site.spent(token) == 4
    with limited(tmp_path / "address", address_rate=0.01, proxy="127.0.0.1") as site:
        for address, status in (
            ("192.0.2.1", 401),
            ("192.0.2.1", 429),
            ("192.0.2.1, 192.0.2.2", 401),  # the proxy adds the last
            ("2001:db8::1", 401),
            ("2001:db8::ffff:2", 429),  # of one owner's 2^64
            ("2001:db8:0:1::1", 401),
            ("::ffff:192.0.2.1", 429),
            ("nonsense", 401),
        ):
            assert site.ask(None, X_Forwarded_For=address).status_code == status, address
        assert requests.get(site.url + "/healthz", timeout=30).status_code == 200


def test_only_the_proxy_may_say_who_asks(tmp_path: Path) -> None:
    with limited(tmp_path, address_rate=0.01) as site:
        codes = [site.ask(None, X_Forwarded_For=f"192.0.2.{number}").status_code for number in range(2)]
    assert codes == [401, 429]


def test_an_address_has_places_too(tmp_path: Path) -> None:
    with limited(tmp_path, address_parallel=3) as site, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(raw(site, unfinished(site.open())))
        until(lambda: site.gate.under_way == 3)
        assert "3 of this address" in site.ask(site.open()).json()["detail"]


# -- ambiguous -------------------------------------------------------------------------------------------------------

LENGTHS = "Content-Length: 4\r\n"
AMBIGUOUS = {
    "length and chunks": f"{LENGTHS}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": f"{LENGTHS}Content-Length: 5\r\n\r\nabcd",
    "a length with a sign": "Content-Length: +4\r\n\r\nabcd",
    "chunks by another name": "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks twice": "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two encodings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded header": "X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n",
    "two tokens": "Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
    "two keys": "Idempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n",
    "two hosts": "Host: other\r\n\r\n",
    "a NUL": "X-A: \0\r\n\r\n",
    "a bad chunk": "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_a_request_that_can_be_read_in_two_ways_smuggles_nothing(site: Site, head: str) -> None:
    """It gets an error, and what follows it on the connection is no request with an answer."""
    token = site.open()
    prefix = PREDICT if "Authorization" in head else f"{PREDICT}Authorization: Bearer {token}\r\n"
    smuggled = "GET /healthz HTTP/1.1\r\nHost: door\r\nConnection: close\r\n\r\n"
    with raw(site, prefix + head + smuggled) as client:
        found = replied(client)
    status = int(found.split()[1])
    assert 400 <= status < 500 or status == 501, found
    assert b'{"status":"ok"}' not in found or found.count(b"HTTP/1.1") == 2
    assert site.spent(token) == 0


# -- what a reply says -----------------------------------------------------------------------------------------------


def test_every_reply_has_the_headers_and_none_answers_other_sites(site: Site) -> None:
    token, origin = site.open(budget=4), {"Origin": "https://elsewhere.example"}
    replies = [
        site.ask(token, **origin),
        site.ask(token, GOOD[:3], **origin),
        site.ask("guess", **origin),
        site.ask(token, b"x", **origin),
        *(requests.get(site.url + path, headers=origin, timeout=30) for path in ("/healthz", "/openapi.json", "/no")),
        requests.options(site.url + "/v1/predict", headers=origin, timeout=30),
    ]
    assert [reply.status_code for reply in replies] == [200, 429, 401, 422, 200, 200, 404, 405]
    for reply in replies:
        assert {name.decode(): value.decode() for name, value in http_gate.HEADERS}.items() <= reply.headers.items()
        assert not [name for name in reply.headers if name.lower().startswith("access-control") or name == "server"]
    for path in ("/docs", "/redoc"):
        assert requests.get(site.url + path, timeout=30).status_code == 404


def test_the_owner_sees_how_the_door_is(site: Site) -> None:
    site.ask(site.open())
    site.ask("guess")
    found = requests.get(site.control + "/metrics", timeout=30)
    assert found.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in (
        'exsim_door_replies_total{status="200"} 1',
        'exsim_door_replies_total{status="401"} 1',
        "exsim_door_requests_under_way 0",
        "exsim_door_body_bytes 0",
    ):
        assert line in found.text.splitlines()
    assert requests.get(site.url + "/metrics", timeout=30).status_code == 404


# -- the end ---------------------------------------------------------------------------------------------------------


def test_at_the_end_what_is_under_way_is_answered_and_the_rest_is_told_to_come_again() -> None:
    begun, go = threading.Event(), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        while not go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    gate, place = Gate(app, Limits(), lambda _: None), bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    with ThreadPoolExecutor(2) as threads:
        with contextlib.ExitStack() as stack:
            stack.enter_context(serving(gate, Intake(), place, None, most=9, tls=None, drain=60))
            slow = threads.submit(requests.get, url, timeout=60)
            assert begun.wait(30)
            ending = threads.submit(stack.pop_all().close)
            until(lambda: gate.draining)
            for path in ("/", "/healthz"):
                told = requests.get(url + path, timeout=30)
                assert (told.status_code, told.headers["Retry-After"]) == (503, "5")
            assert not ending.done()
            go.set()
            ending.result(timeout=30)
        assert slow.result().text == "late"
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


# -- TLS and a proxy -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


def test_the_door_speaks_tls(certificate: tuple[Path, Path]) -> None:
    gate, place = Gate(hello, Limits(), lambda _: None, tls=True), bound("127.0.0.1", 0)
    where = f"127.0.0.1:{place.getsockname()[1]}"
    with serving(gate, Intake(), place, None, most=9, tls=certificate, drain=0):
        found = requests.get(f"https://{where}/", verify=str(certificate[0]), timeout=30)
        assert (found.text, found.headers["Strict-Transport-Security"]) == ("https", "max-age=31536000")


def test_a_certificate_that_cannot_be_used_is_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    for files in ((tmp_path / "missing", certificate[1]), (certificate[1], certificate[0])):
        with bound("127.0.0.1", 0) as place, pytest.raises(InputError, match="--tls-cert") as caught:
            Server(hello, place, tls=files)
        assert "\n" not in str(caught.value)


def nginx_of_the_docs(folder: Path, port: int, door: str, certificate: tuple[Path, Path]) -> Path:
    """The example of docs/http.md, with this test's ports and files."""
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    server = text.split("```nginx\n")[1].split("```")[0]
    for old, new in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("/etc/ssl/door.pem", str(certificate[0])),
        ("/etc/ssl/door.key", str(certificate[1])),
        ("http://127.0.0.1:8000", door),
    ):
        assert old in server
        server = server.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = folder / "nginx.conf"
    file.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off;\n{temporary}{server} }}\n"
    )
    return file


def test_the_door_stands_behind_nginx_as_the_docs_say(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx")
    with limited(tmp_path / "door", address_rate=0.01, proxy="127.0.0.1") as site:
        with bound("127.0.0.1", 0) as place:
            port = place.getsockname()[1]
        file = nginx_of_the_docs(tmp_path, port, site.url, certificate)
        process = subprocess.Popen([nginx, "-p", str(tmp_path), "-c", str(file)])
        try:
            url = f"https://127.0.0.1:{port}"
            until(lambda: open_at(port))
            headers = {"Authorization": f"Bearer {site.open()}", "Content-Type": "application/octet-stream"}
            ask = {"data": npy(GOOD), "verify": str(certificate[0]), "timeout": 30}
            spoofed = {**headers, "X-Forwarded-For": "192.0.2.1"}
            first = requests.post(url + "/v1/predict", headers=spoofed, **ask)
            assert (first.status_code, first.json()["remaining"]) == (200, 996), first.text
            # the address is nginx's word, whatever the client says
            spoofed["X-Forwarded-For"] = "192.0.2.2"
            assert requests.post(url + "/v1/predict", headers=spoofed, **ask).status_code == 429
            ask["data"] = b"\0" * (17 << 20)
            assert requests.post(url + "/v1/predict", headers=headers, **ask).status_code == 413
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_the_limits_of_the_docs_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    for said in (
        f"{http_body.MAX_BODY >> 20} MiB",
        f"{MAX_JSON >> 20} MiB as JSON",
        f"{http_gate.ROOM >> 20} MiB",
        f"{http_gate.ACCOUNT_ROOM >> 20} MiB of one account",
        f"{http_gate.BODY_SECONDS:g} s",
        f"{http_gate.BODY_RATE >> 10} KiB/s",
        f"{http_server.HEAD >> 10} KiB",
    ):
        assert said in text, said
