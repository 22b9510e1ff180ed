import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.errors import InputError
from simulator.models import build, save_model
from simulator.ownership.evidence import Evidence, load_evidence, save_evidence
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.tensorfile import write_tensors

INFO = {"scheme": "deeptracer", "sources": [1, 2], "target": 3, "counts": {"passed": 4}, "note": "ü\n", "none": None}


def key(dtype: torch.dtype = torch.uint8, count: int = 6) -> KeySamples:
    images = torch.arange(count * 18).reshape(count, 2, 3, 3) % 256
    images = images.to(torch.uint8) if dtype == torch.uint8 else images.to(dtype) / 255
    return KeySamples(images, torch.arange(count) % 4, 4, INFO)


def equal(one: KeySamples, other: KeySamples) -> bool:
    same = one.images.dtype == other.images.dtype and torch.equal(one.images, other.images)
    return same and torch.equal(one.labels, other.labels) and (one.classes, one.info) == (other.classes, other.info)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_key_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.safetensors"
    save_key(key(dtype), path)
    assert equal(load_key(path), key(dtype))
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"], "no temporary file is left"


def test_equal_keys_are_equal_files(tmp_path: Path) -> None:
    save_key(key(), tmp_path / "a")
    turned = KeySamples(
        key().images.contiguous(memory_format=torch.channels_last), key().labels, 4, dict(reversed(INFO.items()))
    )
    save_key(turned, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_taking_samples_keeps_and_adds_to_what_is_known_of_them() -> None:
    some = key().take(torch.tensor([4, 0]), filter="both", target=9)
    assert len(some) == 2
    assert torch.equal(some.images, key().images[[4, 0]])
    assert some.labels.tolist() == [0, 0]
    assert some.info == {**INFO, "filter": "both", "target": 9}
    assert torch.equal(key().take(key().labels == 1).images, key().images[[1, 5]])
    assert key().info == INFO


def header(**changes: Any) -> dict[str, str]:
    return {"exsim": json.dumps({"format": 1, "kind": "key", "classes": 4, "info": {}} | changes)}


IMAGES, LABELS = key().images, key().labels
#: deeper than Python's JSON reader goes
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("tensors", "metadata", "fragment"),
    [
        ({"images": IMAGES, "labels": LABELS}, {}, "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, {"exsim": "{"}, "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, {"exsim": "[]"}, "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, {"exsim": "null"}, "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(kind="model"), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(classes="many"), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(classes=float("inf")), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(info=3), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(format=2), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(kind=["key"]), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(kind="a\nb"), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(classes=True), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(classes=0), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, header(classes=10**30), "not a key file"),
        ({"images": IMAGES, "labels": LABELS}, {"exsim": header()["exsim"].replace("{}", DEEP)}, "not a key file"),
        ({"images": IMAGES}, header(), "not a key file of this project (it holds images)"),
        ({"images": IMAGES, "labels": LABELS, "more": LABELS + 1}, header(), "it holds images, labels, more"),
        ({"a\nb": IMAGES}, header(), "it holds a b"),
        ({}, header(), "it holds nothing"),
        ({"images": IMAGES.double(), "labels": LABELS}, header(), "key of a wrong shape"),
        ({"images": IMAGES.long(), "labels": LABELS}, header(), "torch.int64"),
        ({"images": IMAGES[0], "labels": LABELS}, header(), "images (2, 3, 3)"),
        ({"images": IMAGES, "labels": LABELS[:5]}, header(), "labels (5,)"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, header(), "labels (6, 1)"),
        ({"images": torch.zeros(6, 0, 3, 3), "labels": LABELS}, header(), "images (6, 0, 3, 3)"),
        ({"images": IMAGES, "labels": LABELS.int()}, header(), "labels must be int64 in 0..3"),
        ({"images": IMAGES, "labels": LABELS + 1}, header(), "labels must be int64 in 0..3"),
        ({"images": IMAGES, "labels": LABELS - 1}, header(), "labels must be int64 in 0..3"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, header(), "at least one"),
        ({"images": IMAGES.float(), "labels": LABELS}, header(), "must lie in [0, 1]"),
        ({"images": IMAGES.float() / -255, "labels": LABELS}, header(), "must lie in [0, 1]"),
        ({"images": torch.full((6, 1, 2, 2), torch.nan), "labels": LABELS}, header(), "must lie in [0, 1]"),
    ],
)
def test_what_is_no_key_is_refused_with_one_line(
    tensors: dict[str, Tensor], metadata: dict[str, str], fragment: str, tmp_path: Path
) -> None:
    path = tmp_path / "key.safetensors"
    write_tensors(path, tensors, metadata)
    with pytest.raises(InputError) as caught:
        load_key(path)
    assert fragment in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_is_no_key(tmp_path: Path) -> None:
    save_model(build("linear", channels=1, size=4, classes=3), tmp_path / "model")
    with pytest.raises(InputError, match="not a key file"):
        load_key(tmp_path / "model")


def test_evidence_of_other_tests_has_tensors_of_its_own_and_is_no_key(tmp_path: Path) -> None:
    tensors = {"images": IMAGES, "correlation": torch.eye(6), "private": LABELS > 1}
    save_evidence(Evidence("fingerprint", tensors, 4, INFO), tmp_path / "a")
    found = load_evidence(tmp_path / "a")
    assert (found.kind, found.classes, found.info, len(found), found.shape) == ("fingerprint", 4, INFO, 6, (2, 3, 3))
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r"a: not a key file of this project \(it holds correlation, images, private"):
        load_key(tmp_path / "a")


@given(place=st.integers(0, 10**6), damage=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_a_damaged_file_is_a_key_or_refused_with_one_line(
    place: int, damage: bytes, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("key") / "key.safetensors"
    save_key(key(), path)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] if cut else data[:place] + damage + data[place + len(damage) :])
    refusal = ""
    try:
        loaded = load_key(path)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) == 1
    else:
        assert ((loaded.labels >= 0) & (loaded.labels < loaded.classes)).all()
