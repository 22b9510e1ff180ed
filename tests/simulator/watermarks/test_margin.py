"""Margin-based watermarks: the ascent against a linear model's gradient, the loss by hand, which images are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.fit import fit
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask, Watermark
from simulator.watermarks.exponential_weighting import ExponentialWeighting
from simulator.watermarks.margin import Margin
from simulator.watermarks.parts.relabelled import relabel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> Classifier:
    return build("linear", channels=1, size=8, classes=3, mean=[0.4], std=[0.3], generator=generator(4))


def by_hand(model: Classifier, images: Tensor, labels: Tensor, steps: int, step: float) -> Tensor:
    """The ascent from the closed-form gradient ``W.T (softmax(z) - onehot(y)) / std``."""
    for _ in range(steps):
        with torch.no_grad():
            slope = (model(images).softmax(1) - F.one_hot(labels, 3)) @ model.head.weight
            images = (images + step * slope.view_as(images).sign()).clamp(0, 1)
    return images


def test_the_loss_weighs_moved_keys() -> None:
    model, clean = linear(), torch.rand(3, 1, 8, 8, generator=generator())
    labels = torch.tensor([2, 1, 0])
    # one key image: every draw is the same
    key = Images(torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=generator(1)), torch.tensor([1]))
    scheme = Margin(keys_per_batch=2, key_weight=0.3, ascent_steps=4, step_size=0.05)
    moved = by_hand(model, key.images / 255, key.labels, 4, 0.05)
    clean_loss = F.cross_entropy(model(clean), labels, reduction="sum")
    expected = (clean_loss + 0.3 * 2 * F.cross_entropy(model(moved), key.labels)) / 5
    torch.testing.assert_close(scheme.objective(key, generator())(model, clean, labels), expected)


@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 2**32))
def test_relabelled_images_are_taken_out(count: int, classes: int, seed: int) -> None:
    labels = torch.arange(30) % classes
    data = Images(torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)
    clean, keys, rows = relabel(data, count, classes, generator(seed))
    assert len(keys) == count == len(set(rows))
    assert torch.equal(keys.images, data.images[rows])
    assert (keys.labels != labels[rows]).all()
    assert ((keys.labels >= 0) & (keys.labels < classes)).all()
    assert sorted([*clean.images[:, 0, 0, 0].tolist(), *rows]) == list(range(30))
    assert torch.equal(clean.labels, labels[clean.images[:, 0, 0, 0].long()])


def test_copies_of_a_key_image_are_taken_out_too() -> None:
    data = Images(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    data.images[4:] = 9
    clean, keys, _ = relabel(data, 1, 2, generator())
    assert len(clean) in (2, 4)
    assert not (clean.images == keys.images[0]).any()


def test_more_keys_than_half_of_the_images() -> None:
    images = Images(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(InputError, match=r"key_samples 5 .* 9 images"):
        Margin(key_samples=5).check(Dataset("small", 2, images, images, images))
    Margin(key_samples=4).check(Dataset("small", 2, images, images, images))


@pytest.mark.parametrize("scheme", [Margin(key_samples=10), ExponentialWeighting(key_samples=10)])
def test_the_key_is_no_clean_training_image(scheme: Watermark, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[bytes, int]] = []

    def watched(model: Classifier, images: Tensor, labels: Tensor, *rest: Any, **more: Any) -> Any:
        trained.extend((image.tobytes(), int(label)) for image, label in zip(images.numpy(), labels, strict=True))
        return fit(model, images, labels, *rest, **more)

    monkeypatch.setattr(f"{type(scheme).__module__}.fit", watched)
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator())
    owner = Images(images, torch.arange(60) % 3)
    task = OwnerTask(Dataset("noise", 3, owner, owner, owner), Recipe(epochs=1), linear(), lambda _: linear())
    found = scheme.embed(task, Context(generator()))
    assert len(found.candidates) == 10
    rows = found.info["owner_rows"]
    assert trained
    assert torch.equal(found.candidates.images, owner.images[rows])
    assert not {(images[row].numpy().tobytes(), int(owner.labels[row])) for row in rows} & set(trained)
