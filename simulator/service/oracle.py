"""Oracles: an attacker's view of a victim, which answers images while a budget lasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simulator.checkpoint import State
from simulator.errors import InputError
from simulator.service.answers import answer_policy
from simulator.service.query import MAX_BYTES, Query
from simulator.training.predict import predict

#: images in one query of the service; measured best between 256 and 1024
CHUNK = 256


class BudgetExhausted(InputError):
    """More images were asked than remain in the budget; none was answered or charged."""


@runtime_checkable
class Oracle(Protocol):
    """Black-box access to a victim."""

    #: answer mode (see :mod:`simulator.service.answers`)
    labels: str
    #: K, the length of an answer row
    classes: int
    #: ``(C, H, W)`` of the images it takes
    shape: tuple[int, int, int]

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        ...

    def query(self, images: Tensor) -> Tensor:
        """The victim's answers.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1]; B may be any number up to ``remaining``.

        Returns:
            ``(B, K)`` float32 rows that sum to one (one-hot for hard labels), on the CPU.

        Raises:
            BudgetExhausted: B is larger than ``remaining``; nothing was charged.
        """
        ...


class Transport(Protocol):
    """Sends queries to a service."""

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order. A query whose answer was lost is sent again under its key."""
        ...


class Listener(Protocol):
    """Hears every batch that an account has paid for: a recording, or a detector's watch."""

    def hear(self, images: Tensor, answers: Tensor) -> None:
        """Takes one batch.

        Args:
            images: ``(B, C, H, W)`` uint8, or float32 in [0, 1], on the CPU. A listener that keeps them takes a copy.
            answers: ``(B, K)`` float32.
        """
        ...

    def state(self) -> State:
        """What was heard so far, for a checkpoint. No later batch changes the tensors in it."""
        ...

    def restore(self, state: State) -> None:
        """Goes back to a :meth:`state`."""
        ...


class BudgetedOracle(ABC):
    """The base of all oracles: a budget in images, beyond which every query is refused.

    Attributes:
        asked: images that this oracle has answered. A :class:`ServiceOracle` that was restored counts those before,
        too.
    """

    def __init__(self, labels: str, classes: int, shape: tuple[int, int, int], budget: int) -> None:
        self.labels, self.classes, self.shape, self.budget = labels, classes, shape, budget
        self.asked = 0

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self.budget - self.asked

    def query(self, images: Tensor) -> Tensor:
        """See :class:`Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} images asked, {self.remaining} {self._scope()}")
        answers = self._answer(images)
        self.asked += len(images)
        return answers

    @abstractmethod
    def _answer(self, images: Tensor) -> Tensor:
        """The answers to images that the budget allows."""

    def _scope(self) -> str:
        """Ends the sentence "5 images asked, 3 ..."."""
        return f"of {self.budget} remain"


class ServiceOracle(BudgetedOracle):
    """The client of a prediction service: cuts query sets into chunks, numbers them and keeps count.

    The numbers are the keys under which the ledger charges, counted from 0. An attack that is started again from the
    same seed therefore asks the same images under the same keys, and pays nothing twice.

    Args:
        listeners: hear every batch that was paid and answered.
    """

    def __init__(
        self,
        transport: Transport,
        account: str,
        token: str,
        *,
        labels: str,
        classes: int,
        shape: tuple[int, int, int],
        budget: int,
        listeners: Sequence[Listener] = (),
    ) -> None:
        super().__init__(labels, classes, shape, budget)
        self.account, self.listeners = account, listeners
        self._transport, self._token = transport, token
        self._key = 0

    def _answer(self, images: Tensor) -> Tensor:
        if len(images) == 0:
            return torch.empty(0, self.classes)
        images = images.detach().cpu()
        images = images if images.dtype == torch.uint8 else images.to(torch.float32)
        queries = []
        for part in chunked(images, self.classes):
            queries.append(Query(self.account, self._token, self._key, part.contiguous().numpy()))
            self._key += 1
        answers = torch.cat([torch.from_numpy(np.array(rows)) for rows in self._transport.send_all(queries)])
        for listener in self.listeners:
            listener.hear(images, answers)
        return answers

    def counters(self) -> tuple[int, int]:
        """Images asked and the next key, for a checkpoint."""
        return self.asked, self._key

    def restore(self, asked: int, key: int) -> None:
        """Sets the counters back to what :meth:`counters` gave."""
        self.asked, self._key = asked, key


def chunked(images: Tensor, classes: int) -> tuple[Tensor, ...]:
    """The images, cut into queries: each fits into a message, and so does its answer."""
    most = MAX_BYTES // max(1, images[0].numel() * images.element_size(), 4 * classes)
    parts: tuple[Tensor, ...] = images.split(max(1, min(CHUNK, most)))
    return parts


class SharedOracle(BudgetedOracle):
    """The oracle of attackers who collude: each has an account with its own budget, and all share the answers.

    The account with the most budget left asks next, so that all budgets are spent evenly.
    """

    def __init__(self, oracles: Sequence[ServiceOracle]) -> None:
        first, budget = oracles[0], sum(oracle.budget for oracle in oracles)
        super().__init__(first.labels, first.classes, first.shape, budget)
        self._oracles = list(oracles)

    @property
    def remaining(self) -> int:
        """Images that may still be asked, at all accounts together."""
        return sum(oracle.remaining for oracle in self._oracles)

    def _answer(self, images: Tensor) -> Tensor:
        answers, start = [torch.empty(0, self.classes)], 0
        while start < len(images):
            oracle = max(self._oracles, key=lambda each: each.remaining)
            count = min(oracle.remaining, max(1, len(images) // len(self._oracles)), len(images) - start)
            answers.append(oracle.query(images[start : start + count]))
            start += count
        return torch.cat(answers)

    def _scope(self) -> str:
        return f"remain at {len(self._oracles)} accounts"


class AllowanceOracle(BudgetedOracle):
    """A part of another oracle's budget, for one round of several."""

    def __init__(self, oracle: Oracle, allowance: int) -> None:
        super().__init__(oracle.labels, oracle.classes, oracle.shape, allowance)
        self._oracle, self._floor = oracle, oracle.remaining - allowance

    @property
    def remaining(self) -> int:
        """Images that may still be asked in this round."""
        return max(0, self._oracle.remaining - self._floor)

    def _answer(self, images: Tensor) -> Tensor:
        return self._oracle.query(images)

    def _scope(self) -> str:
        return "remain in this round"


class ModelOracle(BudgetedOracle):
    """An oracle over a model in memory, for an owner's simulated theft and for the second stage of a double theft."""

    def __init__(
        self, model: nn.Module, *, labels: str, classes: int, shape: tuple[int, int, int], budget: int
    ) -> None:
        super().__init__(labels, classes, shape, budget)
        self._model = model

    def _answer(self, images: Tensor) -> Tensor:
        policy = answer_policy(self.labels, "model", self.asked)
        # a copy, because autograd refuses tensors that were made in inference mode
        return policy(predict(self._model, images)).clone()
