"""The client of the Serve deployment: sends queries to the replicas, and sends again what was lost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.conversation import PATIENCE, WINDOW, Await, Conversation, Lost, Pause, Send
from actors.failures import innermost
from actors.replica import Replica
from simulator.errors import InputError
from simulator.service.query import Query


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
        self._handle = direct(handle)
        self._conversation = Conversation(time.monotonic, window, patience)

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order.

        Raises:
            InputError: the service refused one of them.
        """
        steps = self._conversation.ask(queries)
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as ended:
                answers: list[NDArray[np.float32]] = ended.value
                return answers
            outcome = self._take(step)

    def _take(self, step: Send | Await | Pause) -> Any:
        """Takes one step; gives what came of it."""
        if isinstance(step, Send):
            return self._handle.answer.remote(step.message)
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        try:
            return step.response.result(timeout_s=step.seconds)
        except RayTaskError as error:
            # such as the ledger's Unauthorised, wrapped once by each actor that passed it on
            cause = innermost(error)
            if isinstance(cause, InputError):
                raise cause from None
            raise
        except (RayActorError, RayServeException, TimeoutError) as error:
            return Lost(error)
