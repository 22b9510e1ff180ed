"""A door that is open in this process: what the tests of the HTTP door, its clients and ``exsim serve`` share."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import requests
import torch
import uvicorn

from actors.devices import Placement
from actors.http import Door, build_app
from actors.http_body import MAX_BODY
from actors.http_gate import Gate, Limits
from actors.http_server import Server, bound, control_app
from actors.ledger import LedgerService
from actors.replica import Replica
from actors.stores import Shelf
from simulator.models import build, save_model
from simulator.seeding import generator_for
from simulator.service.http import ModelInfo
from simulator.service.ledger import Terms, hash_token
from simulator.service.query import MAX_BATCH

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
    accounts: dict[str, str]
    gate: Gate
    control: str

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


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address at which an application is served over real HTTP, by a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([port],))
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@contextmanager
def open_door(folder: Path, limits: Limits | None = None) -> Iterator[Site]:
    """The door in front of :data:`MODEL`, with its ledger in a folder, on the server that ``exsim serve`` uses."""
    save_model(MODEL, folder / "models" / "v.safetensors")
    ledger = LedgerService(str(folder / "ledger.log"), False)
    victim = Replica(Here(ledger), Here(Shelf(str(folder))), Placement(False, 0.5))  # type: ignore[arg-type]
    info = ModelInfo(shape=[1, 8, 8], classes=10, labels="soft", max_batch=MAX_BATCH, max_bytes=MAX_BODY)
    accounts: dict[str, str] = {}

    def find(token: str) -> tuple[str, str] | None:
        name = accounts.get(hash_token(token))
        return None if name is None else (name, token)

    door = Door(victim.answer_with_grants, Here(ledger), info, find)
    app, limits = build_app(door), limits or Limits()
    gate = Gate(app, limits, door.find)
    place, control = bound("127.0.0.1", 0), bound("127.0.0.1", 0)
    server = Server(gate, place, most=limits.connections)
    beside = Server(control_app(gate, app.state.intake, server), control)
    urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (place, control)]
    try:
        yield Site(urls[0], ledger, accounts, gate, urls[1])
    finally:
        server.close()
        beside.close()
