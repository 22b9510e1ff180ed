"""The sets that are known by name: those of this module, and those of plug-ins (entry points ``exsim.datasets``).

A set is read, and then checked to be what its name says. The sets of this module are read through torchvision's classes
from files in torchvision's layout, and are downloaded where the files are missing. Checksums are needed because
torchvision only looks whether MNIST's files *exist*: MNIST's files in Fashion-MNIST's folder would be "Fashion-MNIST".
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

from simulator.component import Table
from simulator.data.images import Images, Parts, convert_images, read_npz, reason_of
from simulator.errors import InputError


class AbsentError(InputError):
    """The files of a known set are not there, and were not to be downloaded."""


Reader = Callable[[Path, int, bool], tuple[Images, Images | None]]


@dataclass(frozen=True)
class KnownSet:
    """What a known set must look like, and how it is read. A plug-in's entry point names one.

    Attributes:
        name: what a configuration calls it.
        what: its name in messages and in ``exsim list datasets``.
        read: takes the data directory, the side that the images will be resized to, and whether it may download. It
            returns the training part and the test part, or None in place of the test part: a run then splits one off.
            It raises `AbsentError` where it would have to download and may not. Images may have any size of their own.
        classes: number of classes K; both parts have each of the labels 0..K-1.
        channels: 1 or 3.
        size: side after resizing, in pixels, where a configuration gives none.
        train: the allowed numbers of training images; the first is the usual one.
        test: the number of test images; None where there is no test part.
        side: of the images as they are read, in pixels; None where that may vary.
        folder: the place of the files in the data directory, for messages.
        note: more for ``exsim list datasets``.
        digests: :func:`digest` of each part. Empty where the reader checks the files itself.
    """

    name: str
    what: str
    read: Reader
    classes: int
    channels: int
    size: int
    train: tuple[int, ...]
    test: int | None
    side: int | None = None
    folder: str = ""
    note: str = ""
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
    test: Images | None
    if name == "cifar10" and archive.is_file():
        where = archive
        parts = read_npz(archive, None)
        train, test = parts.train, parts.test
    else:
        try:
            train, test = known.read(directory, side, download)
        except InputError as error:
            raise type(error)(f"{name}: {error}") from None
        except Exception as error:  # torchvision's readers raise anything from AssertionError to KeyError
            raise InputError(f"{name}: cannot read {where}, truncated or corrupt ({reason_of(error)})") from None
    if (test is None) != (known.test is None):
        raise InputError(f"{name}: {where} has {'no' if test is None else 'a'} test part, against what is known of it")
    _check(known, train, "training", known.train, where)
    if test is not None and known.test is not None:
        _check(known, test, "test", (known.test,), where)

    def resized(part: Images) -> Images:
        return Images(convert_images(part.images, known.channels, side), part.labels)

    return Parts(resized(train), None if test is None else resized(test), known.classes)


def digest(part: Images) -> str:
    """SHA-256 over the raw pixels ``(N, C, H, W)`` and then the labels, one byte each."""
    total = hashlib.sha256(part.images.contiguous().numpy().data)
    total.update(part.labels.to(torch.uint8).numpy().data)
    return total.hexdigest()


def _check(known: KnownSet, part: Images, what: str, counts: tuple[int, ...], where: Path) -> None:
    """Refuse a part that is not what the set's name says: its form, number, classes and, where given, its digest."""
    name, images, numbers = known.name, part.images, part.labels
    if (images.dtype, numbers.dtype) != (torch.uint8, torch.int64) or images.ndim != 4 or numbers.shape != (len(part),):
        found = f"{images.dtype} {tuple(images.shape)} with labels {numbers.dtype} {tuple(numbers.shape)}"
        raise InputError(f"{name}: {what} images are {found}, they should be uint8 (N, C, H, W) with labels int64 (N,)")
    if len(part) not in counts:
        raise InputError(f"{name}: {where} has {len(part)} {what} images, it should have {counts[0]}")
    channels, *sides = images.shape[1:]
    if channels != known.channels or (known.side is not None and sides != [known.side, known.side]):
        wanted = (known.channels, known.side, known.side)
        raise InputError(f"{name}: {what} images in {where} have shape {(channels, *sides)}, it should be {wanted}")
    labels = sorted(set(numbers.tolist()))
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


def _torchvision(source: str, convert: Callable[[Any, int], Images], *, by_split: bool = False) -> Reader:
    """Reads a set through torchvision's class ``source``. ``convert`` makes such a data set into `Images`; it is given
    the side to resize to, for pictures of various sizes."""

    def read(directory: Path, size: int, download: bool) -> tuple[Images, Images]:
        def part(name: str) -> Images:
            arguments = {"split": name} if by_split else {"train": name == "train"}
            return convert(_open(source, directory, download, arguments), size)

        return part("train"), part("test")

    return read


def _open(source: str, directory: Path, download: bool, arguments: dict[str, Any]) -> Any:
    """The torchvision data set, downloaded if its files are absent."""
    from torchvision import datasets  # slow to import, and digits does without it

    make = getattr(datasets, source)
    try:
        return make(root=directory, download=False, **arguments)
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
    if not download:
        raise AbsentError(f"not in {directory}")
    try:
        return make(root=directory, download=True, **arguments)
    except Exception as error:  # no network, no disk, a wrong MD5 sum: each in another type
        raise InputError(
            f"not in {directory} (or corrupt there) and the download failed ({reason_of(error)}): "
            f"name the directory that holds it, in torchvision's layout, with --data DIR"
        ) from None


def _digits(_directory: Path, _size: int, _download: bool) -> tuple[Images, None]:
    """scikit-learn's 8x8 digits: 17 grey levels, stretched to 0..255."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))), None


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
KNOWN: Table[KnownSet] = Table(
    "data set",
    KnownSet,
    "exsim.datasets",
    (
        KnownSet(
            "digits",
            "scikit-learn's digits",
            _digits,
            classes=10,
            channels=1,
            size=16,
            train=(1797,),
            test=None,
            side=8,
            note="no download",
            digests=("a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91",),
        ),
        KnownSet(
            "mnist",
            "MNIST",
            _torchvision("MNIST", _grey),
            classes=10,
            channels=1,
            size=28,
            train=(60_000,),
            test=10_000,
            side=28,
            folder="MNIST",
            digests=(
                "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
                "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
            ),
        ),
        KnownSet(
            "fashion_mnist",
            "Fashion-MNIST",
            _torchvision("FashionMNIST", _grey),
            classes=10,
            channels=1,
            size=28,
            train=(60_000,),
            test=10_000,
            side=28,
            folder="FashionMNIST",
            digests=(
                "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
                "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
            ),
        ),
        KnownSet(
            "cifar10",
            "CIFAR-10",
            _torchvision("CIFAR10", _channels_last),
            classes=10,
            channels=3,
            size=32,
            train=(50_000,),
            test=10_000,
            side=32,
            folder="cifar-10-batches-py",
            digests=(
                "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
                "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
            ),
        ),
        KnownSet(
            "cifar100",
            "CIFAR-100",
            _torchvision("CIFAR100", _channels_last),
            classes=100,
            channels=3,
            size=32,
            train=(50_000,),
            test=10_000,
            side=32,
            folder="cifar-100-python",
        ),
        KnownSet(
            "stl10",
            "STL-10",
            _torchvision("STL10", _channels_first, by_split=True),
            classes=10,
            channels=3,
            size=32,
            train=(5_000,),
            test=8_000,
            side=96,
            folder="stl10_binary",
        ),
        KnownSet(
            "svhn",
            "SVHN",
            _torchvision("SVHN", _channels_first, by_split=True),
            classes=10,
            channels=3,
            size=32,
            train=(73_257,),
            test=26_032,
            side=32,
        ),
        KnownSet(
            "gtsrb",
            "GTSRB",
            _torchvision("GTSRB", _pictures, by_split=True),
            classes=43,
            channels=3,
            size=32,
            train=(26_640, 39_209),
            test=12_630,
            folder="gtsrb",
        ),
    ),
)
