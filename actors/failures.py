"""What Ray's errors say: whether a call failed, or was lost with its process or its node."""

from __future__ import annotations

from ray.exceptions import ObjectLostError, RayError, RayTaskError


def innermost(error: BaseException) -> BaseException:
    """What a task failed of: Ray wraps it once for each actor that it passed."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def is_lost(error: RayError) -> bool:
    """Whether the process died, ran out of memory, or lost what it was given with a node. False where the call itself
    has failed."""
    # a RayTaskError is also of its cause's type, which may be the death of another actor than the one called
    return not isinstance(error, RayTaskError) or isinstance(innermost(error), ObjectLostError)
