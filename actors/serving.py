"""``exsim serve``: a victim behind HTTP, and its accounts in a directory that outlives it.

    DIR/ledger/ledger.log    the durable query account (knows hashes only)
    DIR/accounts.json        hashes of the accounts' tokens, mode 0600 (:mod:`actors.accounts`)
    DIR/models/ID            the model that is served; DIR/logs/ is Ray's

A server that is started again on the same DIR finds every account with the budget that it had left. The victim is the
Serve deployment that a run asks, too. The door stands before it, in this process (:mod:`actors.http_server`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from actors import accounts
from actors.cluster import connected, here
from actors.devices import Placement
from actors.http import REQUEST_SECONDS, Door, build_app
from actors.http_body import MAX_BODY
from actors.http_gate import Gate, Limits
from actors.http_server import bound, serving
from actors.ledger import LedgerActor
from actors.replica import Replica, deploy
from actors.stores import ShelfActor
from actors.transport import direct
from simulator.errors import InputError
from simulator.experiment.guarding import read_hiding
from simulator.files import LOCK, Folder, locked, write_atomically
from simulator.models import load_model
from simulator.models.classifier import ModelSpec
from simulator.service.answers import check_labels, most_kept
from simulator.service.http import ModelInfo
from simulator.service.ledger import Grant, Ledger, Terms, digest_of, hash_token
from simulator.service.query import MAX_BATCH, MAX_BYTES, Query
from simulator.service.victim import Hide
from simulator.service.visit import Answer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: the entries of DIR that an earlier server may have left, however it ended; "lock" is an older name of the lock
OURS = {LOCK, "lock", "logs", "models", "ledger", accounts.FILE, accounts.OLD_FILE, accounts.LOCK}


@dataclass(frozen=True)
class Post:
    """Where the door stands, and how.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        control: port of 127.0.0.1 for ``/healthz`` and ``/metrics``; None for none.
        tls: files of the certificate and its key; None without TLS.
        limits: see :class:`~actors.http_gate.Limits`.
        drain: seconds in which what is under way may end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    control: int | None = None
    tls: tuple[Path, Path] | None = None
    limits: Limits = field(default_factory=Limits)
    drain: float = REQUEST_SECONDS


@dataclass(frozen=True)
class Offer:
    """A model, the accounts it is served to, and the directory that keeps both.

    Attributes:
        victim: id of the model: a digest of its file.
        model: the description of the model that clients may read.
        architecture: name of the model's architecture; clients do not see it.
        terms: the terms of every account.
        remaining: images that every account has left.
        fresh: the tokens that were made now.
        stored: the file that they were written to; None where they are shown.
    """

    directory: Path
    victim: str
    architecture: str
    model: ModelInfo
    terms: Mapping[str, Terms]
    remaining: Mapping[str, int]
    fresh: Mapping[str, str]
    stored: Path | None = None

    @property
    def ledger(self) -> Path:
        """The account log."""
        return self.directory / "ledger" / "ledger.log"

    def lines(self, url: str) -> list[str]:
        """The lines that the server prints at its start. A token is printed only when it is new."""
        channels, height, width = self.model.shape
        return [
            f"serving {self.victim} ({self.architecture}, images ({channels}, {height}, {width}), "
            f"{self.model.classes} classes) with {self.model.labels} answers at {url}",
            *(self._line(name) for name in self.terms),
            *self._about_tokens(),
            f"ledger: {self.ledger}   schema: {url}/openapi.json",
            "Ctrl-C ends it; the same --dir goes on with the same accounts",
        ]

    def _about_tokens(self) -> Iterator[str]:
        if self.fresh:
            how = f"are in {self.stored} (readable by you alone)" if self.stored else "are shown this once"
            yield f"new tokens {how}; only their hashes are kept"
        if (old := self.directory / accounts.OLD_FILE).exists():
            yield f"{old} is of an older version and holds tokens in clear: move it to a safe place"

    def _line(self, name: str) -> str:
        left, budget = self.remaining[name], self.terms[name].budget
        token = f", token {self.fresh[name]}" if name in self.fresh and not self.stored else ""
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
    tokens: Path | None = None,
    address: str | None = None,
    post: Post | None = None,
    evasion: str | None = None,
    evasion_images: str | None = None,
) -> Iterator[tuple[Offer, str]]:
    """Serves the model in ``file`` inside the block; yields the offer and the door's URL.

    Args:
        tokens: file for the new tokens, in clear; None where the caller shows them.
        evasion, evasion_images: the model answers through an evasion (see
            :func:`simulator.experiment.guarding.read_hiding`).

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
    data, post = file.read_bytes(), post or Post()
    victim = f"model-{digest_of(data)[:12]}"
    hide = None if evasion is None else read_hiding(evasion, evasion_images, spec, victim)
    directory = directory or Path("runs") / f"serve_{victim}"
    with ExitStack() as stack:
        place = stack.enter_context(bound(post.host, post.port))
        control = None
        if post.control is not None:
            control = stack.enter_context(bound("127.0.0.1", post.control, "--control-port"))
        stack.enter_context(held(directory))
        offer = prepare(data, victim, spec, directory, labels, budget, names, tokens)
        ask, ledger = stack.enter_context(_service(offer, address, hide))
        door = Door(ask, ledger, offer.model, accounts.Accounts(directory, list(offer.terms)).find)
        app = build_app(door)
        gate = Gate(app, post.limits, door.find, tls=post.tls is not None)
        most = post.limits.connections
        open_door = serving(gate, app.state.intake, place, control, most=most, tls=post.tls, drain=post.drain)
        stack.enter_context(open_door)
        scheme = "https" if post.tls else "http"
        yield offer, f"{scheme}://{_reachable(post.host)}:{place.getsockname()[1]}"


def prepare(
    data: bytes,
    victim: str,
    spec: ModelSpec,
    directory: Path,
    labels: str,
    budget: int,
    names: Sequence[str],
    tokens: Path | None = None,
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
    terms, fresh = {}, {}
    ledger = Ledger(directory / "ledger" / "ledger.log", sync=True)
    try:
        with accounts.changing(directory) as entries:
            opened = set(ledger.all_spent())
            for name in names:
                if name in opened:
                    known = ledger.terms(name).token_hash
                    entries.setdefault(name, accounts.Entry(opens=known, secret=None))  # tokens.json was moved away
                elif name in entries and entries[name].secret is None and entries[name].opens:
                    known = str(entries[name].opens)  # in tokens.json, and its opening was cut short
                else:
                    fresh[name], entries[name] = accounts.new()
                    known = hash_token(str(entries[name].secret))
                terms[name] = Terms(victim, labels, budget, known)
                if name in opened and ledger.terms(name) != terms[name]:
                    raise InputError(f"{directory}: {_other_terms(name, ledger.terms(name), terms[name])}")
            if fresh and tokens is not None:
                _store(tokens, fresh)
        remaining = {name: ledger.open(name, terms[name]) for name in names}
    finally:
        ledger.close()
    return Offer(directory, victim, spec.architecture, info, terms, remaining, fresh, tokens)


def _store(file: Path, fresh: Mapping[str, str]) -> None:
    """Writes new tokens to the owner's file, which must not be there: it may hold others."""
    if file.exists():
        raise InputError(f"--tokens {file}: is there already; new tokens would replace what it holds")
    try:
        write_atomically(file, (json.dumps(dict(fresh), indent=2) + "\n").encode(), mode=0o600)
    except OSError as error:
        raise InputError(f"--tokens {file}: cannot be written: {error.strerror}") from None


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
def _service(offer: Offer, address: str | None, hide: Hide | None) -> Iterator[tuple[Any, Any]]:
    """The victim and its ledger as actors, inside the block; yields how it is asked, and the ledger's handle.

    Raises:
        InputError: no cluster answers, or it cannot start the service.
    """
    borrowed = bool(address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())
    with connected(address, offer.directory / "logs"):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        pinned: dict[str, Any] = {"scheduling_strategy": here()}
        ledger: Any = LedgerActor.options(**pinned).remote(str(offer.ledger.resolve()), True)
        shelf: Any = ShelfActor.options(**pinned).remote(str(offer.directory.resolve()))
        name = f"exsim-serve-{digest_of(str(offer.directory.resolve()).encode())[:12]}"
        try:
            handle = deploy(name, ledger, shelf, Placement(resources.get("GPU", 0) >= 1, 1.0), hide=hide)
            yield _asker(handle), ledger
        except (RayError, RuntimeError, TimeoutError) as error:
            raise InputError(f"Ray Serve could not open the door: {' '.join(str(error).split())[-300:]}") from None
        finally:
            if borrowed:  # a local cluster ends by itself, with all actors
                serve.delete(name)
                for actor in (ledger, shelf):
                    ray.kill(actor)


def _asker(handle: DeploymentHandle[Replica]) -> Any:
    """The door's way to the replicas: by value, where a message is small enough for that."""
    small = direct(handle)

    async def ask(queries: Sequence[Query]) -> Sequence[tuple[Answer, Grant | None]]:
        bytes_ = sum(query.images.nbytes for query in queries)
        method: Any = (small if bytes_ <= MAX_BYTES else handle).answer_with_grants
        answers: Awaitable[Sequence[tuple[Answer, Grant | None]]] = method.remote(list(queries))
        return await answers

    return ask


def wait_for_the_end() -> None:
    """Waits for SIGINT (Ctrl-C) or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


def _reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``: 127.0.0.1 for 0.0.0.0."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
