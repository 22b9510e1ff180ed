"""Knockoff Nets: Stealing Functionality of Black-Box Models (Orekondy et al., CVPR 2019).

The attacker sends natural images of its own to the victim and trains a model on the answers, by cross-entropy against
the answered probabilities (or the one-hot label): ``L = -Σ_k p_k log q_k``. Which images it sends is its *strategy*:
a random choice of the pool, or one that learns from the answers which classes of the pool are worth their price
(:mod:`simulator.attacks.parts.bandit`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import TransferSetAttack
from simulator.attacks.parts.bandit import MEASURES, Arms, Policy, Rewards, pack_bandit, unpack_bandit
from simulator.checkpoint import pack, unpack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.seeding import choose, global_randomness
from simulator.service.oracle import Oracle
from simulator.training.predict import device_of, predict_logits, to_input
from simulator.training.recipe import Recipe, recipe_objective

#: images augmented at a time
PART = 4096


class Knockoff(TransferSetAttack):
    """Queries a pool, each image once, and trains on the answers.

    The authors train with SGD, rate 0.01, momentum 0.5, batch 64, 100 epochs, divided by ten after 60 of them; these
    are the defaults. They also start from ImageNet weights, which this does not.

    A pool smaller than the budget is asked whole. Without ``repeat`` the rest of the budget is not spent. With it, the
    attacker goes through the pool again and again: as it is the first time, and at each later pass with fresh
    augmentation (a random crop of the image padded with black, and a horizontal flip with probability one half), so
    that its answers say something new. DeepTracer's 20 million queries are such passes; the transfer set is held in
    memory, at ``C * H * W`` bytes an image.

    ``adaptive`` draws the images by the gradient bandit, with the pool's groups as arms, and their sources above them
    where the pool has several; the attacker knows the groups because they are classes of its own data. It needs no
    labels of the victim. Where the authors draw one image, ask, and learn, this draws ``pulls`` at a time, so that the
    service is asked in batches; ``pulls: 1`` is theirs. They do not say how a reward is rescaled to [0, 1]; here it is
    by its least and greatest value so far. Nor how the knockoff learns meanwhile (which only the loss sees): here by
    ``surrogate_steps`` steps after each batch, each on images drawn from all answered so far. Final training starts
    afresh. A pass over the whole pool draws every arm's images all: within a pass only the order is the policy's.

    The loss of an answer is at least its entropy, so with soft labels it favours images about which the victim is in
    doubt; with hard labels the certainty is the same for all and decides nothing.
    """

    paper: ClassVar[str] = "Orekondy et al., CVPR 2019"

    name: Literal["knockoff"] = "knockoff"
    strategy: Literal["random", "adaptive"] = "random"
    reward: Literal["certainty", "diversity", "loss", "mean"] = Field(
        "mean", description="what the adaptive strategy seeks; mean is of the three"
    )
    pulls: int = Field(64, ge=1, description="images drawn by one policy before it is updated")
    policy_rate: float = Field(1.0, gt=0, description="α of an arm's first draw; it falls as one over its draws")
    window: int = Field(25, ge=1, description="Δ, the rewards and answers that a new one is compared with")
    surrogate_steps: int = Field(1, ge=0, description="of training after each batch of pulls, for the loss reward")
    repeat: bool = Field(False, description="go through the pool again, augmented, while the budget lasts")
    padding: float = Field(0.125, ge=0, le=0.5, description="of a repeated image, in sides, before it is cropped")
    flip: bool = Field(True, description="repeated images left to right, at random")
    training: Recipe = Recipe(
        optimizer="sgd", learning_rate=0.01, momentum=0.5, batch_size=64, decay_at=(0.6,), decay_factor=0.1
    )

    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """See :meth:`TransferSetAttack.collect`."""
        if self.strategy == "adaptive":
            return self._collect_adaptively(oracle, surrogate, pool, context)
        generator = context.generator
        count = oracle.remaining if self.repeat else min(oracle.remaining, len(pool))
        images = pool.take(choose(len(pool), count, generator))
        for start in range(len(pool), count, PART):
            images[start : start + PART] = self._augment(images[start : start + PART], generator)
        context.progress("query", 0, 1)
        asked, answers = self.ask(oracle, images, generator)
        context.progress("query", 1, 1)
        return asked, answers

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return augment(images, self.padding, self.flip, generator)

    def _collect_adaptively(
        self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context
    ) -> tuple[Tensor, Tensor]:
        generator, checkpoint = context.generator, context.checkpoint
        surrogate.to(memory_format=torch.channels_last)
        optimizer = self.training.build(surrogate.parameters())
        parents = torch.zeros_like(pool.groups.unique()) if pool.parents is None else pool.parents
        policy = Policy(parents, self.policy_rate)
        rewards = Rewards(MEASURES if self.reward == "mean" else (self.reward,), self.window, oracle.classes)
        state = checkpoint.load()  # before anything is read of the oracle: this puts its counts back, too
        arms = Arms(pool.groups, generator)
        asked = 0 if state is None else len(state["answers"])
        budget = asked + oracle.remaining
        total = budget if self.repeat else min(budget, len(pool))
        images = pool.source.new_empty((total, *pool.source.shape[1:]))
        answers = torch.empty(total, oracle.classes)
        if state is not None:
            unpack(state, surrogate=surrogate, optimizer=optimizer, generator=generator)
            unpack_bandit(state, policy, rewards, arms)
            images[:asked], answers[:asked] = state["images"], state["answers"]
        while asked < total:
            if not arms.left:
                arms.begin_pass(generator)
            available = arms.available
            drawn, indices = arms.draw(policy, min(self.pulls, total - asked, arms.left), generator)
            chosen = pool.take(indices)
            if arms.passes > 1:
                chosen = self._augment(chosen, generator)
            new = slice(asked, asked + len(drawn))
            images[new], answers[new] = self.ask(oracle, chosen, generator)
            asked = new.stop
            logits = predict_logits(surrogate, images[new]) if "loss" in rewards.measures else None
            policy.update(drawn, rewards.advantages(answers[new], logits), available)
            if logits is not None:
                self._learn(surrogate, optimizer, images[:asked], answers[:asked], generator)
            if checkpoint.due():
                parts = pack(surrogate=surrogate, optimizer=optimizer, generator=generator)
                bandit = pack_bandit(policy, rewards, arms)
                checkpoint.save({**parts, **bandit, "images": images[:asked], "answers": answers[:asked]})
            context.progress("query", asked, total)
        return images, answers

    def _learn(
        self,
        surrogate: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        answers: Tensor,
        generator: torch.Generator,
    ) -> None:
        """A few steps on images drawn from all that are answered."""
        count = min(self.training.batch_size, len(images))
        if count < 2:  # batch normalisation cannot train on one image
            return
        # A loop of its own, because the optimiser's momentum lives on from one batch of pulls to the next.
        objective, device = recipe_objective(self.training), device_of(surrogate)
        surrogate.train()
        with global_randomness(generator):
            for _ in range(self.surrogate_steps):
                index = torch.randint(len(images), (count,), generator=generator)
                loss = objective(surrogate, to_input(images[index], device), answers[index].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        surrogate.eval()


def augment(images: Tensor, padding: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Crops each image at a random place after padding it with black, and flips it with probability one half.

    Args:
        images: ``(B, C, H, W)`` of any type.
        padding: on every side, as a fraction of it, rounded to whole pixels; 0 crops nothing.
        flip: whether to flip left to right at all.
        generator: the only source of randomness.

    Returns:
        New images of the same shape and type.
    """
    height, width = images.shape[-2:]
    margins = round(padding * height), round(padding * width)
    windows = F.pad(images, (margins[1], margins[1], margins[0], margins[0])).unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = (torch.randint(2 * m + 1, (len(images),), generator=generator) for m in margins)
    cropped = windows[torch.arange(len(images)), :, rows, columns].clone()
    if flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        cropped[flipped] = cropped[flipped].flip(-1)
    return cropped
