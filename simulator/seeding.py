"""Randomness that depends on what is computed, never on when or where.

Every random choice comes from a generator made here out of words that name the computation (a scenario's id, "train").
Two runs that schedule their work differently, with Ray or without, therefore draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed_of(*words: object) -> int:
    """A 63-bit seed from words, by SHA-256 and :class:`numpy.random.SeedSequence`."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    entropy = np.random.SeedSequence(int.from_bytes(digest[:16], "big"))
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def generator_for(*words: object) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*words))


def draw_seed(generator: torch.Generator) -> int:
    """A fresh seed drawn from a generator, for what cannot take a generator itself."""
    return int(torch.randint(2**62, (), generator=generator))


def fork(generator: torch.Generator) -> torch.Generator:
    """A generator that draws what this one would draw next, and leaves it as it is."""
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def choose(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` of ``range(count)``, int64: without replacement while they last, then again from the start."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // max(count, 1)))]
    return torch.cat(rounds)[:size] if rounds else torch.empty(0, dtype=torch.int64)


@contextmanager
def global_randomness(generator: torch.Generator) -> Iterator[None]:
    """Seeds torch's global generators (dropout draws from them) inside the block and restores them after it."""
    with torch.random.fork_rng():
        torch.manual_seed(draw_seed(generator))
        yield
