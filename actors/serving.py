"""``exsim serve``: a victim behind Ray Serve's HTTP proxy, and its accounts in a directory that outlives it.

    DIR/ledger/ledger.log    the durable query account (knows hashes of tokens only)
    DIR/tokens.json          the accounts' tokens, mode 0600; may be moved elsewhere once they are handed out
    DIR/models/ID            the model that is served; DIR/logs/ is Ray's

A server that is started again on the same DIR finds every account with the budget that it had left.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from actors.cluster import connected, here
from actors.devices import Placement
from actors.http import HttpVictim
from actors.http_body import MAX_BODY
from actors.ledger import LedgerActor
from actors.replica import MAX_ONGOING
from actors.stores import ShelfActor
from simulator.errors import InputError
from simulator.files import LOCK, Folder, locked, write_atomically
from simulator.models import load_model
from simulator.models.classifier import ModelSpec
from simulator.service.answers import check_labels, most_kept
from simulator.service.http import HttpClient, ModelInfo
from simulator.service.ledger import Ledger, Terms, digest_of, hash_token
from simulator.service.query import MAX_BATCH

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: the entries of DIR that an earlier server may have left, however it ended; "lock" is an older name of the lock
OURS = {LOCK, "lock", "logs", "models", "ledger", "tokens.json"}
#: seconds in which a request has to be answered
REQUEST_SECONDS = 120.0
#: seconds in which the door has to open
OPEN_SECONDS = 120.0
#: whether Serve's proxy can bind a port that a socket of ours, which does not listen, has bound already
SHARED = sys.platform == "linux" and os.environ.get("SERVE_SOCKET_REUSE_PORT_ENABLED", "1") == "1"


@dataclass(frozen=True)
class Offer:
    """A model, the accounts it is served to, and the directory that keeps both.

    Attributes:
        victim: id of the model: a digest of its file.
        model: the description of the model that clients may read.
        architecture: name of the model's architecture; clients do not see it.
        terms: the terms of every account.
        remaining: images that every account has left.
        tokens: the accounts' tokens, without those that were moved out of the directory.
        fresh: the accounts whose tokens were made now.
    """

    directory: Path
    victim: str
    architecture: str
    model: ModelInfo
    terms: Mapping[str, Terms]
    remaining: Mapping[str, int]
    tokens: Mapping[str, str]
    fresh: frozenset[str]

    @property
    def ledger(self) -> Path:
        """The account log."""
        return self.directory / "ledger" / "ledger.log"

    @property
    def tokens_file(self) -> Path:
        """The file of tokens."""
        return self.directory / "tokens.json"

    def lines(self, url: str) -> list[str]:
        """The lines that the server prints at its start. A token is printed only when it is new."""
        channels, height, width = self.model.shape
        return [
            f"serving {self.victim} ({self.architecture}, images ({channels}, {height}, {width}), "
            f"{self.model.classes} classes) with {self.model.labels} answers at {url}",
            *(self._line(name) for name in self.terms),
            f"tokens: {self.tokens_file} (readable by you alone)   ledger: {self.ledger}   schema: {url}/openapi.json",
            "Ctrl-C ends it; the same --dir goes on with the same accounts",
        ]

    def _line(self, name: str) -> str:
        left, budget = self.remaining[name], self.terms[name].budget
        token = f", token {self.tokens[name]}" if name in self.fresh else ""
        return f"{name}: {left} of {budget} images left{token}"


def account_names(count: int | None, names: Sequence[str]) -> list[str]:
    """The names of the accounts: ``account-1`` to ``account-K`` for a count K, or ``names`` as they are given.

    Raises:
        InputError: both are given, the count is below 1, or a name is given twice or has other characters.
    """
    if count is not None and names:
        raise InputError("--accounts makes accounts by number and --account by name; give one of them")
    if count is not None and count < 1:
        raise InputError(f"--accounts {count}: at least 1")
    for name in names:
        if not NAME.fullmatch(name):
            raise InputError(f"--account {name!r}: allowed: letters, digits, '_', '.' and '-', 64 at most")
        if names.count(name) > 1:
            raise InputError(f"--account {name} is given twice")
    return list(names) or [f"account-{number}" for number in range(1, (count or 1) + 1)]


@contextmanager
def served(
    file: Path,
    *,
    budget: int,
    labels: str = "soft",
    names: Sequence[str] = ("account-1",),
    directory: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
) -> Iterator[tuple[Offer, str]]:
    """Serves the model in ``file`` inside the block; yields the offer and the door's URL.

    Raises:
        InputError: the file, a setting, the directory, the port or the cluster cannot be used.
    """
    try:
        check_labels(labels)
    except InputError as error:
        raise InputError(f"--labels: {error}") from None
    if budget < 1:
        raise InputError(f"--budget {budget}: at least 1")
    spec = load_model(file)[0].spec
    if most_kept(labels) > spec.classes:
        raise InputError(f"--labels {labels}: allowed: top-1 to top-{spec.classes}, as the model has so many classes")
    data = file.read_bytes()
    victim = f"model-{digest_of(data)[:12]}"
    directory = directory or Path("runs") / f"serve_{victim}"
    with nullcontext(port) if address else port_for_serve(host, port) as number, held(directory):
        offer = prepare(data, victim, spec, directory, labels, budget, names)
        with opened(offer, host, number, address) as url:
            yield offer, url


def prepare(
    data: bytes, victim: str, spec: ModelSpec, directory: Path, labels: str, budget: int, names: Sequence[str]
) -> Offer:
    """Writes the model into the directory and opens the accounts there. An account may be open on the same terms.

    Raises:
        InputError: an account was opened on other terms, or the directory cannot be written.
    """
    info = ModelInfo(
        shape=[spec.channels, spec.size, spec.size],
        classes=spec.classes,
        labels=labels,
        max_batch=MAX_BATCH,
        max_bytes=MAX_BODY,
    )
    try:
        Folder(directory / "models").write(victim, data)
        (directory / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    known = _tokens(directory / "tokens.json")
    terms, tokens = {}, dict(known)
    ledger = Ledger(directory / "ledger" / "ledger.log", sync=True)
    try:
        opened = set(ledger.all_spent())
        for name in names:
            if name in opened and name not in tokens:
                token_hash = ledger.terms(name).token_hash  # its token was moved elsewhere and stays valid
            else:
                token_hash = hash_token(tokens.setdefault(name, secrets.token_hex(24)))
            terms[name] = Terms(victim, labels, budget, token_hash)
            if name in opened and ledger.terms(name) != terms[name]:
                raise InputError(f"{directory}: {_other_terms(name, ledger.terms(name), terms[name])}")
        if tokens != known:
            # before the accounts are opened: without its token an account would be lost
            text = json.dumps(tokens, indent=2) + "\n"
            write_atomically(directory / "tokens.json", text.encode(), mode=0o600)
        remaining = {name: ledger.open(name, terms[name]) for name in names}
    finally:
        ledger.close()
    mine = {name: token for name, token in tokens.items() if name in terms}
    fresh = frozenset(mine.keys() - known.keys())
    return Offer(directory, victim, spec.architecture, info, terms, remaining, mine, fresh)


def _tokens(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        tokens = json.loads(file.read_bytes())
    except (OSError, ValueError):
        tokens = None
    if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()):
        raise InputError(f"{file}: not a JSON object of account names and tokens")
    return tokens


def _other_terms(name: str, old: Terms, new: Terms) -> str:
    found = "; ".join(
        f"{field} {getattr(old, field)}, not {getattr(new, field)}"
        for field in ("victim", "labels", "budget")
        if getattr(old, field) != getattr(new, field)
    )
    # without --dir the directory is always the same one: to type another budget must not make a new account
    return (
        f"account {name} was opened there with {found or 'another token'}, and an account keeps its terms; "
        f"ask for those to go on with it, or open another with --account NAME or --dir DIR"
    )


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory, or takes one that an earlier server left. Other processes are kept out, because a log has
    one ledger.

    Raises:
        InputError: another process works there, or the directory holds something else, such as a run, whose accounts
            must not be sold.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = {entry.name for entry in directory.iterdir()}
            if "config.yaml" in found or (found - OURS and not (directory / "ledger" / "ledger.log").exists()):
                raise InputError(f"--dir {directory}: holds something else; allowed: an empty or an earlier one")
            stack.enter_context(locked(directory))
        except OSError as error:
            raise InputError(f"--dir {directory}: cannot be written: {error.strerror}") from None
        yield


@contextmanager
def port_for_serve(host: str, port: int) -> Iterator[int]:
    """The port if it is free, or for 0 a free one, which is held inside the block.

    Serve would share a busy port with another Serve, and the clients of the one would reach the other. A held port is
    bound, and nobody listens at it: the processes that Ray starts first cannot take it, and Serve can, because both
    sockets have SO_REUSEPORT. Where Serve does not set that, nothing is held.

    Raises:
        InputError: the port is busy, or the host is none of this machine's.
    """
    with ExitStack() as stack:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            hold = SHARED and port == 0
            # SO_REUSEADDR, as what a closed server leaves waiting is no hindrance; others could take a held port by it
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if hold else socket.SO_REUSEADDR, 1)
            held.bind((host, port))
            port = int(held.getsockname()[1])
            if not hold:
                held.listen()
                held.close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
        yield port


@contextmanager
def opened(offer: Offer, host: str, port: int, address: str | None) -> Iterator[str]:
    """Opens the door inside the block; yields its URL.

    Raises:
        InputError: no cluster answers, or the cluster runs Serve already, with a proxy that cannot be changed.
    """
    with connected(address, offer.directory / "logs"):
        _refuse_running_serve()
        borrowed = bool(address or os.environ.get("RAY_ADDRESS"))
        pinned: dict[str, Any] = {"scheduling_strategy": here()}
        ledger: Any = LedgerActor.options(**pinned).remote(str(offer.ledger.resolve()), True)
        shelf: Any = ShelfActor.options(**pinned).remote(str(offer.directory.resolve()))
        try:
            _deploy(offer, ledger, shelf, host, port)
            url = f"http://{_reachable(host)}:{port}"
            HttpClient(url, patience=OPEN_SECONDS).send("GET", "/healthz")
            yield url
        finally:
            if borrowed:  # a local cluster ends by itself, with all actors
                serve.shutdown()  # type: ignore[no-untyped-call]
                for actor in (ledger, shelf):
                    ray.kill(actor)


def wait_for_the_end() -> None:
    """Waits for SIGINT (Ctrl-C) or SIGTERM. Both raise KeyboardInterrupt here."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    while True:
        time.sleep(3600)


def _refuse_running_serve() -> None:
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise InputError(
            "Ray Serve runs on this cluster already, and its HTTP proxy cannot be set up anew: "
            "stop it (serve shutdown), or leave out --address"
        )


def _deploy(offer: Offer, ledger: ActorHandle[Any], shelf: ActorHandle[Any], host: str, port: int) -> None:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    placement = Placement(resources.get("GPU", 0) >= 1, 1.0)
    logging: Any = {"enable_access_log": False, "log_level": "WARNING"}
    options = {"host": host, "port": port, "request_timeout_s": REQUEST_SECONDS}
    deployment: Any = serve.deployment(
        serve.ingress()(HttpVictim),
        name="door",
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options=placement.options(),
        logging_config=logging,
    )
    accounts = {terms.token_hash: name for name, terms in offer.terms.items()}
    application = deployment.bind(ledger, shelf, placement, offer.model.model_dump(mode="json"), accounts)
    try:
        # on a busy machine Serve gives up a proxy that starts slowly, and starts another one: opened() waits for that
        with suppress(RayActorError, TimeoutError):
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logging)
        serve.run(application, name="exsim-serve", route_prefix="/")
    except (RayError, RuntimeError, TimeoutError) as error:
        raise InputError(f"Ray Serve could not open the door: {' '.join(str(error).split())[-300:]}") from None


def _reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``: 127.0.0.1 for 0.0.0.0."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
