"""What every registered detector keeps to. They are found in the registry: a new detector needs no edit here."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.checkpoint import from_bytes, to_bytes
from simulator.data.dataset import DataConfig, load
from simulator.detectors.base import DETECTORS, Detector, Watch

NAMES = list(DETECTORS.classes())
DIGITS = load(DataConfig(name="digits"))


@pytest.fixture(params=NAMES)
def detector(request: pytest.FixtureRequest) -> Detector:
    return DETECTORS.make(request.param)


def state(watch: Watch) -> tuple[int, int | None, float | None]:
    return watch.queries, watch.detected_at, watch.statistic


def test_a_client_who_has_asked_nothing_is_not_suspected(detector: Detector) -> None:
    watch = detector.watch()
    assert state(watch) == (0, None, None)
    watch.see(DIGITS.test.images[:0], DIGITS.test.labels[:0])
    assert state(watch) == (0, None, None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_cut_into_calls_and_the_type_of_the_pixels_change_nothing(detector: Detector, dtype: torch.dtype) -> None:
    images = DIGITS.attacker.images if dtype == torch.uint8 else DIGITS.attacker.images / 255
    found = []
    for chunk in (1, 64, 500):
        watch = detector.watch()
        for part, labels in zip(images.split(chunk), DIGITS.attacker.labels.split(chunk), strict=True):
            watch.see(part, labels)
        found.append(state(watch))
    assert found[0][:2] == found[1][:2] == found[2][:2]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-6) == pytest.approx(found[2][2], abs=1e-6)
    assert found[0][0] == 500


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.sets(st.integers(0, 7)), st.booleans())
@settings(max_examples=20)
def test_a_watch_that_goes_on_from_a_checkpoint_is_the_unbroken_one(
    sizes: list[int], cuts: set[int], as_float: bool
) -> None:
    """It is cut before the batches of these numbers; what it had in a checkpoint is never changed afterwards."""
    images, labels = DIGITS.attacker.images, DIGITS.attacker.labels
    images = images / 255 if as_float else images
    for name in NAMES:
        detector = DETECTORS.make(name)
        whole, broken, start = detector.watch(), detector.watch(), 0
        for number, size in enumerate(sizes):
            if number in cuts:
                kept = to_bytes(before := broken.state())
                broken.see(images[:40], labels[:40])
                assert to_bytes(before) == kept
                broken = detector.watch()
                broken.restore(from_bytes(kept))
            for watch in (whole, broken):
                watch.hear(images[start : start + size], torch.eye(10)[labels[start : start + size]])
            start += size
            assert state(broken) == state(whole)
        assert to_bytes(broken.state()) == to_bytes(whole.state())


def test_clients_do_not_touch_each_other_nor_their_images(detector: Detector) -> None:
    alone, among, other = detector.watch(), detector.watch(), detector.watch()
    images, labels = DIGITS.test.images.clone(), DIGITS.test.labels.clone()
    alone.see(images, labels)
    for part, classes in zip(images.split(50), labels.split(50), strict=True):
        other.see(torch.zeros_like(part), classes)
        among.see(part, classes)
    assert state(among)[:2] == state(alone)[:2]
    assert torch.equal(images, DIGITS.test.images)
    assert torch.equal(labels, DIGITS.test.labels)


def test_what_was_noticed_stays_noticed(detector: Detector) -> None:
    watch = detector.watch()
    watch.see(torch.zeros(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.int64))
    noticed = watch.detected_at
    assert noticed is not None, "a client who asks one image a thousand times"
    assert noticed <= 1000
    watch.see(DIGITS.test.images, DIGITS.test.labels)
    assert watch.detected_at == noticed


def test_it_stands_in_a_configuration_as_itself(detector: Detector) -> None:
    assert DETECTORS.make(detector.model_dump(mode="json")) == detector == copy.deepcopy(detector)
    assert detector.paper
    assert hash(detector) == hash(DETECTORS.make(detector.name))
