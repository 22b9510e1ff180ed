"""What a client says to the service: which messages it sends, how long it waits, and when it sends one again.

:class:`Conversation` decides this and does nothing: it yields steps, and whoever drives it takes them and hands back
what came of each. :class:`actors.transport.ServeTransport` takes them on Ray Serve. The deterministic simulation
(``benchmarks/simulation``) takes them in virtual time, so both follow the same rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

#: seconds before a lost message is sent again: at first, and at most
PAUSES = (0.05, 2.0)


class Busy(InputError):
    """The account has too many messages under way; nothing was charged, and the message may come again."""


@dataclass(frozen=True)
class Send:
    """Send a message; what is handed back stands for its response. ``again`` says that it was sent before."""

    message: list[Query]
    again: bool = False


@dataclass(frozen=True)
class Await:
    """Wait for a response, so many seconds at most; the answers are handed back, or :class:`Lost`."""

    response: Any
    seconds: float


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Lost:
    """In place of answers: the message or its answer was lost, or too long in coming."""

    error: Exception


Steps = Generator[Send | Await | Pause, Any, list[NDArray[np.float32]]]


class Conversation:
    """The rules of one client.

    Args:
        clock: the time in seconds.
        window: messages that it has under way.
        patience: seconds it goes on asking for a lost answer.
    """

    def __init__(self, clock: Callable[[], float], window: int = WINDOW, patience: float = PATIENCE) -> None:
        self._clock, self._window, self._patience = clock, window, patience
        self._width = 0

    def ask(self, queries: list[Query]) -> Steps:
        """The steps that lead to the answers to several queries, in their order.

        Raises:
            InputError: the service refused one of them.
            Exception: the error of :class:`Lost`, when patience has ended.
        """
        answers: list[NDArray[np.float32]] = []
        under_way: deque[tuple[list[Query], Any]] = deque()
        waiting = deque(queries)
        while waiting or under_way:
            while waiting and len(under_way) < self._window:
                message = self._message(waiting)
                under_way.append((message, (yield Send(message))))
            for answer in (yield from self._result(*under_way.popleft())):
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

    def _result(self, message: list[Query], response: Any) -> Generator[Send | Await | Pause, Any, list[Answer]]:
        # The clock alone does not decide: a machine may have been suspended while it waited for its first answer. To
        # ask again is free, because the key is the same.
        deadline, (pause, longest) = self._clock() + self._patience, PAUSES
        asked = 0
        while True:
            asked += 1
            enough = asked >= LEAST_TRIES and self._clock() > deadline
            answers: list[Answer] | Lost = yield Await(response, min(WAIT, self._patience))
            if not isinstance(answers, Lost):
                if not isinstance(answers[0], Busy) or enough:
                    return answers
            elif enough:
                raise answers.error
            yield Pause(pause)
            pause = min(2 * pause, longest)
            response = yield Send(message, again=isinstance(answers, Lost))
