"""Fair turns, the one thread that computes, and the grouping of requests to the ledger. No Ray."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import LOW, FairQueue, Replies, Teller, Worker
from simulator.service.ledger import Grant, Refused, Request


def test_one_who_sends_much_does_not_delay_one_who_sends_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.put("greedy", 1, "greedy")
    for name in ("a", "b"):
        queue.put(name, 1, name)
    assert sorted(queue.get() for _ in range(3)) == ["a", "b", "greedy"]
    assert {queue.get() for _ in range(99)} == {"greedy"}


def test_a_turn_is_measured_in_images_not_in_queries() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.put("large", 256, "large")
        for _ in range(16):
            queue.put("small", 16, "small")
    first = Counter(queue.get() for _ in range(170))
    assert first["small"] == 16 * first["large"]


def test_one_who_comes_late_is_not_given_what_it_did_not_ask_for_earlier() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(40):
        queue.put("early", 1, "early")
    for _ in range(20):
        queue.get()
    for _ in range(20):
        queue.put("late", 1, "late")
    first = Counter(queue.get() for _ in range(10))
    assert first["early"] == first["late"] == 5


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 256)), min_size=1, max_size=60))
def test_every_item_is_served_once_in_its_accounts_order(items: list[tuple[str, int]]) -> None:
    """While two accounts both wait, neither is ahead of the other by more than one item of each."""
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for number, (account, cost) in enumerate(items):
        queue.put(account, cost, (account, cost, number))
    served = [queue.get() for _ in items]
    assert sorted(number for _, _, number in served) == list(range(len(items)))
    for account in "abcde":
        numbers = [number for name, _, number in served if name == account]
        assert numbers == sorted(numbers)
    left, done = Counter(name for name, _ in items), Counter[str]()
    for account, cost, _ in served:
        left[account] -= 1
        done[account] += cost
        waiting = [name for name in left if left[name]]
        assert all(done[account] - done[other] <= 2 * 256 for other in waiting)


def test_the_worker_computes_in_turns_and_hands_errors_to_the_asker() -> None:
    def fail() -> int:
        raise ValueError("no")

    async def scene() -> None:
        prepared: list[str] = []
        worker = Worker(lambda: prepared.append(threading.current_thread().name))
        block, order = threading.Event(), list[str]()
        held = asyncio.create_task(worker.run("greedy", 1, lambda: block.wait(30)))
        await asyncio.sleep(0.05)  # the thread is busy with it
        tasks = [asyncio.create_task(worker.run("greedy", 1, lambda: order.append("greedy"))) for _ in range(9)]
        tasks.append(asyncio.create_task(worker.run("modest", 1, lambda: order.append("modest"))))
        gone = asyncio.create_task(worker.run("gone", 1, lambda: order.append("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        low = asyncio.create_task(worker.low())
        await asyncio.sleep(0)
        assert not low.done()  # ten wait
        block.set()
        await asyncio.gather(*tasks)
        await asyncio.wait_for(low, 30)
        assert held.done()
        assert "modest" in order[:2]
        assert len(order) == 10
        assert prepared == ["answers"]
        with pytest.raises(ValueError, match="no"):
            await worker.run("a", 1, fail)
        assert await worker.run("a", 1, lambda: 3) == 3

    asyncio.run(scene())


def request(number: int) -> Request:
    return Request("a", "t", number, 1, "d")


class Till:
    """A ledger that grants even keys, refuses odd ones, and cannot take key 404."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    async def ask(self, requests: Sequence[Request]) -> Replies:
        self.calls.append([asked.key for asked in requests])
        await asyncio.sleep(0.01)
        if 404 in self.calls[-1]:
            raise TypeError("no such key")
        return [Refused("odd") if asked.key % 2 else Grant(1, True, asked.key) for asked in requests]


async def at_once() -> None:
    """More is always wanted."""


def keys(replies: Replies) -> list[Any]:
    return [reply.remaining if isinstance(reply, Grant) else str(reply) for reply in replies]


def test_what_comes_while_the_ledger_works_goes_into_one_call() -> None:
    async def scene() -> None:
        ledger = Till()
        teller = Teller(ledger.ask, at_once)
        messages = [[request(0), request(1)], [request(2)], [request(4), request(6)]]
        first = asyncio.create_task(teller.reserve([request(8)]))
        await asyncio.sleep(0.001)
        replies = await asyncio.gather(*(teller.reserve(message) for message in messages))
        assert [keys(each) for each in replies] == [[0, "odd"], [2], [4, 6]]
        assert keys(await first) == [8]
        assert ledger.calls == [[8], [0, 1, 2, 4, 6]]
        assert keys(await teller.reserve([request(10)])) == [10]

    asyncio.run(scene())


def test_a_message_that_the_ledger_cannot_take_harms_no_other() -> None:
    async def scene() -> None:
        ledger = Till()
        teller = Teller(ledger.ask, at_once)
        asked = [teller.reserve([request(key)]) for key in (0, 404, 2)]
        good, bad, other = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(bad, TypeError)
        assert not isinstance(good, BaseException)
        assert not isinstance(other, BaseException)
        assert keys(good) + keys(other) == [0, 2]

    asyncio.run(scene())


def test_no_grant_is_asked_for_while_the_worker_has_enough_to_do() -> None:
    async def scene() -> None:
        ledger, block = Till(), threading.Event()
        worker = Worker(lambda: None)
        teller = Teller(ledger.ask, worker.low)
        busy = [asyncio.create_task(worker.run("a", 1, lambda: block.wait(30))) for _ in range(LOW + 3)]
        asked = [asyncio.create_task(teller.reserve([request(key)])) for key in (0, 2, 4)]
        await asyncio.sleep(0.05)
        assert ledger.calls == []
        block.set()
        await asyncio.gather(*busy, *asked)
        assert ledger.calls == [[0, 2, 4]]

    asyncio.run(scene())


def test_clients_that_go_away_while_they_wait_leave_no_one_waiting_for_ever() -> None:
    async def scene() -> None:
        ledger, block = Till(), threading.Event()
        worker = Worker(lambda: None)
        teller = Teller(ledger.ask, worker.low)
        gone = [asyncio.create_task(worker.run(f"{number}", 1, lambda: block.wait(30))) for number in range(LOW + 4)]
        await asyncio.sleep(0.05)
        asked = asyncio.create_task(teller.reserve([request(0)]))
        await asyncio.sleep(0.05)
        assert ledger.calls == []
        for each in gone:
            each.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        block.set()
        assert keys(await asyncio.wait_for(asked, 10)) == [0]
        assert keys(await asyncio.wait_for(teller.reserve([request(2)]), 30)) == [2]

    asyncio.run(scene())


def test_a_call_to_the_ledger_that_is_cancelled_does_not_end_all_calls() -> None:
    async def scene() -> None:
        ledger = Till()
        interrupted = [True]

        async def wanted() -> None:
            if interrupted.pop() if interrupted else False:
                raise asyncio.CancelledError

        teller = Teller(ledger.ask, wanted)
        first = asyncio.create_task(teller.reserve([request(0)]))
        await asyncio.sleep(0.01)
        assert keys(await asyncio.wait_for(teller.reserve([request(2)]), 30)) == [2]
        assert keys(await asyncio.wait_for(first, 30)) == [0]

    asyncio.run(scene())
