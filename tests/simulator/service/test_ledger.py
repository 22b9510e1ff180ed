import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from simulator.chain import head_file
from simulator.errors import InputError
from simulator.files import DISK, Disk
from simulator.service.ledger import Grant, Ledger, Refused, Request, Terms, digest_of, hash_token

TERMS = Terms("victim-1", "soft", 100, hash_token("secret"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "log"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.open("a", TERMS)
    return ledger


def kill(ledger: Ledger, path: Path) -> None:
    """Ends a ledger as a kill does: its lock is free, and its head stays behind what it granted."""
    head = head_file(path).read_bytes()
    ledger.close()
    head_file(path).write_bytes(head)


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
    """Closing writes nothing: it stands for a kill, which also gives the lock back."""
    first = Ledger(path, sync=sync)
    first.open("ä\n\r\u2028", TERMS)
    first.reserve("ä\n\r\u2028", "secret", 3, 10, "d")
    written = path.read_bytes()
    first.close()
    assert path.read_bytes() == written
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
    kill(ledger, path)
    torn = path.read_bytes()
    for end in range(len(whole), len(torn)):
        path.write_bytes(torn[:end])
        reopened = Ledger(path)
        assert path.read_bytes() == whole
        assert reopened.grants("a") == {0: (10, "d0")}
        head = head_file(path).read_bytes()
        reopened.reserve("a", "secret", 1, 20, "d1")
        kill(reopened, path)
        assert head_file(path).read_bytes() == head
        assert path.read_bytes() == torn


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("damage", [b"0", b"\n", b"{", b"\xff", b"\r"])
def test_damage_is_refused_and_the_file_is_left_alone(ledger: Ledger, path: Path, line: int, damage: bytes) -> None:
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


def test_any_bit_of_the_last_record_that_flips_is_refused(ledger: Ledger, path: Path) -> None:
    """The end of its line too: what was acknowledged must not be taken for a torn record and cut off."""
    ledger.reserve("a", "secret", 0, 10, "d0")
    ledger.close()
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for place in range(start, len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(InputError, match="line 2 is damaged"):
                Ledger(path)
            assert path.read_bytes() == broken


@pytest.mark.parametrize(
    "order",
    [(1,), (0, 0), (0, 1, 1), (0, 1, 2, 3)],
    ids=["never opened", "opened twice", "the same grant twice", "more than the budget"],
)
def test_whole_records_that_no_ledger_wrote_in_this_order_are_refused(
    ledger: Ledger, path: Path, order: tuple[int, ...]
) -> None:
    ledger.reserve("a", "secret", 0, 60, "d0")
    ledger.reserve("a", "secret", 1, 40, "d1")
    ledger.close()
    other = Ledger(path.with_name("other"))
    other.open("a", TERMS)
    other.reserve("a", "secret", 2, 1, "d2")
    other.close()
    lines = path.read_bytes().splitlines(True) + path.with_name("other").read_bytes().splitlines(True)[1:]
    path.write_bytes(b"".join(lines[number] for number in order))
    with pytest.raises(InputError, match=f"line {len(order)} is damaged"):
        Ledger(path)


def test_a_second_process_waits_for_the_first_and_then_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Ledger(path)
    first.open("a", TERMS)
    monkeypatch.setattr("simulator.files.PATIENCE", 0.2)
    with pytest.raises(InputError, match="another process has had this account") as caught:
        Ledger(path)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(Ledger, path)
        first.reserve("a", "secret", 0, 5, "d")
        assert not waiting.done()
        first.close()
        second = waiting.result(timeout=30)
    assert second.spent("a") == 5


class Odd(str):
    """Text that is of another type."""


@pytest.mark.parametrize("token", [None, 0, b"secret", ["secret"], {}, "\ud800", Odd("other"), "s" * 10**6])
@pytest.mark.parametrize("account", ["a", "b", None, 7, ["a"], {"a": 1}, Odd("a"), "x\ny" * 10**5])
def test_an_account_or_a_token_of_any_type_is_refused_in_one_line(
    ledger: Ledger, path: Path, account: Any, token: Any
) -> None:
    before = path.read_bytes()
    assert len(refused(ledger.reserve, account, token, 0, 1, "d")) < 200
    assert (path.read_bytes(), ledger.spent("a")) == (before, 0)


@pytest.mark.parametrize(
    ("key", "count", "digest"),
    [
        *((key, 1, "d") for key in (0.0, True, None, [], "0", 10**4000, 2**63)),
        *((0, count, "d") for count in (1.0, True, None, 10**4000, -(10**4000))),
        *((0, 1, digest) for digest in (None, b"d")),
    ],
)
def test_a_key_count_or_digest_of_another_type_is_refused(
    ledger: Ledger, path: Path, key: Any, count: Any, digest: Any
) -> None:
    before = path.read_bytes()
    assert len(refused(ledger.reserve, "a", "secret", key, count, digest)) < 200
    assert (path.read_bytes(), ledger.grants("a")) == (before, {})


def test_a_grant_that_could_not_be_written_whole_is_not_given(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk for one moment: the ledger lives on, and its file stays good."""
    before = path.read_bytes()
    monkeypatch.setattr(DISK, "write", lambda file, data, at: Disk.write(DISK, file, data[: len(data) // 2], at))
    with pytest.raises(OSError, match="whole record"):
        ledger.reserve("a", "secret", 0, 10, "d")
    assert (path.read_bytes(), ledger.spent("a")) == (before, 0)
    monkeypatch.undo()
    assert ledger.reserve("a", "secret", 0, 10, "d").fresh
    ledger.close()
    assert Ledger(path).grants("a") == {0: (10, "d")}


def test_a_grant_that_the_disk_did_not_take_is_not_charged_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path, sync=True)
    ledger.open("a", TERMS)

    def fail(_: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(DISK, "sync", fail)
    with pytest.raises(OSError, match="input/output"):
        ledger.reserve("a", "secret", 0, 60, "d")
    monkeypatch.undo()
    assert ledger.reserve("a", "secret", 0, 60, "d") == Grant(60, fresh=True, remaining=40)
    ledger.close()
    assert Ledger(path).spent("a") == 60


def test_digests_and_tokens_are_told_apart_by_their_bytes() -> None:
    assert digest_of(b"ab") == digest_of(memoryview(b"ab")) != digest_of(b"ac")
    assert len(digest_of(b"")) == 32
    assert hash_token("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


BUDGETS = {"a": 20, "b": 7, "c": 1}
ACCOUNTS = st.sampled_from(sorted(BUDGETS))
KEYS = st.integers(0, 5)
COUNTS = st.integers(1, 9)
DIGESTS = st.sampled_from(["x", "y"])


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of requests, retries, restarts and kills amid a record, by several accounts, against a dictionary of
    what was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.path = self.folder / "log"
        self.ledger = Ledger(self.path)
        self.paid: dict[str, dict[int, tuple[int, str]]] = {}

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    def remaining(self, account: str) -> int:
        return BUDGETS[account] - sum(count for count, _ in self.paid[account].values())

    def terms(self, account: str) -> Terms:
        return Terms("v", "soft", BUDGETS[account], hash_token(account))

    def wrong(self, account: str, key: int, count: int, digest: str) -> bool:
        """Whether a request has to be refused."""
        if account not in self.paid:
            return True
        known = self.paid[account].get(key)
        return known != (count, digest) if known else count > self.remaining(account)

    @initialize()
    def first(self) -> None:
        self.open("a")

    @rule(account=ACCOUNTS)
    def open(self, account: str) -> None:
        self.paid.setdefault(account, {})
        assert self.ledger.open(account, self.terms(account)) == self.remaining(account)

    @rule(account=ACCOUNTS, key=KEYS, count=COUNTS, digest=DIGESTS)
    def reserve(self, account: str, key: int, count: int, digest: str) -> None:
        if self.wrong(account, key, count, digest):
            refused(self.ledger.reserve, account, account, key, count, digest)
            return
        fresh = key not in self.paid[account]
        self.paid[account][key] = (count, digest)
        grant = self.ledger.reserve(account, account, key, count, digest)
        assert grant == Grant(count, fresh, self.remaining(account))

    @rule(asked=st.lists(st.tuples(ACCOUNTS, KEYS, COUNTS, DIGESTS, st.booleans()), max_size=4))
    def reserve_all(self, asked: list[tuple[str, int, int, str, bool]]) -> None:
        """Several at once, by several accounts, some with another's token: each by itself, in their order."""
        requests = [Request(account, account if right else "w", *rest) for account, *rest, right in asked]  # type: ignore[arg-type]
        replies = self.ledger.reserve_all(requests)
        for (account, key, count, digest, right), reply in zip(asked, replies, strict=True):
            if not right or self.wrong(account, key, count, digest):
                assert isinstance(reply, Refused)
                continue
            fresh = key not in self.paid[account]
            self.paid[account][key] = (count, digest)
            assert reply == Grant(count, fresh, self.remaining(account))

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

    @rule(account=ACCOUNTS, other=ACCOUNTS, key=KEYS)
    def wrong_token(self, account: str, other: str, key: int) -> None:
        """Another's token is none."""
        refused(self.ledger.reserve, account, "wrong" if other == account else other, key, 1, "x")

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @rule(account=ACCOUNTS, key=KEYS, count=COUNTS, digest=DIGESTS, left=st.integers(0, 200))
    def killed_amid_a_record(self, account: str, key: int, count: int, digest: str, left: int) -> None:
        """A kill when ``left`` bytes of a new record were written, anything from none to all but its end: nobody was
        told of it, so it never was. What was told before it stays."""
        before = self.path.read_bytes()
        if account not in self.paid:
            self.ledger.open(account, self.terms(account))
        elif key in self.paid[account] or self.wrong(account, key, count, digest):
            return
        else:
            self.ledger.reserve(account, account, key, count, digest)
        kill(self.ledger, self.path)
        record = self.path.stat().st_size - len(before)
        os.truncate(self.path, len(before) + min(left, record - 1))
        self.ledger = Ledger(self.path)
        assert self.path.read_bytes() == before

    @rule(asked=st.lists(st.tuples(ACCOUNTS, KEYS, COUNTS, DIGESTS), max_size=4), share=st.floats(0, 1))
    def killed_amid_several(self, asked: list[tuple[str, int, int, str]], share: float) -> None:
        """A kill while several grants were written at once. Nobody was told of any; those that are whole were paid for,
        and whoever asks again under their keys gets them for that."""
        before = self.path.stat().st_size
        fresh = []
        for account, key, count, digest in asked:
            if not self.wrong(account, key, count, digest) and key not in self.paid[account]:
                self.paid[account][key] = (count, digest)
                fresh.append((account, key))
        self.ledger.reserve_all([Request(account, account, *rest) for account, *rest in asked])
        kill(self.ledger, self.path)
        os.truncate(self.path, before + int(share * (self.path.stat().st_size - before)))
        for account, key in fresh[self.path.read_bytes()[before:].count(b"\n") :]:
            del self.paid[account][key]
        self.ledger = Ledger(self.path)

    @precondition(lambda self: self.path.stat().st_size)
    @rule(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage(self, place: float, bit: int) -> None:
        """A bit that flipped, anywhere, is refused and nothing is cut off; the copy that is put back is good."""
        self.ledger.close()
        whole = self.path.read_bytes()
        broken = bytearray(whole)
        broken[int(place * len(whole))] ^= 1 << bit
        self.path.write_bytes(broken)
        with pytest.raises(InputError, match="is damaged"):
            Ledger(self.path)
        assert self.path.read_bytes() == broken
        self.path.write_bytes(whole)
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
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_several_requests_are_one_write_and_refusals_among_them_are_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, writes, waits = Ledger(path, sync=True), [], []
    ledger.open("a", Terms("v", "soft", 10, hash_token("t")))
    monkeypatch.setattr(DISK, "write", lambda file, data, at: writes.append(data) or Disk.write(DISK, file, data, at))
    monkeypatch.setattr(DISK, "sync", waits.append)

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
    grants = ledger.grants("a")
    ledger.close()
    assert Ledger(path).grants("a") == grants == {0: (4, "d"), 3: (6, "d")}


def test_of_several_grants_that_could_not_be_written_none_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)
    ledger.open("a", Terms("v", "soft", 10, hash_token("t")))
    asked = [Request("a", "t", key, 2, "d") for key in range(3)]
    ledger.reserve_all(asked[:1])
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(DISK, "write", lambda file, data, at: Disk.write(DISK, file, data[:-5], at))
        with pytest.raises(OSError, match="whole record"):
            ledger.reserve_all(asked)
    assert path.read_bytes() == before
    assert ledger.grants("a") == {0: (2, "d")}
    assert ledger.spent("a") == 2
    assert [reply.fresh for reply in ledger.reserve_all(asked) if isinstance(reply, Grant)] == [False, True, True]
    ledger.close()
    assert Ledger(path).spent("a") == 6
