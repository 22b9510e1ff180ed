"""``exsim verify --url``: verifies a suspect that can only be asked, over HTTP, for as few queries as may be."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from simulator.component import describe
from simulator.errors import InputError
from simulator.http_oracle import HttpClient, LabelAsker, model_info
from simulator.seeding import generator_for
from simulator.sequential import SequentialTest, SequentialVerdict, default_stolen_wsr, verify_sequentially
from simulator.watermarks.key import KeySamples, load_key

#: seconds of trying again where nothing answers: a person waits
PATIENCE = 5.0


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
        threshold: p0 of the :class:`~simulator.sequential.SequentialTest`; ``stolen_wsr`` is its p1.
        seed: draws the order in which the key's samples are asked.
        answer_field: for a foreign API (see :class:`~simulator.http_oracle.LabelAsker`); None for a door of ours.

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
    samples = load_key(key)
    client = HttpClient(url, token, PATIENCE)
    if answer_field is None:
        _check_fit(client, key, samples)
    ask = LabelAsker(client, answer_field, images_field)
    generator = generator_for("verify", seed)
    found = verify_sequentially(ask, samples, rule, generator=generator, max_queries=max_queries)
    return found, _about(found, rule, seed)


def _check_fit(client: HttpClient, key: Path, samples: KeySamples) -> None:
    info, shape = model_info(client), tuple(samples.images.shape[1:])
    if shape != tuple(info.shape) or samples.classes != info.classes:
        raise InputError(
            f"{key}: the key's images are {shape} of {samples.classes} classes, "
            f"the model at {client.url} takes {tuple(info.shape)} of {info.classes}"
        )


def _about(found: SequentialVerdict, rule: SequentialTest, seed: int) -> str:
    low, high = rule.bounds
    if found.decided:
        end = f"decided {'above' if found.verified else 'below'} {high if found.verified else low:.2f}"
    elif found.saved:
        end = f"undecided between {low:.2f} and {high:.2f}: more queries are needed"
    else:
        end = f"undecided between {low:.2f} and {high:.2f}: the whole key's WSR against the threshold decides"
    answer = "VERIFIED: the model carries this watermark" if found.verified else "not verified"
    return (
        f"{answer}\n{found.hits} of {found.asked} answers are the key's; {found.asked} queries, {found.saved} of the "
        f"key's {found.samples} samples saved (seed {seed})\nWald's sequential test of WSR <= {rule.benign_wsr:g} "
        f"(error rate {rule.alpha:g}) against WSR >= {rule.stolen_wsr:g} ({rule.beta:g}): log-likelihood ratio "
        f"{found.ratio:.2f}, {end}"
    )
