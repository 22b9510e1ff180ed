"""What data-free attacks share: a generator makes the queries, and one or more students learn from the answers.

An iteration is ``generator_steps`` steps of the generator, ``student_steps`` steps of the students, each on a fresh
batch that the victim answers, and ``replay_steps`` more on earlier batches. When the budget no longer pays for a whole
iteration, what is left of it goes into steps of the students, the last one on a smaller batch: every query is spent.
(A last batch of one image, on which batch normalisation cannot train, joins the one before it.)
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import Attack
from simulator.attacks.parts.generator import ImageGenerator, to_images
from simulator.checkpoint import State, pack, unpack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.seeding import global_randomness
from simulator.service.answers import gives_labels, keeps_zeros
from simulator.service.oracle import Oracle
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Recipe, loss_function
from simulator.training.signed import adversarial_mean

#: the least probability a full answer is read as: float32 softmax underflows to zero
TINY = torch.finfo(torch.float32).tiny
#: the same for rounded and truncated answers, whose zeros say no more than "small"
SMALL = 1e-4

Distance = Callable[[Tensor, Tensor], Tensor]


def recover_logits(answers: Tensor, least: float = TINY) -> Tensor:
    """Logits ``(B, K)`` from probability rows: ``log p`` less its mean over the classes.

    The true logits differ from them by their own mean, a constant a row (DFME, §3.3).
    """
    logs = answers.clamp_min(least).log()
    return logs - logs.mean(1, keepdim=True)


class Replay:
    """The last ``capacity`` images that were answered, with their answers.

    Kept as uint8, a quarter of the memory, so an image comes back within 1/510 of the one that was answered.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int], classes: int) -> None:
        self.images = torch.empty(capacity, *shape, dtype=torch.uint8)
        self.answers = torch.empty(capacity, classes)
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.images))

    def add(self, images: Tensor, answers: Tensor) -> None:
        """Keeps a batch of float images, in place of the oldest when full."""
        index = torch.arange(self.added, self.added + len(images)) % len(self.images)
        self.images[index] = images.cpu().mul(255).round_().to(torch.uint8)
        self.answers[index] = answers
        self.added += len(images)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` images and answers, uniformly, with replacement."""
        index = torch.randint(len(self), (count,), generator=generator)
        return self.images[index], self.answers[index]

    def state(self) -> State:
        """For a checkpoint."""
        kept = len(self)
        return {"replay.images": self.images[:kept], "replay.answers": self.answers[:kept], "replay.added": self.added}

    def restore(self, state: State) -> None:
        """Takes :meth:`state` back."""
        self.added = int(state["replay.added"])
        self.images[: len(self)] = state["replay.images"]
        self.answers[: len(self)] = state["replay.answers"]


@dataclass
class Theft:
    """An attack under way. ``student_optimizer`` is over all ``students``; the first of them is the stolen model."""

    oracle: Oracle
    students: list[nn.Module]
    network: ImageGenerator
    student_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    context: Context
    device: torch.device
    budget: int = 0
    replay: Replay | None = None
    pending: list[int] = field(default_factory=list)

    @property
    def generator(self) -> torch.Generator:
        """The only source of randomness."""
        return self.context.generator

    @property
    def asked(self) -> int:
        """Images asked so far."""
        return self.budget - self.oracle.remaining

    def images(self, count: int) -> Tensor:
        """Fresh images in [0, 1], without a graph."""
        with torch.no_grad():
            return to_images(self.network(self.network.noise(count, self.generator)))

    def _parts(self) -> dict[str, Any]:
        students = {f"student{number}": student for number, student in enumerate(self.students)}
        return {
            **students,
            "network": self.network,
            "student_optimizer": self.student_optimizer,
            "generator_optimizer": self.generator_optimizer,
            "random": self.generator,
        }

    def state(self) -> State:
        """All that goes on from here needs."""
        replayed = {} if self.replay is None else self.replay.state()
        return {**pack(**self._parts()), **replayed, "budget": self.budget}

    def restore(self, state: State) -> None:
        """Goes back to a :meth:`state`."""
        unpack(state, **self._parts())
        if self.replay is not None:
            self.replay.restore(state)


class DataFreeAttack(Attack):
    """An attack that makes its own queries; the pool is left alone.

    The students' ``training`` recipe gives the batch size of all queries, the optimiser and, with ``schedule: steps``,
    the decay of both learning rates, by the share of the budget that is spent (its ``epochs`` are the steps in which
    that share is counted). Its ``loss`` is that for hard labels; soft ones have the paper's.

    ``query_noise`` above ``epsilon`` drowns a difference quotient: it then steers the generator at random.
    """

    data_free: ClassVar[bool] = True
    #: how many students there are
    students: ClassVar[int] = 1

    training: Recipe
    generator_optimizer: Literal["adam", "sgd"] = Field("adam", description="SGD has the recipe's momentum and decay")
    generator_learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["steps", "cosine"] = Field("steps", description="of both learning rates")
    latent: int = Field(256, ge=1, description="length of the generator's input")
    generator_steps: int = Field(1, ge=0, description="n_G, an iteration")
    student_steps: int = Field(5, ge=1, description="n_S, an iteration")
    replay_steps: int = Field(0, ge=0, description="an iteration, on images answered before; costs no query")
    replay_size: int = Field(1_000_000, ge=1, description="images kept for them, a byte a value")

    @abstractmethod
    def generator_cost(self, labels: str) -> int:
        """Queries a generator step costs for each image of its batch."""

    @abstractmethod
    def generator_step(self, theft: Theft) -> None:
        """One step of the generator; asks ``batch_size * generator_cost`` images."""

    @abstractmethod
    def soft_distance(self, logits: Tensor, answers: Tensor, labels: str) -> Tensor:
        """How far students' logits ``(B, K)`` are from soft answers, for each image ``(B,)``."""

    def extract(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
        """See :meth:`Attack.extract`."""
        checkpoint, progress = context.checkpoint, context.progress
        theft = self._begin(oracle, surrogate, context, checkpoint.load())
        theft.pending = sorted(count for count in context.snapshots.at if count > theft.asked)
        progress("extract", theft.asked, theft.budget)
        while oracle.remaining:
            # anew in every iteration, so that dropout's state, too, is a function of the checkpoint
            with global_randomness(context.generator):
                self._iterate(theft)
            if checkpoint.due():
                checkpoint.save(theft.state())
            progress("extract", theft.asked, theft.budget)
        return surrogate.eval()

    def trained_images(self, budget: int, pool: int, curve: Sequence[int], labels: str) -> int:
        """See :meth:`Attack.trained_images`: the students' batches, and each replayed one again."""
        asked = self.student_steps + self.generator_steps * self.generator_cost(labels)
        rounds = budget / (self.training.batch_size * max(1, asked))
        steps = self.student_steps + self.replay_steps
        return math.ceil(rounds * self.training.batch_size * steps * self.students)

    def _begin(self, oracle: Oracle, surrogate: nn.Module, context: Context, state: State | None) -> Theft:
        device = device_of(surrogate)
        with global_randomness(context.generator):
            network = ImageGenerator(oracle.shape, self.latent)
            students = [surrogate, *(_fresh(surrogate) for _ in range(self.students - 1))]
        for module in (network, *students):
            module.to(device).to(memory_format=torch.channels_last).train()
        parameters = [parameter for student in students for parameter in student.parameters()]
        # the recipe's optimiser, at the generator's own rate
        recipe = {"optimizer": self.generator_optimizer, "learning_rate": self.generator_learning_rate}
        if self.generator_optimizer == "adam":
            recipe["weight_decay"] = 0.0
        theft = Theft(
            oracle,
            students,
            network,
            self.training.build(parameters),
            self.training.model_copy(update=recipe).build(network.parameters()),
            context,
            device,
            budget=oracle.remaining if state is None else int(state["budget"]),
        )
        if self.replay_steps:
            theft.replay = Replay(max(1, min(self.replay_size, theft.budget)), oracle.shape, oracle.classes)
        if state is not None:
            theft.restore(state)
        return theft

    def _iterate(self, theft: Theft) -> None:
        batch, spent = self.training.batch_size, theft.asked / theft.budget
        self._set_rates(theft, spent)
        cost = self.generator_steps * self.generator_cost(theft.oracle.labels) + self.student_steps
        if theft.oracle.remaining >= batch * cost:
            for _ in range(self.generator_steps):
                self.generator_step(theft)
        for _ in range(self.student_steps):
            remaining = theft.oracle.remaining
            if remaining:
                self._student_step(theft, remaining if remaining <= batch + 1 else batch)
        for _ in range(self.replay_steps):
            if theft.replay is not None and len(theft.replay) >= 2:
                images, answers = theft.replay.sample(min(batch, len(theft.replay)), theft.generator)
                self._learn(theft, images, answers)

    def _set_rates(self, theft: Theft, spent: float) -> None:
        recipe = self.training
        if self.schedule == "cosine":
            factor = (1 + math.cos(math.pi * spent)) / 2
        else:
            factor = recipe.rate(int(spent * recipe.epochs), recipe.epochs) / recipe.learning_rate
        pairs = (
            (theft.student_optimizer, recipe.learning_rate),
            (theft.generator_optimizer, self.generator_learning_rate),
        )
        for optimizer, rate in pairs:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    def _student_step(self, theft: Theft, count: int) -> None:
        asked, answers = self.ask(theft.oracle, theft.images(count), theft.generator)
        if theft.replay is not None:
            theft.replay.add(asked, answers)
        if count > 1:
            self._learn(theft, asked, answers)
        while theft.pending and theft.asked >= theft.pending[0]:
            theft.context.snapshots.take(theft.pending.pop(0), theft.students[0].eval())
            theft.students[0].train()

    def _learn(self, theft: Theft, images: Tensor, answers: Tensor) -> None:
        """One step of every student on images and answers."""
        # a copy, because an oracle's answer may have been made in inference mode, which no graph can hold
        inputs, targets = to_input(images, theft.device), answers.to(theft.device, copy=True)
        theft.student_optimizer.zero_grad()
        for student in theft.students:
            self._loss(theft, student, inputs, targets).backward()
        theft.student_optimizer.step()

    def _loss(self, theft: Theft, student: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        def loss(batch: Tensor) -> Tensor:
            return self.distance(student(batch), targets, theft.oracle.labels).mean()

        return adversarial_mean(loss, inputs, self.training.adversarial_epsilon)

    def distance(self, logits: Tensor, answers: Tensor, labels: str) -> Tensor:
        """How far students' logits are from answers: for each image ``(B,)`` if soft, the batch's mean if hard."""
        if gives_labels(labels):
            return loss_function(self.training.loss)(logits, answers)
        return self.soft_distance(logits, answers, labels)


def logit_distance(logits: Tensor, answers: Tensor, labels: str) -> Tensor:
    """``mean_k |z_k - t_k|`` for each image ``(B,)``, with t the logits recovered from the answers (DFME, Eq. 4)."""
    target = recover_logits(answers, TINY if keeps_zeros(labels) else SMALL)
    return F.l1_loss(logits, target, reduction="none").mean(1)


def descend(theft: Theft, outputs: Tensor, slope: Tensor) -> None:
    """A step of the generator down a gradient ``slope`` with respect to its ``outputs``."""
    theft.generator_optimizer.zero_grad()
    outputs.backward(slope)
    theft.generator_optimizer.step()


def _fresh(model: nn.Module) -> nn.Module:
    """A copy with other starting weights, drawn from torch's global generator."""
    model = copy.deepcopy(model)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return model
