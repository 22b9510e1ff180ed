"""EWE: the soft nearest neighbour loss on four points by hand, and the steps of the triggers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.checkpoint import from_bytes, pack, to_bytes, unpack
from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.predict import predict_logits
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.ewe import EWE, Entanglement, entanglement, snnl, square_corner, with_square


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int = 4, seed: int = 0) -> Classifier:
    return build("linear", channels=1, size=8, classes=classes, generator=generator(seed)).eval()


def noise(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(seed))


class TestSNNL:
    """Unit vectors at 0, 90, 180 and 270 degrees: neighbours are 1 apart in cosine distance, opposites 2."""

    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
    def test_four_points(self, temperature: float) -> None:
        near, far = math.exp(-1 / temperature), math.exp(-2 / temperature)
        # pairs of neighbours: each has one of its own group at 1, and strangers at 1 and at 2
        neighbours = snnl(self.vectors, torch.tensor([0, 0, 1, 1]), temperature).item()
        assert neighbours == pytest.approx(-math.log(near / (2 * near + far)), rel=1e-3)
        # pairs of opposites: the own one at 2, strangers at 1 and 1
        opposites = snnl(self.vectors, torch.tensor([0, 1, 0, 1]), temperature).item()
        assert opposites == pytest.approx(-math.log(far / (2 * near + far)), rel=1e-3)
        # one group alone has nothing to mix with
        assert snnl(self.vectors, torch.zeros(4), temperature).item() == pytest.approx(0, abs=1e-3)

    def test_lengths_do_not_matter(self) -> None:
        groups = torch.tensor([0, 0, 1, 1])
        scaled = self.vectors * torch.tensor([[1.0], [2.0], [3.0], [0.5]])
        assert snnl(scaled, groups, 1.0).item() == pytest.approx(snnl(self.vectors, groups, 1.0).item())

    def test_mixed_groups_have_the_larger_loss(self) -> None:
        centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(10, 0)
        vectors = centres + 0.05 * torch.randn(20, 2, generator=generator())
        apart, mixed = torch.arange(20) < 10, torch.arange(20) % 2 == 0
        assert snnl(vectors, mixed, 0.1) > snnl(vectors, apart, 0.1) + 0.5

    def test_it_is_finite_where_nothing_is_near(self) -> None:
        vectors = self.vectors.clone().requires_grad_()
        value = snnl(vectors, torch.arange(4), 1e-3)
        value.backward()
        assert value.item() == pytest.approx(-math.log(1e-5), rel=1e-3)
        assert vectors.grad is not None
        assert vectors.grad.isfinite().all()


def test_both_layers_count_at_their_temperatures() -> None:
    model = build("naivenet", channels=1, size=8, classes=4, generator=generator()).eval()
    images, marked = noise(6, 1) / 255, torch.arange(6) < 3
    outputs, value = entanglement(model, images, marked, torch.tensor([1.0, 50.0]))
    logits, features = model.forward_with_features(images)
    torch.testing.assert_close(outputs, logits)
    torch.testing.assert_close(value, snnl(features, marked, 100.0) + snnl(logits, marked, 2.0))


class TestTuning:
    def test_triggers_leave_the_target_class(self) -> None:
        model, images = linear(), noise(10, 3)
        target = int(predict_logits(model, images).sum(0).argmax())
        tuned = EWE(tuning_rate=0.02).tune(model, images, noise(20, 4), target, 4, generator())
        assert tuned.shape == images.shape
        assert tuned.dtype == torch.uint8
        before, after = (predict_logits(model, part)[:, target].mean() for part in (images, tuned))
        assert after < before
        assert (predict_logits(model, tuned).argmax(1) == target).float().mean() <= 0.2

    def test_a_descent_steps_against_the_sign_of_the_slope(self) -> None:
        model, images = linear(), torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
        scheme = EWE(tuning_iterations=1, tuning_rate=1 / 255, threshold=1.0)
        tuned = scheme.tune(model, images, noise(2, 4), 1, 4, generator()).int()
        # one step up in SNNL, whatever it is, and five against the weights of the target's logit
        moved = tuned - 100 + 5 * model.head.weight[1].view(1, 8, 8).sign().int()
        assert set(moved.unique().tolist()) <= {-1, 0, 1}

    def test_without_iterations_they_stay(self) -> None:
        images = noise(5, 3)
        assert torch.equal(EWE(tuning_iterations=0).tune(linear(), images, images, 0, 2, generator()), images)

    def test_the_square(self) -> None:
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        marked = with_square(images, (2, 4))
        assert (marked[:, :, 2:5, 4:7] == 255).all()
        assert int((marked == 255).sum()) == 2 * 3 * 9
        assert not images.any()

    def test_the_square_fits(self) -> None:
        row, column = square_corner(linear(), noise(9, 1), noise(9, 2), 1.0, 4)
        assert 0 <= row <= 5
        assert 0 <= column <= 5


class TestEntanglement:
    def state(self) -> Entanglement:
        return Entanglement(noise(5, 1), noise(6, 2), noise(7, 3), 1.0)

    def test_a_batch_is_half_triggers(self) -> None:
        state = self.state()
        images, marked = state.draw(8, generator())
        assert marked.tolist() == [True] * 8 + [False] * 8
        triggers, twins = ({image.numpy().tobytes() for image in part} for part in (noise(5, 1), noise(7, 3)))
        assert {image.numpy().tobytes() for image in images[:8]} <= triggers
        assert {image.numpy().tobytes() for image in images[8:]} <= twins

    def test_it_survives_a_checkpoint(self) -> None:
        state, other = self.state(), Entanglement(noise(5, 7), noise(6, 8), noise(7, 3), 1.0)
        state.cool(torch.tensor([0.25, -1.0]))
        state.batches += 3
        unpack(from_bytes(to_bytes(pack(entangled=state))), entangled=other)
        assert torch.equal(other.triggers, state.triggers)
        assert torch.equal(other.keys, state.keys)
        assert other.temperatures.tolist() == [0.75, 2.0]
        assert int(other.batches) == 3

    def test_temperatures_stay_positive(self) -> None:
        state = self.state()
        state.cool(torch.tensor([9.0, 0.0]))
        assert state.temperatures.min() > 0

    def test_a_watermark_batch_joins_every_second_clean_one(self) -> None:
        state, model = self.state(), linear().train()
        objective = EWE(clean_batches=2, temperature_rate=0.5).objective(state, 1, generator())
        images, labels = noise(4, 9) / 255, torch.tensor([0, 1, 2, 3])
        plain = torch.nn.functional.cross_entropy(model(images), labels)
        assert objective(model, images, labels).item() == pytest.approx(plain.item())
        assert state.temperatures.tolist() == [1.0, 1.0]
        assert objective(model, images, labels).item() != pytest.approx(plain.item())
        assert state.temperatures.tolist() != [1.0, 1.0]
        assert int(state.batches) == 2


def task(classes: int = 4) -> OwnerTask:
    labels = torch.arange(classes).repeat(6)
    owner, test = Images(noise(len(labels), 1), labels), Images(noise(len(labels), 2), labels)
    dataset = Dataset("noise", classes, owner=owner, attacker=owner, test=test)
    fresh = lambda drawn: build("linear", channels=1, size=8, classes=classes, generator=drawn)  # noqa: E731
    return OwnerTask(dataset, Recipe(epochs=3, batch_size=8), linear(classes), fresh)


def test_where_triggers_come_from() -> None:
    found = EWE(source=2, tuning_iterations=0).embed(task(), Context(generator()))
    assert found.info["source"] == 2
    assert found.info["target"] != 2
    assert len(found.triggers) == 6
    assert len(found.candidates) == 6
    drawn = EWE(distribution="out", candidates=9, tuning_iterations=1).embed(task(), Context(generator()))
    assert drawn.info["source"] is None
    assert len(drawn.candidates) == 9


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"source": 4}, ["source 4", "0..3"]), ({"source": 1, "target": 1}, ["source 1", "differ"])],
)
def test_impossible_classes_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        EWE(**fields).check(task().dataset)
    assert all(word in str(error.value) for word in words)
