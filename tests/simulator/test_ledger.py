import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from simulator.errors import InputError
from simulator.ledger import Grant, Ledger, Refused, Request, Terms, digest_of, hash_token

TERMS = Terms("victim-1", "soft", 100, hash_token("secret"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "log"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.open("a", TERMS)
    return ledger


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    assert isinstance(caught.value, InputError)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_account_is_charged_for_each_new_key(ledger: Ledger) -> None:
    assert ledger.open("a", TERMS) == 100
    assert ledger.reserve("a", "secret", 0, 30, "d0") == Grant(30, fresh=True, remaining=70)
    assert ledger.reserve("a", "secret", 5, 20, "d5") == Grant(20, fresh=True, remaining=50)
    assert ledger.open("a", TERMS) == 50
    assert (ledger.spent("a"), ledger.all_spent()) == (50, {"a": 50})
    assert ledger.grants("a") == {0: (30, "d0"), 5: (20, "d5")}
    assert ledger.terms("a") == TERMS


def test_the_same_key_and_images_are_free_even_when_nothing_remains(ledger: Ledger) -> None:
    ledger.reserve("a", "secret", 0, 100, "d")
    assert ledger.reserve("a", "secret", 0, 100, "d") == Grant(100, fresh=False, remaining=0)
    assert ledger.spent("a") == 100


def test_the_budget_may_be_spent_to_the_last_image_and_no_further(ledger: Ledger) -> None:
    ledger.reserve("a", "secret", 0, 60, "d")
    assert "41 images asked, 40 of 100 remain" in refused(ledger.reserve, "a", "secret", 1, 41, "e")
    assert ledger.reserve("a", "secret", 1, 40, "e").remaining == 0
    refused(ledger.reserve, "a", "secret", 2, 1, "f")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("a", "secret", 0, 30, "other"), "key 0 was used for other images"),
        (("a", "secret", 0, 29, "d"), "key 0 was used for other images"),
        (("a", "Secret", 0, 30, "d"), "unknown account or wrong token"),
        (("a", "", 1, 1, "d"), "unknown account or wrong token"),
        (("a", TERMS.token_hash, 1, 1, "d"), "unknown account or wrong token"),
        (("b", "secret", 1, 1, "d"), "unknown account or wrong token"),
        (("a", "secret", 1, 0, "d"), "must be at least"),
        (("a", "secret", 1, -5, "d"), "must be at least"),
        (("a", "secret", -1, 1, "d"), "must be at least"),
        (("a", "secret", 1, 71, "d"), "71 images asked, 70 of 100 remain"),
    ],
)
def test_a_refused_request_charges_and_writes_nothing(
    ledger: Ledger, path: Path, arguments: tuple[Any, ...], fragment: str
) -> None:
    ledger.reserve("a", "secret", 0, 30, "d")
    before = path.read_bytes()
    assert fragment in refused(ledger.reserve, *arguments)
    assert (path.read_bytes(), ledger.spent("a"), ledger.grants("a")) == (before, 30, {0: (30, "d")})


def test_an_unknown_account_and_a_wrong_token_sound_the_same(ledger: Ledger) -> None:
    """Nobody learns which accounts exist."""
    unknown = refused(ledger.reserve, "x", "wrong", 0, 1, "d")
    assert unknown.replace("'x'", "'a'") == refused(ledger.reserve, "a", "wrong", 0, 1, "d")


def test_an_account_stays_on_its_terms(ledger: Ledger) -> None:
    for change in ({"budget": 101}, {"labels": "hard"}, {"victim": "v2"}, {"token_hash": hash_token("x")}):
        assert "already open on other terms" in refused(ledger.open, "a", Terms(**(TERMS.__dict__ | change)))
    assert "budget 0 is not at least 1" in refused(ledger.open, "b", Terms("v", "soft", 0, ""))
    assert ledger.all_spent() == {"a": 0}


def test_an_unknown_account_has_spent_nothing_and_has_no_terms(ledger: Ledger) -> None:
    assert (ledger.spent("nobody"), ledger.grants("nobody")) == (0, {})
    refused(ledger.terms, "nobody")


def test_what_is_handed_out_is_a_copy(ledger: Ledger) -> None:
    ledger.grants("a")[7] = (1, "forged")
    ledger.all_spent()["a"] = -100
    assert (ledger.grants("a"), ledger.spent("a")) == ({}, 0)


@pytest.mark.parametrize("sync", [False, True])
def test_every_grant_is_on_disk_before_it_is_given(path: Path, sync: bool) -> None:
    """No close: the first ledger's process was killed."""
    first = Ledger(path, sync=sync)
    first.open("ä\n\r\u2028", TERMS)
    first.reserve("ä\n\r\u2028", "secret", 3, 10, "d")
    second = Ledger(path, sync=sync)
    assert second.grants("ä\n\r\u2028") == {3: (10, "d")}
    assert second.terms("ä\n\r\u2028") == TERMS
    assert second.reserve("ä\n\r\u2028", "secret", 3, 10, "d") == Grant(10, fresh=False, remaining=90)


def test_the_token_is_never_on_disk(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", "secret", 0, 1, "d")
    assert b"secret" not in path.read_bytes()


def test_a_last_record_torn_anywhere_is_cut_off(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", "secret", 0, 10, "d0")
    whole = path.read_bytes()
    ledger.reserve("a", "secret", 1, 20, "d1")
    ledger.close()
    torn = path.read_bytes()
    for end in range(len(whole), len(torn)):
        path.write_bytes(torn[:end])
        reopened = Ledger(path)
        assert path.read_bytes() == whole
        assert reopened.grants("a") == {0: (10, "d0")}
        reopened.reserve("a", "secret", 1, 20, "d1")
        reopened.close()
        assert path.read_bytes() == torn


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("damage", [b"0", b"\n", b"{", b"\xff"])
def test_damage_before_the_last_record_is_refused_and_the_file_is_left_alone(
    ledger: Ledger, path: Path, line: int, damage: bytes
) -> None:
    ledger.reserve("a", "secret", 0, 10, "d0")
    ledger.reserve("a", "secret", 1, 10, "d1")
    ledger.close()
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(0, len(lines[line]) - 1, 7):
        broken = lines[line][:place] + damage + lines[line][place + 1 :]
        if broken == lines[line]:
            continue
        data = b"".join([*lines[:line], broken, *lines[line + 1 :]])
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"line {line + 1} is damaged") as caught:
            Ledger(path)
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == data


def test_a_grant_that_could_not_be_written_whole_is_not_given(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk for one moment: the ledger lives on, and its file stays good."""
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr("simulator.ledger.os.write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match="whole record"):
        ledger.reserve("a", "secret", 0, 10, "d")
    assert (path.read_bytes(), ledger.spent("a")) == (before, 0)
    monkeypatch.undo()
    assert ledger.reserve("a", "secret", 0, 10, "d").fresh
    assert Ledger(path).grants("a") == {0: (10, "d")}


def test_a_grant_that_the_disk_did_not_take_is_not_charged_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path, sync=True)
    ledger.open("a", TERMS)

    def fail(_: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr("simulator.ledger.os.fdatasync", fail)
    with pytest.raises(OSError, match="input/output"):
        ledger.reserve("a", "secret", 0, 60, "d")
    monkeypatch.undo()
    assert ledger.reserve("a", "secret", 0, 60, "d") == Grant(60, fresh=True, remaining=40)
    assert Ledger(path).spent("a") == 60


def test_digests_and_tokens_are_told_apart_by_their_bytes() -> None:
    assert digest_of(b"ab") == digest_of(memoryview(b"ab")) != digest_of(b"ac")
    assert len(digest_of(b"")) == 32
    assert hash_token("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


ACCOUNTS = st.sampled_from(["a", "b"])
BUDGETS = {"a": 20, "b": 7}
KEYS = st.integers(0, 5)
COUNTS = st.integers(1, 9)


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of requests, restarts and torn records against a dictionary of what was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.path = self.folder / "log"
        self.ledger = Ledger(self.path)
        self.paid: dict[str, dict[int, tuple[int, str]]] = {}
        # what undoes the last record in the model, while no other has followed it
        self.last: tuple[str, int | None] | None = None

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    def remaining(self, account: str) -> int:
        return BUDGETS[account] - sum(count for count, _ in self.paid[account].values())

    def terms(self, account: str) -> Terms:
        return Terms("v", "soft", BUDGETS[account], hash_token(account))

    @initialize()
    def first(self) -> None:
        self.open("a")

    @rule(account=ACCOUNTS)
    def open(self, account: str) -> None:
        if account not in self.paid:
            self.paid[account] = {}
            self.last = (account, None)
        assert self.ledger.open(account, self.terms(account)) == self.remaining(account)

    @rule(account=ACCOUNTS, key=KEYS, count=COUNTS, digest=st.sampled_from(["x", "y"]))
    def reserve(self, account: str, key: int, count: int, digest: str) -> None:
        paid = self.paid.get(account)
        known = paid.get(key) if paid is not None else None
        if (
            paid is None
            or (known not in (None, (count, digest)))
            or (known is None and count > self.remaining(account))
        ):
            refused(self.ledger.reserve, account, account, key, count, digest)
            return
        if known is None:
            paid[key] = (count, digest)
            self.last = (account, key)
        grant = self.ledger.reserve(account, account, key, count, digest)
        assert grant == Grant(count, known is None, self.remaining(account))

    @precondition(lambda self: any(self.paid.values()))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """A key that was paid for is free."""
        account = data.draw(st.sampled_from([name for name, paid in self.paid.items() if paid]))
        key = data.draw(st.sampled_from(list(self.paid[account])))
        size = self.path.stat().st_size
        grant = self.ledger.reserve(account, account, key, *self.paid[account][key])
        assert (grant.fresh, grant.remaining) == (False, self.remaining(account))
        assert self.path.stat().st_size == size

    @rule(account=ACCOUNTS, key=KEYS)
    def wrong_token(self, account: str, key: int) -> None:
        refused(self.ledger.reserve, account, "wrong", key, 1, "x")

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @precondition(lambda self: self.last is not None)
    @rule(share=st.floats(0, 1, exclude_max=True))
    def tear(self, share: float) -> None:
        """A kill in the middle of the last record, which was therefore never acknowledged."""
        assert self.last is not None
        self.ledger.close()
        data = self.path.read_bytes()
        start = len(data) - len(data.splitlines(keepends=True)[-1])
        os.truncate(self.path, start + int(share * (len(data) - start)))
        account, key = self.last
        if key is None:
            del self.paid[account]
        else:
            del self.paid[account][key]
        self.last = None
        self.ledger = Ledger(self.path)

    @invariant()
    def agrees(self) -> None:
        assert self.ledger.all_spent() == {
            account: sum(count for count, _ in paid.values()) for account, paid in self.paid.items()
        }
        for account in BUDGETS:
            grants = self.ledger.grants(account)
            assert grants == self.paid.get(account, {})
            assert self.ledger.spent(account) == sum(count for count, _ in grants.values()) <= BUDGETS[account]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_several_requests_are_one_write_and_refusals_among_them_are_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, writes, waits = Ledger(path, sync=True), [], []
    ledger.open("a", Terms("v", "soft", 10, hash_token("t")))
    monkeypatch.setattr("os.write", lambda file, data, write=os.write: writes.append(data) or write(file, data))
    monkeypatch.setattr("os.fdatasync", waits.append)

    def ask(key: int, count: int, token: str = "t", digest: str = "d") -> Request:
        return Request("a", token, key, count, digest)

    asked = [ask(0, 4), ask(1, 1, token="x"), ask(0, 4), ask(0, 4, digest="e"), ask(2, 7), ask(3, 6), ask(4, 1)]
    replies = ledger.reserve_all(asked)
    granted = [reply for reply in replies if isinstance(reply, Grant)]
    assert granted == [Grant(4, True, 6), Grant(4, False, 6), Grant(6, True, 0)]
    assert [isinstance(reply, Refused) for reply in replies] == [False, True, False, True, True, False, True]
    assert (len(writes), len(waits), writes[0].count(b"\n")) == (1, 1, 2)
    assert ledger.reserve_all([ask(0, 4), ask(3, 6)]) == [Grant(4, False, 0), Grant(6, False, 0)]
    assert len(writes) == 1
    replayed = Ledger(path)
    assert replayed.grants("a") == ledger.grants("a") == {0: (4, "d"), 3: (6, "d")}


def test_of_several_grants_that_could_not_be_written_none_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)
    ledger.open("a", Terms("v", "soft", 10, hash_token("t")))
    asked = [Request("a", "t", key, 2, "d") for key in range(3)]
    ledger.reserve_all(asked[:1])
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr("os.write", lambda file, data, write=os.write: write(file, data[:-5]))
        with pytest.raises(OSError, match="whole record"):
            ledger.reserve_all(asked)
    assert path.read_bytes() == before
    assert ledger.grants("a") == {0: (2, "d")}
    assert ledger.spent("a") == 2
    assert [reply.fresh for reply in ledger.reserve_all(asked) if isinstance(reply, Grant)] == [False, True, True]
    assert Ledger(path).spent("a") == 6
