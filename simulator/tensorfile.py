"""Tensors on disk: safetensors with string metadata, written atomically, refused with one clear line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from simulator.errors import InputError
from simulator.files import write_atomically


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors, of any device and memory layout, and metadata as the bytes of a safetensors file."""
    # safetensors knows no strides
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(contiguous, dict(metadata))


def decode(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata in the bytes of a safetensors file.

    Raises:
        InputError: they are none; ``where`` says in the message where they are from.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not a safetensors file, or damaged ({reason}); pickles are never loaded") from None
    return tensors, header.get("__metadata__") or {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata to ``path``, atomically."""
    write_atomically(path, encode(tensors, metadata))


def read_tensors(path: Path, what: str = "a file") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        InputError: missing, unreadable, or not safetensors; ``what`` says in the message what was wanted.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; wanted {what}")
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
