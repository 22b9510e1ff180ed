"""The open door, once a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.actors.door import Site, open_door


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_door(tmp_path_factory.mktemp("door")) as site:
        yield site
