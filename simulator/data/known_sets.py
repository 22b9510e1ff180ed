"""The sets that are known by name: read through torchvision's classes, and checked to be what their name says.

The files lie in torchvision's layout, and are downloaded where missing. torchvision only looks whether MNIST's files
*exist*, so MNIST's files in Fashion-MNIST's folder would silently be "Fashion-MNIST": hence the checksums here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simulator.data.images import Images, Parts, convert_images, read_npz, reason_of
from simulator.errors import InputError


class AbsentError(InputError):
    """The files of a known set are not there, and were not to be downloaded."""


@dataclass(frozen=True)
class KnownSet:
    """What a known set must look like, and how it is read.

    ``source`` is torchvision's class, empty for digits; ``convert`` turns such a data set into :class:`Images` (its
    size is for pictures of various sizes, whose ``side`` is None). ``size`` is the default side after resizing.
    ``train`` lists the allowed numbers of training images. ``digests`` are :func:`digest` of the training and the test
    part, empty where torchvision itself checks the files' MD5 sums.
    """

    what: str
    source: str
    folder: str
    classes: int
    channels: int
    side: int | None
    size: int
    train: tuple[int, ...]
    test: int | None
    convert: Callable[[Any, int], Images]
    digests: tuple[str, ...] = ()


def read_known(name: str, size: int | None, directory: Path, download: bool = True) -> Parts:
    """A known set from ``directory``, its images square with side ``size`` (None: the set's default).

    CIFAR-10 is read from ``cifar10.npz`` where the directory has one.

    Raises:
        AbsentError: the files are absent, and ``download`` is false.
        InputError: the files are absent and cannot be downloaded, are damaged, or are another set's.
    """
    known = KNOWN[name]
    side = size or known.size
    where = directory / known.folder
    archive = directory / f"{name}.npz"
    if not known.source:
        parts = _digits()
    elif name == "cifar10" and archive.is_file():
        where = archive
        parts = read_npz(archive, None)
    else:
        try:
            train, test = (known.convert(_open(name, directory, part, download), side) for part in ("train", "test"))
        except InputError:
            raise
        except Exception as error:  # torchvision's readers raise anything from AssertionError to KeyError
            raise InputError(f"{name}: cannot read {where}, truncated or corrupt ({reason_of(error)})") from None
        parts = Parts(train, test, known.classes)
    _check_known(name, parts.train, "training", known.train, where)
    if parts.test is not None and known.test is not None:
        _check_known(name, parts.test, "test", (known.test,), where)

    def resized(part: Images) -> Images:
        return Images(convert_images(part.images, known.channels, side), part.labels)

    return Parts(resized(parts.train), None if parts.test is None else resized(parts.test), known.classes)


def digest(part: Images) -> str:
    """SHA-256 over the raw pixels ``(N, C, H, W)`` and then the labels, one byte each."""
    total = hashlib.sha256(part.images.contiguous().numpy().data)
    total.update(part.labels.to(torch.uint8).numpy().data)
    return total.hexdigest()


def _check_known(name: str, part: Images, what: str, counts: tuple[int, ...], where: Path) -> None:
    """Is this part of the set what its name says? Number, shape, classes and, where we know them, the bytes."""
    known = KNOWN[name]
    if len(part) not in counts:
        raise InputError(f"{name}: {where} has {len(part)} {what} images, it should have {counts[0]}")
    channels, *sides = part.images.shape[1:]
    if channels != known.channels or (known.side is not None and sides != [known.side, known.side]):
        wanted = (known.channels, known.side, known.side)
        raise InputError(f"{name}: {what} images in {where} have shape {(channels, *sides)}, it should be {wanted}")
    labels = sorted(set(part.labels.tolist()))
    if labels != list(range(known.classes)):
        raise InputError(
            f"{name}: {what} labels in {where} are {len(labels)} classes from {labels[0]} to {labels[-1]}, "
            f"they should be 0 to {known.classes - 1}"
        )
    if not known.digests:
        return
    expected, found = known.digests[what == "test"], digest(part)
    if found != expected:
        owners = [entry.what for entry in KNOWN.values() if found in entry.digests]
        whose = f"are {owners[0]}'s" if owners else f"are not {known.what}'s"
        raise InputError(
            f"{name}: the {what} files in {where} {whose} (SHA-256 {found[:12]}, not {expected[:12]}): "
            f"remove them, or give your own set as a *.npz file"
        )


def _open(name: str, directory: Path, part: str, download: bool) -> Any:
    """The torchvision data set, downloaded if its files are absent."""
    from torchvision import datasets  # slow to import, and digits does without it

    make = getattr(datasets, KNOWN[name].source)
    arguments = {"split": part} if name in ("stl10", "svhn", "gtsrb") else {"train": part == "train"}
    try:
        return make(root=directory, download=False, **arguments)
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
    if not download:
        raise AbsentError(f"{name}: not in {directory}")
    try:
        return make(root=directory, download=True, **arguments)
    except Exception as error:  # no network, no disk, a wrong MD5 sum: each in another type
        raise InputError(
            f"{name}: not in {directory} (or corrupt there) and the download failed ({reason_of(error)}): "
            f"name the directory that holds it, in torchvision's layout, with --data DIR"
        ) from None


def _digits() -> Parts:
    """scikit-learn's 8x8 digits: 17 grey levels, stretched to 0..255."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Parts(Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))), None, 10)


def _grey(part: Any, _size: int) -> Images:
    return Images(part.data.unsqueeze(1).contiguous(), part.targets.long())


def _channels_last(part: Any, _size: int) -> Images:
    pixels = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
    return Images(torch.from_numpy(pixels), torch.tensor(part.targets, dtype=torch.int64))


def _channels_first(part: Any, _size: int) -> Images:
    return Images(torch.from_numpy(np.ascontiguousarray(part.data)), torch.as_tensor(part.labels).long())


def _pictures(part: Any, size: int) -> Images:
    """Pictures of various sizes, resized one by one."""
    pixels = torch.empty((len(part), 3, size, size), dtype=torch.uint8)
    labels = torch.empty(len(part), dtype=torch.int64)
    for index, (picture, label) in enumerate(part):
        resized = np.array(picture.resize((size, size), Image.Resampling.BILINEAR))
        pixels[index] = torch.from_numpy(resized).permute(2, 0, 1)
        labels[index] = label
    return Images(pixels, labels)


#: GTSRB is allowed in two sizes: torchvision downloads the "fixed" archive, 26,640 images; the final one has 39,209
KNOWN = {
    "digits": KnownSet(
        "scikit-learn's digits",
        "",
        "",
        10,
        1,
        8,
        16,
        (1797,),
        None,
        _grey,
        ("a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91",),
    ),
    "mnist": KnownSet(
        "MNIST",
        "MNIST",
        "MNIST",
        10,
        1,
        28,
        28,
        (60_000,),
        10_000,
        _grey,
        (
            "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
            "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
        ),
    ),
    "fashion_mnist": KnownSet(
        "Fashion-MNIST",
        "FashionMNIST",
        "FashionMNIST",
        10,
        1,
        28,
        28,
        (60_000,),
        10_000,
        _grey,
        (
            "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
            "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        ),
    ),
    "cifar10": KnownSet(
        "CIFAR-10",
        "CIFAR10",
        "cifar-10-batches-py",
        10,
        3,
        32,
        32,
        (50_000,),
        10_000,
        _channels_last,
        (
            "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
            "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
        ),
    ),
    "cifar100": KnownSet(
        "CIFAR-100", "CIFAR100", "cifar-100-python", 100, 3, 32, 32, (50_000,), 10_000, _channels_last
    ),
    "stl10": KnownSet("STL-10", "STL10", "stl10_binary", 10, 3, 96, 32, (5_000,), 8_000, _channels_first),
    "svhn": KnownSet("SVHN", "SVHN", "", 10, 3, 32, 32, (73_257,), 26_032, _channels_first),
    "gtsrb": KnownSet("GTSRB", "GTSRB", "gtsrb", 43, 3, None, 32, (26_640, 39_209), 12_630, _pictures),
}
