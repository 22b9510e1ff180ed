"""Function-coupled watermarks: fused pixels (Eq. 2, 3), masks (Eq. 4 to 6), fine-tuning (Eq. 7, 8), resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from simulator.checkpoint import State, from_bytes, to_bytes
from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.function_coupled import FunctionCoupled, Fusion, Masked, fuse_directly, fuse_invisibly
from simulator.watermarks.parts.reparametrised import layer_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(shade: int, side: int = 4) -> Tensor:
    return torch.full((1, 1, side, side), shade, dtype=torch.uint8)


class TestFusion:
    def test_direct_shows_both_images_whole_on_white(self) -> None:
        first = torch.tensor([[[[0, 10, 20, 30], [2, 12, 22, 32], [40, 50, 60, 70], [42, 52, 62, 74]]]])
        fused = fuse_directly(first.to(torch.uint8), plain(200))[0, 0]
        assert fused[:2, :2].tolist() == [[6, 26], [46, 66]]  # means of 2 x 2 pixels; 66.5 is rounded to even
        assert (fused[2:, 2:] == 200).all()
        assert (fused[:2, 2:] == 255).all()
        assert (fused[2:, :2] == 255).all()

    def test_direct_of_an_odd_side_shares_the_middle(self) -> None:
        fused = fuse_directly(plain(0, 3), plain(100, 3))[0, 0]
        # the canvas has six rows: the middle pixel averages one of each quarter
        assert fused.tolist() == [[0, 128, 255], [128, round((255 + 255 + 100) / 4), 178], [255, 178, 100]]

    @pytest.mark.parametrize(("ratio", "expected"), [(0.5, 150), (0.7, 130), (0.9, 110)])
    def test_invisible_mixes_by_the_ratio_of_the_first(self, ratio: float, expected: int) -> None:
        assert (fuse_invisibly(plain(100), plain(200), ratio) == expected).all()

    @given(st.integers(0, 255), st.integers(0, 255), st.floats(0.01, 0.99))
    def test_invisible_stays_between_the_two(self, first: int, second: int, ratio: float) -> None:
        fused = int(fuse_invisibly(plain(first), plain(second), ratio)[0, 0, 0, 0])
        assert abs(fused - (ratio * first + (1 - ratio) * second)) <= 0.5 + 1e-4

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("side", [8, 9, 28])
    def test_shapes_and_types(self, channels: int, side: int) -> None:
        images = torch.randint(0, 256, (5, channels, side, side), dtype=torch.uint8, generator=generator())
        for fused in (fuse_directly(images, images.flip(0)), fuse_invisibly(images, images.flip(0), 0.5)):
            assert fused.shape == images.shape
            assert fused.dtype == torch.uint8


def network(architecture: str = "naivenet", classes: int = 4) -> Classifier:
    return build(architecture, channels=1, size=8, classes=classes, generator=generator(3))


class TestMasks:
    def test_nothing_is_masked_before_the_first_draw(self) -> None:
        model, images = network(), torch.rand(3, 1, 8, 8, generator=generator())
        torch.testing.assert_close(Masked(model, 0.5)(images), model(images))

    def test_equation_four(self) -> None:
        model, images = network("linear"), torch.rand(3, 1, 8, 8, generator=generator())
        masked = Masked(model, 0.25)
        masked.redraw(generator())
        (mask,) = masked.masks.values()
        pixels = ((images - model.mean) / model.std).flatten(1)
        expected = pixels @ (model.head.weight * mask / 0.75).T + model.head.bias
        torch.testing.assert_close(masked(images), expected)

    def test_equation_six(self) -> None:
        """The gradient is ∂L/∂(the weight that is used) ⊙ M / (1 - p): nothing where masked, scaled elsewhere."""
        model, images = network("linear"), torch.rand(6, 1, 8, 8, generator=generator())
        labels = torch.tensor([0, 1, 2, 3, 0, 1])
        masked = Masked(model, 0.25)
        masked.redraw(generator())
        (mask,) = masked.masks.values()
        F.cross_entropy(masked(images), labels).backward()
        pixels = ((images - model.mean) / model.std).flatten(1)
        slope = (masked(images).softmax(1) - F.one_hot(labels, 4)).T @ pixels / 6
        assert model.head.weight.grad is not None
        torch.testing.assert_close(model.head.weight.grad, slope * mask / 0.75)

    @pytest.mark.parametrize("optimizer", ["adam", "sgd"])
    def test_masked_weights_do_not_move(self, optimizer: Any) -> None:
        model, images = network(), torch.rand(6, 1, 8, 8, generator=generator())
        # momentum and weight decay would move weights that have no gradient
        steps = Recipe(optimizer=optimizer, weight_decay=0.1).build(model.parameters())
        masked, drawing = Masked(model, 0.5), generator()
        for _ in range(3):
            masked.redraw(drawing)
            before = {name: weight.detach().clone() for name, weight in layer_weights(model).items()}
            biases = model.head.bias.detach().clone()
            steps.zero_grad()
            F.cross_entropy(masked(images), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
            with masked.frozen():
                steps.step()
            for name, weight in layer_weights(model).items():
                moved = weight != before[name]
                assert not (moved & ~masked.masks[name]).any()
                assert moved[masked.masks[name]].double().mean() > 0.5
            assert (model.head.bias != biases).all()

    def test_the_expectation_is_kept(self) -> None:
        model, images = network("linear"), torch.rand(1, 1, 8, 8, generator=generator())
        masked, drawing, ratio, rounds = Masked(model, 0.3), generator(), 0.3, 2000
        answers = []
        with torch.no_grad():
            for _ in range(rounds):
                masked.redraw(drawing)
                answers.append(masked(images)[0])
            pixels = ((images - model.mean) / model.std).flatten()
            spread = ((model.head.weight * pixels).square().sum(1) * ratio / (1 - ratio)).sqrt()
            assert ((torch.stack(answers).mean(0) - model(images)[0]).abs() < 5 * spread / rounds**0.5).all()

    def test_p_is_the_fraction_masked_out_of_every_convolution_and_linear_layer(self) -> None:
        masked = Masked(network(), 0.2)
        masked.redraw(generator())
        assert len(masked.masks) == 4
        for mask in masked.masks.values():
            deviation = (0.2 * 0.8 / mask.numel()) ** 0.5
            assert abs((~mask).double().mean().item() - 0.2) < 5 * deviation


def test_the_fine_tuning_step_is_equation_seven() -> None:
    model = network("linear")
    # more images than go into one forward pass
    tuning = Images(
        torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=generator()), torch.arange(300) % 4
    )
    masked = Masked(model, 0.25)
    masked.redraw(generator())
    (mask,) = masked.masks.values()
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        pixels = ((tuning.images / 255 - model.mean) / model.std).flatten(1)
        slope = (masked(tuning.images).softmax(1) - F.one_hot(tuning.labels, 4)).T @ pixels / 300
    FunctionCoupled(fine_tuning_rate=0.1).fine_tune(masked, tuning)
    torch.testing.assert_close(model.head.weight.detach(), before - 0.1 * slope * mask / 0.75)


def shades(classes: int, brightness: int, each: int) -> Images:
    """Images of one shade: ``brightness`` plus twice the class."""
    labels = torch.arange(classes).repeat(each)
    values = (brightness + 2 * labels).to(torch.uint8)
    return Images(values[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)


def task(classes: int, epochs: int = 1) -> OwnerTask:
    """Owner's images have the shades from 100 on and test images those from 0 on."""
    owner = shades(classes, 100, 4)
    dataset = Dataset("shades", classes, owner=owner, attacker=owner, test=shades(classes, 0, 4))
    return OwnerTask(
        dataset,
        Recipe(epochs=epochs, batch_size=16),
        network("linear", classes).eval(),
        lambda drawn: build("naivenet", channels=1, size=8, classes=classes, generator=drawn),
    )


class TestEmbedding:
    @pytest.mark.parametrize("fusion", ["direct", "invisible"])
    def test_what_the_images_are_made_of(self, fusion: Fusion) -> None:
        found = FunctionCoupled(fusion=fusion).embed(task(6), Context(generator(1)))
        sources, target = found.info["sources"], found.info["target"]
        assert len({*sources, target}) == 3

        def made_of(images: Tensor, brightness: int) -> set[int]:
            values = images.unique().tolist()
            if fusion == "invisible":
                assert len(values) == 1
                return {int(values[0] - brightness)}  # the mean of 2i and 2j
            assert values[-1] == 255
            return {int(value - brightness) // 2 for value in values[:-1]}

        expected = set(sources) if fusion == "direct" else {sum(sources)}
        assert made_of(found.triggers, 100) == expected
        assert made_of(found.candidates.images, 0) == expected
        assert found.near_misses is not None
        if fusion == "direct":
            assert made_of(found.near_misses, 0).isdisjoint({*sources, target})
        assert set(found.candidates.labels.tolist()) == set(found.trigger_labels.tolist()) == {target}
        assert len(found.candidates) == len(found.triggers) == 90

    def test_three_classes_are_the_least(self) -> None:
        found = FunctionCoupled().embed(task(3), Context(generator()))
        assert found.near_misses is None
        assert found.near_miss_labels is None
        with pytest.raises(InputError, match="shades has 2"):
            FunctionCoupled().embed(task(2), Context(generator()))

    def test_it_may_start_from_the_benign_model(self) -> None:
        benign = network("naivenet", 6).eval()
        given_task = replace(task(6), benign=benign)
        given_task = replace(given_task, training=given_task.training.model_copy(update={"learning_rate": 1e-9}))
        quiet: dict[str, Any] = {"fine_tuning_samples": 0, "mask_ratio": 0.0}
        near = FunctionCoupled(start="benign", **quiet).embed(given_task, Context(generator())).model
        far = FunctionCoupled(**quiet).embed(given_task, Context(generator())).model
        torch.testing.assert_close(near.head.weight, benign.head.weight)
        assert not torch.allclose(far.head.weight, benign.head.weight)

    @pytest.mark.parametrize("stop", [1, 2, 3])
    def test_it_goes_on_where_it_was_interrupted(self, stop: int) -> None:
        class Interrupted(Exception):
            pass

        class Memory:
            data: bytes | None = None

            def load(self) -> State | None:
                return None if self.data is None else from_bytes(self.data)

            def due(self) -> bool:
                return True

            def save(self, state: State) -> None:
                self.data = to_bytes(state)

        def listen(phase: str, done: int, total: int) -> None:
            assert (phase, total) == ("train", 3)
            if done == stop:
                raise Interrupted

        scheme, memory = FunctionCoupled(), Memory()
        whole = scheme.embed(task(6, epochs=3), Context(generator(2)))
        with pytest.raises(Interrupted):
            scheme.embed(task(6, epochs=3), Context(generator(2), listen, memory))
        told: list[int] = []
        listener = Context(generator(2), lambda _, done, __: told.append(done), memory)
        resumed = scheme.embed(task(6, epochs=3), listener)
        assert told == list(range(stop + 1, 4))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name])
        assert torch.equal(whole.candidates.images, resumed.candidates.images)


@pytest.mark.parametrize("wrong", [{"mask_ratio": 1.0}, {"ratio": 0.0}, {"fusion": "hidden"}, {"trigger_ratio": 0.0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FunctionCoupled(**wrong)
