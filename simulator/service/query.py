"""A query, and the checks that it passes before it is paid for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.service.ledger import KEYS

#: images in one query at most; a client cuts larger sets into chunks
MAX_BATCH = 4096


#: bytes in one query, and in its answer, at most: larger gRPC messages (4 MiB) fail
MAX_BYTES = 3 << 20


class MalformedQuery(InputError):
    """The query has a wrong shape, type, size or range; nothing was charged."""


@dataclass(frozen=True)
class Query:
    """One batch of images, and the account that pays for it.

    Attributes:
        account: name of the account in the ledger.
        token: its secret.
        key: the client's number for this batch. The client uses the same number when it asks the batch again.
        images: ``(B, C, H, W)``, uint8 or float32 in [0, 1].
    """

    account: str
    token: str
    key: int
    images: NDArray[np.generic]


def check_form(query: object) -> None:
    """Checks that a query has an account, a token and a key of the right types. The ledger checks their values.

    Raises:
        MalformedQuery: it is no query, one of the three has a wrong type, or the key is out of range.
    """
    if type(query) is not Query:
        raise MalformedQuery(f"{type(query).__name__} is not a query")
    for name in ("account", "token"):
        if type(getattr(query, name)) is not str:
            raise MalformedQuery(f"query with {name} of type {type(getattr(query, name)).__name__}; allowed: text")
    if type(query.key) is not int:
        raise MalformedQuery(f"query key of type {type(query.key).__name__} is not an integer")
    if not 0 <= query.key < KEYS:  # not printed: it may have millions of digits
        raise MalformedQuery(f"query key {'below 0' if query.key < 0 else 'too large'}; allowed: 0 to {KEYS - 1}")


def check_images(images: object, channels: int, size: int) -> NDArray[np.generic]:
    """Checks images against the input ``(channels, size, size)`` of a victim, and gives them back.

    Raises:
        MalformedQuery: their type, shape, count or range is wrong, or they are not finite.
    """
    wanted = f"(1..{MAX_BATCH}, {channels}, {size}, {size}) uint8, or float32 in [0, 1]"
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        found = str(images.dtype if isinstance(images, np.ndarray) else type(images).__name__)[:60]
        raise MalformedQuery(f"query of type {found}; allowed: {wanted}")
    images = np.asarray(images)  # drops the mask of a masked array: all its values are checked
    if images.ndim != 4 or images.shape[1:] != (channels, size, size) or not 1 <= len(images) <= MAX_BATCH:
        raise MalformedQuery(f"query of shape {images.shape}; allowed: {wanted}")
    if images.dtype == np.float32 and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise MalformedQuery(f"query with values outside [0, 1] or not finite; allowed: {wanted}")
    return images
