"""The client of the service: messages that were lost or sent away come again. Nothing here starts Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.conversation import Busy
from actors.transport import ServeTransport
from simulator.service.query import Query

GOOD = np.zeros((4, 1, 8, 8), np.uint8)
TOKEN = "s3cret"


def test_a_message_that_was_sent_away_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Query]] = []

    class Twice:
        """A service that has no place at first."""

        def options(self, **_: Any) -> Any:
            return self

        @property
        def answer(self) -> Any:
            return SimpleNamespace(remote=self.reply)

        def reply(self, queries: list[Query]) -> Any:
            sent.append(queries)
            answers: list[Any] = [Busy("later") if len(sent) < 3 else np.ones((4, 2)) for _ in queries]
            return SimpleNamespace(result=lambda **_: answers)

    service: Any = Twice()
    monkeypatch.setattr("time.sleep", lambda _: None)
    (answer,) = ServeTransport(service).send_all([Query("a", TOKEN, 0, GOOD)])
    assert answer.shape == (4, 2)
    assert len(sent) == 3
    monkeypatch.setattr(Twice, "reply", lambda *_: SimpleNamespace(result=lambda **_: [Busy("later")]))
    with pytest.raises(Busy, match="later"):
        ServeTransport(service, patience=-1.0).send_all([Query("a", TOKEN, 0, GOOD)])


@pytest.mark.parametrize(("silent", "answered"), [(2, True), (3, False)])
def test_a_message_is_sent_again_however_long_the_first_waited(
    monkeypatch: pytest.MonkeyPatch, silent: int, answered: bool
) -> None:
    """As after a machine was suspended: the clock says that patience has ended, and nobody was asked meanwhile."""
    sent: list[Any] = []

    def result(**_: Any) -> list[Any]:
        if len(sent) <= silent:
            raise TimeoutError
        return [np.ones((4, 2))]

    service: Any = SimpleNamespace(
        answer=SimpleNamespace(remote=lambda queries: sent.append(queries) or SimpleNamespace(result=result))
    )
    service.options = lambda **_: service
    monkeypatch.setattr("time.sleep", lambda _: None)
    transport = ServeTransport(service, patience=-1.0)
    query = Query("a", TOKEN, 0, GOOD)
    if answered:
        assert transport.send_all([query])[0].shape == (4, 2)
    else:
        with pytest.raises(TimeoutError):
            transport.send_all([query])
    assert sent == [[query]] * 3
