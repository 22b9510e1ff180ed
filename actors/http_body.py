"""The body of a request to the HTTP door: images as JSON or as a .npy file. Nothing in it is trusted.

A body is refused as early as it can be: by its length before it is read, and as JSON by its count of lists and numbers
before it is parsed.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from simulator.component import describe
from simulator.service.http import Problem

#: bytes of a request's body at most: a thousand colour images of 64 pixels as uint8
MAX_BODY = 16 << 20
#: bytes of a body of JSON at most. A number in JSON takes some hundred times the CPU of one in a .npy file
MAX_JSON = 4 << 20
#: characters of a key at most
MAX_KEY = 255

# fails at the first wrong number: a body full of them would make one error each
Row = Annotated[list[float], FailFast()]
Channel = Annotated[list[Row], FailFast()]
Image = Annotated[list[Channel], FailFast()]


class PredictRequest(BaseModel):
    """A query in JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: Annotated[list[Image], FailFast()] = Field(description="(B, C, H, W) nested lists of numbers")
    dtype: Literal["uint8", "float32"] = Field("uint8", description="uint8: integers 0..255; float32: [0, 1]")
    key: Annotated[str, Field(min_length=1, max_length=MAX_KEY)] | int | None = Field(
        None, description="as the header Idempotency-Key"
    )


class Refusal(Exception):
    """Raised to refuse a request; the client gets its :class:`Problem`.

    Args:
        after: seconds after which the client may come again (``Retry-After``); None where that would not help.
    """

    def __init__(self, status: int, title: str, detail: str, after: float | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.problem = Problem(status=status, title=title, detail=" ".join(detail.split())[:500], **more)
        self._headers = {} if after is None else {"Retry-After": str(max(1, math.ceil(after)))}
        if status == 401:
            self._headers["WWW-Authenticate"] = "Bearer"

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The reply to the client: ``application/problem+json``."""
        body, more = self.problem.model_dump(exclude_none=True), {**self._headers, **(headers or {})}
        return JSONResponse(body, self.problem.status, more, "application/problem+json")


def refuse_bombs(body: bytes, shape: Sequence[int], most: int) -> None:
    """Refuses JSON that has more lists, numbers or fields than any query of this model. It only counts bytes, which
    takes a millisecond for each MiB; parsing two million images of one pixel would take eight seconds.

    Args:
        shape: (C, H, W) of an image.
        most: images in a query at most.

    Raises:
        Refusal: it does.
    """
    channels, height, width = shape
    images = min(most, body.count(b",") // (channels * height * width) + 1)
    # a key may hold any of these characters
    for mark, name, limit in (
        (b"[", "lists", 1 + images * (1 + channels + channels * height)),
        (b",", "numbers", images * channels * height * width + len(PredictRequest.model_fields)),
        (b":", "fields", len(PredictRequest.model_fields)),
    ):
        if body.count(mark) > limit + MAX_KEY:
            raise Refusal(
                422, "Malformed query", f"body: more {name} than {images} images of shape {tuple(shape)} have"
            )


def images_from_json(body: bytes) -> tuple[NDArray[np.generic], str | None]:
    """The images and the key of a :class:`PredictRequest`.

    Raises:
        Refusal: the body is no such request.
    """
    try:
        asked = PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(422, "Malformed query", f"body: {describe(error)}") from None
    try:
        numbers = np.array(asked.images, dtype=np.float64)
    except ValueError:
        raise Refusal(422, "Malformed query", "images: the lists of one level are not all of one length") from None
    if asked.dtype == "float32":
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused later as outside [0, 1]
            images: NDArray[np.generic] = numbers.astype(np.float32)
    elif ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
        images = numbers.astype(np.uint8)
    else:
        raise Refusal(422, "Malformed query", "images: dtype uint8 takes integers 0..255; for [0, 1] say float32")
    return images, None if asked.key is None else str(asked.key)


def images_from_npy(body: bytes) -> NDArray[np.generic]:
    """The array in a .npy file. Nothing is unpickled, and no more is allocated than the file has bytes.

    Raises:
        Refusal: the body is no such file.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format; allowed: 1.0 and 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about headers that Python 2 wrote
            shape, fortran, dtype = read(file)
        if dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise ValueError(f"numbers of type {dtype}; allowed: uint8, float32")
        data = body[file.tell() :]
        if min(shape, default=1) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes of data for the shape {shape} of {dtype}")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy's parser of the header, a Python literal, may raise anything
        raise Refusal(422, "Malformed query", f"body: not a .npy file of images: {error}") from None
