"""State of long work, kept between interruptions: tensors and JSON values in one safetensors file.

A state is a flat mapping. :func:`pack` and :func:`unpack` turn modules, optimisers and generators into entries of one
and back, so that work continued from a state gives bit for bit what uninterrupted work would have given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simulator.errors import InputError
from simulator.files import Folder, write_atomically
from simulator.tensorfile import decode, encode

#: seconds of work that a kill may cost; more, where saving takes long
INTERVAL = 10.0
#: seconds of work to each second of saving, at least: saving takes a twentieth of the time at most
RATIO = 20.0

#: tensors, and values that JSON can hold
State = dict[str, Any]


class Checkpoint(Protocol):
    """Where a computation keeps its state."""

    def load(self) -> State | None:
        """The last state that was saved, or None at the first start."""
        ...

    def due(self) -> bool:
        """Whether it is time to save again; asked at every step, so cheap."""
        ...

    def save(self, state: State) -> None:
        """Replaces the saved state."""
        ...


class NoCheckpoint:
    """Keeps nothing: the work starts from the beginning, which gives the same result and pays no query twice."""

    def load(self) -> State | None:
        """None."""
        return None

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, state: State) -> None:
        """Does nothing."""


NO_CHECKPOINT = NoCheckpoint()


class TimedCheckpoint:
    """Keeps the state as bytes, at most every ``interval`` seconds, wherever ``read`` and ``write`` put them.

    A large state is kept less often: after a saving, :data:`RATIO` times as long as it took goes by until the next.
    What it took counts from the step that found it due to the end of the write. An interval of 0 saves at every step.
    """

    def __init__(
        self, read: Callable[[], bytes | None], write: Callable[[bytes], object], interval: float = INTERVAL
    ) -> None:
        self._read, self._write, self._interval = read, write, interval
        self._saved, self._pause, self._due = time.monotonic(), interval, 0.0

    def load(self) -> State | None:
        """See :class:`Checkpoint`. One that is damaged is none: the work begins anew, and what was asked is paid."""
        data = self._read()
        try:
            return None if data is None else from_bytes(data)
        except InputError:
            return None

    def due(self) -> bool:
        """See :class:`Checkpoint`."""
        now = time.monotonic()
        self._due = now if now - self._saved >= self._pause else 0.0
        return bool(self._due)

    def save(self, state: State) -> None:
        """See :class:`Checkpoint`."""
        begun, self._due = self._due or time.monotonic(), 0.0
        self._write(to_bytes(state))
        self._saved = time.monotonic()
        if self._interval:
            self._pause = max(self._interval, RATIO * (self._saved - begun))


def to_bytes(state: State) -> bytes:
    """A state as a safetensors file."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    return encode(tensors, {"values": json.dumps(values)})


def from_bytes(data: bytes) -> State:
    """The state that :func:`to_bytes` wrote.

    Raises:
        InputError: the bytes are no such file.
    """
    try:
        tensors, metadata = decode(data, "checkpoint")
        return {**json.loads(metadata["values"]), **tensors}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged checkpoint: {' '.join(str(error).split())}") from None


class FileCheckpoint(TimedCheckpoint):
    """Keeps the state in one file, written atomically, at most every ``interval`` seconds."""

    def __init__(self, path: Path, interval: float = INTERVAL) -> None:
        super().__init__(
            lambda: path.read_bytes() if path.exists() else None, lambda data: write_atomically(path, data), interval
        )


class CheckpointFolder(Folder):
    """The checkpoints of a run, one file each."""

    def checkpoint(self, name: str, interval: float = INTERVAL) -> FileCheckpoint:
        """The checkpoint of one piece of work."""
        return FileCheckpoint(self.file(name), interval)


def pack(**parts: nn.Module | torch.optim.Optimizer | torch.Generator) -> State:
    """The state of modules, optimisers and generators, each under its keyword's name. Tensors are copied."""
    state: State = {}
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            state[f"{name}.generator"] = part.get_state().clone()
        elif isinstance(part, nn.Module):
            state |= {f"{name}.module.{key}": value.detach().cpu().clone() for key, value in part.state_dict().items()}
        else:
            slots = part.state_dict()["state"]
            for slot, values in slots.items():
                for key, value in values.items():
                    is_tensor = isinstance(value, Tensor)
                    state[f"{name}.slot.{slot}.{key}"] = value.detach().cpu().clone() if is_tensor else value
            state[f"{name}.rates"] = [group["lr"] for group in part.param_groups]
    return state


def unpack(state: Mapping[str, Any], **parts: nn.Module | torch.optim.Optimizer | torch.Generator) -> None:
    """Puts what :func:`pack` took back into the same kind of parts."""
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            part.set_state(state[f"{name}.generator"])
        elif isinstance(part, nn.Module):
            prefix = f"{name}.module."
            part.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
        else:
            whole, prefix = part.state_dict(), f"{name}.slot."
            slots: dict[int, dict[str, Any]] = {}
            for key, value in state.items():
                if key.startswith(prefix):
                    slot, _, entry = key.removeprefix(prefix).partition(".")
                    slots.setdefault(int(slot), {})[entry] = value
            _lay_out_like(part, slots)
            for group, rate in zip(whole["param_groups"], state[f"{name}.rates"], strict=True):
                group["lr"] = rate
            part.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})


def _lay_out_like(optimizer: torch.optim.Optimizer, slots: dict[int, dict[str, Any]]) -> None:
    """Gives the optimiser's tensors the strides of their parameters, which a file does not keep.

    Fused optimisers step through both as raw memory, and would pair the wrong entries without a word.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for slot, values in slots.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[slot].shape:
                values[key] = torch.empty_like(parameters[slot], device="cpu", dtype=value.dtype).copy_(value)
