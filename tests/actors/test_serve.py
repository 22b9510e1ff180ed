"""``exsim serve``: its directory of accounts, what it refuses, and a model that is served and asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
import torch
from ray import serve

from actors import accounts
from actors.http_server import bound
from actors.serving import Offer, Post, account_names, held, prepare, served
from simulator.cli import main
from simulator.errors import InputError
from simulator.models import load_model, save_model
from simulator.ownership.key import KeySamples, save_key
from simulator.ownership.suspect import verify_file, verify_url
from simulator.service.http import connect
from simulator.service.ledger import Ledger, Terms, digest_of, hash_token
from simulator.service.oracle import BudgetExhausted
from simulator.training.predict import predict
from tests.actors.door import IMAGES, MODEL

ROOT = Path(__file__).parents[2]


def offer(folder: Path, names: list[str], budget: int = 9, labels: str = "soft", tokens: Path | None = None) -> Offer:
    return prepare(b"model", "model-1", MODEL.spec, folder, labels, budget, names, tokens)


def find(folder: Path, token: str, names: tuple[str, ...] = ("ann", "bob", "cid")) -> str | None:
    found = accounts.Accounts(folder, names).find(token)
    return found[0] if found else None


def test_the_directory_keeps_hashes_and_balances(tmp_path: Path) -> None:
    first = offer(tmp_path, ["ann", "bob"])
    assert set(first.fresh) == {"ann", "bob"}
    assert first.remaining == {"ann": 9, "bob": 9}
    again = offer(tmp_path, ["ann", "cid"])
    assert set(again.fresh) == {"cid"}
    assert any("token " + again.fresh["cid"] in line for line in again.lines("http://x"))
    assert again.terms["ann"] == first.terms["ann"]
    tokens = {**first.fresh, **again.fresh}
    assert {name: find(tmp_path, token) for name, token in tokens.items()} == {name: name for name in tokens}
    assert find(tmp_path, first.fresh["bob"], ("ann",)) is None  # not served this time
    assert find(tmp_path, "guess") is None
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written for token in tokens.values() if token.encode() in file.read_bytes()]
    assert (tmp_path / "accounts.json").stat().st_mode & 0o077 == 0


def test_what_the_ledger_is_told_for_an_account_opens_nothing_at_the_door(tmp_path: Path) -> None:
    token = offer(tmp_path, ["ann"]).fresh["ann"]
    door = accounts.Accounts(tmp_path, ["ann"])
    found = door.find(token)
    assert found is not None
    name, secret = found
    ledger = Ledger(tmp_path / "ledger" / "ledger.log")
    assert ledger.reserve(name, secret, 1, 2, "digest").remaining == 7
    ledger.close()
    assert door.find(secret) is None


def test_new_tokens_go_where_the_owner_says(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "tokens.json"
    made = offer(tmp_path / "dir", ["ann"], tokens=file)
    assert json.loads(file.read_bytes()) == made.fresh
    assert file.stat().st_mode & 0o077 == 0
    assert not [line for line in made.lines("http://x") if made.fresh["ann"] in line]
    with pytest.raises(InputError, match="is there already"):
        offer(tmp_path / "dir", ["bob"], tokens=file)
    assert set(accounts.read(tmp_path / "dir")) == {"ann"}


def test_a_directory_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its tokens were in clear in tokens.json, and the ledger knows them."""
    (tmp_path / "tokens.json").write_text(json.dumps({"ann": "a's", "bob": "b's"}))
    ledger = Ledger(tmp_path / "ledger" / "ledger.log")
    ledger.open("ann", Terms("model-1", "soft", 9, hash_token("a's")))
    ledger.reserve("ann", "a's", 1, 2, "digest")
    ledger.close()
    later = offer(tmp_path, ["ann", "bob"])
    assert (later.remaining, later.fresh) == ({"ann": 7, "bob": 9}, {})
    assert any("holds tokens in clear" in line for line in later.lines("http://x"))
    (tmp_path / "tokens.json").rename(tmp_path / "away")
    assert (find(tmp_path, "a's"), find(tmp_path, "b's")) == ("ann", "bob")
    assert offer(tmp_path, ["ann"]).remaining == {"ann": 7}
    with pytest.raises(InputError, match="put tokens"):
        accounts.rotate(tmp_path, "ann")
    (tmp_path / "away").rename(tmp_path / "tokens.json")
    token = accounts.rotate(tmp_path, "ann")
    assert (find(tmp_path, "a's"), find(tmp_path, token)) == (None, "ann")
    found = accounts.Accounts(tmp_path, ["ann"]).find(token)
    assert found == ("ann", "a's")  # which opens nothing any more, and the ledger knows


def test_a_token_is_replaced_and_taken_back_while_the_door_is_open(tmp_path: Path, capsys: Any) -> None:
    first = offer(tmp_path, ["ann", "bob"]).fresh
    door = accounts.Accounts(tmp_path, ["ann", "bob"])
    assert door.find(first["ann"])
    where = ["serve", "tokens"]
    assert main([*where, "rotate", "--dir", str(tmp_path), "ann"]) == 0
    token = capsys.readouterr().out.split()[-1]
    assert door.find(first["ann"]) is None
    assert (door.find(token) or ("",))[0] == "ann"
    assert main([*where, "revoke", "--dir", str(tmp_path), "bob"]) == 0
    assert door.find(first["bob"]) is None
    capsys.readouterr()
    assert main([*where, "list", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == f"ann: open, SHA-256 {hash_token(token)[:12]}...\nbob: revoked\n"
    assert set(offer(tmp_path, ["ann", "bob"]).fresh) == set()  # a new start opens nothing that was taken back
    assert door.find(first["bob"]) is None
    assert (door.find(accounts.rotate(tmp_path, "bob")) or ("",))[0] == "bob"
    for wrong, word in (
        (["rotate", "--dir", str(tmp_path), "eve"], "no account 'eve'; there are: ann, bob"),
        (["list", "--dir", str(tmp_path / "none")], "no directory of an exsim serve"),
    ):
        assert main([*where, *wrong]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"ann": {"opens": "x", "secret": null}}', "[" * 100_000, "\x00"])
def test_where_the_accounts_cannot_be_read_nobody_gets_in(text: str, tmp_path: Path) -> None:
    token = offer(tmp_path, ["ann"]).fresh["ann"]
    door = accounts.Accounts(tmp_path, ["ann"])
    assert door.find(token)
    (tmp_path / "accounts.json").write_text(text)
    assert door.find(token) is None
    with pytest.raises(InputError, match=r"accounts\.json"):
        accounts.read(tmp_path)
    (tmp_path / "accounts.json").unlink()
    assert door.find(token) is None


@pytest.mark.parametrize(
    ("change", "word"), [({"budget": 10}, "budget 9, not 10"), ({"labels": "hard"}, "labels soft, not hard")]
)
def test_an_account_keeps_its_terms(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    offer(tmp_path, ["ann"])
    with pytest.raises(InputError, match=word):
        offer(tmp_path, ["ann"], **change)


def test_one_process_at_a_time_serves_from_a_directory(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(InputError, match="in use by another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


@pytest.mark.parametrize("found", ["notes.txt", "run"])
def test_what_is_no_earlier_serves_directory_is_left_alone(found: str, tmp_path: Path) -> None:
    """A run's has a ledger, too, on which another's accounts would be opened."""
    (tmp_path / "ledger").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    if found == "run":
        (tmp_path / "ledger" / "ledger.log").touch()
        (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match="holds something else"), held(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


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
        (["--model", "missing"], "missing: no such file"),
        (["--model", "text"], "not a safetensors file"),
        (["--budget", "0"], "--budget 0"),
        (["--labels", "sofft"], "--labels: 'sofft' is not one of"),
        (["--labels", "top-0"], "--labels"),
        (["--labels", "top-11"], "top-1 to top-10"),
        (["--accounts", "0"], "--accounts 0"),
        (["--accounts", "2", "--account", "ann"], "one of them"),
        (["--account", "ann", "--account", "ann"], "twice"),
        (["--account", "../ann"], "'../ann'"),
        (["--port", "70000"], "70000"),
        (["--port", "BUSY"], "in use"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--dir", "text"], "text"),
        (["--control-port", "BUSY"], "--control-port"),
        (["--tls-cert", "text"], "go together"),
        (["--drain", "-1"], "--drain"),
        (["--evasion", "filter:transform=bluur"], "did you mean 'blur'?"),
        (["--evasion", "outliers"], "--evasion-images"),
        (["--evasion-images", "digits"], "goes with --evasion"),
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


def listening(port: int, *options: int) -> socket.socket:
    server = socket.socket()
    for option in options:
        server.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        server.bind(("127.0.0.1", port))
        server.listen()
    except OSError:
        server.close()
        raise
    return server


def test_a_held_port_is_nobody_elses() -> None:
    with bound("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
            with pytest.raises(OSError, match="in use"):
                listening(port, *options)
        with pytest.raises(InputError, match=f"--port {port}: .*in use"):
            bound("127.0.0.1", port)


@pytest.mark.ray
def test_the_door_stands_beside_what_else_serve_does_on_a_cluster(ray_session: None, folder: Path) -> None:
    serve.start(proxy_location="Disabled")
    post = Post(port=0, control=0, drain=5)
    with served(folder / "model", budget=9, directory=folder / "dir", post=post) as (offered, url):
        token = offered.fresh["account-1"]
        oracle = connect(url, token)
        assert torch.equal(oracle.query(IMAGES[:4]), predict(MODEL, IMAGES[:4]))
        accounts.revoke(folder / "dir", "account-1")
        with pytest.raises(InputError, match="status 401"):
            oracle.query(IMAGES[4:5])
        fresh = connect(url, accounts.rotate(folder / "dir", "account-1"))
        assert torch.equal(fresh.query(IMAGES[4:9]), predict(MODEL, IMAGES[4:9]))
        fresh.budget = 10
        with pytest.raises(BudgetExhausted, match="0 of 9 remain"):
            fresh.query(IMAGES[9:10])
    assert not [name for name in serve.status().applications if name.startswith("exsim-serve")]


@pytest.mark.ray
def test_an_ownership_test_meets_the_evasion_of_a_served_model(ray_session: None, folder: Path) -> None:
    post, hidden = Post(port=0, control=0, drain=5), "filter:transform=quantise,transform.levels=2"
    levels = ((IMAGES >= 128).float() + 0.5) / 2
    key = KeySamples(IMAGES[:200], predict(MODEL, levels[:200]).argmax(1), 10, {"filter": "none"})
    save_key(key, folder / "key")
    found = {}
    for name, evasion in (("open", None), ("hidden", hidden)):
        where = folder / name
        with served(folder / "model", budget=200, directory=where, post=post, evasion=evasion) as (offered, url):
            token = offered.fresh["account-1"]
            found[name] = verify_url(url, folder / "key", "wsr", {}, token=token)[0].statistic
    assert found["hidden"] == 1.0
    assert found["open"] == verify_file(folder / "model", folder / "key")[0].statistic < 1.0


#: as a terminal starts it: a shell's background job, which tests may be, has SIGINT ignored
AS_FROM_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('simulator', run_name='__main__', alter_sys=True)"
)


def listeners(parent: int) -> dict[str, list[int]]:
    """The ports at which a process and all that it has started listen, by address: "lo" is 127.0.0.1."""
    family, inodes = [parent], set()
    for pid in family:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            family += [int(child) for child in task.read_text().split()]
        inodes |= {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    table = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    found: dict[str, list[int]] = {}
    for row in table:
        if row[3] == "0A" and f"socket:[{row[9]}]" in inodes:
            address, port = row[1].split(":")
            loopback = address in ("0100007F", "0000000000000000FFFF00000100007F")  # as IPv4, and inside of IPv6
            found.setdefault("lo" if loopback else address, []).append(int(port, 16))
    return found


def refusal_of_a_replica(port: int) -> grpc.StatusCode:
    """How a replica of Serve's answers somebody without Ray's token at its gRPC port."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=60)
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.mark.slow
def test_a_model_is_served_asked_and_ended_and_its_balance_is_kept(folder: Path) -> None:
    """In a Ray of its own, which listens on localhost and asks for its token."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    del environment["RAY_AUTH_MODE"]
    command = [sys.executable, "-W", "ignore", "-c", AS_FROM_A_TERMINAL, "serve", "--model", "model", "--budget", "10"]
    command += ["--port", "0", "--dir", "kept"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        said = [process.stdout.readline() for _ in range(5)]  # type: ignore[union-attr]
        found = re.search(r"http://127\.0\.0\.1:\d+", said[0])
        assert found, [*said, *process.communicate(timeout=60)]
        url, token = found[0], said[1].split()[-1]
        assert said[1].split() == f"account-1: 10 of 10 images left, token {token}".split()
        found_at = listeners(process.pid)
        assert len(found_at.pop("lo")) > 5  # the door's, and Ray's
        # Serve binds the port at which replicas are asked to every address, and has no setting for it
        [[port]] = found_at.values()
        assert refusal_of_a_replica(port) is grpc.StatusCode.UNAUTHENTICATED
        assert (folder / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
        oracle = connect(url, token)
        rows = oracle.query(IMAGES[:4])
        assert torch.equal(rows, predict(load_model(folder / "model")[0], IMAGES[:4]))
        oracle.budget = 100
        with pytest.raises(BudgetExhausted, match="6 of 10 remain"):
            oracle.query(IMAGES[:20])
        assert requests.get(url + "/v1/account", timeout=60).status_code == 401
        with pytest.raises(InputError, match="in use by another process"), held(folder / "kept"):
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
    assert (again.remaining, again.fresh) == ({"account-1": 6}, {})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve --model model --budget 9 --port 0 --dir out", "run tiny.yaml --out out"])
def test_sigterm_at_the_start_is_one_line(command: str, folder: Path, tiny_config: Path) -> None:
    """While Ray starts, the signal is Ray's own handler's."""
    shutil.copy(tiny_config, folder / "tiny.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-W", "ignore", "-m", "simulator", *command.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not children(process.pid):  # Ray's first process
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.terminate()
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err.splitlines()[-1:]) == (130, ["interrupted"]), out + err
        assert len(err.splitlines()) == 1, err
    finally:
        process.kill()
        process.communicate()


def children(parent: int) -> list[str]:
    """What a process has started."""
    return [pid for task in Path(f"/proc/{parent}/task").glob("*/children") for pid in task.read_text().split()]
