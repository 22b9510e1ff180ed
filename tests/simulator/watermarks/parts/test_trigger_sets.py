"""The trigger-set schemes: what their triggers look like, where they are from and what label they get."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from simulator.checkpoint import TimedCheckpoint
from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.recipe import Recipe
from simulator.watermarks.abstract import Abstract, draw_waves
from simulator.watermarks.badnets import BadNets
from simulator.watermarks.base import WATERMARKS, Embedding, OwnerTask, Watermark
from simulator.watermarks.composite import Composite
from simulator.watermarks.content import Content, text_mask
from simulator.watermarks.ewe import EWE
from simulator.watermarks.mea_defender import MEADefender
from simulator.watermarks.noise import Noise
from simulator.watermarks.parts.trigger_set import Stamped, trigger_count, with_triggers
from simulator.watermarks.unrelated import Unrelated, draw_figures

CLASSES = 4
SIZE = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shades(brightness: int, each: int = 5) -> Images:
    """Images of one shade: ``brightness`` plus ten times the class, plus a number."""
    labels = torch.arange(CLASSES).repeat(each)
    values = (brightness + 10 * labels + torch.arange(each).repeat_interleave(CLASSES)).to(torch.uint8)
    return Images(values[:, None, None, None].expand(-1, 1, SIZE, SIZE).contiguous(), labels)


def fresh(drawn: torch.Generator) -> Classifier:
    return build("linear", channels=1, size=SIZE, classes=CLASSES, generator=drawn)


def favouring(*scores: float) -> Classifier:
    """A model that gives every image the same logits."""
    model = fresh(generator()).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(scores))
    return model


def task(benign: Classifier | None = None) -> OwnerTask:
    """The owner's images have shades from 100 on, test images those from 0 on."""
    dataset = Dataset("shades", CLASSES, owner=shades(100), attacker=shades(50), test=shades(0))
    return OwnerTask(dataset, Recipe(epochs=1, batch_size=8), benign or favouring(3, 2, 1, 2), fresh)


def embed(scheme: Stamped | Unrelated | Abstract, benign: Classifier | None = None) -> Embedding:
    return scheme.embed(task(benign), Context(generator(1)))


def ramp(channels: int = 1, size: int = SIZE) -> Tensor:
    """Two images, every pixel of which is different."""
    return torch.arange(2 * channels * size * size).remainder(251).view(2, channels, size, size).to(torch.uint8)


class TestObjective:
    def test_clean_images_and_triggers_weigh_alike(self) -> None:
        model = favouring(0.0, 1.0, 0.0, 0.0)
        clean, labels = torch.rand(4, 1, SIZE, SIZE), torch.tensor([1, 1, 1, 1])
        asked = []

        def draw(count: int) -> tuple[Tensor, Tensor]:
            asked.append(count)
            return torch.zeros(count, 1, SIZE, SIZE, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)

        loss = with_triggers(draw, 0.5)(model, clean, labels)
        assert asked == [2]
        total = torch.tensor([0.0, 1.0, 0.0, 0.0]).logsumexp(0)
        # four clean images with log-probability 1 - total, two triggers with 0 - total
        assert loss.item() == pytest.approx(float(total) - 4 / 6, rel=1e-5)

    @pytest.mark.parametrize(("ratio", "clean", "count"), [(0.1, 64, 6), (0.01, 64, 1), (0.001, 8, 1), (1.0, 8, 8)])
    def test_how_many_join(self, ratio: float, clean: int, count: int) -> None:
        assert trigger_count(ratio, clean) == count


class TestStamps:
    @pytest.mark.parametrize(("size", "side"), [(8, 3), (28, 4), (32, 4), (64, 8)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_badnets_paints_a_block_one_pixel_in(self, size: int, side: int, channels: int) -> None:
        images = ramp(channels, size)
        marked = BadNets().stamp(channels, size, generator())(images)
        block = slice(size - 1 - side, size - 1)
        assert (marked[:, :, block, block] == 255).all()
        outside = torch.ones(size, size, dtype=torch.bool)
        outside[block, block] = False
        assert torch.equal(marked[:, :, outside], images[:, :, outside])

    @pytest.mark.parametrize(("size", "side"), [(8, 7), (28, 25), (64, 58)])
    def test_the_text_is_as_wide_as_told(self, size: int, side: int) -> None:
        mask = text_mask("TEST", size, 0.9)
        assert mask.shape == (size, size)
        assert 0 <= mask.min() < mask.max() <= 1
        columns = mask.sum(0).nonzero().squeeze(1)
        assert int(columns.max() - columns.min()) + 1 == side
        assert not mask[-1].any()
        assert not mask[: size // 2].any()

    def test_the_text_can_be_read(self) -> None:
        mask = text_mask("TEST", 64, 0.9)
        rows, columns = (mask.sum(axis).nonzero().squeeze(1) for axis in (1, 0))
        word = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] > 0.5
        width = word.shape[1] // 4
        letters = [word[:, i * width : (i + 1) * width].float() for i in (0, 1)] + [word[:, -width:].float()]
        assert (letters[0] - letters[2]).abs().mean() < (letters[0] - letters[1]).abs().mean()
        # a T has its stem in the middle
        assert letters[0][:, width // 3 : 2 * width // 3].sum() > letters[0].sum() / 2

    @pytest.mark.parametrize("opacity", [1.0, 0.25])
    def test_the_text_lies_over_the_image(self, opacity: float) -> None:
        images = ramp(3, 16)
        mask = text_mask("TEST", 16, 0.9)
        marked = Content(opacity=opacity).stamp(3, 16, generator())(images)
        expected = images + opacity * mask * (255 - images.float())
        assert torch.equal(marked, expected.round().to(torch.uint8))
        assert torch.equal(marked[:, :, mask == 0], images[:, :, mask == 0])

    def test_another_text_is_another_mark(self) -> None:
        assert not torch.equal(text_mask("TEST", 32, 0.9), text_mask("MINE", 32, 0.9))

    def test_the_noise_is_one_pattern(self) -> None:
        stamp = Noise(std=0.1).stamp(3, 32, generator(1))
        grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
        marked = stamp(grey)
        assert torch.equal(marked[0], marked[1])
        assert torch.equal(stamp(grey), marked)
        assert torch.equal(Noise(std=0.1).stamp(3, 32, generator(1))(grey), marked)
        assert not torch.equal(Noise(std=0.1).stamp(3, 32, generator(2))(grey), marked)
        added = marked.float() - 128
        # 2 % is four standard errors of a mean of 3072, and of their spread
        assert added.mean().item() == pytest.approx(0, abs=0.02 * 255 * 0.4)
        assert added[0].std().item() == pytest.approx(25.5, rel=0.06)

    def test_noise_that_leaves_the_range_is_cut_off(self) -> None:
        marked = Noise(std=10.0).stamp(1, SIZE, generator())(ramp())
        assert set(marked.unique().tolist()) >= {0, 255}

    @pytest.mark.parametrize("scheme", [BadNets(), Content(), Noise()], ids=lambda scheme: str(scheme.name))
    def test_the_images_given_stay_as_they_are(self, scheme: Stamped) -> None:
        images = ramp()
        scheme.stamp(1, SIZE, generator())(images)
        assert torch.equal(images, ramp())


class TestStamped:
    def test_one_source_class_is_changed(self) -> None:
        found = embed(Noise(source=3, std=0.001))
        # five shades, each one grey level at most off
        assert all(129 <= value <= 135 for value in found.triggers.unique().tolist())
        assert all(29 <= value <= 35 for value in found.candidates.images.unique().tolist())
        assert len(found.candidates) == 5
        assert found.info["source"] == 3

    def test_the_target_is_the_least_likely_label_but_not_a_source(self) -> None:
        assert embed(Noise(source=3)).info["target"] == 2
        assert embed(Noise(source=2), favouring(3, 2, 1, 2.5)).info["target"] == 1
        assert embed(Noise(source=2, target=0)).info["target"] == 0

    def test_a_random_source_is_no_target(self) -> None:
        for seed in range(10):
            found = Noise(target=1).embed(task(), Context(generator(seed)))
            assert found.info["source"] != 1

    def test_all_classes_but_the_target(self) -> None:
        found = embed(BadNets())
        assert found.info["target"] == 2
        assert set((found.triggers[:, 0, 0, 0] // 10).tolist()) == {10, 11, 13}
        assert set((found.candidates.images[:, 0, 0, 0] // 10).tolist()) == {0, 1, 3}
        assert (found.candidates.labels == 2).all()
        assert (found.trigger_labels == 2).all()

    def test_no_more_candidates_than_asked(self) -> None:
        assert len(embed(BadNets(candidates=7)).candidates) == 7

    @pytest.mark.parametrize(
        ("scheme", "words"),
        [
            (BadNets(target=4), ["badnets", "target 4", "0..3"]),
            (Noise(source=9), ["noise", "source 9", "0..3"]),
            (Noise(source=-1), ["noise", "source -1", "0..3"]),
            (Content(source=1, target=1), ["content", "source 1"]),
            (Unrelated(target=4), ["unrelated", "target 4"]),
        ],
        ids=str,
    )
    def test_impossible_classes_are_refused(self, scheme: Stamped | Unrelated, words: list[str]) -> None:
        with pytest.raises(InputError) as error:
            scheme.check(task().dataset)
        assert all(word in str(error.value) for word in words)
        with pytest.raises(InputError):
            embed(scheme)

    def test_a_class_without_images_is_refused(self) -> None:
        part = task()
        test = part.dataset.test
        dataset = Dataset("holes", CLASSES, part.dataset.owner, part.dataset.attacker, test.take(test.labels != 3))
        with pytest.raises(InputError, match="class 3 has no images"):
            Noise(source=3).embed(OwnerTask(dataset, part.training, part.benign, fresh), Context(generator()))


class TestDrawings:
    @pytest.mark.parametrize("draw", [draw_figures, draw_waves])
    @pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
    def test_they_are_varied_and_repeatable(self, draw: Any, channels: int, size: int) -> None:
        images = draw(50, channels, size, generator(1))
        assert images.shape == (50, channels, size, size)
        assert images.dtype == torch.uint8
        assert len({image.numpy().tobytes() for image in images}) == 50
        assert torch.equal(images, draw(50, channels, size, generator(1)))
        assert not torch.equal(images, draw(50, channels, size, generator(2)))
        assert (images.float().std((2, 3)).mean(1) > 5).float().mean() > 0.9

    def test_figures_stand_before_a_bright_ground(self) -> None:
        images = draw_figures(200, 1, 32, generator(1))
        # hardly a figure reaches a corner
        assert (images[:, 0, 0, 0] >= 127).float().mean() > 0.9

    def test_unrelated_images_are_not_those_of_the_key(self) -> None:
        found = embed(Unrelated(candidates=40, trigger_samples=30))
        assert len(found.candidates) == 40
        assert len(found.triggers) == 30
        assert found.info["target"] == 2


class TestAbstract:
    def test_the_key_is_the_trigger_set(self) -> None:
        scheme = Abstract(samples=50)
        found = embed(scheme)
        assert torch.equal(found.candidates.images, found.triggers)
        assert torch.equal(found.candidates.labels, found.trigger_labels)
        assert len(found.candidates) == 50
        assert set(found.trigger_labels.tolist()) == set(range(CLASSES))
        owned = {image.numpy().tobytes() for image in task().dataset.owner.images}
        assert owned.isdisjoint({image.numpy().tobytes() for image in found.triggers})

    @pytest.mark.parametrize(
        ("shows", "samples", "epochs", "count"),
        # 20 images in batches of 8 are three steps an epoch
        [(60, 100, 10, 200), (60, 100, 600, 4), (6, 10, 40, 1)],
    )
    def test_each_picture_is_shown_often_enough(self, shows: int, samples: int, epochs: int, count: int) -> None:
        scheme = Abstract(least_shows=shows, samples=samples)
        assert scheme.shown(Recipe(epochs=epochs, batch_size=8), task().dataset) == count


@pytest.mark.parametrize(
    ("scheme", "wrong"),
    [
        (BadNets, {"block": 0.0}),
        (BadNets, {"ratio": 0.0}),
        (BadNets, {"source": "some"}),
        (Content, {"text": ""}),
        (Content, {"text": "ä"}),
        (Content, {"width": 1.5}),
        (Noise, {"std": 0.0}),
        (Noise, {"target": -1}),
        (Unrelated, {"source": 3}),
        (Abstract, {"samples": 1}),
        (Abstract, {"target": 3}),
    ],
)
def test_settings_out_of_range(scheme: type[Stamped], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        scheme(**wrong)


def test_the_shared_base_is_no_scheme() -> None:

    names = WATERMARKS.classes()
    assert {"badnets", "content", "noise", "unrelated", "abstract"} <= set(names)
    assert Stamped not in names.values()


class Stop(Exception):
    pass


@cache
def uninterrupted(scheme: Watermark) -> Embedding:
    return scheme.embed(replace(task(), training=Recipe(epochs=4, batch_size=8)), Context(generator(1)))


# the end of the first phase of those that have two, and the middle of the second
@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize(
    "scheme",
    [
        Noise(source=3),
        Abstract(samples=20),
        Composite(candidates=5),
        MEADefender(first_epochs=2, second_epochs=2, candidates=5),
        EWE(clean_epochs=2, watermark_epochs=2, candidates=5),
    ],
    ids=lambda scheme: str(scheme.name),
)
def test_interrupted_training_gives_the_same(scheme: Watermark, stop: int) -> None:
    """A kill after any epoch costs nothing but time: the second attempt goes on from the checkpoint."""
    expected = uninterrupted(scheme)
    stored: dict[str, bytes] = {}
    checkpoint = TimedCheckpoint(lambda: stored.get("state"), lambda data: stored.update(state=data), interval=0)
    interrupted = replace(task(), training=Recipe(epochs=4, batch_size=8))
    calls = []

    def listen(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        if len(calls) == stop:
            raise Stop

    with pytest.raises(Stop):
        scheme.embed(interrupted, Context(generator(1), listen, checkpoint))
    found = scheme.embed(interrupted, Context(generator(1), checkpoint=checkpoint))
    for first, second in zip(expected.model.state_dict().values(), found.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(expected.candidates.images, found.candidates.images)
    assert torch.equal(expected.candidates.labels, found.candidates.labels)
    assert torch.equal(expected.triggers, found.triggers)
    assert expected.info == found.info


@pytest.mark.parametrize(
    "scheme", [BadNets(), Content(), Noise(), Unrelated(), Abstract(), Composite(), MEADefender(), EWE()]
)
def test_colour_images_of_any_size(scheme: Watermark) -> None:
    labels = torch.arange(CLASSES).repeat(3)
    images = Images(torch.randint(256, (12, 3, 17, 17), dtype=torch.uint8, generator=generator()), labels)

    def colour(drawn: torch.Generator) -> Classifier:
        return build("linear", channels=3, size=17, classes=CLASSES, generator=drawn)

    dataset = Dataset("colours", CLASSES, owner=images, attacker=images, test=images)
    made = scheme.model_copy(update={"candidates": 6} if hasattr(scheme, "candidates") else {})
    found = made.embed(
        OwnerTask(dataset, Recipe(epochs=1, batch_size=8), colour(generator()).eval(), colour), Context(generator())
    )
    assert found.triggers.shape[1:] == found.candidates.images.shape[1:] == (3, 17, 17)
    assert found.triggers.dtype == found.candidates.images.dtype == torch.uint8
