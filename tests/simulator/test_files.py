"""Files that are whole or not there, and never written through a symbolic link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.files import Log, demand_plain, locked, write_atomically
from simulator.service.ledger import Ledger


def test_a_file_is_replaced_with_its_mode_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    write_atomically(path, b"one", mode=0o600)
    write_atomically(path, b"two", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o600)
    assert list(path.parent.iterdir()) == [path]


def test_the_target_of_a_link_is_never_written(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "run" / "link"
    mine.write_bytes(b"mine")
    link.parent.mkdir()
    link.symlink_to(mine)
    write_atomically(link, b"new")  # takes the link's place
    assert (mine.read_bytes(), link.is_symlink(), link.read_bytes()) == (b"mine", False, b"new")
    for name, use in (
        ("ledger.log", lambda path: Ledger(path)),
        ("log", lambda path: Log(path)),
        (".lock", lambda path: locked(path.parent).__enter__()),
    ):
        place = tmp_path / "run" / name
        for target in (mine, tmp_path / "dangling"):
            place.symlink_to(target)
            with pytest.raises(InputError, match=f"{name}: is no regular file") as caught:
                use(place)
            assert "\n" not in str(caught.value)
            place.unlink()
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "dangling").exists()


def test_a_log_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ledger.log")
    with pytest.raises(InputError, match="is no regular file"):
        Ledger(tmp_path / "ledger.log")


@pytest.mark.parametrize("place", ["report/index.html", ".lock", "ledger", "logs/driver.log", "logs/ray", "a/b/c/d"])
def test_a_run_directory_holds_files_and_folders_alone(place: str, tmp_path: Path) -> None:
    for kind in ("link", "pipe"):
        run = tmp_path / kind
        (run / place).parent.mkdir(parents=True)
        (run / "results").mkdir()
        demand_plain(run)
        if kind == "link":
            (run / place).symlink_to(tmp_path)
        else:
            os.mkfifo(run / place)
        with pytest.raises(InputError, match=f"{place}: is .*, and a run directory holds none"):
            demand_plain(run)
    named = tmp_path / "named"
    named.symlink_to(tmp_path / "link" / "results")  # the user may name a directory by a link
    demand_plain(named)
    demand_plain(tmp_path / "nowhere")


def test_links_of_other_programs_logs_are_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "logs" / "ray").mkdir(parents=True)
    (tmp_path / "logs" / "ray" / "latest").symlink_to(tmp_path)
    demand_plain(tmp_path)


@pytest.mark.parametrize("what", ["removed", "replaced", "cut", "grown"])
def test_a_log_that_somebody_else_touches_takes_nothing_more(what: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path)
    log.append(b"one\n")
    if what in ("removed", "replaced"):
        path.unlink()
    if what == "replaced":
        path.write_bytes(b"one\n")
    if what == "cut":
        os.truncate(path, 2)
    if what == "grown":
        with path.open("ab") as file:
            file.write(b"two\n")
    with pytest.raises(OSError, match="while it was in use"):
        log.append(b"three\n")
    log.close()
