from pathlib import Path

import pytest
import torch

from simulator.errors import InputError
from simulator.files import write_atomically
from simulator.tensorfile import read_tensors, write_tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64])
def test_tensors_and_metadata_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12).reshape(3, 4).to(dtype), "empty": torch.empty(0, 2, dtype=dtype)}
    path = tmp_path / "new" / "file"
    write_tensors(path, tensors, {"words": "ü\n", "none": ""})
    found, metadata = read_tensors(path)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()
    }
    assert metadata == {"words": "ü\n", "none": ""}


def test_any_memory_layout_and_gradients_are_written(tmp_path: Path) -> None:
    square = torch.arange(4.0).reshape(2, 2)
    write_tensors(tmp_path / "file", {"turned": square.T, "learned": square.clone().requires_grad_()}, {})
    found, metadata = read_tensors(tmp_path / "file")
    assert torch.equal(found["turned"], square.T)
    assert torch.equal(found["learned"], square)
    assert metadata == {}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tensors(path, "a key file")
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_missing_file_says_what_was_wanted(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing").endswith("no such file; wanted a key file")
    assert refusal(tmp_path).endswith("is a directory; wanted a key file")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 7, b"\xff" * 64, b"name: digits\n", b"\x02" + b"\0" * 7 + b"[]", b"\x80\x04K\x01."],
    ids=["empty", "short", "huge header", "text", "no object", "pickle"],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert "not a safetensors file" in refusal(tmp_path / "file")


def test_a_pickled_file_is_never_loaded(tmp_path: Path) -> None:
    torch.save({"images": torch.zeros(2)}, tmp_path / "model.pt")
    assert "pickles are never loaded" in refusal(tmp_path / "model.pt")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.arange(5)}, {})
    whole = path.read_bytes()
    for end in range(0, len(whole), 9):
        path.write_bytes(whole[:end])
        refusal(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
