"""The rules by which a client sends, waits and sends again. Nothing here sends anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.conversation import PACK, PAUSES, WAITS, WINDOW, Await, Busy, Conversation, Lost, Pause, Send
from simulator.errors import InputError
from simulator.service.query import Query

ROWS = np.ones((4, 2), np.float32)


def queries(count: int) -> list[Query]:
    return [Query("a", "t", key, np.zeros((4, 1, 8, 8), np.uint8)) for key in range(count)]


def told(count: int, *replies: Any, patience: float = 900.0) -> tuple[list[Any], Any]:
    """The steps of a conversation whose waits end in ``replies``, in good answers afterwards; and how it ended."""
    now = [0.0]
    steps, taken, left, outcome = (
        Conversation(lambda: now[0], patience=patience).ask(queries(count)),
        [],
        [*replies],
        None,
    )
    while True:
        try:
            step = steps.send(outcome)
        except (StopIteration, InputError, RuntimeError) as ended:
            return taken, ended.value if isinstance(ended, StopIteration) else ended
        taken.append(step)
        outcome = None
        if isinstance(step, Send):
            outcome = step.message
        elif isinstance(step, Pause):
            now[0] += step.seconds
        else:
            outcome = left.pop(0) if left else [ROWS for _ in step.response]
            now[0] += step.seconds if isinstance(outcome, Lost) else 0


def keys(steps: list[Any]) -> list[list[int]]:
    return [[query.key for query in step.message] for step in steps if isinstance(step, Send)]


def test_the_first_message_has_one_query_and_later_ones_as_many_as_fit() -> None:
    steps, answers = told(12)
    assert len(answers) == 12
    assert keys(steps)[: WINDOW + 1] == [[0], [1], list(range(2, 2 + PACK))]
    assert [key for message in keys(steps) for key in message] == list(range(12))


def test_no_more_messages_than_the_window_are_under_way() -> None:
    steps, _ = told(20)
    under_way = 0
    for step in steps:
        under_way += isinstance(step, Send) - isinstance(step, Await)
        assert under_way <= WINDOW


def test_a_late_answer_is_waited_for_longer_each_time_and_a_lost_one_is_not() -> None:
    late, lost = Lost(TimeoutError()), Lost(RuntimeError("gone"))
    waits = [step.seconds for step in told(1, late, late, late, late)[0] if isinstance(step, Await)]
    assert waits == [WAITS[0], 2 * WAITS[0], WAITS[1], WAITS[1], WAITS[1]]
    steps, answers = told(1, *[lost] * 8)
    assert [step.seconds for step in steps if isinstance(step, Await)] == [WAITS[0]] * 9
    pauses = [step.seconds for step in steps if isinstance(step, Pause)]
    assert pauses[0] == PAUSES[0]
    assert pauses[-1] == PAUSES[1]
    assert pauses == sorted(pauses)
    assert keys(steps) == [[0]] * 9
    assert len(answers) == 1


def test_what_is_busy_is_asked_again_and_what_is_refused_is_not() -> None:
    steps, answers = told(1, [Busy("later")], [Busy("later")])
    assert len(keys(steps)) == 3
    assert len(answers) == 1
    steps, refusal = told(1, [InputError("no")])
    assert str(refusal) == "no"
    assert len(keys(steps)) == 1


@pytest.mark.parametrize("patience", [-1.0, 100.0])
def test_patience_ends_after_some_tries_and_with_what_was_lost(patience: float) -> None:
    steps, error = told(1, *[Lost(RuntimeError("gone"))] * 99, patience=patience)
    assert str(error) == "gone"
    assert len(keys(steps)) >= 3
