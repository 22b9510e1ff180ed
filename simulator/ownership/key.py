"""Key samples: the owner's secret, and the evidence of every test that asks for a watermark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulator.errors import InputError
from simulator.ownership.evidence import Evidence, load_evidence, names_of, save_evidence

#: the kind of the evidence that a key is
KEY = "key"


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

    def evidence(self) -> Evidence:
        """The key as evidence of the kind :data:`KEY`."""
        return Evidence(KEY, {"images": self.images, "labels": self.labels}, self.classes, self.info)

    @classmethod
    def of(cls, evidence: Evidence) -> KeySamples:
        """The key that evidence holds.

        Raises:
            InputError: it is of another kind, or its labels do not fit its images.
        """
        images, labels, classes = evidence.images, evidence.tensors.get("labels"), evidence.classes
        if evidence.kind != KEY or labels is None or len(evidence.tensors) != 2:
            raise InputError(f"not a key file of this project (it holds {names_of(evidence.tensors)})")
        if labels.shape != (len(images),):
            raise InputError(f"key of a wrong shape: labels {tuple(labels.shape)} of {len(images)} images")
        if labels.dtype != torch.int64 or not ((labels >= 0) & (labels < classes)).all():
            raise InputError(f"key labels must be int64 in 0..{classes - 1}")
        return cls(images, labels, classes, evidence.info)


def save_key(key: KeySamples, path: Path) -> None:
    """Writes the key to one safetensors file, atomically."""
    save_evidence(key.evidence(), path)


def load_key(path: Path) -> KeySamples:
    """Reads what :func:`save_key` wrote.

    Raises:
        InputError: the file is missing, not safetensors, not a key, or its tensors do not fit together.
    """
    evidence = load_evidence(path)
    try:
        return KeySamples.of(evidence)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
