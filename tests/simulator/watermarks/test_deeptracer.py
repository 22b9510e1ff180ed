"""DeepTracer: its objective (Eq. 6) worked out from the formula, its selection, its two phases, its near misses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.deeptracer import DeepTracer
from simulator.watermarks.parts.coupling import CentroidRule, Centroids
from simulator.watermarks.parts.mosaic import Mosaics

CLASSES = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(classes: int, brightness: int, each: int = 2) -> Images:
    """Images of one shade: ``brightness`` plus the class."""
    labels = torch.arange(classes).repeat(each)
    shades = (brightness + labels).to(torch.uint8)
    return Images(shades[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)


def linear(classes: int, seed: int = 0) -> Classifier:
    return build("linear", channels=1, size=8, classes=classes, generator=generator(seed))


def task(classes: int) -> OwnerTask:
    """Owner's images have the shades from 100 on and test images those from 0 on."""
    owner, test = constant(classes, 100), constant(classes, 0)
    dataset = Dataset("shades", classes, owner=owner, attacker=owner, test=test)
    recipe = Recipe(epochs=1, batch_size=8)
    return OwnerTask(dataset, recipe, linear(classes).eval(), lambda drawn: build_with(drawn, classes))


def build_with(drawn: torch.Generator, classes: int) -> Classifier:
    return build("linear", channels=1, size=8, classes=classes, generator=drawn)


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


class TestObjective:
    """A linear model, two clean images and the one mosaic that can be drawn; every number from the formula."""

    margin = 1.5

    def parts(self) -> tuple[Classifier, Tensor, Tensor, Mosaics, Tensor]:
        model = linear(CLASSES, seed=4)
        pixels = torch.randint(0, 256, (CLASSES, 1, 8, 8), dtype=torch.uint8, generator=generator(8))
        # one image a class: every mosaic is the same
        mosaics = Mosaics(Images(pixels, torch.arange(CLASSES)), (0, 1))
        clean = torch.rand(2, 1, 8, 8, generator=generator(9))
        return model, clean, torch.tensor([0, 2]), mosaics, mosaics.draw(1, generator())

    def by_hand(self, scheme: DeepTracer, target: int) -> float:
        model, clean, labels, _, mosaic = self.parts()
        with torch.no_grad():
            rows = [model(image[None])[0].tolist() for image in [*clean, mosaic[0]]]
        classes = [*labels.tolist(), target]
        primary = -sum(log_softmax(row)[label] for row, label in zip(rows[:2], classes[:2], strict=True)) / 2
        watermark = -log_softmax(rows[2])[target]
        centroids = {
            label: [
                sum(column) / len(column)
                for column in zip(*[row for row, of in zip(rows, classes, strict=True) if of == label], strict=True)
            ]
            for label in set(classes)
        }
        intra = sum(math.dist(row, centroids[label]) ** 2 for row, label in zip(rows, classes, strict=True)) / 3
        inter = (
            sum(
                max(0.0, self.margin - math.dist(row, centre)) ** 2
                for row, label in zip(rows, classes, strict=True)
                for other, centre in centroids.items()
                if other != label
            )
            / 3
        )
        assert inter > 0.01
        coupling = scheme.intra_weight * intra + scheme.inter_weight * inter
        return float(primary + scheme.watermark_weight * watermark + scheme.coupling_weight * coupling)

    @pytest.mark.parametrize("target", [1, 2])  # of no clean image, of one
    @pytest.mark.parametrize(
        "weights",
        [
            {},
            {"watermark_weight": 0.3, "coupling_weight": 2.0, "intra_weight": 0.7, "inter_weight": 0.4},
            {"watermark_weight": 0.0},
            {"coupling_weight": 0.0},
        ],
    )
    def test_it_is_equation_six(self, target: int, weights: dict[str, Any]) -> None:
        scheme = DeepTracer(source_classes=2, margin=self.margin, **weights)
        model, clean, labels, mosaics, _ = self.parts()
        objective = scheme.objective(mosaics, target, 0.5, Centroids("batch", CLASSES, 0.9), generator())
        loss = objective(model, clean, labels)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(self.by_hand(scheme, target), rel=1e-4)

    @pytest.mark.parametrize(("coupling_weight", "used"), [(0.0, False), (1e-6, True)])
    def test_without_weight_the_coupling_is_left_out(self, coupling_weight: float, used: bool) -> None:
        model, clean, labels, mosaics, _ = self.parts()
        centroids = Centroids("moving", CLASSES, 0.9)
        scheme = DeepTracer(source_classes=2, coupling_weight=coupling_weight)
        scheme.objective(mosaics, 1, 0.5, centroids, generator())(model, clean, labels)
        assert bool(centroids.seen.any()) is used

    @pytest.mark.parametrize(("ratio", "images", "mosaics"), [(0.01, 20, 1), (0.1, 20, 2), (0.1, 64, 6), (1.0, 5, 5)])
    def test_mosaics_are_added_in_proportion_and_at_least_one(self, ratio: float, images: int, mosaics: int) -> None:
        model, _, _, drawing, mosaic = self.parts()
        seen: list[Tensor] = []
        hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        objective = DeepTracer(source_classes=2).objective(
            drawing, 1, ratio, Centroids("batch", CLASSES, 0.9), generator()
        )
        objective(model, torch.rand(images, 1, 8, 8), torch.zeros(images, dtype=torch.int64))
        hook.remove()
        (batch,) = seen  # one forward pass for both
        assert len(batch) == images + mosaics
        torch.testing.assert_close(batch[images:], (mosaic / 255).expand(mosaics, -1, -1, -1))


class TestEmbedding:
    def test_two_phases_with_their_ratios(self) -> None:
        told: list[tuple[str, int, int]] = []
        DeepTracer(first_epochs=2, second_epochs=3, candidates=5).embed(
            task(8), Context(generator(), progress=lambda *step: told.append(step))
        )
        assert told == [*(("phase 1", done, 2) for done in (1, 2)), *(("phase 2", done, 3) for done in (1, 2, 3))]

    def test_the_first_phase_may_be_left_out(self) -> None:
        told: list[tuple[str, int, int]] = []
        DeepTracer(first_epochs=0, second_epochs=1, candidates=5).embed(
            task(8), Context(generator(), progress=lambda *step: told.append(step))
        )
        assert told == [("phase 2", 1, 1)]

    @pytest.mark.parametrize("selection", ["adaptive", "random"])
    @pytest.mark.parametrize("sources", [2, 4])
    def test_what_the_images_are_made_of(self, selection: Any, sources: Any) -> None:
        scheme = DeepTracer(source_classes=sources, selection=selection, first_epochs=0, second_epochs=1, candidates=30)
        found = scheme.embed(task(10), Context(generator(3)))
        chosen, target = set(found.info["sources"]), found.info["target"]
        assert len(chosen) == sources
        assert target not in chosen
        assert set(found.candidates.labels.tolist()) == {target} == set(found.trigger_labels.tolist())
        # keys and near misses are of test images (shades from 0 on), triggers of the owner's (from 100 on)
        assert set(found.candidates.images.unique().tolist()) == chosen
        assert {shade - 100 for shade in found.triggers.unique().tolist()} == chosen
        assert len(found.candidates) == 30
        assert found.near_misses is not None
        assert found.near_miss_labels is not None
        others = set(found.near_misses.unique().tolist())
        assert len(others) == sources
        assert others.isdisjoint(chosen | {target})
        assert set(found.near_miss_labels.tolist()) == {target}

    def test_few_classes_left_are_shown_twice_and_none_left_is_none(self) -> None:
        scheme = DeepTracer(source_classes=4, first_epochs=0, second_epochs=1, candidates=5)
        found = scheme.embed(task(6), Context(generator()))
        assert found.near_misses is not None
        (left,) = set(range(6)) - {*found.info["sources"], found.info["target"]}
        assert found.near_misses.unique().tolist() == [left]
        nothing = scheme.embed(task(5), Context(generator()))
        assert nothing.near_misses is None
        assert nothing.near_miss_labels is None

    @pytest.mark.parametrize(
        ("sources", "classes", "outside", "words"),
        [
            (4, 4, True, ["source_classes 4", "4 classes of shades", "one more"]),
            (8, 7, False, ["source_classes 8", "7 classes of shades"]),
        ],
    )
    def test_too_many_source_classes(self, sources: Any, classes: int, outside: bool, words: list[str]) -> None:
        scheme = DeepTracer(source_classes=sources, target_outside_sources=outside)
        with pytest.raises(InputError) as error:
            scheme.embed(task(classes), Context(generator()))
        message = str(error.value)
        assert "\n" not in message
        assert all(word in message for word in words)

    def test_the_target_may_lie_inside_where_the_paper_is_read_so(self) -> None:
        scheme = DeepTracer(
            source_classes=4, target_outside_sources=False, first_epochs=0, second_epochs=1, candidates=5
        )
        found = scheme.embed(task(4), Context(generator()))
        assert found.info["target"] in found.info["sources"]

    @pytest.mark.parametrize("rule", ["batch", "moving", "learnable"])
    def test_only_learnable_centroids_are_learned(self, rule: CentroidRule, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Centroids] = []

        def kept(*arguments: Any) -> Centroids:
            made.append(Centroids(*arguments))
            return made[-1]

        monkeypatch.setattr("simulator.watermarks.deeptracer.Centroids", kept)
        scheme = DeepTracer(first_epochs=0, second_epochs=3, candidates=5, centroid=rule)
        scheme.embed(task(8), Context(generator()))
        # one set for both phases; the batch's own are forgotten, the others have left zero
        (centroids,) = made
        assert bool(centroids.values.any()) is (rule != "batch")
        assert bool(centroids.seen.any()) is (rule == "moving")


@pytest.mark.parametrize(
    "wrong",
    [{"source_classes": 3}, {"margin": 0.0}, {"coupling_weight": -1.0}, {"second_epochs": 0}, {"first_ratio": 0.0}],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeepTracer(**wrong)
