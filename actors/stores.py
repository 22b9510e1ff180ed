"""Small actors that keep bytes in the run directory for those who work on other nodes.

Neither needs torch, which would cost each process seconds and half a gigabyte. What they keep is on disk, so one that
was killed and started again has lost nothing.
"""

from __future__ import annotations

from pathlib import Path

import ray

from simulator.files import Folder


class Shelf:
    """The victims' models as bytes, from which every replica takes what it is asked for."""

    def __init__(self, path: str) -> None:
        self._models = Folder(Path(path) / "models")

    async def get(self, victim: str) -> bytes:
        """A model from the shelf."""
        return self._models.file(victim).read_bytes()


class Keeper:
    """The checkpoints of attackers and trainers."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(Path(path) / "checkpoints")

    async def read(self, name: str) -> bytes | None:
        """What was last written under a name."""
        return self._folder.read(name)

    async def write(self, name: str, data: bytes) -> None:
        """Replaces what is kept under a name."""
        self._folder.write(name, data)


class LogFiles:
    """The parts of the query log. A part that is written again replaces itself."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(Path(path) / "queries", ".parquet")

    async def write(self, name: str, data: bytes) -> None:
        """Writes a part."""
        self._folder.write(name, data)


ShelfActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Shelf)
LogFilesActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LogFiles)
KeeperActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Keeper)
