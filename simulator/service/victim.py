"""The victims as a plain class, which checks and answers queries: in a Ray Serve replica, and in a run without Ray.

A query is paid for between the check and the answer (:mod:`simulator.service.visit`). So a malformed query is refused
and charges nothing, and no answer is computed for images that were not charged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulator.models import Classifier
from simulator.service.answers import answer_policy
from simulator.service.ledger import digest_of
from simulator.service.query import MAX_BYTES, MalformedQuery, Query, check_images
from simulator.training.predict import predict

#: ``half`` computes in 16 bits on a GPU, where that is faster; on a CPU it is the same as ``full``
Precision = Literal["full", "half"]


#: from images to probability rows ``(B, K)``
Predict = Callable[[Tensor], Tensor]


#: from a model to the function that answers in its place
Hide = Callable[[Classifier], Predict]


#: a probability in half precision differs from the one in full precision by this much at most
HALF_TOLERANCE = 1e-2


class VictimService:
    """Answers queries with the victims it has been given.

    An answer is a function of the query alone, in half precision too, because two queries are never computed together.

    Args:
        device: where the models run.
        precision: ``half`` computes in float16 on a GPU, to within :data:`HALF_TOLERANCE` of the full answers.
        half: the 16-bit type of ``half``, in place of the device's own (for tests on a CPU).
        room: bytes of weights that are kept; None keeps all. To make room for a new victim, those whose last query is
            the oldest are dropped. A dropped victim has to be added again before it is asked.
        hide: puts an evasion before every model; None answers openly.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision = "full",
        half: torch.dtype | None = None,
        room: int | None = None,
        hide: Hide | None = None,
    ) -> None:
        self._device, self._room = device, room
        self._half = None if precision == "full" else half or (torch.float16 if device.type == "cuda" else None)
        self._hide, self._hidden = hide, dict[str, Predict]()
        self._models: OrderedDict[str, Classifier] = OrderedDict()  # those asked longest ago first

    def __contains__(self, victim: str) -> bool:
        return victim in self._models

    def add(self, victim: str, model: Classifier) -> None:
        """Adds a model under a victim's id."""
        self._models[victim] = model.to(self._device).eval()
        self._models.move_to_end(victim)
        if self._hide is not None:
            self._hidden[victim] = self._hide(self._models[victim])
        while self._room is not None and len(self._models) > 1 and sum(map(_size, self._models.values())) > self._room:
            self._hidden.pop(self._models.popitem(last=False)[0], None)

    def check(self, victim: str, images: object) -> str:
        """Checks images against the victim's input; returns their digest.

        Raises:
            MalformedQuery: see :func:`check_images`, or an answer too large for a message.
        """
        spec = self._models[victim].spec
        images = check_images(images, spec.channels, spec.size)
        most = max(1, MAX_BYTES // (4 * spec.classes))
        if len(images) > most:
            raise MalformedQuery(f"query of {len(images)} images; allowed: 1..{most}, with {spec.classes} classes each")
        return digest_of(np.ascontiguousarray(images).data.cast("B"))

    def answer(self, victim: str, labels: str, query: Query) -> NDArray[np.float32]:
        """Probability rows ``(B, K)`` float32 under an answer mode, for a query that has been checked and paid for.

        Noise is drawn from the victim's id, the account's name and the key. It is therefore the same when the query is
        asked again, at another replica or in another run.
        """
        return self.answering(victim, labels, query)()

    def answering(self, victim: str, labels: str, query: Query) -> Callable[[], NDArray[np.float32]]:
        """A function that computes :meth:`answer` later. It holds the model, so the victim may be dropped meanwhile."""
        self._models.move_to_end(victim)
        predict_ = self._hidden.get(victim) or partial(self._predict, self._models[victim])
        return partial(self._answer, predict_, victim, labels, query)

    def _answer(self, predict_: Predict, victim: str, labels: str, query: Query) -> NDArray[np.float32]:
        # torch warns about read-only memory, such as Ray's zero-copy arrays. It refuses negative strides, which numpy
        # calls contiguous in a dimension of one entry
        images = np.require(query.images, requirements=["C", "W"])
        if min(images.strides) < 0:
            images = images.copy()
        policy = answer_policy(labels, victim, query.account, query.key)
        rows = policy(predict_(torch.from_numpy(images)))
        answers: NDArray[np.float32] = rows.numpy()
        return answers

    def _predict(self, model: Classifier, images: Tensor) -> Tensor:
        if self._half is None:
            return predict(model, images)
        with torch.autocast(self._device.type, self._half):
            rows = predict(model, images)
        # a logit was beyond float16's range, so the batch is computed in full: the images alone decide this, too
        return rows if bool(rows.isfinite().all()) else predict(model, images)


def _size(model: Classifier) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
