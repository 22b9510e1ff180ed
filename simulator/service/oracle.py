"""What an attacker has of the victim: answers to images, while its budget lasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from simulator.detectors.base import Detection, Detector, Watch, detections
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
    """How queries reach a service."""

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """The answers to several queries, in their order; asks again, with the same keys, what was lost on the way."""
        ...


class ServiceOracle:
    """The client of a prediction service: cuts query sets into chunks, numbers them and keeps count.

    The numbers are the keys under which the ledger charges, counted from 0. An attack that is started again from the
    same seed therefore asks the same images under the same keys, and pays nothing twice.

    Args:
        record: keep what was asked and answered, for :meth:`transfer_set`.
        watched: the detectors that look at what the account asks.
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
        record: bool = False,
        watched: Sequence[tuple[Detector, Watch]] = (),
    ) -> None:
        self.labels, self.classes, self.shape, self.budget = labels, classes, shape, budget
        self.asked = 0
        self.account = account
        self._transport, self._token = transport, token
        self._key = 0
        self._record = record
        self._watched = watched
        self._transcript: list[tuple[Tensor, Tensor]] = []

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self.budget - self.asked

    def query(self, images: Tensor) -> Tensor:
        """See :class:`Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} images asked, {self.remaining} of {self.budget} remain")
        if len(images) == 0:
            return torch.empty(0, self.classes)
        images = images.detach().cpu()
        images = images if images.dtype == torch.uint8 else images.to(torch.float32)
        queries = []
        for part in images.split(_chunk(images, self.classes)):
            queries.append(Query(self.account, self._token, self._key, part.contiguous().numpy()))
            self._key += 1
        answers = torch.cat([torch.from_numpy(np.array(rows)) for rows in self._transport.send_all(queries)])
        self.asked += len(images)
        if self._record:
            self._transcript.append((images.clone(), answers))
        for _, watch in self._watched:
            watch.see(images, answers.argmax(1))
        return answers

    def detections(self) -> list[Detection]:
        """What the detectors have found."""
        return detections(self.account, self._watched)

    def counters(self) -> tuple[int, int]:
        """Images asked and the next key, for a checkpoint."""
        return self.asked, self._key

    def restore(self, asked: int, key: int) -> None:
        """Sets the counters back to what :meth:`counters` gave."""
        self.asked, self._key = asked, key

    def transfer_set(self) -> bytes:
        """All that was asked and answered, as a safetensors file: ``images`` in the order asked, ``answers``, and
        ``chunks``, the size of each paid batch, from which the ledger's digests can be computed again.

        Where uint8 and float images were asked, all are float32 here, and ``uint8`` says which batches were 255 times
        that, rounded.
        """
        asked = [images for images, _ in self._transcript]
        parts = [part for images in asked for part in images.split(_chunk(images, self.classes))]
        if len({part.dtype for part in parts}) > 1:
            asked = [images / 255 if images.dtype == torch.uint8 else images for images in asked]
        tensors = {
            "images": torch.cat(asked) if asked else torch.empty(0, dtype=torch.uint8),
            "answers": torch.cat([torch.empty(0, self.classes), *(rows for _, rows in self._transcript)]),
            "chunks": torch.tensor([len(part) for part in parts], dtype=torch.int64),
            "uint8": torch.tensor([part.dtype == torch.uint8 for part in parts], dtype=torch.bool),
        }
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _chunk(images: Tensor, classes: int) -> int:
    """How many of these images go into one query: it fits into a message, and so does its answer."""
    return max(1, min(CHUNK, MAX_BYTES // max(1, images[0].numel() * images.element_size(), 4 * classes)))


class SharedOracle:
    """The oracle of attackers who collude: each has an account and a budget of its own, and all pool the answers.

    Images are asked at the account that has the most budget left, so that all are spent evenly.
    """

    def __init__(self, oracles: Sequence[ServiceOracle]) -> None:
        self.labels, self.classes, self.shape = oracles[0].labels, oracles[0].classes, oracles[0].shape
        self._oracles = list(oracles)

    @property
    def remaining(self) -> int:
        """Images that may still be asked, at all accounts together."""
        return sum(oracle.remaining for oracle in self._oracles)

    def query(self, images: Tensor) -> Tensor:
        """See :class:`Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(
                f"{len(images)} images asked, {self.remaining} remain at {len(self._oracles)} accounts"
            )
        answers, start = [torch.empty(0, self.classes)], 0
        while start < len(images):
            oracle = max(self._oracles, key=lambda each: each.remaining)
            count = min(oracle.remaining, max(1, len(images) // len(self._oracles)), len(images) - start)
            answers.append(oracle.query(images[start : start + count]))
            start += count
        return torch.cat(answers)


class AllowanceOracle:
    """An oracle of which only a part of the budget may be used: one round of several."""

    def __init__(self, oracle: Oracle, allowance: int) -> None:
        self.labels, self.classes, self.shape = oracle.labels, oracle.classes, oracle.shape
        self._oracle, self._floor = oracle, oracle.remaining - allowance

    @property
    def remaining(self) -> int:
        """Images that may still be asked in this round."""
        return max(0, self._oracle.remaining - self._floor)

    def query(self, images: Tensor) -> Tensor:
        """See :class:`Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} images asked, {self.remaining} remain in this round")
        return self._oracle.query(images)


class ModelOracle:
    """An oracle over a model in memory: the owner's own simulated theft, and the second stage of a double theft."""

    def __init__(
        self, model: nn.Module, *, labels: str, classes: int, shape: tuple[int, int, int], budget: int
    ) -> None:
        self.labels, self.classes, self.shape, self.budget = labels, classes, shape, budget
        self.asked = 0
        self._model = model

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self.budget - self.asked

    def query(self, images: Tensor) -> Tensor:
        """See :class:`Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} images asked, {self.remaining} of {self.budget} remain")
        policy = answer_policy(self.labels, "model", self.asked)
        self.asked += len(images)
        # a copy, for autograd does not take what was made in inference mode
        return policy(predict(self._model, images)).clone()
