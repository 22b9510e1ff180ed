"""``run.json``: how the rows beside it came to be."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from simulator.chain import Head
from simulator.component import Settings, describe
from simulator.errors import InputError
from simulator.files import write_atomically


class Host(Settings):
    """The machine that drove the run; ``cpus`` is its number of logical cores."""

    hostname: str
    cpus: int | None
    platform: str


class RunInfo(Settings):
    """``run.json``: how the rows beside it came to be. Change it with ``info.model_copy(update={...})``.

    ``account`` is the head of the query account when the run last ended, or None where none has ended yet.
    """

    name: str
    status: Literal["running", "done", "failed", "interrupted"]
    mode: Literal["ray", "local"]
    started: AwareDatetime
    finished: AwareDatetime | None = None
    argv: list[str]
    seeds: list[int]
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    host: Host
    config_sha256: str
    account: Head | None = None
    warnings: list[str] = Field(default_factory=list)


def collect_provenance(
    argv: Sequence[str], *, name: str, mode: Literal["ray", "local"], seeds: Sequence[int], config_yaml: str
) -> RunInfo:
    """The provenance of a run that starts now. ``config_yaml`` is the text of ``config.yaml``, which is hashed."""
    commit, dirty = _git(Path(__file__))
    return RunInfo(
        name=name,
        status="running",
        mode=mode,
        started=datetime.now(UTC),
        argv=list(argv),
        seeds=list(seeds),
        git_commit=commit,
        git_dirty=dirty,
        versions=_versions(("extraction-simulator", "torch", "torchvision", "ray", "numpy", "pydantic", "pyarrow")),
        host=Host(hostname=platform.node(), cpus=os.cpu_count(), platform=platform.platform()),
        config_sha256=hashlib.sha256(config_yaml.encode()).hexdigest(),
    )


def write_run_info(run_dir: Path, info: RunInfo) -> Path:
    """Write ``run.json``, atomically."""
    checked = RunInfo.model_validate(info.model_dump())  # because model_copy(update=...) checks nothing
    path = run_dir / "run.json"
    write_atomically(path, (checked.model_dump_json(indent=2) + "\n").encode())
    return path


def read_run_info(run_dir: Path) -> RunInfo:
    """Read ``run.json``.

    Raises:
        InputError: it is missing or is not what :func:`write_run_info` writes.
    """
    path = run_dir / "run.json"
    try:
        return RunInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{run_dir} is not a run directory: run.json: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(source: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that tracks ``source``; ``(None, None)`` if there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # fails in a foreign checkout that we are installed in
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
