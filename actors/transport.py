"""The client of the Serve deployment: sends queries to the replicas, and sends again what was lost."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.failures import innermost
from actors.replica import Busy, Replica
from simulator.errors import InputError
from simulator.service.query import MAX_BYTES, Query
from simulator.service.visit import Answer

#: messages that one client has under way
WINDOW = 2


#: queries in one message at most
PACK = 4


#: seconds a client waits for an answer before it asks again
WAIT = 120.0


#: seconds a client goes on asking for a lost answer. After the loss of a node the service may wait for a new node
PATIENCE = 900.0


#: a message is sent at least so often before it is given up
LEAST_TRIES = 3


def direct(handle: DeploymentHandle[Replica]) -> DeploymentHandle[Replica]:
    """The handle with arguments sent by value over gRPC. At 256 images a query this has 1.6 times the default's rate.

    The option is not public. A Ray that does not know it keeps the default transport.
    """
    try:
        return handle.options(_by_reference=False)
    except (TypeError, ValueError):
        return handle


class ServeTransport:
    """Sends queries to the service, a few messages at a time. A message whose replica was killed is sent again."""

    def __init__(self, handle: DeploymentHandle[Replica], window: int = WINDOW, patience: float = PATIENCE) -> None:
        self._handle, self._window, self._patience = direct(handle), window, patience
        self._width = 0

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order.

        Raises:
            InputError: the service refused one of them.
        """
        answers: list[NDArray[np.float32]] = []
        under_way: deque[tuple[list[Query], Any]] = deque()
        waiting = deque(queries)
        while waiting or under_way:
            while waiting and len(under_way) < self._window:
                message = self._message(waiting)
                under_way.append((message, self._handle.answer.remote(message)))
            for answer in self._result(*under_way.popleft()):
                if isinstance(answer, InputError):
                    raise answer
                self._width = answer.shape[1]
                answers.append(answer)
        return answers

    def _message(self, waiting: deque[Query]) -> list[Query]:
        """Takes the queries that fit into one message, as their answers do. Before the first answer, whose row length
        is not known yet, it takes one query."""
        message: list[Query] = []
        size = 0
        while waiting and len(message) < PACK:
            images = np.asarray(waiting[0].images)
            size += max(images.nbytes, 4 * self._width * len(images) if images.ndim else 0)
            if message and (size > MAX_BYTES or not self._width):
                break
            message.append(waiting.popleft())
        return message

    def _result(self, message: list[Query], response: Any) -> list[Answer]:
        # The clock alone does not decide: a machine may have been suspended while it waited for its first answer. To
        # ask again is free, because the key is the same.
        deadline, pause = time.monotonic() + self._patience, 0.05
        asked = 0
        while True:
            asked += 1
            enough = asked >= LEAST_TRIES and time.monotonic() > deadline
            try:
                answers: list[Answer] = response.result(timeout_s=min(WAIT, self._patience))
                if not isinstance(answers[0], Busy) or enough:
                    return answers
            except RayTaskError as error:
                # such as the ledger's Unauthorised, wrapped once by each actor that passed it on
                cause = innermost(error)
                if isinstance(cause, InputError):
                    raise cause from None
                raise
            except (RayActorError, RayServeException, TimeoutError):
                if enough:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            response = self._handle.answer.remote(message)
