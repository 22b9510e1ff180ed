"""What every registered ownership test keeps to. They are found in the registry: a new test needs no edit here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simulator.context import Context
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.ownership.base import OWNERSHIP, OwnershipTest, Verdict, top_labels
from simulator.ownership.evidence import Evidence, load_evidence, save_evidence
from simulator.ownership.key import KeySamples
from simulator.ownership.suspect import suspect_of
from simulator.seeding import generator_for
from simulator.service.oracle import BudgetExhausted, Oracle
from simulator.training.predict import predict_labels

NAMES = list(OWNERSHIP.classes())
CLASSES = 5


@dataclass(frozen=True)
class Trained:
    """An owner after training."""

    model: Classifier
    key: KeySamples | None


class Heard:
    """An oracle that notes what passes through it, and has no more than an oracle has."""

    def __init__(self, oracle: Oracle) -> None:
        self.labels, self.classes, self.shape = oracle.labels, oracle.classes, oracle.shape
        self._oracle, self.images = oracle, list[Tensor]()

    @property
    def remaining(self) -> int:
        return self._oracle.remaining

    def query(self, images: Tensor) -> Tensor:
        self.images += images.unbind()
        return self._oracle.query(images)


class Constant:
    """A suspect that answers every image with class 0, of which no key here has a sample."""

    labels, classes, shape = "hard", CLASSES, (1, 8, 8)

    def __init__(self, budget: int) -> None:
        self.remaining = budget

    def query(self, images: Tensor) -> Tensor:
        self.remaining -= len(images)
        return torch.eye(CLASSES)[torch.zeros(len(images), dtype=torch.int64)]


def owner() -> Trained:
    """A model and a key of about 160 samples: images that it does not answer with class 0, with its answers."""
    generator = generator_for("owner")
    model = build("linear", channels=1, size=8, classes=CLASSES, generator=generator).eval()
    images = torch.randint(0, 256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = predict_labels(model, images)
    assert (labels > 0).sum() > 100
    return Trained(model, KeySamples(images, labels, CLASSES, {"filter": "both"}).take(labels > 0))


OWNER = owner()


@pytest.fixture(params=NAMES)
def rule(request: pytest.FixtureRequest) -> OwnershipTest:
    return OWNERSHIP.make(request.param)


def gathered(rule: OwnershipTest) -> Evidence:
    return rule.gather(OWNER, Context(generator_for("gather")))


def judged(rule: OwnershipTest, suspect: Oracle, seed: int = 0) -> Verdict:
    return rule.judge(suspect, gathered(rule), Context(generator_for("judge", seed)))


def victim(rule: OwnershipTest) -> Heard:
    return Heard(suspect_of(OWNER.model, len(gathered(rule))))


def test_the_victim_is_verified_and_a_constant_model_is_not(rule: OwnershipTest) -> None:
    yes, no = judged(rule, victim(rule)), judged(rule, Constant(len(gathered(rule))))
    assert (yes.verified, no.verified) == (True, False)
    assert yes.statistic > no.statistic
    assert yes.p_value < 0.05 < no.p_value <= 1
    for found in (yes, no):
        assert found.low <= found.statistic <= found.high


def test_a_suspect_is_asked_images_of_the_evidence_and_each_at_most_once(rule: OwnershipTest) -> None:
    suspect, evidence = victim(rule), gathered(rule)
    found = judged(rule, suspect)
    asked = [image.numpy().tobytes() for image in suspect.images]
    assert found.samples == len(evidence)
    assert 0 < found.asked == len(asked) <= found.samples
    assert found.saved == suspect.remaining
    assert len(set(asked)) == len(asked)
    assert set(asked) <= {image.numpy().tobytes() for image in evidence.images}


def test_a_seed_gives_the_same_questions_and_the_same_verdict(rule: OwnershipTest) -> None:
    one, other = victim(rule), victim(rule)
    assert judged(rule, one, 3) == judged(rule, other, 3)
    assert torch.equal(torch.stack(one.images), torch.stack(other.images))


def test_no_more_is_asked_than_the_suspect_answers(rule: OwnershipTest) -> None:
    suspect = Heard(suspect_of(OWNER.model, 2))
    try:
        found = judged(rule, suspect)
    except BudgetExhausted:
        assert suspect.remaining == 2
    else:
        assert (found.verified, found.asked) == (False, 2)


def test_evidence_survives_its_file(rule: OwnershipTest, tmp_path: Path) -> None:
    evidence = gathered(rule)
    save_evidence(evidence, tmp_path / "evidence")
    loaded = load_evidence(tmp_path / "evidence")
    assert (loaded.kind, loaded.classes, loaded.info) == (rule.kind, evidence.classes, evidence.info)
    assert loaded.tensors.keys() == evidence.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in evidence.tensors.items())
    again = rule.judge(victim(rule), loaded, Context(generator_for("judge", 0)))
    assert again == judged(rule, victim(rule))


def test_evidence_that_does_not_fit_is_one_line_and_nothing_is_asked(rule: OwnershipTest) -> None:
    good = gathered(rule)
    for bad, word in (
        (Evidence("hearsay", good.tensors, good.classes), "'hearsay'"),
        (Evidence(good.kind, good.tensors, 7), "7 classes"),
        (Evidence(good.kind, {**good.tensors, "images": good.images[..., 1:]}, good.classes), "(1, 8, 7)"),
    ):
        suspect = victim(rule)
        with pytest.raises(InputError) as caught:
            rule.judge(suspect, bad, Context(generator_for("judge")))
        assert word in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert suspect.images == []


def test_what_is_said_begins_with_the_verdict(rule: OwnershipTest) -> None:
    yes, no = judged(rule, victim(rule)), judged(rule, Constant(len(gathered(rule))))
    assert rule.explain(yes, gathered(rule), 0).startswith("VERIFIED")
    assert rule.explain(no, gathered(rule), 0).startswith("not verified")


def test_bad_settings_are_one_line(rule: OwnershipTest) -> None:
    bad = [{"frobnicate": 1}, *({setting: value} for setting in rule.params() for value in ("x", [], -1e9))]
    for settings in bad:
        with pytest.raises(InputError) as caught:
            OWNERSHIP.make({"name": rule.name, **settings})
        assert str(caught.value).startswith(rule.name)
        assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_a_watermark_gives_no_key() -> None:
    for name in ("wsr", "wsr_sequential"):
        with pytest.raises(InputError, match="no key"):
            OWNERSHIP.make(name).gather(Trained(OWNER.model, None), Context(generator_for("gather")))


def test_a_row_that_names_no_class_has_no_label() -> None:
    rows = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    assert top_labels(rows).tolist() == [1, -1, 2]
