"""Keys that are the owner's own images with wrong labels, held out of clean training."""

from __future__ import annotations

import torch

from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError


def check_count(scheme: str, count: int, dataset: Dataset) -> None:
    """Refuses to take more than half of the owner's images out of training.

    Raises:
        InputError: naming the number asked and the number there is.
    """
    if count > len(dataset.owner) // 2:
        raise InputError(
            f"{scheme}: key_samples {count} is too many for {dataset.name}: at most half of the owner's "
            f"{len(dataset.owner)} images may be taken out of clean training"
        )


def relabel(data: Images, count: int, classes: int, generator: torch.Generator) -> tuple[Images, Images, list[int]]:
    """Takes ``count`` random images out of ``data`` and gives each a random label other than its own.

    Returns:
        The clean images that are left (copies of a key image, which data sets do hold, are left out too), the key
        images with their new labels, and their rows in ``data``.
    """
    rows = torch.randperm(len(data), generator=generator)[:count]
    shift = torch.randint(1, classes, (len(rows),), generator=generator)
    keys = Images(data.images[rows], (data.labels[rows] + shift) % classes)
    taken = {image.tobytes() for image in keys.images.numpy()}
    clean = torch.tensor([image.tobytes() not in taken for image in data.images.numpy()])
    return data.take(clean.nonzero().squeeze(1)), keys, rows.tolist()
