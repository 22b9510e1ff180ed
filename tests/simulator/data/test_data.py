"""Data sets: what is read from real file formats, what is refused, and the split."""

from __future__ import annotations

import copy
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from simulator.component import describe
from simulator.data.dataset import (
    AbsentError,
    DataConfig,
    Images,
    Outline,
    describe_datasets,
    load,
    outline,
    training_images,
)
from simulator.data.known_sets import KNOWN, digest
from simulator.data.pool import PoolSpec
from simulator.errors import InputError

PlugIn = Callable[..., Path]


def refused(name: str, data_dir: Path | None = None, **settings: Any) -> str:
    """The line with which a data set is refused."""
    with pytest.raises(InputError) as caught:
        load(DataConfig(name=name, **settings), data_dir)
    line = str(caught.value)
    assert "\n" not in line
    return line


def write_npz(path: Path, **changes: Any) -> str:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (30, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(30) % 3,
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def write_idx(directory: Path, seed: int, train: int = 60, test: int = 30) -> None:
    """Files of MNIST's format in torchvision's layout."""
    rng = np.random.default_rng(seed)
    raw = directory / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


@pytest.fixture
def idx_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small MNIST and Fashion-MNIST, which the table of known sets takes for the real ones."""
    for seed, (name, folder) in enumerate((("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"))):
        write_idx(tmp_path / folder, seed)
        small = replace(KNOWN[name], train=(60,), test=30, digests=())
        monkeypatch.setitem(KNOWN.own, name, small)
        split = load(DataConfig(name=name, owner=50, attacker=10), tmp_path)
        whole = training_images(name, tmp_path)
        monkeypatch.setitem(KNOWN.own, name, replace(small, digests=(digest(whole), digest(split.test))))
    return tmp_path


def rows(images: Images) -> list[bytes]:
    return [row.tobytes() for row in images.images.numpy()]


def save_image(path: Path, value: int | tuple[int, int, int], side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(value, int) else "RGB", (side, side), value).save(path)


class TestDigits:
    def test_default_split(self) -> None:
        data = load(DataConfig(name="digits"))
        assert (len(data.owner), len(data.attacker), len(data.test)) == (900, 500, 397)
        assert (data.classes, data.channels, data.size) == (10, 1, 16)
        assert data.owner.images.dtype == torch.uint8
        assert data.owner.labels.dtype == torch.int64
        assert int(data.owner.images.min()) == 0
        assert int(data.owner.images.max()) == 255

    def test_upscaling_keeps_the_mean(self) -> None:
        assert load(DataConfig(name="digits")).mean == pytest.approx(
            load(DataConfig(name="digits", size=8)).mean, abs=0.01
        )

    def test_mean_and_std_are_those_of_the_owners_images(self) -> None:
        data = load(DataConfig(name="digits", owner=100))
        pixels = data.owner.images.double() / 255
        assert data.mean == pytest.approx((pixels.mean().item(),))
        assert data.std == pytest.approx((pixels.std(correction=0).item(),))

    @given(st.integers(200, 600), st.integers(1, 500), st.integers(200, 500), st.integers(0, 2**62))
    def test_parts_are_disjoint_and_repeatable(self, owner: int, attacker: int, test: int, seed: int) -> None:
        config = DataConfig(name="digits", size=8, owner=owner, attacker=attacker, test=test, split_seed=seed)
        data, again = load(config), load(config)
        assert (len(data.owner), len(data.attacker), len(data.test)) == (owner, attacker, test)
        parts = [set(rows(part)) for part in (data.owner, data.attacker, data.test)]
        # the 1797 digits are all different
        assert len(set.union(*parts)) == owner + attacker + test
        assert torch.equal(data.owner.images, again.owner.images)
        assert torch.equal(data.attacker.labels, again.attacker.labels)

    def test_more_for_one_part_leaves_the_others_as_they_are(self) -> None:
        small = load(DataConfig(name="digits", size=8, owner=300, attacker=100))
        large = load(DataConfig(name="digits", size=8, owner=900, attacker=200))
        assert rows(large.owner)[:300] == rows(small.owner)
        assert rows(large.attacker)[-100:] == rows(small.attacker)
        assert rows(large.test) == rows(small.test)

    def test_another_seed_is_another_split(self) -> None:
        first, second = (load(DataConfig(name="digits", size=8, split_seed=seed)) for seed in (0, 1))
        assert rows(first.test) != rows(second.test)

    def test_too_many_images(self) -> None:
        line = refused("digits", owner=1200, attacker=500)
        assert all(number in line for number in ("1797", "397", "1200", "500"))

    def test_every_class_must_be_there(self) -> None:
        assert "no image of class" in refused("digits", owner=3)
        assert "test part (4 images) has no image of class" in refused("digits", test=4)


class TestConfig:
    @pytest.mark.parametrize(
        "wrong", [{"owner": 0}, {"size": 7}, {"size": 513}, {"test": -1}, {"seed": 1}, {"owner": 1.5}]
    )
    def test_wrong_numbers(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"name": "digits"} | wrong)

    @pytest.mark.parametrize("name", ["mnits", "", "Digits", "data.npy"])
    def test_unknown_name(self, name: str) -> None:
        with pytest.raises(ValidationError) as caught:
            DataConfig(name=name)
        line = describe(caught.value)
        assert all(known in line for known in (*KNOWN, "a *.npz file or an image folder"))

    def test_paths_are_names(self, tmp_path: Path) -> None:
        for name in ("some.npz", "some/folder", str(tmp_path)):
            assert DataConfig(name=name).name == name

    def test_every_known_set_is_described(self) -> None:
        assert [name for name, _ in describe_datasets()] == list(KNOWN)
        assert dict(describe_datasets())["digits"].startswith("scikit-learn's digits: 1797 images")


class TestKnownFiles:
    def test_idx_files(self, idx_dir: Path) -> None:
        data = load(DataConfig(name="mnist", size=20), idx_dir)
        assert (len(data.owner), len(data.attacker), len(data.test)) == (50, 10, 30)
        assert (data.channels, data.size, data.classes) == (1, 20, 10)

    def test_directory_of_the_environment(self, idx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EXSIM_DATA", str(idx_dir))
        assert len(training_images("fashion_mnist")) == 60

    def test_mnist_in_the_folder_of_fashion_mnist(self, idx_dir: Path) -> None:
        (idx_dir / "FashionMNIST").rename(idx_dir / "aside")
        (idx_dir / "MNIST").rename(idx_dir / "FashionMNIST")
        line = refused("fashion_mnist", idx_dir)
        assert f"{idx_dir / 'FashionMNIST'} are MNIST's" in line

    def test_only_the_test_files_are_wrong(self, idx_dir: Path) -> None:
        for name in ("images-idx3", "labels-idx1"):
            (idx_dir / f"MNIST/raw/t10k-{name}-ubyte").replace(idx_dir / f"FashionMNIST/raw/t10k-{name}-ubyte")
        write_idx(idx_dir / "MNIST", 0)
        assert "the test files in" in refused("fashion_mnist", idx_dir)

    def test_changed_pixel(self, idx_dir: Path) -> None:
        file = idx_dir / "MNIST/raw/train-images-idx3-ubyte"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        assert "are not MNIST's" in refused("mnist", idx_dir)

    def test_wrong_number_of_images(self, idx_dir: Path) -> None:
        write_idx(idx_dir / "MNIST", 0, train=50)
        assert "has 50 training images, it should have 60" in refused("mnist", idx_dir)

    @pytest.mark.parametrize("keep", [0, 3, 8, 1000])
    def test_truncated_idx(self, idx_dir: Path, keep: int) -> None:
        file = idx_dir / "MNIST/raw/train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:keep])
        assert f"cannot read {idx_dir / 'MNIST'}, truncated or corrupt" in refused("mnist", idx_dir)

    def test_absent_and_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import datasets

        def unreachable(_self: object) -> None:
            raise OSError("no\nnetwork")

        monkeypatch.setattr(datasets.MNIST, "download", unreachable)
        monkeypatch.setattr(datasets.SVHN, "download", unreachable)
        for name in ("mnist", "svhn"):
            line = refused(name, tmp_path)
            assert all(part in line for part in (name, str(tmp_path), "no network", "--data DIR"))

    def test_absent_files_are_downloaded(self, idx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import datasets

        (idx_dir / "MNIST").rename(idx_dir / "elsewhere")
        monkeypatch.setattr(datasets.MNIST, "download", lambda _: (idx_dir / "elsewhere").rename(idx_dir / "MNIST"))
        assert len(training_images("mnist", idx_dir)) == 60

    def test_cifar10_as_npz(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (90, 32, 32, 3), dtype=np.uint8)
        labels = (np.arange(90) % 10).astype(np.uint8)
        arrays = {"x_train": pixels[:60], "y_train": labels[:60], "x_test": pixels[60:], "y_test": labels[60:]}
        file = tmp_path / "cifar10.npz"
        np.savez(file, **arrays)
        monkeypatch.setitem(KNOWN.own, "cifar10", replace(KNOWN["cifar10"], train=(60,), test=30, digests=()))
        data = load(DataConfig(name="cifar10"), tmp_path)
        assert (data.channels, data.size, len(data.owner)) == (3, 32, 50)
        assert rows(data.test) == [row.transpose(2, 0, 1).tobytes() for row in pixels[60:]]
        monkeypatch.setitem(KNOWN.own, "cifar10", replace(KNOWN["cifar10"], digests=("0" * 64, "0" * 64)))
        assert f"{file} are not CIFAR-10's" in refused("cifar10", tmp_path)
        file.write_bytes(file.read_bytes()[:-500])
        assert str(file) in refused("cifar10", tmp_path)


PICTURES = """
import numpy as np
import torch
from simulator.data.images import Images
from simulator.data.known_sets import AbsentError, KnownSet

def part(count):
    pixels = torch.arange(count * 2 * 20 * 20).reshape(count, 2, 20, 20)[:, :1] % 251
    return Images(pixels.to(torch.uint8), torch.arange(count) % 2)

def read(directory, size, download):
    if not (directory / "pictures.txt").exists() and not download:
        raise AbsentError("pictures.txt is not there")
    train, test = part(60), part(20)
    CHANGE
    return train, test

STRIPES = KnownSet("stripes", "Stripes", read, classes=2, channels=1, size=12, train=(60,), test=20)
"""


class TestPlugIn:
    def test_it_is_loaded_and_split_as_the_others(self, plug_in: PlugIn, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="'stripes' is not one of digits, mnist"):
            DataConfig(name="stripes")
        plug_in("pictures", PICTURES.replace("CHANGE", "pass"), datasets="STRIPES")
        data = load(DataConfig(name="stripes"), tmp_path)
        assert (len(data.owner), len(data.attacker), len(data.test)) == (50, 10, 20)
        assert (data.channels, data.size, data.classes) == (1, 12, 2)
        assert data.owner.images.dtype == torch.uint8
        assert load(DataConfig(name="stripes", size=20), tmp_path).test.labels.tolist() == [0, 1] * 10
        assert len(training_images("stripes", tmp_path)) == 60
        expected = Outline(classes=2, channels=1, size=12, owner=50, attacker=10, test=20)
        assert outline(DataConfig(name="stripes")) == expected
        assert describe_datasets()[-1] == ("stripes", "Stripes: 60 and 20 test images, 2 classes, grey, 12x12")
        assert PoolSpec.parse({"stripes": 1, "attacker": 1}).label == "attacker+stripes"

    def test_it_may_be_absent(self, plug_in: PlugIn, tmp_path: Path) -> None:
        plug_in("pictures", PICTURES.replace("CHANGE", "pass"), datasets="STRIPES")
        with pytest.raises(AbsentError, match=r"^stripes: pictures.txt is not there$"):
            load(DataConfig(name="stripes"), tmp_path, download=False)
        (tmp_path / "pictures.txt").touch()
        assert load(DataConfig(name="stripes"), tmp_path, download=False).classes == 2

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ("train = part(59)", "has 59 training images, it should have 60"),
            ("test = part(21)", "has 21 test images, it should have 20"),
            ("test = None", "has no test part"),
            ("train = Images(train.images.float(), train.labels)", "are torch.float32 (60, 1, 20, 20) with labels"),
            ("train = Images(train.images.numpy(), train.labels)", "are uint8 (60, 1, 20, 20) with labels"),
            ("train = Images(train.images, train.labels.int())", "with labels torch.int32 (60,), they should be uint8"),
            ("train = Images(train.images, train.labels[:9])", "with labels torch.int64 (9,), they should be uint8"),
            ("train = Images(train.images[:, 0], train.labels)", "are torch.uint8 (60, 20, 20) with labels"),
            ("train = Images(train.images.expand(-1, 3, -1, -1), train.labels)", "have shape (3, 20, 20)"),
            ("train = Images(train.images, train.labels * 2)", "2 classes from 0 to 2, they should be 0 to 1"),
            ("raise OSError('a\\nb')", "truncated or corrupt (a b)"),
            ("return None", "truncated or corrupt (cannot unpack non-iterable NoneType object)"),
        ],
    )
    def test_what_it_reads_is_checked(self, plug_in: PlugIn, tmp_path: Path, change: str, line: str) -> None:
        plug_in("pictures", PICTURES.replace("CHANGE", change), datasets="STRIPES")
        found = refused("stripes", tmp_path)
        assert found.startswith("stripes: ")
        assert line in found


class TestNpz:
    def test_colour(self, tmp_path: Path) -> None:
        data = load(DataConfig(name=write_npz(tmp_path / "a.npz")))
        assert (data.channels, data.size, data.classes) == (3, 12, 3)
        assert (len(data.owner), len(data.attacker), len(data.test)) == (50, 10, 30)

    def test_grey_resized(self, tmp_path: Path) -> None:
        grey = {"x_train": np.full((60, 10, 14), 77, np.uint8), "x_test": np.full((30, 10, 14), 77, np.uint8)}
        name = write_npz(tmp_path / "a.npz", **grey)
        data = load(DataConfig(name=name, size=9))
        assert data.owner.images.shape == (50, 1, 9, 9)
        assert data.owner.images.unique().tolist() == [77]
        # one grey level, not zero, so that the victim can divide by it
        assert data.std == (1 / 255,)
        assert "not square" in refused(name)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"y_test": None}, "has no y_test"),
            ({"x_train": np.zeros((60, 12, 12, 3), np.float32)}, "x_train is float32"),
            ({"x_train": np.zeros((60, 3, 12, 12), np.uint8)}, "(60, 3, 12, 12)"),
            ({"x_train": np.zeros((60, 144), np.uint8)}, "(60, 144)"),
            ({"x_train": np.zeros((0, 12, 12, 3), np.uint8), "y_train": np.zeros(0, np.int64)}, "(0, 12, 12, 3)"),
            ({"x_test": np.zeros((30, 13, 13, 3), np.uint8)}, "must agree"),
            ({"y_train": np.arange(59) % 3}, "y_train has shape (59,)"),
            ({"y_train": np.arange(60) / 60}, "y_train is float64"),
            ({"y_train": np.arange(60) - 1}, "labels -1 to 58"),
            ({"y_train": np.arange(60) * 10**6}, "labels 0 to 59000000"),
            ({"y_train": np.zeros(60, int), "y_test": np.zeros(30, int)}, "at least 2 classes"),
            ({"y_train": np.arange(60) % 3 * 2, "y_test": np.arange(30) % 3 * 2}, "no image of class 1"),
            ({"y_train": np.array([None] * 60, dtype=object)}, "pickled"),
            ({"x_train": np.zeros((60, 4, 4), np.uint8), "x_test": np.zeros((30, 4, 4), np.uint8)}, "8 to 512"),
        ],
    )
    def test_refused(self, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
        line = refused(write_npz(tmp_path / "a.npz", **changes))
        assert part in line
        assert "a.npz" in line

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive", b"\x80\x04K\x01."])
    def test_not_an_npz(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "a.npz"
        file.write_bytes(content)
        assert str(file) in refused(str(file))

    def test_truncated_missing_single_array_and_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "a.npz"
        whole = Path(write_npz(file)).read_bytes()
        for keep in (len(whole) // 2, len(whole) - 10):
            file.write_bytes(whole[:keep])
            assert "truncated or corrupt" in refused(str(file))
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
        assert "single array" in refused(str(file))
        assert "no such file" in refused(str(tmp_path / "b.npz"))

    def test_damaged_inside(self, tmp_path: Path) -> None:
        file = tmp_path / "a.npz"
        content = bytearray(Path(write_npz(file)).read_bytes())
        content[2000] ^= 255
        file.write_bytes(content)
        assert "truncated or corrupt" in refused(str(file))


class TestFolder:
    def test_train_and_val(self, tmp_path: Path) -> None:
        for part, count in (("train", 6), ("val", 2)):
            for value, name in ((200, "cat"), (50, "dog")):
                for index in range(count):
                    save_image(tmp_path / part / name / f"{index}.png", (value, 0, index))
        data = load(DataConfig(name=str(tmp_path)))
        assert (data.channels, data.size, data.classes) == (3, 64, 2)
        assert (len(data.owner), len(data.attacker), len(data.test)) == (10, 2, 4)
        # classes are in the order of their names
        assert data.test.images[:, 0, 0, 0].tolist() == [200, 200, 50, 50]
        assert data.test.labels.tolist() == [0, 0, 1, 1]

    def test_tiny_imagenet(self, tmp_path: Path) -> None:
        for value, name in ((200, "n02"), (50, "n01")):
            for index in range(6):
                save_image(tmp_path / f"train/{name}/images/{name}_{index}.JPEG", (value, value, 0))
            (tmp_path / f"train/{name}/{name}_boxes.txt").write_text("0\t0\t1\t1\n")
        lines = [("val_0.JPEG", "n02", 200), ("val_1.JPEG", "n01", 50), ("val_2.JPEG", "n02", 200)]
        for name, _, value in lines:
            save_image(tmp_path / "val/images" / name, (value, value, 0))
        save_image(tmp_path / "test/images/test_0.JPEG", (1, 2, 3))
        annotations = tmp_path / "val/val_annotations.txt"
        annotations.write_text("".join(f"{name}\t{wnid}\t0\t0\t62\t62\n" for name, wnid, _ in lines))
        data = load(DataConfig(name=str(tmp_path), size=16))
        assert (len(data.owner), len(data.attacker), len(data.test)) == (10, 2, 3)
        assert data.test.labels.tolist() == [1, 0, 1]
        assert (data.test.images[:, 0].float().mean(dim=(1, 2)).round() / 50).round().tolist() == [4, 1, 4]
        annotations.write_text("val_0.JPEG\tn03\t0\n")
        assert "line 1" in refused(str(tmp_path))

    def test_not_split_and_grey(self, tmp_path: Path) -> None:
        for label, name in enumerate(("a", "b", "c")):
            for index in range(20):
                save_image(tmp_path / name / f"{index}.png", label * 100 + index)
        data = load(DataConfig(name=str(tmp_path), size=8))
        assert (len(data.owner), len(data.attacker), len(data.test)) == (40, 10, 10)
        assert data.channels == 1
        everything = [part.images[:, 0, 0, 0] for part in (data.owner, data.attacker, data.test)]
        assert len(torch.cat(everything).unique()) == 60
        assert torch.equal(data.owner.images[:, 0, 0, 0] // 100, data.owner.labels)

    def test_refused(self, tmp_path: Path) -> None:
        assert "no such folder" in refused(str(tmp_path / "none"))
        assert "found 0 class folders" in refused(str(tmp_path))
        for name in ("a", "b"):
            save_image(tmp_path / "train" / name / "0.png", 1)
        (tmp_path / "train/c").mkdir()
        assert f"{tmp_path / 'train/c'}: no image in it" in refused(str(tmp_path))
        bad = tmp_path / "train/c/0.png"
        bad.write_bytes((tmp_path / "train/a/0.png").read_bytes()[:40])
        assert f"{bad}: not a readable image" in refused(str(tmp_path))
        Image.new("I;16", (9, 9)).save(bad)
        assert "8 bits a channel" in refused(str(tmp_path))
        save_image(bad, 2)
        save_image(tmp_path / "test/d/0.png", 1)
        assert "class 'd' is not one of the 3 classes of train" in refused(str(tmp_path))


def test_images_by_index_and_class() -> None:
    images = Images(torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert images.take(torch.tensor([4, 1])).images.flatten().tolist() == [4, 1]
    chosen = images.subset_of_classes([2, 0])
    assert chosen.images.flatten().tolist() == [0, 2, 3, 5]
    assert chosen.labels.tolist() == [0, 2, 0, 2]
    assert len(images.subset_of_classes([7])) == 0


def test_images_are_sent_so_that_readers_share_their_memory() -> None:
    """They go as numpy arrays, which Ray's object store gives every reader at one read-only place."""
    images = Images(torch.arange(2 * 3 * 4 * 4).byte().reshape(2, 3, 4, 4), torch.tensor([1, 0]))
    make, arrays = images.__reduce__()
    for array in arrays:
        array.flags.writeable = False
    read = [make(*arrays) for _ in range(2)]
    for each in read:
        assert torch.equal(each.images, images.images)
        assert torch.equal(each.labels, images.labels)
        assert each.images.data_ptr() == images.images.data_ptr()
    own = copy.deepcopy(images)
    assert torch.equal(own.images, images.images)
    assert own.images.data_ptr() != images.images.data_ptr()


class TestBombs:
    """Small files that stand for much are refused before they are unpacked."""

    def test_an_npz_of_zeros(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "bomb.npz"
        zeros = np.zeros((300_000, 8, 8), np.uint8)
        np.savez_compressed(path, x_train=zeros, y_train=np.zeros(1, int), x_test=zeros, y_test=np.zeros(1, int))
        assert path.stat().st_size < 10**5
        monkeypatch.setattr("simulator.data.images.MOST_BYTES", 2**25)
        tracemalloc.start()
        try:
            assert "its arrays take 38,400,528 bytes in memory, allowed: 33,554,432" in refused(str(path))
            assert tracemalloc.get_traced_memory()[1] < 2**23
        finally:
            tracemalloc.stop()

    def test_an_array_whose_header_promises_more_than_there_is(self, tmp_path: Path) -> None:
        path = Path(write_npz(tmp_path / "lie.npz"))
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 512, 512, 3), }"
        header += b" " * (117 - len(header)) + b"\n"
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        members["x_train.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with zipfile.ZipFile(path, "w") as new:
            for name, data in members.items():
                new.writestr(name, data)
        assert "its arrays take 78,643," in refused(str(path))

    def test_an_image_of_very_many_pixels(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.new("L", (8, 8)).save(tmp_path / name / "good.png")
        Image.new("1", (8000, 8000)).save(tmp_path / "b" / "large.png")
        assert (tmp_path / "b" / "large.png").stat().st_size < 2 * 10**4
        assert "large.png: has 8000 x 8000 pixels; allowed: 33,554,432 in one image" in refused(str(tmp_path))

    def test_a_folder_of_images_that_become_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("simulator.data.images.MOST_BYTES", 10**4)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.new("L", (8, 8)).save(tmp_path / name / "good.png")
        assert "2 images of side 64 take 24,576 bytes in memory, allowed: 10,000" in refused(str(tmp_path))
