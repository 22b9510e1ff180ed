"""Labelled images in memory, and the two kinds of file a user can bring: a ``*.npz`` and a folder of images.

Both readers give :class:`Parts`: uint8 images ``(N, C, H, W)`` with their labels, split as the file splits them. A file
that is wrong raises one :class:`InputError` line. Pickles are never loaded.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simulator.errors import InputError

#: the side of the images of a folder, where the config gives none
FOLDER_SIZE = 64
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff", ".webp"}
#: luminance of ITU-R BT.601, the conversion to grey of PIL, OpenCV and torchvision
LUMINANCE = (0.299, 0.587, 0.114)
#: bytes that the arrays of an npz, or the images of a folder, may take in memory: small files can stand for much
MOST_BYTES = 2 * 2**30
#: images that are decoded at a time
THREADS = 8
#: pixels of one image file: as it is and converted, those of all threads take no more than :data:`MOST_BYTES`
MOST_PIXELS = MOST_BYTES // (8 * THREADS)
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: ``images`` uint8 ``(N, C, H, W)``, ``labels`` int64 ``(N,)``. Nobody writes to them.

    They are pickled as numpy arrays, because Ray shares the memory of these: all processes of a node read one copy in
    its object store. That memory is read-only, and a write to it ends the process.
    """

    images: Tensor
    labels: Tensor

    def __reduce__(self) -> tuple[Callable[..., Images], tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        return _from_arrays, (self.images.numpy(), self.labels.numpy())

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Images:
        """The images at ``indices`` (int64 ``(M,)``), in that order, as a copy."""
        return Images(self.images[indices], self.labels[indices])

    def subset_of_classes(self, classes: Sequence[int]) -> Images:
        """The images whose label is one of ``classes``, in their order; the labels stay what they are."""
        wanted = torch.tensor(list(classes), dtype=torch.int64)
        return self.take(torch.isin(self.labels, wanted).nonzero().squeeze(1))


def _from_arrays(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Images:
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; these are never written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Images(torch.from_numpy(images), torch.from_numpy(labels))


@dataclass(frozen=True, eq=False)
class Parts:
    """A data set as its files split it. ``test`` is None if they do not; a test part is then split off ``train``."""

    train: Images
    test: Images | None
    classes: int


def convert_images(images: Tensor, channels: int, size: int) -> Tensor:
    """Images in another size and number of channels.

    Colour to grey is the ITU-R BT.601 luminance, grey to colour three equal channels. Resizing is bilinear with
    antialiasing (the triangle filter widens with the scale); the aspect ratio is not kept, the result is square.

    Args:
        images: uint8 ``(N, C, H, W)`` with C 1 or 3.
        channels: 1 or 3.
        size: the new side in pixels.

    Returns:
        uint8 ``(N, channels, size, size)``. This is ``images`` itself if it has that shape already.
    """
    count, found, height, width = images.shape
    if found not in (1, 3) or channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, found {found}, asked {channels}")
    resize = (height, width) != (size, size)
    if not resize and found == channels:
        return images
    result = torch.empty((count, channels, size, size), dtype=torch.uint8)
    weights = torch.tensor(LUMINANCE).reshape(1, 3, 1, 1)
    for start in range(0, count, _CHUNK):  # floats of the whole set would take four times its memory
        part = images[start : start + _CHUNK].float()
        if channels < found:
            part = (part * weights).sum(dim=1, keepdim=True)
        if resize:
            part = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        # a grey part is broadcast over three channels by the assignment
        result[start : start + _CHUNK] = part.round_().clamp_(0, 255).to(torch.uint8)
    return result


def read_npz(path: Path, size: int | None) -> Parts:
    """A ``*.npz`` with uint8 ``x_train, x_test`` (NHWC or NHW, C 1 or 3) and integer ``y_train, y_test`` from 0.

    Args:
        path: the file.
        size: the side to resize to. None keeps the images' own size, which must then be square, of 8 to 512 pixels.

    Raises:
        InputError: the file is missing, unreadable, holds pickled objects, or has arrays that do not fit.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = _open_npz(path, names)
    train = _checked(path, arrays["x_train"], arrays["y_train"], "train")
    test = _checked(path, arrays["x_test"], arrays["y_test"], "test")
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [tuple(arrays[name].shape[1:]) for name in ("x_train", "x_test")]
        raise InputError(f"{path}: x_train has images of shape {shapes[0]} and x_test of {shapes[1]}: they must agree")
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    if classes < 2:
        raise InputError(f"{path}: every label is 0, at least 2 classes are needed")
    channels, height, width = train.images.shape[1:]
    if size is None and height != width:
        raise InputError(f"{path}: images are {height}x{width}, not square: give a size to resize them to")
    if size is None and not 8 <= height <= 512:
        raise InputError(f"{path}: images are {height}x{width}, 8 to 512 pixels are allowed: give a size to resize to")
    side = size or height
    parts = [Images(convert_images(part.images, channels, side), part.labels) for part in (train, test)]
    return Parts(parts[0], parts[1], classes)


def _open_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory, not an npz file' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as stream:  # np.load leaves a file open that it cannot read
            stored = np.load(stream, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: holds a single array, wanted an npz with {', '.join(names)}")
            missing = [name for name in names if name not in stored.files]
            if missing:
                held = ", ".join(stored.files) or "nothing"
                raise InputError(f"{path}: has no {missing[0]}, wanted {', '.join(names)}, found {held}")
            _demand_small(path, stored, names)
            return {name: stored[name] for name in names}
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for a file that is not what it should be
        if "pickle" in str(error):
            raise InputError(f"{path}: holds pickled objects, only plain arrays are loaded") from None
        raise InputError(f"{path}: not a readable npz, truncated or corrupt ({reason_of(error)})") from None


def _demand_small(path: Path, stored: np.lib.npyio.NpzFile, names: Sequence[str]) -> None:
    """Sees that the arrays fit into :data:`MOST_BYTES`, by what the archive and the arrays' headers say: zeros are
    stored in a thousandth of their size, and a header may promise what does not follow."""
    total = 0
    for name in names:
        with stored.zip.open(f"{name}.npy") as member:  # type: ignore[union-attr]
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        total += max(math.prod(shape) * dtype.itemsize, stored.zip.getinfo(f"{name}.npy").file_size)  # type: ignore[union-attr]
    if total > MOST_BYTES:
        raise InputError(f"{path}: its arrays take {total:,} bytes in memory, allowed: {MOST_BYTES:,}")


def _checked(path: Path, images: np.ndarray, labels: np.ndarray, part: str) -> Images:
    if images.dtype != np.uint8:
        raise InputError(f"{path}: x_{part} is {images.dtype}, uint8 values 0..255 are wanted")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise InputError(f"{path}: x_{part} has shape {images.shape}, wanted (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: y_{part} is {labels.dtype}, integer labels are wanted")
    if labels.shape != (len(images),):
        raise InputError(f"{path}: y_{part} has shape {labels.shape}, wanted ({len(images)},) as x_{part} has images")
    if labels.min() < 0 or labels.max() >= 2**16:
        raise InputError(f"{path}: y_{part} has labels {labels.min()} to {labels.max()}, 0 to 65535 are allowed")
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def read_folder(root: Path, size: int | None) -> Parts:
    """A folder of images, in one of three layouts; the classes are the folders' names, sorted.

    - ``train/<class>/...`` and ``test/<class>/...`` (or ``val/<class>/...``; ``test`` wins where it has classes);
    - Tiny ImageNet's own: ``train/<class>/images/...`` and ``val/images/...`` with ``val/val_annotations.txt``;
    - ``<class>/...``, not split.

    Images are resized to a square of side ``size`` (default 64). They get one channel if all are grey, else three.

    Raises:
        InputError: a folder is missing or empty, the test part has an unknown class, an image cannot be read.
    """
    if not root.is_dir():
        found = "is a file, wanted an npz or a folder of images" if root.is_file() else "no such folder"
        raise InputError(f"{root}: {found}")
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = [folder.name for folder in _folders(train_root)]
    if len(classes) < 2:
        raise InputError(
            f"{train_root}: found {len(classes)} class folders, at least 2 are needed (one folder a class)"
        )
    train = [(path, label) for label, name in enumerate(classes) for path in _image_files(train_root / name)]
    test = _test_files(root, classes) if train_root != root else []
    pixels = _read_images([path for path, _ in train + test], size or FOLDER_SIZE)
    labels = torch.tensor([label for _, label in train + test], dtype=torch.int64)
    count = len(train)
    held_out = Images(pixels[count:], labels[count:]) if test else None
    return Parts(Images(pixels[:count], labels[:count]), held_out, len(classes))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise InputError(f"{folder}: no image in it ({', '.join(sorted(SUFFIXES))})")
    return files


def _test_files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Paths and labels of the held-out part; empty where there is no such folder (then it is split off)."""
    annotations = root / "val" / "val_annotations.txt"
    if annotations.is_file():
        return _annotated_files(annotations, classes)
    held_out = [folder for folder in (root / "test", root / "val") if folder.is_dir() and _folders(folder)]
    if not held_out:
        return []
    unknown = [folder for folder in _folders(held_out[0]) if folder.name not in classes]
    if unknown:
        raise InputError(f"{unknown[0]}: class {unknown[0].name!r} is not one of the {len(classes)} classes of train")
    return [(path, classes.index(folder.name)) for folder in _folders(held_out[0]) for path in _image_files(folder)]


def _annotated_files(annotations: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Tiny ImageNet's ``val_annotations.txt``: file name, class and a bounding box a line, separated by tabs."""
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{annotations}: cannot be read ({reason_of(error)})") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in labels:
            raise InputError(f"{annotations}, line {number}: {line[:60]!r} is not a file, a tab and a class of train")
        files.append((annotations.parent / "images" / fields[0], labels[fields[1]]))
    return files


def _read_images(paths: list[Path], size: int) -> Tensor:
    """uint8 ``(N, C, size, size)``; decoding runs in threads because PIL releases the interpreter's lock."""
    total = len(paths) * 3 * size * size
    if total > MOST_BYTES:
        raise InputError(f"{len(paths)} images of side {size} take {total:,} bytes in memory, allowed: {MOST_BYTES:,}")
    pixels = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)

    def read(index: int) -> bool:
        array, grey = _read_image(paths[index], size)
        pixels[index] = torch.from_numpy(array).permute(2, 0, 1)
        return grey

    with ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1)) as executor:
        grey = all(list(executor.map(read, range(len(paths)))))
    return pixels[:, :1].contiguous() if grey else pixels


def _read_image(path: Path, size: int) -> tuple[np.ndarray, bool]:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: has pixels of mode {image.mode!r}, 8 bits a channel are wanted")
            width, height = image.size  # of the file's head; nothing is decoded yet
            if width * height > MOST_PIXELS:
                raise InputError(f"{path}: has {width} x {height} pixels; allowed: {MOST_PIXELS:,} in one image")
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            return np.array(resized), image.mode in ("1", "L", "LA")
    except InputError:
        raise
    except Exception as error:  # each of PIL's decoders raises its own types for a damaged file
        raise InputError(f"{path}: not a readable image ({reason_of(error)})") from None


def reason_of(error: BaseException) -> str:
    """An error's text on one line, for the end of an InputError."""
    return " ".join(str(error).split())[:200] or type(error).__name__
