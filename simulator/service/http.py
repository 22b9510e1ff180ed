"""The client of a victim behind HTTP, for any attack and for verification.

The server is ``exsim serve`` (docs/http.md). Client and server share the messages below:

    GET  /v1/model      -> ModelInfo         GET /v1/account -> AccountInfo
    POST /v1/predict    -> Prediction        images as a .npy file, ``Idempotency-Key`` names the query in the ledger

Every error is a :class:`Problem` (RFC 9457). A query whose answer was lost on the way is sent again under its key, free
of charge.
"""

from __future__ import annotations

import io
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import requests
import urllib3
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simulator.component import describe
from simulator.errors import InputError
from simulator.service.oracle import BudgetExhausted, ServiceOracle
from simulator.service.query import Query

#: seconds to wait for a connection, and for an answer
TIMEOUT = (10.0, 120.0)


#: seconds that a client goes on asking for a lost answer
PATIENCE = 60.0


#: seconds from the sending of a request to the last byte of its reply: ``TIMEOUT`` begins anew with every byte
LIMIT = 180.0


#: bytes of a reply at most; the largest answer of a door (see ``MAX_BYTES`` in query.py) is a third of it as JSON
LARGEST_REPLY = 64 << 20


#: seconds that a client waits before it asks again at most, whatever the server says
LONGEST_PAUSE = 30.0


#: statuses that the door sends while its service is being started again
UNAVAILABLE = (502, 503, 504)


NPY = "application/octet-stream"


class ModelInfo(BaseModel):
    """The description of a model that its clients may read."""

    model_config = ConfigDict(title="Model")

    # a list, because FastAPI's schema of a tuple is not allowed in OpenAPI 3.1
    shape: list[int] = Field(min_length=3, max_length=3, description="(C, H, W) of one image")
    classes: int = Field(ge=2, description="K, the length of an answer row")
    labels: str = Field(description="answer mode: soft, hard, top-K, round-D, ...")
    max_batch: int = Field(ge=1, description="images in one query at most")
    max_bytes: int = Field(ge=1, description="bytes in one request's body at most")


class AccountInfo(BaseModel):
    """An account's balance, in images."""

    model_config = ConfigDict(title="Account")

    account: str
    budget: int = Field(ge=1)
    spent: int = Field(ge=0)
    remaining: int = Field(ge=0)


class Prediction(BaseModel):
    """The answer to one query."""

    model_config = ConfigDict(title="Prediction")

    key: str = Field(description="under which the ledger keeps the query; the same images under it again are free")
    charged: int = Field(ge=0, description="images charged now; 0 where the key had paid already")
    remaining: int = Field(ge=0, description="images that the account may still ask")
    probabilities: list[list[float]] = Field(description="(B, K) rows that sum to one, in the account's answer mode")


class Problem(BaseModel):
    """The description of an error (RFC 9457, application/problem+json)."""

    model_config = ConfigDict(title="Problem")

    type: str = "about:blank"
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    asked: int | None = Field(None, description="images that were refused (429)")
    remaining: int | None = Field(None, description="images that the account may still ask (429)")
    budget: int | None = Field(None, description="of the account, in images (429)")


class Unreachable(InputError):
    """Nothing answers at the address, or something that is no door."""


class _Bearer(requests.auth.AuthBase):
    """Adds the token to a request. It is no plain header, because a ~/.netrc would replace that."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _Session(requests.Session):
    """Sees no redirect in any reply: to find the next address, requests would read the whole body, however long."""

    def get_redirect_target(self, resp: Any) -> None:
        return None


class HttpClient:
    """Sends requests to one address. A request that got no answer is sent again; every failure is told in one line.

    Args:
        url: ``http://`` or ``https://`` and a host; for a door of ``exsim serve`` without a path.
        token: the bearer token, or None.
        patience: seconds for which a request without an answer is sent again.
        limit: seconds that one reply may take to its last byte.
        largest: bytes of a reply at most.

    Raises:
        InputError: the address or the token cannot be sent.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        patience: float = PATIENCE,
        *,
        limit: float = LIMIT,
        largest: int = LARGEST_REPLY,
    ) -> None:
        self.url, self._patience, self._limit, self._largest = url.rstrip("/"), patience, limit, largest
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address; allowed: http://HOST:PORT or https://HOST:PORT")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise InputError("the token has characters that a header cannot carry; allowed: printable ASCII")
        self._auth = None if token is None else _Bearer(token)
        self._new_session()

    def _new_session(self) -> None:
        self._session = _Session()
        # a few packed bytes may be gigabytes
        self._session.headers["Accept-Encoding"] = "identity"

    def send(self, method: str, path: str, **request: Any) -> Any:
        """The JSON value of a successful reply.

        Raises:
            BudgetExhausted: status 429, unless the reply says when to come again.
            Unreachable: nothing answers, or the answer is no JSON.
            InputError: the door refused the request otherwise; the message has the door's reason.
        """
        where, deadline, pause = self.url + path, time.monotonic() + self._patience, 0.2
        while True:
            after = None
            try:
                status, after, body = self._within(where, lambda: self._once(method, where, request))
            except InputError:
                raise
            except (requests.ConnectionError, requests.Timeout) as error:
                failure = f"{where}: not reachable: {_reason(error)}"
            except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
                raise Unreachable(f"{where}: {_reason(error)}") from None
            else:
                if status not in UNAVAILABLE and (status != 429 or after is None):
                    return _value(where, status, body)
                failure = _refusal(where, status, body)
            wait = max(pause, min(after or 0.0, LONGEST_PAUSE))
            if time.monotonic() + wait > deadline:
                raise Unreachable(failure)
            time.sleep(wait)
            pause = min(2 * pause, 5.0)

    def _once(self, method: str, where: str, request: dict[str, Any]) -> tuple[int, float | None, bytes]:
        """The status, ``Retry-After`` in seconds, and the body of one reply."""
        # a redirect could carry the token elsewhere
        with self._session.request(
            method, where, auth=self._auth, timeout=TIMEOUT, allow_redirects=False, stream=True, **request
        ) as reply:
            if packed := reply.headers.get("Content-Encoding"):
                raise Unreachable(f"{where}: the reply is packed ({packed[:40]}), which was not asked for")
            after = reply.headers.get("Retry-After", "")
            wait = float(after) if after.isascii() and after.isdigit() and len(after) < 10 else None
            return reply.status_code, wait, _body(where, reply, self._largest)

    def _within(self, where: str, work: Callable[[], tuple[int, float | None, bytes]]) -> Any:
        """What ``work`` gives. It is given up, with its connection, after the limit: no timeout of a socket ends a
        reply of a byte a second."""
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(), None))
            except BaseException as error:
                done.put((None, error))

        threading.Thread(target=run, daemon=True, name="request").start()
        try:
            found, error = done.get(timeout=self._limit)
        except queue.Empty:
            self._new_session()
            raise Unreachable(f"{where}: the reply took longer than {self._limit:g} s") from None
        if error is not None:
            raise error
        return found


def _body(where: str, reply: requests.Response, largest: int) -> bytes:
    """The body of a reply, if it is not longer than ``largest`` bytes."""
    body = bytearray()
    for part in reply.iter_content(1 << 16):
        body += part
        if len(body) > largest:
            raise Unreachable(f"{where}: the reply is longer than {largest} bytes")
    return bytes(body)


def _value(where: str, status: int, body: bytes) -> Any:
    if status == 429:
        raise BudgetExhausted(_refusal(where, status, body))
    if status != 200:
        raise InputError(_refusal(where, status, body))
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        found = body[:80].decode(errors="replace")
        raise Unreachable(f"{where}: answered with no JSON, or one nested too deeply: {found!r}") from None


def _reason(error: Exception) -> str:
    """The innermost cause in one line. The library requests wraps it several times."""
    while isinstance(getattr(error, "reason", None) or (error.args and error.args[0]), Exception):
        error = getattr(error, "reason", None) or error.args[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refusal(where: str, status: int, body: bytes) -> str:
    try:
        value = json.loads(body)
        detail = str(value.get("detail") or value.get("error") or value)
    except (ValueError, AttributeError, RecursionError):
        detail = body[:2000].decode(errors="replace")
    return f"{where}: refused with status {status}: {' '.join(detail.split())[:300]}"


def _read(model: type[Any], value: object, where: str) -> Any:
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        reason = describe(error)
    except RecursionError:
        reason = "nested too deeply"
    raise Unreachable(f"{where}: not an answer of a door of this program: {reason}")


def model_info(client: HttpClient) -> ModelInfo:
    """The door's description of its model."""
    info: ModelInfo = _read(ModelInfo, client.send("GET", "/v1/model"), client.url)
    return info


def account_info(client: HttpClient) -> AccountInfo:
    """The balance of the token's account."""
    info: AccountInfo = _read(AccountInfo, client.send("GET", "/v1/account"), client.url)
    return info


def predict(client: HttpClient, images: NDArray[np.generic], key: str) -> NDArray[np.float64]:
    """The answer rows ``(B, K)`` to one query, finite.

    Args:
        images: ``(B, C, H, W)`` uint8, or float32 in [0, 1].
        key: names the query. The same images under the same key are answered again free of charge.
    """
    body = io.BytesIO()
    np.save(body, np.ascontiguousarray(images), allow_pickle=False)
    headers = {"Content-Type": NPY, "Idempotency-Key": key}
    reply = client.send("POST", "/v1/predict", data=body.getvalue(), headers=headers)
    answer: Prediction = _read(Prediction, reply, client.url)
    if len(answer.probabilities) != len(images):
        raise Unreachable(f"{client.url}: {len(answer.probabilities)} answers to {len(images)} images")
    if len({len(row) for row in answer.probabilities}) > 1 or not np.isfinite(answer.probabilities).all():
        raise Unreachable(f"{client.url}: answer rows must have one length and finite values")
    return np.asarray(answer.probabilities)


class HttpTransport:
    """Queries over HTTP: a :class:`~simulator.service.oracle.Transport`.

    Args:
        session: put before every key. An attack that is started again with the same session asks under the same keys,
            and pays nothing twice. Two attacks at one account need two sessions.
    """

    def __init__(self, url: str, *, session: str, patience: float = PATIENCE) -> None:
        self._url, self._session, self._patience = url, session, patience
        self._clients: dict[str, HttpClient] = {}

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order.

        Raises:
            InputError: the door refused one of them, or does not answer.
        """
        answers = []
        for query in queries:
            client = self._clients.setdefault(query.token, HttpClient(self._url, query.token, self._patience))
            rows = predict(client, query.images, f"{self._session}-{query.key}")
            answers.append(rows.astype(np.float32))
        return answers


def connect(
    url: str, token: str, *, session: str | None = None, budget: int | None = None, patience: float = PATIENCE
) -> ServiceOracle:
    """The oracle of an account at a door, for any attack: ``attack.extract(connect(url, token), ...)``.

    Args:
        session: name of this attack at the account (see :class:`HttpTransport`); a new one by default.
        budget: images that may be asked; by default the account's remaining ones. To go on with an attack, give the
            session and the budget that it had the first time, because it asks again what it has paid for.

    Raises:
        InputError: nothing answers there, or the token is refused.
    """
    client = HttpClient(url, token, patience)
    model, account = model_info(client), account_info(client)
    channels, height, width = model.shape
    return ServiceOracle(
        HttpTransport(url, session=session or secrets.token_hex(8), patience=patience),
        account.account,
        token,
        labels=model.labels,
        classes=model.classes,
        shape=(channels, height, width),
        budget=account.remaining if budget is None else budget,
    )
