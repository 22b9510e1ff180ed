"""Small actors that keep bytes in the run directory for actors on other nodes.

They do without torch, which would cost each process seconds and half a gigabyte. All they keep is on disk, so an actor
that was killed has lost nothing when it is started again.
"""

from __future__ import annotations

from pathlib import Path

import ray

from simulator.files import Folder


class Shelf:
    """The models of a run as bytes, and what thefts asked and were answered. A replica takes a model when it is first
    asked for it."""

    def __init__(self, path: str) -> None:
        self._models = Folder(Path(path) / "models")
        self._transfer = Folder(Path(path) / "transfer")

    async def get(self, victim: str) -> bytes:
        """The bytes of a victim's model."""
        return self._models.file(victim).read_bytes()

    async def transfer_set(self, account: str) -> bytes | None:
        """The bytes of an account's transfer set; None where nothing was kept."""
        return self._transfer.read(account)


class Keeper:
    """The checkpoints of attackers and trainers."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(Path(path) / "checkpoints")

    async def read(self, name: str) -> bytes | None:
        """The bytes that were last written under a name; None before the first."""
        return self._folder.read(name)

    async def write(self, name: str, data: bytes) -> None:
        """Replaces the bytes under a name."""
        self._folder.write(name, data)


class LogFiles:
    """The parts of the query log. A part that is written again replaces the one before."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(Path(path) / "queries", ".parquet")

    async def write(self, name: str, data: bytes) -> None:
        """Writes a part."""
        self._folder.write(name, data)


ShelfActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Shelf)
LogFilesActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LogFiles)
KeeperActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Keeper)
