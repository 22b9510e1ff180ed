"""The answer modes: how much of its probabilities a victim tells an account.

- ``soft``: all probabilities;
- ``hard``: one-hot of the top-1 label;
- ``top-K``: the K largest probabilities (as ``top-3``), the others 0;
- ``round-D``: probabilities rounded to D digits (as ``round-2``);
- ``noise-S``: Gaussian noise of standard deviation S on the logits (as ``noise-0.5``).

Steps are joined by `` then `` and taken in that order: ``noise-0.5 then top-3 then round-2``. After every step the
answer is scaled to sum to one again, so every answer is a probability row.

**Noise.** ``p'_k ∝ p_k · exp(S · g_k)`` with independent standard normal ``g_k``. This is normal noise on the logits,
for which the probabilities suffice. It is the plainest randomised perturbation. Optimised ones are the reverse sigmoid
(Lee et al., 2018) and MAD (Orekondy et al., ICLR 2020). Like MAD, and unlike the reverse sigmoid, it may change the
top-1 label. The noise is a function of the victim, the account and the query's key. A query that is asked again,
because its answer was lost, therefore gets the same answer, free of charge. The same image under another key is paid
again and gets fresh noise, so an account that pays n times can average the noise down to S/√n.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from simulator.errors import InputError
from simulator.seeding import generator_for

#: between the steps of a mode
THEN = " then "
# every number has one spelling, because a scenario's id is made of its mode, too
_STEPS = re.compile(r"hard|top-([1-9][0-9]*)|round-([1-9])|noise-(0\.[0-9]*[1-9]|[1-9][0-9]{0,2}(?:\.[0-9]*[1-9])?)")

Step = Callable[[Tensor], Tensor]


def check_labels(mode: str) -> str:
    """Checks an answer mode, and gives it back.

    Raises:
        InputError: there is no such mode.
    """
    steps = mode.split(THEN)
    if mode != "soft" and not all(_STEPS.fullmatch(step) for step in steps):
        raise InputError(
            f"{mode!r} is not one of soft, hard, top-K (as top-3), round-D (as round-2), noise-S (as noise-0.5), "
            "or several as 'top-3 then round-2'"
        )
    if "hard" in steps[:-1]:
        raise InputError(f"{mode!r}: 'hard' leaves nothing for a later step, it may only stand last")
    return mode


#: the pydantic type of a field that holds an answer mode
Labels = Annotated[str, AfterValidator(check_labels)]


def gives_labels(mode: str) -> bool:
    """Whether answers of the mode are one-hot labels, as of ``hard`` and ``top-3 then hard``."""
    return mode.split(THEN)[-1] == "hard"


def keeps_zeros(mode: str) -> bool:
    """Whether a 0 in an answer of the mode is the victim's own 0. Modes that leave out or round probabilities make
    others."""
    return all(step == "soft" or step.startswith("noise-") for step in mode.split(THEN))


def most_kept(mode: str) -> int:
    """The largest K of the mode's ``top-K`` steps; 0 without such a step."""
    return max(int(step.removeprefix("top-")) if step.startswith("top-") else 0 for step in mode.split(THEN))


def answer_policy(mode: str, *query: object) -> Callable[[Tensor], Tensor]:
    """The function from probability rows ``(B, K)`` to the answer rows of a mode, float32 ``(B, K)`` summing to one.

    Args:
        query: words that name the query (the victim, the account, the key). Noise is drawn from them and from the mode,
            so the same words give the same noise.
    """
    steps = [_step(step, (mode, number, *query)) for number, step in enumerate(check_labels(mode).split(THEN))]

    def policy(rows: Tensor) -> Tensor:
        for step in steps:
            rows = step(rows)
        return rows

    return policy


def one_hot(rows: Tensor) -> Tensor:
    """One-hot rows of the top-1 label."""
    return F.one_hot(rows.argmax(1), rows.shape[1]).to(torch.float32)


def _step(step: str, words: tuple[object, ...]) -> Step:
    if step == "soft":
        return lambda rows: rows
    if step == "hard":
        return one_hot
    match = _STEPS.fullmatch(step)
    assert match is not None
    count, digits, deviation = match.groups()
    if count:
        return lambda rows: _truncated(rows, int(count))
    if digits:
        return lambda rows: _rounded(rows, int(digits))
    return lambda rows: _noisy(rows, float(deviation), generator_for("noise", *words))


def _truncated(rows: Tensor, count: int) -> Tensor:
    values, index = rows.topk(min(count, rows.shape[1]))
    return torch.zeros_like(rows).scatter(1, index, values / values.sum(1, keepdim=True))


def _rounded(rows: Tensor, digits: int) -> Tensor:
    rounded = rows.round(decimals=digits)
    total = rounded.sum(1, keepdim=True)
    # with many classes every probability may round to 0: the answer is then the label
    return torch.where(total > 0, rounded / total.clamp_min(1e-12), one_hot(rows))


def _noisy(rows: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(rows.shape, generator=generator).mul_(deviation)
    # added to logits, which cannot overflow; the log of 0 is -inf, which becomes 0 again
    return (rows.log() + noise).softmax(1)
