"""``exsim serve``: a victim behind Ray Serve's HTTP proxy, its accounts in a directory that survives it.

    DIR/ledger/ledger.log    the durable query account (knows hashes of tokens only)
    DIR/tokens.json          the accounts' tokens, mode 0600; may be moved elsewhere once they are handed out
    DIR/models/ID            what is served; DIR/logs/ is Ray's

Started again on the same DIR, the accounts go on with what they have left.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.cluster import connected, here
from actors.devices import Placement
from actors.http import HttpVictim
from actors.http_body import MAX_BODY
from actors.ledger import LedgerActor
from actors.stores import ShelfActor
from actors.victim import MAX_ONGOING
from simulator.answers import check_labels
from simulator.errors import InputError
from simulator.files import Folder, write_atomically
from simulator.http_oracle import HttpClient, ModelInfo
from simulator.ledger import Ledger, Terms, digest_of, hash_token
from simulator.models import load_model
from simulator.service import MAX_BATCH

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: seconds in which a request has to be answered
REQUEST_SECONDS = 120.0
#: seconds in which the door has to open
OPEN_SECONDS = 120.0


@dataclass(frozen=True)
class Offer:
    """What is served, to whom, and where it is kept.

    Attributes:
        victim: id of the model: a digest of its file.
        model: what clients are told.
        architecture: for the person who serves it.
        terms: of every account.
        tokens: of the accounts whose tokens lie in the directory.
        fresh: whether the tokens were made now.
    """

    directory: Path
    victim: str
    architecture: str
    model: ModelInfo
    terms: Mapping[str, Terms]
    tokens: Mapping[str, str]
    fresh: bool

    @property
    def ledger(self) -> Path:
        """The account log."""
        return self.directory / "ledger" / "ledger.log"

    @property
    def tokens_file(self) -> Path:
        """Where the tokens lie."""
        return self.directory / "tokens.json"


def account_names(count: int | None, names: Sequence[str]) -> list[str]:
    """The accounts that are asked for: ``account-1`` to ``account-K``, or the names.

    Raises:
        InputError: both, a count below 1, a name twice, or one that is none.
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


def prepare(file: Path, directory: Path | None, labels: str, budget: int, names: Sequence[str]) -> Offer:
    """Reads the model, and opens the accounts in the directory, or finds them open on the same terms.

    Raises:
        InputError: the model cannot be served, or the directory's accounts were opened on other terms.
    """
    try:
        check_labels(labels)
    except InputError as error:
        raise InputError(f"--labels: {error}") from None
    if budget < 1:
        raise InputError(f"--budget {budget}: at least 1")
    spec = load_model(file)[0].spec
    data = file.read_bytes()
    victim = f"model-{digest_of(data)[:12]}"
    directory = directory or Path("runs") / f"serve_{victim}"
    info = ModelInfo(
        shape=(spec.channels, spec.size, spec.size),
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
                token_hash = ledger.terms(name).token_hash  # its token was moved elsewhere, and is still good
            else:
                token_hash = hash_token(tokens.setdefault(name, secrets.token_urlsafe(32)))
            terms[name] = Terms(victim, labels, budget, token_hash)
            if name in opened and ledger.terms(name) != terms[name]:
                raise InputError(f"{directory}: {_other_terms(name, ledger.terms(name), terms[name])}")
        if tokens != known:
            # before the ledger knows them: an account whose token was never written would be lost
            text = json.dumps(tokens, indent=2) + "\n"
            write_atomically(directory / "tokens.json", text.encode(), mode=0o600)
        for name in names:
            ledger.open(name, terms[name])
    finally:
        ledger.close()
    mine = {name: token for name, token in tokens.items() if name in terms}
    return Offer(directory, victim, spec.architecture, info, terms, mine, tokens != known)


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
    return f"account {name} was opened there on other terms ({found or 'another token'}); take another --dir or account"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of the directory: two ledgers over one log would not be exact.

    Raises:
        InputError: another process serves from it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{directory}: another exsim serve works there; stop it or take another --dir") from None
        yield
    finally:
        os.close(handle)


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Serve would share a busy port with another Serve, and the clients of the one would reach the other.

    Raises:
        InputError: the port is busy, or the host is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # what a closed server leaves waiting is no hindrance
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def opened(offer: Offer, host: str, port: int, *, address: str | None = None, replicas: int = 1) -> Iterator[str]:
    """Serves inside the block; yields the door's URL.

    Raises:
        InputError: the port is busy, no cluster answers, or it runs Serve already, whose proxy cannot be set up anew.
    """
    if not address:
        port = free_port(host, port)
    with connected(address, offer.directory / "logs"):
        _refuse_running_serve()
        pinned: dict[str, Any] = {"scheduling_strategy": here()}
        ledger = LedgerActor.options(**pinned).remote(str(offer.ledger), True)
        shelf = ShelfActor.options(**pinned).remote(str(offer.directory))
        try:
            _deploy(offer, ledger, shelf, host, port, replicas)
            url = f"http://{_reachable(host)}:{port}"
            HttpClient(url, patience=OPEN_SECONDS).send("GET", "/healthz")
            yield url
        finally:
            serve.shutdown()
            for actor in (ledger, shelf):
                ray.kill(actor)


def _refuse_running_serve() -> None:
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise InputError(
            "Ray Serve runs on this cluster already, and its HTTP proxy cannot be set up anew: "
            "stop it (serve shutdown), or leave out --address"
        )


def _deploy(
    offer: Offer, ledger: ActorHandle[Any], shelf: ActorHandle[Any], host: str, port: int, replicas: int
) -> None:
    gpu = ray.cluster_resources().get("GPU", 0) >= replicas
    placement = Placement(gpu, 1.0)
    logging: Any = {"enable_access_log": False, "log_level": "WARNING"}
    options = {"host": host, "port": port, "request_timeout_s": REQUEST_SECONDS}
    deployment: Any = serve.deployment(
        serve.ingress()(HttpVictim),
        name="door",
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options=placement.options(),
        logging_config=logging,
    )
    accounts = {terms.token_hash: name for name, terms in offer.terms.items()}
    application = deployment.bind(ledger, shelf, placement, offer.model.model_dump(mode="json"), accounts)
    try:
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logging)
        serve.run(application, name="exsim-serve", route_prefix="/")
    except (RayError, RuntimeError) as error:
        raise InputError(f"Ray Serve could not open the door: {' '.join(str(error).split())[-300:]}") from None


def _reachable(host: str) -> str:
    """An address of this machine under which a host to listen on is reached."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
