"""The notice board."""

from __future__ import annotations

import asyncio

from actors.board import Board


def test_what_was_read_does_not_change_while_it_is_on_its_way() -> None:
    """A dictionary that grew while Ray packed it ended a sweep."""

    async def look() -> None:
        board = Board()
        await board.post("a", ("train", 1, 2))
        seen = await board.read()
        await board.post("b", ("train", 1, 2))
        assert seen == {"a": ("train", 1, 2)}
        assert set(await board.read()) == {"a", "b"}

    asyncio.run(look())
