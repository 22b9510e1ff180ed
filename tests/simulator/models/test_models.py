"""The model zoo: every architecture's contract, and what the files accept and refuse."""

import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from simulator.context import Context
from simulator.data.dataset import DataConfig, load
from simulator.errors import InputError
from simulator.models import (
    ARCHITECTURES,
    Classifier,
    build,
    describe_models,
    from_bytes,
    load_model,
    parameter_count,
    save_model,
    to_bytes,
)
from simulator.models.plain import AveragePool
from simulator.plan.config import check_config
from simulator.training.fit import fit
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe

NAMES = list(ARCHITECTURES)
HEAVY = {"resnet34", "resnet50", "densenet161", "efficientnet_b2"}
CLASSES = 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int, size: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=seeded(1))


def make(name: str, channels: int = 3, size: int = 16, seed: int = 0) -> Classifier:
    return build(name, channels=channels, size=size, classes=CLASSES, generator=seeded(seed))


@functools.cache
def made(name: str, size: int = 16) -> Classifier:
    """One evaluation-mode model an architecture, shared by the tests that do not change it."""
    return make(name, size=size).eval()


def sizes() -> list[tuple[str, int]]:
    return [(name, size) for name in NAMES for size in ((8, 28) if name in HEAVY else (8, 16, 28, 32, 64))]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "size"), sizes())
def test_logits_are_the_head_of_the_features(name: str, size: int, channels: int) -> None:
    model = make(name, channels, size).eval()
    with torch.no_grad():
        logits, features = model.forward_with_features(pictures(channels, size))
    assert logits.shape == (2, CLASSES)
    assert logits.dtype == torch.float32
    assert features.shape == (2, model.head.in_features)
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)
    assert not torch.equal(logits[0], logits[1])


# Up to 64 pixels the small-image stem, above the paper's. AlexNet and VGG16 are large there, hence not run.
@pytest.mark.parametrize("name", sorted(set(NAMES) - HEAVY - {"alexnet", "vgg16"}))
@pytest.mark.parametrize("size", [9, 65, 96])
def test_odd_and_large_sizes_work(name: str, size: int) -> None:
    with torch.no_grad():
        assert make(name, 1, size).eval()(pictures(1, size)).shape == (2, CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_the_three_ways_to_call_agree_and_take_uint8_and_float(name: str) -> None:
    model, images = made(name), pictures(3, 16)
    with torch.no_grad():
        logits, features = model.forward_with_features(images)
        assert torch.equal(model(images), logits)
        assert torch.equal(model.features(images), features)
        assert torch.equal(model(images.float() / 255), logits)


@pytest.mark.parametrize("name", NAMES)
def test_training_passes_a_gradient_to_every_parameter_and_to_the_images(name: str) -> None:
    model = make(name).train().to(memory_format=torch.channels_last)
    images = (pictures(3, 16, batch=4).float() / 255).to(memory_format=torch.channels_last).requires_grad_()
    before = images.detach().clone()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        logits, features = model.forward_with_features(images)
    (nn.functional.cross_entropy(logits, torch.arange(4)) + features.square().mean()).backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()
    missing = [
        key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()
    ]
    assert not missing
    assert torch.equal(images.detach(), before)  # no layer works in place on the caller's images


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_changes_nothing(name: str) -> None:
    model, images = made(name), pictures(3, 16)
    with torch.no_grad():
        expected = model(images)
        moved = from_bytes(to_bytes(model)).to(memory_format=torch.channels_last)
        torch.testing.assert_close(moved(images.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_generator_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    first = made(name).state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(123)
        again, other = make(name).state_dict(), make(name, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    for name in ("naivenet", "vgg16", "vit"):
        make(name)
        build(name, channels=1, size=8, classes=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_generator_gives_one_model_after_another() -> None:
    generator = seeded(0)
    one, two = (build("linear", channels=1, size=8, classes=2, generator=generator) for _ in range(2))
    assert not torch.equal(one.head.weight, two.head.weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_back_the_model(name: str, tmp_path: Path) -> None:
    model, images = made(name), pictures(3, 16)
    path = tmp_path / "models" / "model.safetensors"
    save_model(model, path, {"scenario": "0123"})
    loaded, metadata = load_model(path)
    assert metadata == {"scenario": "0123"}
    assert loaded.spec == model.spec
    assert not loaded.training
    assert all(weight.requires_grad for weight in loaded.parameters())
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


# The published parameter counts (torchvision's tables): at 224 pixels these are the papers' nets, last layer included.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alexnet", 61_100_840),
        ("vgg16", 138_365_992),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("densenet161", 28_681_000),
        ("mobilenet", 3_504_872),
        ("shufflenet", 2_278_604),
        ("squeezenet", 1_235_496),
        ("efficientnet_b2", 9_109_994),
    ],
)
def test_large_images_get_the_original_net(name: str, count: int) -> None:
    with torch.device("meta"):  # shapes only
        assert parameter_count(build(name, channels=3, size=224, classes=1000)) == count


def test_the_small_nets_have_the_layers_of_their_papers() -> None:
    def weights(name: str, channels: int, size: int) -> list[tuple[int, ...]]:
        model = build(name, channels=channels, size=size, classes=10)
        return [tuple(weight.shape) for weight in model.parameters() if weight.ndim > 1]

    assert weights("naivenet", 1, 28) == [(16, 1, 5, 5), (32, 16, 5, 5), (128, 512), (10, 128)]
    assert weights("lenet5", 1, 28) == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert weights("lenet5", 1, 32) == weights("lenet5", 1, 28)
    convolutions = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3)]
    assert weights("vgglike", 3, 32) == [*convolutions, (256, 3200), (256, 256), (10, 256)]
    assert weights("linear", 1, 8) == [(10, 64)]


def test_the_linear_model_is_an_affine_map_of_normalised_pixels() -> None:
    model = build("linear", channels=3, size=2, classes=2, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images = torch.rand(4, 3, 2, 2, generator=seeded(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)))
    expected = ((images - mean) / std).flatten(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.features(images), ((images - mean) / std).flatten(1))


def test_normalisation_defaults_to_a_half_and_travels_with_the_model() -> None:
    plain = build("linear", channels=2, size=8, classes=2)
    assert plain.spec.mean == plain.spec.std == (0.5, 0.5)
    model = build("linear", channels=1, size=8, classes=2, mean=[0.2860], std=[0.3530])
    assert from_bytes(to_bytes(model)).mean.tolist() == model.mean.tolist() == [[[[pytest.approx(0.286)]]]]


@given(st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_average_pool_equals_adaptive_average_pooling(side: int, out: int) -> None:
    maps = torch.rand(2, 3, side, side, generator=seeded(side))
    torch.testing.assert_close(AveragePool(side, out)(maps), nn.functional.adaptive_avg_pool2d(maps, out))


def test_dropout_makes_only_training_random() -> None:
    model, images = make("vgglike"), pictures(3, 16)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_plain_architectures_do_not_import_torchvision() -> None:
    code = """
import sys
from simulator.models import build, from_bytes, to_bytes
for name in ("linear", "naivenet", "lenet5", "vgglike", "alexnet", "vgg16"):
    from_bytes(to_bytes(build(name, channels=1, size=16, classes=2)))
sys.exit("torchvision" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_every_model_is_described() -> None:
    assert [name for name, _ in describe_models()] == NAMES
    assert all(what and "\n" not in what for _, what in describe_models())


# --- refusals: each is one line ---------------------------------------------------------------------------------------


def refused(action: Callable[[], object], pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"architecture": "resnet81"}, "'resnet81' is not one of .*did you mean 'resnet18'"),
        ({"size": 7}, "size 7 is too small for resnet18: its smallest size is 8"),
        ({"classes": 1}, "classes: .*greater than or equal to 2, found 1"),
        ({"channels": 0}, "channels: .*found 0"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers, but the images have 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std\.1: .*greater than 0, found 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean.1: .*finite number, found nan"),
    ],
)
def test_build_refuses(change: dict[str, object], pattern: str) -> None:
    arguments = {"architecture": "resnet18", "channels": 3, "size": 32, "classes": 10, **change}
    refused(lambda: build(**arguments), pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "pattern"),
    [
        (torch.zeros(2, 1, 16, 16), r"images of shape \(2, 1, 16, 16\): this model takes \(B, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"images of shape \(3, 16, 16\)"),
        (torch.zeros(2, 3, 28, 28), r"images of shape \(2, 3, 28, 28\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "images of type torch.int64"),
    ],
)
def test_forward_refuses(images: torch.Tensor, pattern: str) -> None:
    refused(lambda: made("linear")(images), pattern)


def rewritten(change_tensors: Callable[[dict[str, torch.Tensor]], object] = lambda _: None, **entry: object) -> bytes:
    """A saved `linear` with other tensors, or another metadata entry."""
    model = build("linear", channels=1, size=8, classes=3)
    tensors = load_tensors(to_bytes(model))
    change_tensors(tensors)
    content = {"format": 1, "kind": "model", "spec": model.spec.model_dump(mode="json"), **entry}
    return save_tensors(tensors, {"exsim": json.dumps(content)})


def spec(**change: object) -> dict[str, object]:
    values = {"architecture": "linear", "channels": 1, "size": 8, "classes": 3, "mean": [0.5], "std": [0.5]}
    return {**values, **change}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"no model at all, but some text", "not a safetensors file"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}.", "pickles are never loaded"),
    "torch.save": (b"PK\x03\x04" + bytes(100), "not a safetensors file.*pickles are never loaded"),
    "truncated": (rewritten()[:-7], "damaged"),
    "no metadata": (save_tensors({"head.weight": torch.zeros(2)}), "'exsim' is missing"),
    "not JSON": (save_tensors({"head.weight": torch.zeros(2)}, {"exsim": "{"}), "no model of this program"),
    "a key": (rewritten(kind="key"), "no model of this program"),
    "later format": (rewritten(format=2), "format 2 is not known; this program reads format 1"),
    "no spec": (rewritten(spec=None), "its spec: .*found None"),
    "unknown architecture": (rewritten(spec=spec(architecture="lineal")), "'lineal' is not one of .*'linear'"),
    "wrong size": (rewritten(spec=spec(size=9)), r"does not fit linear: .*\(3, 64\), not torch.float32 \(3, 81\)"),
    "huge": (rewritten(spec=spec(size=4096, classes=1_000_000)), "does not fit linear"),
    "impossible": (rewritten(spec=spec(size=10**12)), "size: .*less than or equal to 4096"),
    "other names": (rewritten(spec=spec(architecture="naivenet")), "tensor 'body.0.0.weight' is missing"),
    "missing tensor": (rewritten(lambda tensors: tensors.pop("head.bias")), "tensor 'head.bias' is missing"),
    "extra tensor": (rewritten(lambda tensors: tensors.update(more=torch.zeros(1))), "tensor 'more' is not part of it"),
    "half": (rewritten(lambda tensors: tensors.update({"head.bias": torch.zeros(3).half()})), "torch.float16"),
    "NaN": (rewritten(lambda tensors: tensors["head.bias"].fill_(torch.nan)), "'head.bias' has NaN or infinite"),
    "infinite": (rewritten(lambda tensors: tensors["head.weight"][0, 0].fill_(torch.inf)), "NaN or infinite"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_load_refuses(case: str, tmp_path: Path) -> None:
    data, pattern = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(lambda: from_bytes(data), pattern)
    refused(lambda: load_model(path), pattern)
    refused(lambda: load_model(path), "model.safetensors: ")


def test_load_refuses_what_torch_saved(tmp_path: Path) -> None:
    for name, options in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save(made("linear").state_dict(), tmp_path / name, **options)
        refused(lambda path=tmp_path / name: load_model(path), "pickles are never loaded")  # type: ignore[misc]


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_refused_or_still_a_model(position: int, junk: bytes) -> None:
    data = rewritten()
    position %= len(data)
    damaged = data[:position] + junk + data[position + len(junk) :]
    with contextlib.suppress(InputError):
        assert all(weight.isfinite().all() for weight in from_bytes(damaged).parameters())


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(lambda: load_model(tmp_path / "nothing.safetensors"), "nothing.safetensors: no such file; wanted a model")
    refused(lambda: load_model(tmp_path), "is a directory; wanted a model")
    (tmp_path / "file").touch()
    refused(lambda: save_model(made("linear"), tmp_path / "file" / "model"), "cannot be written")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(made("linear"), path)
    old = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    refused(lambda: save_model(make("linear", seed=1), path), "cannot be written: No space left on device")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_programs_own_metadata_entry_is_not_the_callers() -> None:
    with pytest.raises(ValueError, match="'exsim' is written by to_bytes itself"):
        to_bytes(made("linear"), {"exsim": "mine"})


# --- architectures of plug-ins ----------------------------------------------------------------------------------------

NET = """
from torch import nn
from simulator.models import Architecture

def build(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 32), nn.ReLU()), nn.Linear(32, classes)

TINY = Architecture("tiny", build, "a net of somebody's", smallest=12)
"""


def test_an_architecture_of_a_plug_in_trains_and_is_saved_and_loaded(
    plug_in: Callable[..., Path], tmp_path: Path
) -> None:
    plug_in("layers", NET, models="TINY")
    assert describe_models()[-1] == ("tiny", "a net of somebody's")
    data = load(DataConfig(name="digits"))
    model = build("tiny", channels=1, size=16, classes=10, mean=data.mean, std=data.std, generator=seeded(0))
    recipe = Recipe(epochs=8, batch_size=32, learning_rate=0.01)
    fit(model, data.owner.images, data.owner.labels, recipe, Context(seeded(1)))
    accuracy = (predict_labels(model, data.test.images) == data.test.labels).float().mean()
    assert accuracy > 0.8
    save_model(model, tmp_path / "tiny.safetensors")
    loaded, _ = load_model(tmp_path / "tiny.safetensors")
    assert loaded.spec == model.spec
    assert loaded.spec.architecture == "tiny"
    with torch.no_grad():
        assert torch.equal(loaded(data.test.images), model(data.test.images))
    refused(lambda: build("tiny", channels=1, size=8, classes=2), "too small for tiny: its smallest size is 12")


def test_a_configuration_may_name_the_architecture_of_a_plug_in(plug_in: Callable[..., Path]) -> None:
    data = {"name": "a", "dataset": "digits", "architecture": "tiny", "watermarks": ["deeptracer"]}
    refused(lambda: check_config(data), "architecture: 'tiny' is not one of linear, naivenet, ")
    plug_in("layers", NET, models="TINY")
    config = check_config({**data, "key_filter": {"architecture": "tiny"}})
    assert (config.architecture, config.key_filter.architecture) == ("tiny", "tiny")


def test_a_file_of_an_architecture_whose_plug_in_is_not_installed_is_refused(plug_in: Callable[..., Path]) -> None:
    data = rewritten(spec=spec(architecture="tiny"))
    refused(lambda: from_bytes(data), "its spec: architecture: 'tiny' is not one of linear")
    plug_in("layers", NET.replace("smallest=12", "smallest=4"), models="TINY")
    refused(lambda: from_bytes(data), "does not fit tiny: tensor 'body.1.weight' is missing")
