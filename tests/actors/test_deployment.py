"""The service starts in a thread of the driver, which hears of it when it is there, or cannot be."""

from __future__ import annotations

import threading

import pytest

from actors.runner import Deployment
from simulator.errors import InputError


def test_the_handle_is_there_when_the_service_is() -> None:
    go = threading.Event()

    def start() -> str:
        assert go.wait(60)
        return "handle"

    deployment = Deployment(start)
    assert deployment.handle() is None
    go.set()
    deployment.wait()
    assert deployment.handle() == "handle"


def test_what_keeps_it_from_starting_ends_the_run() -> None:
    def start() -> None:
        raise InputError("no room for a replica")

    deployment = Deployment(start)
    deployment.wait()
    with pytest.raises(InputError, match="no room"):
        deployment.handle()
