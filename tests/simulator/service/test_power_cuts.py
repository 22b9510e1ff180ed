"""Every state that a power cut can leave of a ledger's files: no grant is lost, none is made twice, all open again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from simulator.files import Disk, write_atomically
from simulator.service import ledger as module
from simulator.service.ledger import Ledger, Request, Terms, hash_token
from tests.simulator.alice import PowerCut, Quick, lay_out

TERMS = Terms("victim", "soft", 100, hash_token("t"))
LOG = Path("ledger") / "ledger.log"
Paid = dict[int, tuple[int, str]]


class Story:
    """A ledger's life on a disk whose power can be cut at every change.

    Attributes:
        told: the grants that somebody was told of.
        asked: those that are being asked for, and may be there or not.
        states: how many different states were opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.root.mkdir()
        self.disk = PowerCut(self.root)
        self.disk.watch = self.cut
        self.told: Paid = {}
        self.asked: Paid = {}
        self.states = 0
        self._seen: set[tuple[object, ...]] = set()

    def cut(self) -> None:
        """Opens every state that a power cut could leave now."""
        for state in self.disk.crashes():
            mark = (frozenset(state.items()), tuple(self.told.items()), tuple(self.asked.items()))
            if mark in self._seen:
                continue
            self._seen.add(mark)
            self.states += 1
            root = lay_out(state, self.folder / "crashed")
            ledger = Ledger(root / LOG, sync=True, disk=Quick())
            found = ledger.grants("a")
            assert self.told.items() <= found.items() <= (self.told | self.asked).items()
            assert ledger.spent("a") == sum(count for count, _ in found.values()) <= 100
            if found:  # whoever asks again is not charged again
                key, (count, digest) = next(iter(found.items()))
                assert not ledger.reserve("a", "t", key, count, digest).fresh
            ledger.close()
            again = Ledger(root / LOG, disk=Quick())
            assert again.grants("a") == found
            again.close()
            shutil.rmtree(root)

    def start(self) -> Ledger:
        ledger = Ledger(self.root / LOG, sync=True, disk=self.disk)
        ledger.open("a", TERMS)
        return ledger

    def pay(self, ledger: Ledger, *keys: int, digest: str = "d") -> None:
        self.asked = dict.fromkeys(keys, (1, digest))
        ledger.reserve_all([Request("a", "t", key, 1, digest) for key in keys])
        self.told, self.asked = self.told | self.asked, {}
        self.cut()

    def fail(self, ledger: Ledger, how: str, *keys: int) -> None:
        """The write fails, and nobody is told of a grant: afterwards it must not be there."""
        self.disk.failing.add(how)
        self.asked = dict.fromkeys(keys, (1, "failed"))
        with pytest.raises((OSError, KeyboardInterrupt)):
            ledger.reserve_all([Request("a", "t", key, 1, "failed") for key in keys])
        self.disk.failing.clear()
        self.asked = {}
        self.cut()


def grants(story: Story) -> None:
    ledger = story.start()
    story.pay(ledger, 0)
    story.pay(ledger, 1)
    ledger.close()
    again = story.start()
    story.pay(again, 2)
    again.close()


def several_at_once(story: Story) -> None:
    ledger = story.start()
    story.pay(ledger, 0)
    story.pay(ledger, *range(1, 25))  # several sectors
    story.pay(ledger, 30, digest="e" * 700)
    ledger.close()


def failures(story: Story) -> None:
    ledger = story.start()
    story.pay(ledger, 0)
    for how in ("short", "sync", "interrupt"):
        story.fail(ledger, how, 1, 2, 3)
        story.fail(ledger, how, *range(4, 14))
    story.pay(ledger, 1, 2)
    ledger.close()


@pytest.mark.parametrize("seconds", [0.0, 5.0], ids=["a head after each grant", "a head at the end"])
@pytest.mark.parametrize("life", [grants, several_at_once, failures])
def test_no_power_cut_loses_a_grant(
    life: Callable[[Story], None], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD_SECONDS", seconds)
    story = Story(tmp_path)
    life(story)
    print(f"{life.__name__}, {seconds:g} s: {story.states} states")
    assert story.states > 20


class Forgetful(PowerCut):
    """A disk that waits for nothing."""

    def sync(self, file: int) -> None:
        self.watch()


class Nameless(PowerCut):
    """A disk that does not wait for names."""

    def sync_folder(self, path: Path) -> None:
        self.watch()


@pytest.mark.parametrize("kind", [Forgetful, Nameless])
def test_the_states_find_a_ledger_that_does_not_wait(kind: type[PowerCut], tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.disk = kind(story.root)
    story.disk.watch = story.cut
    with pytest.raises(Exception, match=r"assert|head|damaged|missing"):
        grants(story)


def test_a_power_cut_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    disk = PowerCut(root)
    found: set[bytes | None] = set()
    disk.watch = lambda: found.update(state.get(Path("a/b/file")) for state in disk.crashes())
    write_atomically(root / "a" / "b" / "file", b"old" * 400, disk=disk)
    assert found == {None, b"old" * 400}
    assert {state.get(Path("a/b/file")) for state in disk.crashes()} == {b"old" * 400}
    found.clear()
    write_atomically(root / "a" / "b" / "file", b"new" * 400, disk=disk)
    assert found == {b"old" * 400, b"new" * 400}
    assert {state.get(Path("a/b/file")) for state in disk.crashes()} == {b"new" * 400}


def test_an_interrupt_amid_any_call_leaves_a_log_that_opens_again(tmp_path: Path) -> None:
    """Also in the call that takes the failed write away."""

    class Interrupted(Quick):
        left = 10**9

        def _count(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def write(self, file: int, data: bytes, at: int) -> int:
            self._count()
            done = super().write(file, data, at)
            self._count()
            return done

        def sync(self, file: int) -> None:
            self._count()

        def truncate(self, file: int, size: int) -> None:
            self._count()
            super().truncate(file, size)

    for calls in range(6):
        disk: Disk = Interrupted()
        ledger = Ledger(tmp_path / str(calls) / "ledger.log", sync=True, disk=disk)
        ledger.open("a", TERMS)
        ledger.reserve("a", "t", 0, 10, "d")
        disk.left = calls  # type: ignore[attr-defined]
        with suppress(KeyboardInterrupt):
            ledger.reserve("a", "t", 1, 60, "e")
        disk.left = 10**9  # type: ignore[attr-defined]
        assert ledger.reserve("a", "t", 1, 60, "e").remaining == 30
        assert ledger.reserve("a", "t", 2, 30, "f").fresh
        ledger.close()
        assert Ledger(tmp_path / str(calls) / "ledger.log").all_spent() == {"a": 100}
