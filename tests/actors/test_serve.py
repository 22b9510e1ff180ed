"""``exsim serve``: its directory of accounts, what it refuses, and a model that is served and asked."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from actors.serving import SHARED, account_names, held, port_for_serve, prepare
from simulator.cli import main
from simulator.errors import InputError
from simulator.models import load_model, save_model
from simulator.service.http import connect
from simulator.service.ledger import digest_of
from simulator.service.oracle import BudgetExhausted
from simulator.training.predict import predict
from tests.actors.door import IMAGES, MODEL

ROOT = Path(__file__).parents[2]


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
        (["--model", "missing"], "missing: cannot be read"),
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


@pytest.mark.skipif(not SHARED, reason="Serve does not share ports here")
def test_a_free_port_is_serves_alone_until_it_opens() -> None:
    """Others cannot take it; who binds it as Serve does gets every connection."""
    with port_for_serve("127.0.0.1", 0) as port, port_for_serve("127.0.0.1", 0) as other:
        assert port != other
        for options in ([], [socket.SO_REUSEADDR]):
            with pytest.raises(OSError, match="in use"):
                listening(port, *options)
        with pytest.raises(InputError, match=f"--port {port}: .*in use"), port_for_serve("127.0.0.1", port):
            pass
        with listening(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT) as server:
            server.settimeout(10)
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port), timeout=10):
                    server.accept()[0].close()
    with listening(other):
        pass


def test_a_named_port_is_left_to_serve_once_it_was_found_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(0) as server:
        busy = server.getsockname()[1]
        with pytest.raises(InputError, match="in use"), port_for_serve("127.0.0.1", busy):
            pass
    with port_for_serve("127.0.0.1", busy) as port, listening(port):
        assert port == busy
    monkeypatch.setattr("actors.serving.SHARED", False)
    with port_for_serve("127.0.0.1", 0) as port, listening(port):
        assert port > 0


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
    assert (again.remaining, again.tokens, again.fresh) == ({"account-1": 6}, {"account-1": token}, frozenset())
