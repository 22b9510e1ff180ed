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
import secrets
import time
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from simulator.component import describe
from simulator.errors import InputError
from simulator.service.ledger import digest_of
from simulator.service.oracle import BudgetExhausted, ServiceOracle
from simulator.service.query import Query

#: seconds to wait for a connection, and for an answer
TIMEOUT = (10.0, 120.0)
#: seconds that a client goes on asking for a lost answer
PATIENCE = 60.0
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


class HttpClient:
    """Sends requests to one address. A request that got no answer is sent again; every failure is told in one line.

    Args:
        url: ``http://`` or ``https://`` and a host; for a door of ``exsim serve`` without a path.
        token: the bearer token, or None.
        patience: seconds for which a request without an answer is sent again.

    Raises:
        InputError: the address or the token cannot be sent.
    """

    def __init__(self, url: str, token: str | None = None, patience: float = PATIENCE) -> None:
        self.url, self._patience = url.rstrip("/"), patience
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address; allowed: http://HOST:PORT or https://HOST:PORT")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise InputError("the token has characters that a header cannot carry; allowed: printable ASCII")
        self._session = requests.Session()
        self._auth = None if token is None else _Bearer(token)

    def send(self, method: str, path: str, **request: Any) -> Any:
        """The JSON value of a successful reply.

        Raises:
            BudgetExhausted: status 429.
            Unreachable: nothing answers, or the answer is no JSON.
            InputError: the door refused the request otherwise; the message has the door's reason.
        """
        where, deadline, pause = self.url + path, time.monotonic() + self._patience, 0.2
        while True:
            try:
                # a redirect could carry the token elsewhere
                reply = self._session.request(
                    method, where, auth=self._auth, timeout=TIMEOUT, allow_redirects=False, **request
                )
            except (requests.ConnectionError, requests.Timeout) as error:
                failure = f"{where}: not reachable: {_reason(error)}"
            except (requests.RequestException, ValueError) as error:
                raise Unreachable(f"{where}: {_reason(error)}") from None
            else:
                if reply.status_code not in UNAVAILABLE:
                    return self._value(where, reply)
                failure = _refusal(where, reply)
            if time.monotonic() + pause > deadline:
                raise Unreachable(failure)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _value(self, where: str, reply: requests.Response) -> Any:
        if reply.status_code == 429:
            raise BudgetExhausted(_refusal(where, reply))
        if reply.status_code != 200:
            raise InputError(_refusal(where, reply))
        try:
            return reply.json()
        except ValueError:
            raise Unreachable(f"{where}: answered with no JSON: {reply.text[:80]!r}") from None


def _reason(error: Exception) -> str:
    """The innermost cause in one line. The library requests wraps it several times."""
    while isinstance(getattr(error, "reason", None) or (error.args and error.args[0]), Exception):
        error = getattr(error, "reason", None) or error.args[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refusal(where: str, reply: requests.Response) -> str:
    try:
        body = reply.json()
        detail = body.get("detail") or body.get("error") or body
    except (ValueError, AttributeError):
        detail = reply.text
    return f"{where}: refused with status {reply.status_code}: {' '.join(str(detail).split())[:300]}"


def _read(model: type[Any], value: object, where: str) -> Any:
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise Unreachable(f"{where}: not an answer of a door of this program: {describe(error)}") from None


def model_info(client: HttpClient) -> ModelInfo:
    """The door's description of its model."""
    info: ModelInfo = _read(ModelInfo, client.send("GET", "/v1/model"), client.url)
    return info


def account_info(client: HttpClient) -> AccountInfo:
    """The balance of the token's account."""
    info: AccountInfo = _read(AccountInfo, client.send("GET", "/v1/account"), client.url)
    return info


def predict(client: HttpClient, images: NDArray[np.generic], key: str) -> Prediction:
    """The answer to one query.

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
    return answer


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
            rows = predict(client, query.images, f"{self._session}-{query.key}").probabilities
            answers.append(np.asarray(rows, dtype=np.float32))
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


class LabelAsker:
    """A suspect's top-1 labels, from a door of ours or from a foreign API that takes JSON.

    A foreign API is asked ``{images_field: [image]}``, the image as nested lists of floats in [0, 1], ``(C, H, W)``.
    Its answer is looked up at ``answer_field``, a dotted path such as ``predictions`` or ``outputs.0.scores``. What
    lies there may be a label, a row of scores, or a list of one of either.

    Args:
        answer_field: None for a door of ours.
    """

    def __init__(self, client: HttpClient, answer_field: str | None = None, images_field: str = "images") -> None:
        self._client, self._answer_field, self._images_field = client, answer_field, images_field

    def __call__(self, image: Tensor) -> int:
        """The top-1 label of an image ``(1, C, H, W)``."""
        if self._answer_field is None:
            pixels = image.contiguous().numpy()
            # the key tells nothing of why it is asked, and asking again after an interruption is free
            return int(np.argmax(predict(self._client, pixels, digest_of(pixels.data.cast("B"))).probabilities[0]))
        scaled = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image
        reply = self._client.send("POST", "", json={self._images_field: scaled.tolist()})
        return _label(_at(reply, self._answer_field), self._answer_field)


def _at(value: Any, path: str) -> Any:
    """The part of a JSON value at a dotted path."""
    for step in path.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            keys = f"the fields {', '.join(map(str, value))}" if isinstance(value, dict) else repr(value)[:80]
            raise InputError(f"--answer-field {path}: the answer has no {step!r}, it has {keys}") from None
    return value


def _label(value: Any, path: str) -> int:
    """The label in an answer to one image: itself, or the argmax of scores."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and all(type(each) in (int, float) for each in value) and value:
        return int(np.argmax(value))
    if type(value) is int:
        return value
    raise InputError(f"--answer-field {path}: {repr(value)[:80]} is neither a label nor a list of scores")
