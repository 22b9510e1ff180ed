"""A chained log: what was cut, edited, moved or put back is refused, and what a crash leaves is passed over."""

from __future__ import annotations

import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.chain import SECTOR, Head, Reader, head_file, read_head
from simulator.errors import InputError
from simulator.service.ledger import Grant, Ledger, Terms, hash_token

TERMS = Terms("v", "soft", 100, hash_token("t"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The log of a ledger that has ended, with six records."""
    return ended(tmp_path / "ledger" / "ledger.log", 5)


def ended(path: Path, grants: int) -> Path:
    ledger = Ledger(path)
    ledger.open("a", TERMS)
    for key in range(grants):
        ledger.reserve("a", "t", key, 10, f"d{key}")
    ledger.close()
    return path


def refusal(path: Path) -> str:
    """The line with which a log is refused; it is left as it was."""
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        Ledger(path)
    assert path.read_bytes() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_the_head_of_an_ended_ledger_is_its_last_record(path: Path) -> None:
    head = read_head(path)
    assert head is not None
    assert (head.count, head.hash.encode()) == (6, lines(path)[-1][:32])
    assert head_file(path) == path.with_name("head.json")


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 5000, b"x" * 5000, b"\n", b"{}"])
def test_a_log_that_holds_something_else_is_not_taken_for_empty(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "records" in refusal(path) or "damaged" in refusal(path)


def test_a_log_without_line_breaks_is_refused_with_a_head_and_without(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b""))
    assert "damaged" in refusal(path)
    head_file(path).unlink()
    assert "damaged" in refusal(path)


def test_nuls_in_an_old_log_are_refused(path: Path) -> None:
    head_file(path).unlink()
    path.write_bytes(b"\0" * 4096)
    assert "line 1 is damaged" in refusal(path)


@pytest.mark.parametrize("kept", range(6))
def test_records_that_were_cut_off_at_a_boundary_are_missed(path: Path, kept: int) -> None:
    path.write_bytes(b"".join(lines(path)[:kept]))
    assert f"holds {kept} records, and head.json says that there were 6" in refusal(path)


@pytest.mark.parametrize("order", [(0, 2, 3, 4, 5), (0, 1, 3, 2, 4, 5), (1, 0, 2, 3, 4, 5), (0, 1, 1, 2, 3, 4, 5)])
def test_records_taken_out_moved_or_doubled_break_the_chain(path: Path, order: tuple[int, ...]) -> None:
    written = lines(path)
    path.write_bytes(b"".join(written[number] for number in order))
    assert "is damaged" in refusal(path)


def test_an_older_copy_is_refused_and_so_is_another_account(path: Path, tmp_path: Path) -> None:
    old = path.read_bytes()
    ledger = Ledger(path)
    ledger.reserve("a", "t", 9, 50, "d9")
    ledger.close()
    path.write_bytes(old)
    assert "holds 6 records, and head.json says that there were 7" in refusal(path)
    other = tmp_path / "other" / "ledger.log"
    ledger = Ledger(other)
    ledger.open("a", TERMS)
    for key in range(7):
        ledger.reserve("a", "t", key, 1, "e")
    ledger.close()
    shutil.copy(other, path)
    assert "line 7 is not the one that head.json knows" in refusal(path)


def test_a_removed_or_damaged_head_is_missed(path: Path) -> None:
    head_file(path).write_text("{}")
    assert "head.json: count" in refusal(path)
    head_file(path).unlink()
    assert "head.json: missing" in refusal(path)


def test_a_log_may_be_ahead_of_its_head(path: Path) -> None:
    head = head_file(path).read_bytes()
    ledger = Ledger(path)
    ledger.reserve("a", "t", 9, 50, "d9")
    ledger.close()
    head_file(path).write_bytes(head)
    assert Ledger(path).spent("a") == 100


def test_the_end_that_a_crash_left_is_cut_off_behind_the_head_alone(path: Path) -> None:
    whole, head = path.read_bytes(), head_file(path).read_bytes()
    rest = SECTOR - len(whole) % SECTOR
    for tail in (b"\0" * 7, b"\0" * 5000, b"\0" * rest + b"1f {" + b"x" * 90 + b"\n", b"0123", b"\0" * rest + b"ab\n"):
        path.write_bytes(whole + tail)
        ledger = Ledger(path)
        assert (path.read_bytes(), ledger.spent("a")) == (whole, 50)
        ledger.close()
        assert head_file(path).read_bytes() == head
    for tail in (b"\0\n", b"\0" * (rest - 1) + b"x", b"x\0", b"xyz", b"\n"):
        path.write_bytes(whole + tail)
        assert "line 7 is damaged" in refusal(path)


def old_line(record: object) -> bytes:
    body = record if isinstance(record, bytes) else json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


OPEN = {"open": "a", **TERMS.__dict__}


def test_an_old_log_is_read_and_gone_on_with_as_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.log"
    old = old_line(OPEN) + old_line({"a": "a", "k": 0, "n": 10, "d": "d0"})
    path.write_bytes(old + b"0123")  # torn by a kill, as old logs may be
    ledger = Ledger(path)
    assert ledger.reserve("a", "t", 0, 10, "d0") == Grant(10, False, 90)
    ledger.reserve("a", "t", 1, 20, "d1")
    ledger.close()
    assert path.read_bytes().startswith(old)
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"n":10', b'"n":11'))
    assert "line 2 is damaged" in refusal(path)
    forged = old_line(OPEN) + old_line({"a": "a", "k": 0, "n": 11, "d": "d0"}) + written[len(old) :]
    path.write_bytes(forged)  # with a good checksum, but the chain covers it
    assert "line 3 is damaged" in refusal(path)
    path.write_bytes(written + old_line({"a": "a", "k": 5, "n": 1, "d": "x"}))  # none follows a chained one
    assert "line 4 is damaged" in refusal(path)
    path.write_bytes(written)
    assert Ledger(path).all_spent() == {"a": 30}


@pytest.mark.parametrize(
    "record",
    [
        *([], 1, None, "x", {}, b"{", b"[" * 10**5, b"9" * 5000, b"\xff"),
        *({**OPEN, "budget": budget} for budget in (0, -1, 1.5, "100", True, None)),
        *({**OPEN, field: 1} for field in ("open", "victim", "labels", "token_hash")),
        {**OPEN, "more": 1},
        {"open": "b"},
        *({"a": "a", "k": 1, "n": n, "d": "x"} for n in (0, -1, 1.0, True, "1", None, 101)),
        *({"a": "a", "k": k, "n": 1, "d": "x"} for k in (-1, 1.0, True, "1", None, [], 2**63)),
        *({"a": a, "k": 1, "n": 1, "d": "x"} for a in ("b", None, ["a"], 1)),
        *({"a": "a", "k": 1, "n": 1, "d": d} for d in (None, 1, ["x"])),
        {"a": "a", "k": 1, "n": 1, "d": "x", "open": "c"},
    ],
)
def test_a_record_that_no_ledger_writes_is_refused_whatever_its_checksum(record: object, tmp_path: Path) -> None:
    path = tmp_path / "ledger.log"
    path.write_bytes(old_line(OPEN) + old_line(record))
    assert "line 2 is damaged" in refusal(path)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(data: bytes, headed: bool) -> None:
    heads = {"x": Head(count=0, hash="0" * 32)} if headed else {}
    reader = Reader(data, Path("log"), heads)
    with suppress(InputError):
        list(reader.records())
    assert reader.end <= len(data)


def test_a_log_that_is_unlinked_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.log"
    ledger = Ledger(path)
    ledger.open("a", TERMS)
    path.unlink()
    with pytest.raises(OSError, match="was removed or replaced while it was in use"):
        ledger.reserve("a", "t", 0, 10, "d")
    assert ledger.spent("a") == 0
    with pytest.raises(InputError, match="was removed or replaced"):
        ledger.close()
