"""``exsim verify``: a suspect's file or address becomes an oracle, and an ownership test judges it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator.context import Context
from simulator.errors import InputError
from simulator.models import Classifier, load_model
from simulator.ownership.base import OWNERSHIP, OwnershipTest, Verdict
from simulator.ownership.evidence import Evidence, load_evidence
from simulator.ownership.key import KeySamples
from simulator.seeding import generator_for
from simulator.service.http import HttpClient, model_info
from simulator.service.http_oracle import HttpOracle
from simulator.service.oracle import ModelOracle, Oracle

#: seconds of trying again where nothing answers: a person waits
PATIENCE = 5.0
#: seconds that a suspect may take for one reply, and bytes that it may have: it answers one image
REPLY_SECONDS, REPLY_BYTES = 60.0, 1 << 20


def verify_file(
    model: Path,
    key: Path,
    test: str = "wsr",
    settings: Mapping[str, Any] | None = None,
    *,
    max_queries: int | None = None,
    seed: int = 0,
) -> tuple[Verdict, str]:
    """The verdict on a model on this disk, and what to say of it.

    Args:
        test: name of the ownership test; ``settings`` are its own (see :func:`make_test`).
        max_queries: images that may be asked; None for all of the evidence.
        seed: draws the order of the samples, for a test that draws one.

    Raises:
        InputError: a wrong test, setting, model or key, or a key that does not fit the model.
    """
    rule, evidence = make_test(test, settings or {}), _load_filtered(key)
    suspect = suspect_of(load_model(model)[0], _budget(evidence, max_queries))
    return _judged(rule, suspect, evidence, key, seed)


def verify_url(
    url: str,
    key: Path,
    test: str = "wsr_sequential",
    settings: Mapping[str, Any] | None = None,
    *,
    token: str | None = None,
    max_queries: int | None = None,
    seed: int = 0,
    answer_field: str | None = None,
    images_field: str = "images",
) -> tuple[Verdict, str]:
    """The verdict on a suspect behind a URL, by its top-1 labels alone, and what to say of it.

    Args:
        test, settings, max_queries, seed: as of :func:`verify_file`. answer_field: for a foreign API (see
        :class:`~simulator.service.http_oracle.HttpOracle`); None for a door of ours.

    Raises:
        InputError: a wrong setting or key; a suspect that does not answer, refuses, or takes other images.
    """
    rule, evidence = make_test(test, settings or {}), _load_filtered(key)
    client = HttpClient(url, token, PATIENCE, limit=REPLY_SECONDS, largest=REPLY_BYTES)
    shape, classes = evidence.shape, evidence.classes  # a foreign API says nothing of its own
    if answer_field is None:
        info = model_info(client)
        (channels, height, width), classes = info.shape, info.classes
        shape = channels, height, width
    suspect = HttpOracle(
        client,
        classes=classes,
        shape=shape,
        budget=_budget(evidence, max_queries),
        answer_field=answer_field,
        images_field=images_field,
    )
    return _judged(rule, suspect, evidence, key, seed)


def make_test(name: str, settings: Mapping[str, Any]) -> OwnershipTest:
    """A test by its name, with the settings that are not None; ``threshold`` is p0 of the sequential test.

    Raises:
        InputError: no such test or setting, or a wrong value.
    """
    given = {setting: value for setting, value in settings.items() if value is not None}
    found = OWNERSHIP.classes().get(name)
    if found and "benign_wsr" in found.model_fields and "threshold" in given:
        given["benign_wsr"] = given.pop("threshold")
    return OWNERSHIP.make({**given, "name": name})


def suspect_of(model: Classifier, budget: int) -> ModelOracle:
    """A model in memory as a suspect, which gives hard labels for so many images."""
    spec = model.spec
    shape = (spec.channels, spec.size, spec.size)
    return ModelOracle(model, labels="hard", classes=spec.classes, shape=shape, budget=budget)


def verify_model(model: Classifier, key: KeySamples, rule: OwnershipTest) -> Verdict:
    """The verdict of a watermark's test on a model in memory; a test that draws an order draws the one of seed 0."""
    evidence = key.evidence()
    return rule.judge(suspect_of(model, len(key)), evidence, Context(generator_for("verify", 0)))


def _budget(evidence: Evidence, max_queries: int | None) -> int:
    return len(evidence) if max_queries is None else min(max_queries, len(evidence))


def _judged(rule: OwnershipTest, suspect: Oracle, evidence: Evidence, key: Path, seed: int) -> tuple[Verdict, str]:
    try:
        rule.check(suspect, evidence)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    found = rule.judge(suspect, evidence, Context(generator_for("verify", seed)))
    return found, rule.explain(found, evidence, seed)


def _load_filtered(path: Path) -> Evidence:
    """Evidence that may prove something: not the triggers that a run keeps beside its keys, in the same format, for
    pools.

    A run writes the victim into both, and what its filter did into the key alone.
    """
    evidence = load_evidence(path)
    victim = evidence.info.get("victim")
    if isinstance(victim, str) and "filter" not in evidence.info:
        raise InputError(
            f"{path}: holds triggers of {victim[:100]} for pools, and no key: they were not filtered, and prove "
            f"nothing; its key is {victim[:100]}.safetensors"
        )
    return evidence
