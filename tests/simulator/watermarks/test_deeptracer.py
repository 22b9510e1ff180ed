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
from simulator.plan.config import read_config
from simulator.plan.tree import make_plan
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.deeptracer import Coupling, DeepTracer
from simulator.watermarks.parts.coupling import CentroidRule, Centroids, RelativeMargin
from simulator.watermarks.parts.diagnostics import Course, centroid_distances, geometry
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


def coupled(rule: CentroidRule = "batch", margin: float = 1.0, rise: float = 0.0) -> Coupling:
    return Coupling(margin, Centroids(rule, CLASSES, 0.9), Course(2), rise)


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
        objective = scheme.objective(mosaics, target, 0.5, coupled(margin=self.margin), generator())
        loss = objective(model, clean, labels)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(self.by_hand(scheme, target), rel=1e-4)

    @pytest.mark.parametrize(("coupling_weight", "used"), [(0.0, False), (1e-6, True)])
    def test_without_weight_the_coupling_is_left_out(self, coupling_weight: float, used: bool) -> None:
        model, clean, labels, mosaics, _ = self.parts()
        coupling = coupled("moving")
        scheme = DeepTracer(source_classes=2, coupling_weight=coupling_weight)
        scheme.objective(mosaics, 1, 0.5, coupling, generator())(model, clean, labels)
        assert bool(coupling.centroids.seen.any()) is used

    def test_a_rising_weight_reaches_its_height_and_stays(self) -> None:
        model, clean, labels, mosaics, _ = self.parts()
        scheme = DeepTracer(source_classes=2, watermark_weight=0.0, intra_weight=0.0, inter_weight=2.0)
        plain = DeepTracer(source_classes=2, watermark_weight=0.0, coupling_weight=0.0)
        rest = plain.objective(mosaics, 1, 0.5, coupled(), generator())(model, clean, labels)
        objective = scheme.objective(mosaics, 1, 0.5, coupled(margin=self.margin, rise=4), generator())
        parts = [(objective(model, clean, labels) - rest).item() for _ in range(6)]
        assert parts[-1] > 0.01
        assert [part / parts[-1] for part in parts] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-3)

    def test_normalised_features_have_length_one(self) -> None:
        model, clean, labels, mosaics, _ = self.parts()
        coupling = coupled("moving")
        DeepTracer(source_classes=2, normalise="unit").objective(mosaics, 1, 0.5, coupling, generator())(
            model, clean, labels
        )
        torch.testing.assert_close(coupling.centroids.values.norm(dim=1), torch.ones(CLASSES))

    @pytest.mark.parametrize(("ratio", "images", "mosaics"), [(0.01, 20, 1), (0.1, 20, 2), (0.1, 64, 6), (1.0, 5, 5)])
    def test_mosaics_are_added_in_proportion_and_at_least_one(self, ratio: float, images: int, mosaics: int) -> None:
        model, _, _, drawing, mosaic = self.parts()
        seen: list[Tensor] = []
        hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        objective = DeepTracer(source_classes=2).objective(drawing, 1, ratio, coupled(), generator())
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


class TestDiagnostics:
    def embed(self, **settings: Any) -> tuple[OwnerTask, Any]:
        """A victim whose phases are long enough to be measured: a step an epoch."""
        work = task(8)
        return work, DeepTracer(first_epochs=30, second_epochs=30, candidates=5, **settings).embed(
            work, Context(generator(2))
        )

    def test_they_say_what_the_loss_did(self) -> None:
        work, found = self.embed(margin=20.0, centroid="learnable")
        told = found.diagnostics
        assert set(told) == {"margin", "within_margin", "benign", "victim", "training"}
        test = work.dataset.test
        assert told["victim"] == geometry(found.model(test.images / 255).detach(), test.labels, 8)
        for phase in ("phase 1", "phase 2"):
            shares = told["training"][phase]["share"]
            assert set(shares) == {"primary", "watermark", "intra", "inter"}
            assert min(shares.values()) > 0
            assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert told["training"][phase]["within_margin"] > 0.5

    def test_a_margin_that_nothing_lies_within_is_warned_of(self) -> None:
        _, found = self.embed(margin=1e-4)
        assert found.diagnostics["within_margin"] == 0.0
        (line,) = found.diagnostics["warnings"]
        assert "L_inter is inactive" in line
        assert "0.0001" in line
        assert found.diagnostics["training"]["phase 2"]["gradient"]["inter"] == 0.0
        # who asks for no L_inter is not told that there is none
        for without in ({"inter_weight": 0.0}, {"coupling_weight": 0.0}):
            assert "warnings" not in self.embed(margin=1e-4, **without)[1].diagnostics

    def test_a_loss_that_has_pushed_everybody_out_is_no_idle_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("simulator.watermarks.deeptracer.share_within", lambda *_: 0.5)
        monkeypatch.setattr(Course, "summary", lambda _: {"phase 2": {"within_margin": 0.0}})
        assert "warnings" not in self.embed(margin=1e-4)[1].diagnostics  # there are pairs within it now
        monkeypatch.setattr("simulator.watermarks.deeptracer.share_within", lambda *_: 0.0)
        assert "warnings" in self.embed(margin=1e-4)[1].diagnostics
        monkeypatch.setattr(Course, "summary", lambda _: {"phase 2": {"within_margin": 0.5}})
        assert "warnings" not in self.embed(margin=1e-4)[1].diagnostics  # there were some

    def test_a_relative_margin_is_measured_on_the_benign_model(self) -> None:
        work, found = self.embed(margin=RelativeMargin(relative=1.5))
        owner = work.dataset.owner
        distances = sorted(centroid_distances(work.benign(owner.images / 255).detach(), owner.labels, 8))
        assert found.diagnostics["margin"] == pytest.approx(1.5 * (distances[13] + distances[14]) / 2, rel=1e-3)

    def test_measuring_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = self.embed(margin=20.0)[1]
        monkeypatch.setattr(Course, "due", lambda *_: False)
        unmeasured = self.embed(margin=20.0)[1]
        for name, value in measured.model.state_dict().items():
            assert torch.equal(value, unmeasured.model.state_dict()[name])
        assert torch.equal(measured.candidates.images, unmeasured.candidates.images)
        assert unmeasured.diagnostics["training"] == {}


class TestNegatives:
    def test_they_join_the_clean_images_with_the_benign_model_s_label(self) -> None:
        work = task(8)
        scheme = DeepTracer(source_classes=2, near_misses_as_negatives=True)
        negatives = scheme._negatives(work, (0, 1), 2, generator())
        assert negatives is not None
        images, labels = negatives.draw(40, generator(1))
        # tiles of owner's images (shades from 100 on) of no source and not of the target
        assert {shade - 100 for shade in images.unique().tolist()} <= {3, 4, 5, 6, 7}
        assert torch.equal(labels, work.benign(images / 255).argmax(1))

        model, seen = linear(8), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        mosaics = Mosaics(work.dataset.owner, (0, 1))
        coupling = Coupling(1.0, Centroids("batch", 8, 0.9), Course(2))
        scheme.objective(mosaics, 2, 0.1, coupling, generator(), negatives)(
            model, torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
        )
        assert seen == [24]  # two triggers and two negatives

    def test_none_where_no_class_is_left(self) -> None:
        assert DeepTracer(near_misses_as_negatives=True)._negatives(task(5), (0, 1, 2, 3), 4, generator()) is None


@pytest.mark.parametrize("setting", [{"normalise": "unit"}, {"inter_warmup": 0.5}, {"near_misses_as_negatives": True}])
def test_younger_settings_are_named_only_where_they_are_used(setting: dict[str, Any]) -> None:
    """Published figures keep their ids."""
    ((name, value),) = setting.items()
    assert name not in DeepTracer().params()
    assert DeepTracer(**setting).params() == DeepTracer().params() | {name: value}


def test_the_id_of_the_preset_s_victim_is_that_of_published_figures() -> None:
    (victim,) = make_plan(read_config("digits")).victims
    assert victim.id == "deeptracer-3cfc15a0dd29"


@pytest.mark.parametrize(
    "wrong",
    [
        {"source_classes": 3},
        {"margin": 0.0},
        {"coupling_weight": -1.0},
        {"second_epochs": 0},
        {"first_ratio": 0.0},
        {"margin": {"relative": 0.0}},
        {"inter_warmup": 1.5},
        {"normalise": "max"},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeepTracer(**wrong)
