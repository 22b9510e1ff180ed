"""The HTTP door: the prediction service as a web API, with bearer tokens and the same ledger.

:class:`Door` is a plain class over the service, which checks, charges and answers. The routes translate between the
door and HTTP. The application stands behind a :class:`~actors.http_gate.Gate`, and ``exsim serve`` opens it
(:mod:`actors.serving`). The messages are those of :mod:`simulator.service.http`, and every error is one
:class:`~simulator.service.http.Problem`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from actors.conversation import Busy
from actors.http_body import (
    MAX_BODY,
    MAX_JSON,
    MAX_KEY,
    PredictRequest,
    Refusal,
    images_from_json,
    images_from_npy,
    refuse_bombs,
)
from actors.http_gate import Intake
from actors.replica import MAX_PER_ACCOUNT
from simulator import __version__
from simulator.errors import InputError
from simulator.service.http import NPY, AccountInfo, ModelInfo, Prediction, Problem
from simulator.service.ledger import KEYS, Grant, KeyReused, OverBudget, Refused, Terms, Unauthorised
from simulator.service.query import MalformedQuery, Query
from simulator.service.visit import Answer

#: seconds in which a query has to be answered
REQUEST_SECONDS = 120.0


class Door:
    """Finds accounts by their tokens, and has their queries answered. The routes call it.

    Args:
        ask: has the service answer queries, as :meth:`actors.replica.Replica.answer_with_grants` does.
        ledger: handle of :class:`~actors.ledger.LedgerService`.
        model: the description of the model that clients may read.
        find: the account that a token opens, and what the ledger is told in the token's place; None if it opens none.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Query]], Awaitable[Sequence[tuple[Answer, Grant | None]]]],
        ledger: Any,
        model: ModelInfo,
        find: Callable[[str], tuple[str, str] | None],
    ) -> None:
        self.model = model
        self._ask, self._ledger, self._find = ask, ledger, find
        # the replica takes so many queries of an account at once; the others wait here
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MAX_PER_ACCOUNT))

    def find(self, token: str) -> str | None:
        """The name of the account that a token opens, or None."""
        found = self._find(token)
        return found[0] if found else None

    def account_of(self, token: str | None) -> tuple[str, str]:
        """The name of the account that a token opens, and what the ledger is told for it."""
        found = None if token is None else self._find(token)
        if found is None:
            raise Refusal(401, "Unauthorised", "the bearer token is missing or opens no account")
        return found

    async def account(self, token: str) -> AccountInfo:
        """The balance of a token's account."""
        return await self._balance(self.account_of(token)[0])

    async def _balance(self, name: str) -> AccountInfo:
        terms: Terms = await self._ledger.terms.remote(name)
        spent = await self._ledger.spent.remote([name])
        return AccountInfo(account=name, budget=terms.budget, spent=spent, remaining=terms.budget - spent)

    async def predict(self, token: str, images: NDArray[np.generic], key: str | None) -> Prediction:
        """The answer to a query. The account is charged, unless the key has paid for these images already."""
        number = ledger_key(key)
        account, secret = self.account_of(token)
        async with self._turns[account], asyncio.timeout(REQUEST_SECONDS):
            [(answer, grant)] = await self._ask([Query(account, secret, number, images)])
        if isinstance(answer, InputError):
            raise await self._refusal(answer, account, len(images))
        assert grant is not None
        return Prediction(
            key=str(number) if key is None else key,
            charged=grant.count if grant.fresh else 0,
            remaining=grant.remaining,
            probabilities=answer.tolist(),
        )

    async def _refusal(self, error: InputError, account: str, asked: int) -> Refusal:
        if isinstance(error, MalformedQuery):
            return Refusal(422, "Malformed query", str(error))
        if isinstance(error, KeyReused):
            return Refusal(409, "Key reused", "the Idempotency-Key was used for other images; nothing was charged")
        if isinstance(error, OverBudget):
            left = await self._balance(account)
            detail = f"{asked} images asked, {left.remaining} of {left.budget} remain; none was answered or charged"
            more = {"asked": asked, "remaining": left.remaining, "budget": left.budget}
            return Refusal(429, "Budget exhausted", detail, **more)
        if isinstance(error, Busy):
            return Refusal(503, "Busy", str(error), after=1)
        if isinstance(error, Unauthorised):
            return Refusal(401, "Unauthorised", "the account does not take this token")
        return Refusal(422 if isinstance(error, Refused) else 500, "Refused", str(error))


def ledger_key(text: str | None) -> int:
    """The ledger's number for an Idempotency-Key.

    A decimal number below 2^63 stands for itself, such as "17" for 17. Other text is hashed into the upper half of that
    range. Without a key the number is random in that half, so every such query is a new one.
    """
    half = KEYS // 2
    if text is None:
        return half + secrets.randbelow(half)
    if text.isascii() and text.isdigit() and str(int(text[:20])) == text and int(text) < KEYS:
        return int(text)
    return half + int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % half


# -- routes ---------------------------------------------------------------------------------------------------------

router = APIRouter()
bearer = HTTPBearer(auto_error=False, description="the account's token, as `exsim serve` made it")


async def authorised(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> str:
    """The token of the request. It opens an account, or the request is refused."""
    token = credentials.credentials if credentials else None
    request.app.state.door.account_of(token)
    assert token is not None
    return token


Token = Annotated[str, Depends(authorised)]
UNAUTHORISED = {401: "no token, or one that opens no account"}
DOWN = {
    429: "more requests than the account or its address may send; `Retry-After` says when",
    503: "the service is being started again, is full, or ends; ask again with the same key after `Retry-After`",
}


def _problems(reasons: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": reason, "content": content} for status, reason in reasons.items()}


@router.get("/healthz", summary="Whether the door is open")
async def healthz() -> dict[str, Literal["ok"]]:
    """Answers when queries can be answered."""
    return {"status": "ok"}


@router.get(
    "/v1/model",
    summary="What is asked",
    responses=_problems(UNAUTHORISED | DOWN),
    dependencies=[Depends(authorised)],
)
async def model(request: Request) -> ModelInfo:
    """The shape of the images, the number of classes and the answer mode."""
    info: ModelInfo = request.app.state.door.model
    return info


@router.get("/v1/account", summary="What is left", responses=_problems(UNAUTHORISED | DOWN))
async def account(request: Request, token: Token) -> AccountInfo:
    """The account's budget, what was spent of it and what remains, in images."""
    info: AccountInfo = await request.app.state.door.account(token)
    return info


@router.post(
    "/v1/predict",
    summary="Ask",
    responses=_problems(
        {
            **UNAUTHORISED,
            409: "the key was used for other images",
            413: "the body is too large",
            415: "the body is of another type",
            422: "malformed images; nothing was charged",
            **DOWN,
            408: "the body came too slowly",
            429: "over budget: `asked` images were refused, `remaining` are left; nothing was charged. With "
            "`Retry-After`, too many requests",
        }
    ),
)
async def predict(
    request: Request,
    token: Token,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=MAX_KEY,
            description="the client's name for this query: the same images under it again are answered for nothing",
        ),
    ] = None,
) -> Prediction:
    """Probabilities for one batch of images, charged to the account: as JSON, or as a .npy file of uint8 or float32."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", NPY):
        raise Refusal(415, "Unsupported type", f"body of type {kind[:80]!r}; allowed: application/json, {NPY} (.npy)")
    door: Door = request.app.state.door
    intake: Intake = request.app.state.intake
    async with intake.body(request, door.account_of(token)[0], MAX_BODY if kind == NPY else MAX_JSON) as body:
        if kind == NPY:
            images = images_from_npy(body)
        else:
            refuse_bombs(body, door.model.shape, door.model.max_batch)
            images, named = images_from_json(body)
            if named is not None and key is not None and named != key:
                raise Refusal(422, "Malformed query", "the key of the body is not that of the header Idempotency-Key")
            key = key if named is None else named
        if key is not None and not 1 <= len(key) <= MAX_KEY:
            raise Refusal(422, "Malformed query", f"key of {len(key)} characters; allowed: 1 to {MAX_KEY}")
        return await door.predict(token, images, key)


def build_app(door: Door) -> FastAPI:
    """The web application over a door; its OpenAPI schema is at ``/openapi.json``. No page of another site may read
    it: nothing here answers CORS."""
    # no /docs: its page loads scripts from other sites
    app = FastAPI(title="exsim prediction service", version=__version__, docs_url=None, redoc_url=None)
    app.state.door, app.state.intake = door, Intake()
    app.include_router(router)
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    for down in (RayError, RayServeException, TimeoutError):
        app.exception_handler(down)(_down)
    make_schema = app.openapi

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            _describe_body(make_schema(), door.model)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
    return app


def _describe_body(schema: dict[str, Any], info: ModelInfo) -> None:
    """Adds what FastAPI cannot know to the schema: two types of body, the images' shape, and the problem's fields."""
    channels, height, width = info.shape
    images: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 255}
    for length in (width, height, channels):
        images = {"type": "array", "items": images, "minItems": length, "maxItems": length}
    images = {"type": "array", "items": images, "minItems": 1, "maxItems": info.max_batch}
    body = PredictRequest.model_json_schema()
    body["properties"]["images"] |= images
    binary = {"type": "string", "format": "binary", "description": "a .npy file, (B, C, H, W) uint8 or float32"}
    content = {"application/json": {"schema": body}, NPY: {"schema": binary}}
    schema["paths"]["/v1/predict"]["post"]["requestBody"] = {"required": True, "content": content}
    schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()


# -- errors ---------------------------------------------------------------------------------------------------------


async def _refused(_: Request, refusal: Any) -> JSONResponse:
    response: JSONResponse = refusal.response()
    return response


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    return Refusal(422, "Malformed query", f"{'.'.join(map(str, first['loc']))}: {first['msg']}").response()


async def _http(_: Request, error: Any) -> JSONResponse:
    return Refusal(error.status_code, "Refused", str(error.detail)).response(error.headers)


async def _down(*_: object) -> JSONResponse:
    return Refusal(503, "Unavailable", "the service is being started again; ask again with the same key", 1).response()
