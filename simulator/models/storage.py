"""Models as safetensors: tensors, and a JSON text of what they are. Nothing in the file is ever executed.

The metadata entry ``exsim`` holds ``{"format": 1, "kind": "model", "spec": {...}}``; the others are the caller's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from simulator.component import describe
from simulator.errors import InputError
from simulator.files import write_atomically
from simulator.models.classifier import Classifier, ModelSpec, assemble
from simulator.tensorfile import decode, encode, read_tensors

_KEY = "exsim"
_FORMAT = 1


def to_bytes(model: Classifier, metadata: Mapping[str, str] | None = None) -> bytes:
    """The model as the bytes of a safetensors file, e.g. for Ray's object store."""
    entries = dict(metadata or {})
    if _KEY in entries:
        raise ValueError(f"the metadata entry {_KEY!r} is written by to_bytes itself")
    entries[_KEY] = json.dumps({"format": _FORMAT, "kind": "model", "spec": model.spec.model_dump(mode="json")})
    return encode(model.state_dict(), entries)


def from_bytes(data: bytes) -> Classifier:
    """The model that `to_bytes` wrote, on the CPU, in evaluation mode.

    Raises:
        InputError: as `load_model`.
    """
    return _assembled(*decode(data, "model"), "model")[0]


def save_model(model: Classifier, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the model to ``path``, whole or not at all: a reader sees the old file or the new one.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_atomically(Path(path), to_bytes(model, metadata))
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from None


def load_model(path: str | os.PathLike[str]) -> tuple[Classifier, dict[str, str]]:
    """The model in ``path``, on the CPU, in evaluation mode, and the caller's metadata entries.

    Raises:
        InputError: the file is missing, damaged, no safetensors file, not of this program, of an unknown architecture,
            or its weights do not fit the architecture or are not finite.
    """
    return _assembled(*read_tensors(Path(path), "a model"), os.fspath(path))


def _assembled(tensors: dict[str, Tensor], metadata: dict[str, str], where: str) -> tuple[Classifier, dict[str, str]]:
    spec = _spec(metadata.pop(_KEY, None), where)
    # On the meta device nothing is allocated or drawn, so a file that lies about its size costs nothing.
    with torch.device("meta"):
        model = assemble(spec)
    _check(tensors, model, where)
    model.load_state_dict(tensors, assign=True)
    # the layout that a model has after training: another one changes the last bits of an answer
    return model.eval().to(memory_format=torch.channels_last), metadata


def _spec(text: str | None, where: str) -> ModelSpec:
    if text is None:
        raise InputError(f"{where}: no model of this program: the metadata entry {_KEY!r} is missing")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or entry.get("kind") != "model":
        raise InputError(f"{where}: no model of this program: its metadata entry {_KEY!r} is {text[:100]!r}")
    if entry.get("format") != _FORMAT:
        raise InputError(f"{where}: format {entry.get('format')!r} is not known; this program reads format {_FORMAT}")
    try:
        return ModelSpec.model_validate_json(json.dumps(entry.get("spec")))
    except ValidationError as error:
        raise InputError(f"{where}: its spec: {describe(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: its spec is nested too deeply") from None


def _check(tensors: Mapping[str, Tensor], model: Classifier, where: str) -> None:
    """Refuse tensors that are not exactly those of ``model``, or not finite."""
    expected = model.state_dict()
    for name in (*expected, *tensors):
        if name not in tensors or name not in expected:
            problem = "is missing" if name in expected else "is not part of it"
            raise InputError(f"{where}: does not fit {model.spec.architecture}: tensor {name!r} {problem}")
        found, wanted = ((tuple(tensor.shape), tensor.dtype) for tensor in (tensors[name], expected[name]))
        if found != wanted:
            raise InputError(
                f"{where}: does not fit {model.spec.architecture}: tensor {name!r} is "
                f"{found[1]} {found[0]}, not {wanted[1]} {wanted[0]}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise InputError(f"{where}: tensor {name!r} has NaN or infinite values")
