"""Key samples: the owner's secret, in memory and on disk (safetensors with JSON metadata, never a pickle)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulator.errors import InputError
from simulator.tensorfile import read_tensors, write_tensors


@dataclass(frozen=True)
class KeySamples:
    """Images and the labels that a marked model answers them with.

    Attributes:
        images: ``(N, C, H, W)``, uint8 (or float32 in [0, 1] for schemes whose triggers are not 8-bit images).
        labels: ``(N,)`` int64 in ``[0, classes)``.
        classes: K of the victim's task.
        info: JSON values that say where the key came from: scheme, source classes, target, what the filter kept.
    """

    images: Tensor
    labels: Tensor
    classes: int
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor, **info: Any) -> KeySamples:
        """The samples at ``index`` (int64 or bool), with more ``info``."""
        return KeySamples(self.images[index], self.labels[index], self.classes, {**self.info, **info})


def save_key(key: KeySamples, path: Path) -> None:
    """Writes the key to one safetensors file, atomically."""
    header = {"format": 1, "kind": "key", "classes": key.classes, "info": dict(key.info)}
    write_tensors(path, {"images": key.images, "labels": key.labels}, {"exsim": json.dumps(header, sort_keys=True)})


def load_key(path: Path) -> KeySamples:
    """Reads what :func:`save_key` wrote.

    Raises:
        InputError: the file is missing, not safetensors, not a key, or its tensors do not fit together.
    """
    tensors, metadata = read_tensors(path, "a key file")
    try:
        header = json.loads(metadata["exsim"])
        classes, info = int(header["classes"]), dict(header["info"])
        good = header["kind"] == "key"
    except (KeyError, TypeError, ValueError, OverflowError):
        good = False
    if not good or set(tensors) != {"images", "labels"}:
        found = " ".join(", ".join(sorted(tensors)).split()) or "nothing"
        raise InputError(f"{path}: not a key file of this project (it holds {found})")
    images, labels = tensors["images"], tensors["labels"]
    whole = images.dtype in (torch.uint8, torch.float32) and images.ndim == 4 and 0 not in images.shape[1:]
    if not whole or labels.shape != (len(images),):
        shapes = f"images {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)}"
        raise InputError(f"{path}: key of a wrong shape: {shapes}; allowed: (N, C, H, W) uint8 or float32 and (N,)")
    if labels.dtype != torch.int64 or not (((labels >= 0) & (labels < classes)).all() and len(labels)):
        raise InputError(f"{path}: key labels must be int64 in 0..{classes - 1}, at least one")
    if images.is_floating_point() and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise InputError(f"{path}: key images of type float32 must lie in [0, 1]")
    return KeySamples(images, labels, classes, info)
