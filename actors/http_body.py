"""The body of a request to the HTTP door: images as JSON or as a .npy file. Nothing in it is trusted."""

from __future__ import annotations

import io
import math
import warnings
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from simulator.component import describe
from simulator.service.http import Problem

#: bytes of a request's body at most: a thousand colour images of 64 pixels as uint8
MAX_BODY = 16 << 20

# fails at the first wrong number: a body full of them would make one error each
Row = Annotated[list[float], FailFast()]
Channel = Annotated[list[Row], FailFast()]
Image = Annotated[list[Channel], FailFast()]


class PredictRequest(BaseModel):
    """A query in JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: Annotated[list[Image], FailFast()] = Field(description="(B, C, H, W) nested lists of numbers")
    dtype: Literal["uint8", "float32"] = Field("uint8", description="uint8: integers 0..255; float32: [0, 1]")
    key: Annotated[str, Field(min_length=1, max_length=255)] | int | None = Field(
        None, description="as the header Idempotency-Key"
    )


class Refusal(Exception):
    """Raised to refuse a request; the client gets its :class:`Problem`."""

    def __init__(self, status: int, title: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.problem = Problem(status=status, title=title, detail=" ".join(detail.split())[:500], **more)


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


async def body_of(request: Request) -> bytes:
    """The body. Reading stops, and the request is refused, once it has more than ``MAX_BODY`` bytes."""
    length = request.headers.get("content-length", "0")
    too_large = Refusal(413, "Too large", f"the body is larger than {MAX_BODY} bytes; ask fewer images at once")
    if length.isdigit() and int(length[:20]) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise too_large
    return bytes(body)
