"""``exsim verify``: a suspect's file, with the whole key; or, for as few queries as may be, one behind HTTP."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from simulator.component import describe
from simulator.errors import InputError
from simulator.models import load_model
from simulator.ownership.key import KeySamples, load_key
from simulator.ownership.sequential import SequentialTest, SequentialVerdict, default_stolen_wsr, verify_sequentially
from simulator.ownership.wsr import Verdict, Verification, small_key, verify
from simulator.seeding import generator_for
from simulator.service.http import HttpClient, LabelAsker, model_info

#: seconds of trying again where nothing answers: a person waits
PATIENCE = 5.0


def verify_file(model: Path, key: Path, threshold: float) -> tuple[Verdict, str]:
    """The verdict on a model on this disk, and what to say of it.

    Raises:
        InputError: a wrong threshold, model or key, or a key that does not fit the model.
    """
    try:
        rule = Verification(threshold=threshold)
    except ValidationError as error:
        raise InputError(f"--threshold: {describe(error)}") from None
    suspect, _ = load_model(model)
    samples = _load_filtered(key)
    spec = suspect.spec
    _check_fit(key, samples, "the model", (spec.channels, spec.size, spec.size), spec.classes)
    found = verify(suspect, samples, rule)
    chance = f"{found.p_value:.3g}" if found.p_value else "below 1e-300"
    doubt = small_key(found.samples, samples.classes, rule)
    return found, (
        f"{_answer(found.verified)}\nWSR {found.wsr:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}) on "
        f"{found.samples} key samples, threshold {threshold:g}\np-value {chance}: the chance that a model without the "
        f"watermark, right once in {samples.classes}, does as well" + (f"\nwarning: {doubt}" if doubt else "")
    )


def verify_url(
    url: str,
    key: Path,
    threshold: float,
    *,
    token: str | None = None,
    stolen_wsr: float | None = None,
    alpha: float = 0.05,
    beta: float = 0.05,
    max_queries: int | None = None,
    seed: int = 0,
    answer_field: str | None = None,
    images_field: str = "images",
) -> tuple[SequentialVerdict, str]:
    """The verdict on a suspect behind a URL, by its top-1 labels alone, and what to say of it.

    Args:
        threshold: p0 of the :class:`~simulator.ownership.sequential.SequentialTest`; ``stolen_wsr`` is its p1.
        seed: draws the order in which the key's samples are asked.
        answer_field: for a foreign API (see :class:`~simulator.service.http.LabelAsker`); None for a door of ours.

    Raises:
        InputError: a wrong setting or key; a suspect that does not answer, refuses, or takes other images.
    """
    try:
        rule = SequentialTest(
            benign_wsr=threshold,
            stolen_wsr=default_stolen_wsr(threshold) if stolen_wsr is None else stolen_wsr,
            alpha=alpha,
            beta=beta,
        )
    except ValidationError as error:
        raise InputError(f"sequential test: {describe(error)}") from None
    samples = _load_filtered(key)
    client = HttpClient(url, token, PATIENCE)
    if answer_field is None:
        info = model_info(client)
        _check_fit(key, samples, f"the model at {client.url}", tuple(info.shape), info.classes)
    ask = LabelAsker(client, answer_field, images_field)
    generator = generator_for("verify", seed)
    found = verify_sequentially(ask, samples, rule, generator=generator, max_queries=max_queries)
    return found, _about(found, rule, seed)


def _load_filtered(path: Path) -> KeySamples:
    """A key that may prove something: not the triggers that a run keeps beside its keys, in the same format, for pools.

    A run writes the victim into both, and what its filter did into the key alone.
    """
    samples = load_key(path)
    if "victim" in samples.info and "filter" not in samples.info:
        victim = samples.info["victim"]
        raise InputError(
            f"{path}: holds triggers of {victim} for pools, and no key: they were not filtered, and prove "
            f"nothing; its key is {victim}.safetensors"
        )
    return samples


def _check_fit(key: Path, samples: KeySamples, suspect: str, shape: tuple[int, ...], classes: int) -> None:
    found = tuple(samples.images.shape[1:])
    if found != shape or samples.classes != classes:
        raise InputError(
            f"{key}: the key's images are {found} of {samples.classes} classes, {suspect} takes {shape} of {classes}"
        )


def _answer(verified: bool) -> str:
    return "VERIFIED: the model carries this watermark" if verified else "not verified"


def _about(found: SequentialVerdict, rule: SequentialTest, seed: int) -> str:
    low, high = rule.bounds
    if found.decided:
        end = f"decided {'above' if found.verified else 'below'} {high if found.verified else low:.2f}"
    elif found.saved:
        end = f"undecided between {low:.2f} and {high:.2f}: more queries are needed"
    else:
        least = rule.least_hits(found.samples)
        counts = f"verified from {least} hits on" if least <= found.samples else "the key is too short to verify by"
        end = (
            f"undecided between {low:.2f} and {high:.2f} at the key's end: {counts}, so that an innocent suspect is "
            f"verified with a probability of at most {rule.accusation_bound:.3g}"
        )
    return (
        f"{_answer(found.verified)}\n{found.hits} of {found.asked} answers are the key's; {found.asked} queries, "
        f"{found.saved} of the key's {found.samples} samples saved (seed {seed})\n"
        f"Wald's sequential test of WSR <= {rule.benign_wsr:g} (error rate {rule.alpha:g}) against "
        f"WSR >= {rule.stolen_wsr:g} ({rule.beta:g}): log-likelihood ratio {found.ratio:.2f}, {end}"
    )
