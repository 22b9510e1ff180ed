"""Data sets by name, as uint8 tensors in memory, split into an owner's, an attacker's and a test part.

The owner trains on its part; the attacker holds images of the same source that the owner never saw (its query pool);
the test part belongs to the collector alone. The three never share an image.

A name stands for a known set, e.g. ``mnist`` (:mod:`simulator.data.known_sets`). A path stands for a ``*.npz`` file or
a folder of images (:mod:`simulator.data.images`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field, field_validator

from simulator.component import Settings, one_of
from simulator.data.images import Images, Parts, convert_images, read_folder, read_npz
from simulator.data.known_sets import KNOWN, AbsentError, KnownSet, read_known
from simulator.errors import InputError

__all__ = [
    "AbsentError",
    "DataConfig",
    "Dataset",
    "Images",
    "Outline",
    "check_name",
    "convert_images",
    "describe_datasets",
    "load",
    "outline",
    "training_images",
]


class DataConfig(Settings):
    """Which data set, and how it is split.

    Default numbers of images: ``test`` is the whole official test part, ``attacker`` is a sixth of the training images,
    and ``owner`` is the rest. A set without an official test part gives a sixth of its images for one. Digits has 900
    images for the owner, 500 for the attacker and 397 for the test. A number that is given is never changed, and an
    impossible one is an error.
    """

    #: a known set, a ``*.npz`` file or an image folder
    name: str
    #: side of the square images in pixels; the default is the set's own (see :func:`describe_datasets`)
    size: int | None = Field(default=None, ge=8, le=512)
    owner: int | None = Field(default=None, ge=1)
    attacker: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)
    split_seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        check_name(name)
        return name


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in its three disjoint parts; all images have the same number of channels and are square."""

    name: str
    classes: int
    owner: Images
    attacker: Images
    test: Images

    @property
    def channels(self) -> int:
        """1 or 3."""
        return int(self.owner.images.shape[1])

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self.owner.images.shape[2])

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the owner's images, in [0, 1]; with ``std``, the victim's own normalisation."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the owner's images, in [0, 1]; never below one grey level."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # whole numbers: exact, so that the same on every machine and with any number of threads
        sums = torch.zeros(self.channels, dtype=torch.int64)
        squares = torch.zeros(self.channels, dtype=torch.int64)
        for start in range(0, len(self.owner), 1024):
            values = self.owner.images[start : start + 1024].to(torch.int32)
            sums += values.sum(dim=(0, 2, 3), dtype=torch.int64)
            squares += (values * values).sum(dim=(0, 2, 3), dtype=torch.int64)
        count = len(self.owner) * self.size**2
        means = [int(total) / count for total in sums]
        variances = [int(total) / count - mean**2 for total, mean in zip(squares, means, strict=True)]
        stds = [max(variance, 1.0) ** 0.5 / 255 for variance in variances]
        return tuple(mean / 255 for mean in means), tuple(stds)


@dataclass(frozen=True)
class Outline:
    """The format of a data set's images, and how many each part gets. The images need not be there.

    ``foreign`` maps the other sets that pools draw from to their numbers of images, as far as these are known.
    """

    classes: int
    channels: int
    size: int
    owner: int
    attacker: int
    test: int
    foreign: Mapping[str, int] = field(default_factory=dict)


def outline(config: DataConfig, data_dir: Path | None = None) -> Outline:
    """The outline of the data set that :func:`load` gives. A known set is not read; a file or a folder is.

    Raises:
        InputError: the split is impossible, or the file or folder is no data set.
    """
    known = KNOWN.get(config.name)
    if known is None:
        data = load(config, data_dir)
        counts = (len(data.owner), len(data.attacker), len(data.test))
        return Outline(data.classes, data.channels, data.size, *counts)
    return Outline(
        known.classes, known.channels, config.size or known.size, *_numbers(config, known.train[0], known.test)
    )


def describe_datasets() -> list[tuple[str, str]]:
    """Every known set's name with one line about it, for ``exsim list datasets``."""
    return [(name, _description(known)) for name, known in KNOWN.items()]


def _description(known: KnownSet) -> str:
    colour = "grey" if known.channels == 1 else "colour"
    counts = f"{known.train[0]} images" if known.test is None else f"{known.train[0]} and {known.test} test images"
    facts = (counts, known.note, f"{known.classes} classes", colour, f"{known.size}x{known.size}")
    return f"{known.what}: {', '.join(filter(None, facts))}"


def check_name(name: str, also: tuple[str, ...] = ()) -> None:
    """Refuse a name that is no known set, none of ``also`` and no path. Only the form of a path is checked.

    Raises:
        InputError: lists what is allowed.
    """
    if name not in also and name not in KNOWN and not _is_path(name):
        raise InputError(one_of(name, [*also, *KNOWN, "a *.npz file or an image folder"]))


def _is_path(name: str) -> bool:
    separators = [mark for mark in (os.sep, os.altsep) if mark]
    return name.endswith(".npz") or any(mark in name for mark in separators) or (bool(name) and Path(name).is_dir())


def load(config: DataConfig, data_dir: Path | None = None, *, download: bool = True) -> Dataset:
    """A data set, split by ``config.split_seed``.

    The training images are permuted once. The owner takes its images from the front and the attacker from the back, so
    more images for one of them never change those of the other. Where a test part is split off, it is taken first.

    Args:
        config: which set, and the split.
        data_dir: where the known sets' files are; default the environment's EXSIM_DATA, else ``~/.cache/exsim``.
        download: whether a known set whose files are not there may be downloaded.

    Raises:
        AbsentError: the files of a known set are not there, and ``download`` is false.
        InputError: the set is absent and cannot be downloaded, is not what it should be, or is too small.
    """
    parts = _read(config.name, config.size, data_dir, download)
    generator = torch.Generator().manual_seed(config.split_seed)
    order = torch.randperm(len(parts.train), generator=generator)
    owner, attacker, tested = _numbers(config, len(parts.train), None if parts.test is None else len(parts.test))
    if parts.test is None:
        test, order = parts.train.take(order[:tested]), order[tested:]
    else:
        chosen = torch.randperm(len(parts.test), generator=generator)[:tested]
        test = parts.test if tested == len(parts.test) else parts.test.take(chosen)
    dataset = Dataset(
        name=config.name,
        classes=parts.classes,
        owner=parts.train.take(order[:owner]),
        attacker=parts.train.take(order[len(order) - attacker :]),
        test=test,
    )
    for part, images in (("owner", dataset.owner), ("test", dataset.test)):
        missing = set(range(parts.classes)) - set(images.labels.tolist())
        if missing:
            raise InputError(
                f"{config.name}: the {part} part ({len(images)} images) has no image of class {min(missing)}: "
                f"all {parts.classes} classes are needed, give more images or another split_seed"
            )
    return dataset


def training_images(
    name: str, data_dir: Path | None = None, size: int | None = None, *, download: bool = True
) -> Images:
    """All training images of a foreign set, for a pool. A set without a test part gives all its images.

    Raises:
        InputError: as for :func:`load`.
    """
    check_name(name)
    return _read(name, size, data_dir, download).train


def _numbers(config: DataConfig, train: int, official_test: int | None) -> tuple[int, int, int]:
    """How many images the owner, the attacker and the test part get."""
    defaults = (
        {"attacker": 500, "test": 397} if config.name == "digits" else {"attacker": train // 6, "test": train // 6}
    )
    if official_test is None:
        test = config.test or defaults["test"]
        available = train - test
    else:
        test = config.test or official_test
        available = train
        if test > official_test:
            raise InputError(f"{config.name}: {test} test images asked, it has {official_test}")
    attacker = config.attacker or min(defaults["attacker"], available - (config.owner or 1))
    owner = config.owner or available - attacker
    if min(owner, attacker, test) < 1 or owner + attacker > available:
        asked = f"owner {config.owner or 'rest'}, attacker {config.attacker or 'default'}"
        taken = f" ({test} of them for test)" if official_test is None else ""
        raise InputError(f"{config.name}: has {train} training images{taken}, too few for {asked}")
    return owner, attacker, test


def _read(name: str, size: int | None, data_dir: Path | None, download: bool) -> Parts:
    if name in KNOWN:
        return read_known(name, size, _directory(data_dir), download)
    path = Path(name).expanduser()
    return read_npz(path, size) if name.endswith(".npz") else read_folder(path, size)


def _directory(data_dir: Path | None) -> Path:
    return (data_dir or Path(os.environ.get("EXSIM_DATA") or "~/.cache/exsim")).expanduser()
