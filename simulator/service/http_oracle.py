"""An oracle over HTTP: a suspect behind a door of ours or a foreign API, by its top labels alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from simulator.errors import InputError
from simulator.service.http import HttpClient, Unreachable, predict
from simulator.service.ledger import digest_of
from simulator.service.oracle import BudgetExhausted


class HttpOracle:
    """A suspect behind HTTP as an :class:`~simulator.service.oracle.Oracle` of hard labels, asked image by image.

    A door of ours is asked by its protocol. A foreign API is asked ``{images_field: [image]}``, the image as nested
    lists of floats in [0, 1], ``(C, H, W)``. Its answer is looked up at ``answer_field``, a dotted path such as
    ``predictions`` or ``outputs.0.scores``. What lies there may be a label, a row of scores, or a list of one of
    either. A label that is none of the K classes is answered by a row of zeros.

    Args:
        classes, shape: what the suspect is taken to answer and to be asked.
        budget: images that may be asked.
        answer_field: None for a door of ours.
    """

    labels = "hard"

    def __init__(
        self,
        client: HttpClient,
        *,
        classes: int,
        shape: tuple[int, int, int],
        budget: int,
        answer_field: str | None = None,
        images_field: str = "images",
    ) -> None:
        self.classes, self.shape, self.budget = classes, shape, budget
        self.asked = 0
        self._client, self._answer_field, self._images_field = client, answer_field, images_field

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self.budget - self.asked

    def query(self, images: Tensor) -> Tensor:
        """See :class:`~simulator.service.oracle.Oracle`.

        Raises:
            InputError: the suspect does not answer, or not with a label or finite scores.
        """
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} images asked, {self.remaining} of {self.budget} remain")
        rows = torch.zeros(len(images), self.classes)
        for row, image in zip(rows, images.split(1), strict=True):
            label = self._label(image.detach().cpu())
            self.asked += 1
            if 0 <= label < self.classes:
                row[label] = 1
        return rows

    def _label(self, image: Tensor) -> int:
        if self._answer_field is None:
            pixels = image.contiguous().numpy()
            # the key tells nothing of why it is asked, and asking again after an interruption is free
            answer = predict(self._client, pixels, digest_of(pixels.data.cast("B")))[0]
            if len(answer) != self.classes:
                raise Unreachable(f"{self._client.url}: {len(answer)} probabilities for {self.classes} classes")
            return int(answer.argmax())
        scaled = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image
        reply = self._client.send("POST", "", json={self._images_field: scaled.tolist()})
        try:
            return _label(_at(reply, self._answer_field), self._answer_field)
        except RecursionError:
            raise InputError(f"--answer-field {self._answer_field}: the answer is nested too deeply") from None


def _at(value: Any, path: str) -> Any:
    """The part of a JSON value at a dotted path."""
    for step in path.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            keys = f"the fields {', '.join(map(str, value))}" if isinstance(value, dict) else repr(value)
            raise InputError(f"--answer-field {path}: the answer has no {step!r}, it has {keys[:300]}") from None
    return value


def _label(value: Any, path: str) -> int:
    """The label in an answer to one image: itself, or the first largest of finite scores."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value and all(type(each) is int or _finite(each) for each in value):
        return max(range(len(value)), key=value.__getitem__)
    if type(value) is int:
        return value
    raise InputError(f"--answer-field {path}: {repr(value)[:80]} is neither a label nor a list of scores")


def _finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)
