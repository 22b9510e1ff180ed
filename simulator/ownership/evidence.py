"""What an owner holds against a suspect, in memory and on disk (safetensors with JSON metadata, never a pickle)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulator.errors import InputError
from simulator.tensorfile import read_tensors, write_tensors

_FORMAT = 1
_KIND = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Evidence:
    """Images to ask a suspect, and all that an ownership test needs to judge the answers.

    Attributes:
        kind: what the tensors mean, e.g. ``"key"``: images with the labels that a marked model gives them. A test
            judges evidence of its own kind.
        tensors: by name. Every kind has ``"images"``, ``(N, C, H, W)`` uint8, or float32 in [0, 1]; the others are the
            kind's own, e.g. ``"labels"`` of a key.
        classes: K of the victim's task.
        info: JSON values: where the evidence comes from, and the settings of the test that gathered it.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    classes: int
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images(self) -> Tensor:
        """The images that a suspect may be asked."""
        return self.tensors["images"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def save_evidence(evidence: Evidence, path: Path) -> None:
    """Writes the evidence to one safetensors file, atomically."""
    header = {"format": _FORMAT, "kind": evidence.kind, "classes": evidence.classes, "info": dict(evidence.info)}
    write_tensors(path, evidence.tensors, {"exsim": json.dumps(header, sort_keys=True)})


def load_evidence(path: Path) -> Evidence:
    """Reads what :func:`save_evidence` wrote.

    Raises:
        InputError: the file is missing, not safetensors, no evidence, or its images are none.
    """
    tensors, metadata = read_tensors(path, "a key file")
    header = _header(metadata)
    if header is None or "images" not in tensors:
        raise InputError(f"{path}: not a key file of this project (it holds {names_of(tensors)})")
    images, kind = tensors["images"], header["kind"]
    whole = images.dtype in (torch.uint8, torch.float32) and images.ndim == 4 and 0 not in images.shape
    if not whole:
        raise InputError(
            f"{path}: {kind} of a wrong shape: images {tuple(images.shape)} {images.dtype}; allowed: (N, C, H, W), "
            "at least one, uint8 or float32"
        )
    if images.is_floating_point() and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise InputError(f"{path}: {kind} images of type float32 must lie in [0, 1]")
    return Evidence(kind, tensors, header["classes"], header["info"])


def names_of(tensors: Mapping[str, Tensor]) -> str:
    """The names of tensors as one short line, ``"images, labels"``."""
    return " ".join(", ".join(sorted(tensors)).split())[:200] or "nothing"


def _header(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What the metadata says of the file; None where it is not evidence of this program."""
    try:
        header = json.loads(metadata["exsim"])
        kind, classes, info = header["kind"], header["classes"], header["info"]
        known = header["format"] == _FORMAT and _KIND.fullmatch(kind) and isinstance(info, dict)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return header if known and type(classes) is int and 1 <= classes < 2**31 else None
