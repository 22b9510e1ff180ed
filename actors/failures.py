"""Reads Ray's errors: whether a call failed, or was lost with its process or its node."""

from __future__ import annotations

from ray.exceptions import ObjectLostError, RayError, RayTaskError


def innermost(error: BaseException) -> BaseException:
    """The original error of a task. Ray wraps it once for each actor that it passed."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def is_lost(error: RayError) -> bool:
    """Whether a call was lost because its process died, ran out of memory, or lost an argument with a node. False if
    the call itself failed."""
    # A RayTaskError is also an instance of its cause's type. So the type alone may tell of the death of another actor.
    return not isinstance(error, RayTaskError) or isinstance(innermost(error), ObjectLostError)
