"""A transfer set as it grows: what an account asked and was answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from simulator.checkpoint import State
from simulator.errors import InputError
from simulator.service.oracle import chunked
from simulator.tensorfile import decode


@dataclass(frozen=True, eq=False)
class TransferSet:
    """What a theft asked and was answered: ``images`` ``(N, C, H, W)``, uint8 or float in [0, 1], and ``answers``
    ``(N, K)`` float probability rows, in the order asked, one account after the other."""

    images: Tensor
    answers: Tensor

    @classmethod
    def of(cls, files: Sequence[bytes], where: str) -> TransferSet:
        """Reads the files of a theft's accounts, as :meth:`Recording.transfer_set` makes them.

        Raises:
            InputError: there is none, or one is damaged; ``where`` says in the message where they are from.
        """
        if not files:
            raise InputError(f"{where}: no transfer set was kept")
        parts = [decode(data, where)[0] for data in files]
        images = [part["images"] for part in parts]
        if len({part.dtype for part in images}) > 1:
            images = [part / 255 if part.dtype == torch.uint8 else part for part in images]
        return cls(torch.cat(images), torch.cat([part["answers"] for part in parts]))


class Recording:
    """Keeps what an account asked and was answered: a :class:`~simulator.service.oracle.Listener`.

    Batches are packed together once, when a checkpoint is taken, and a pack never changes. A checkpoint therefore
    copies only what came since the one before, until it writes the file.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._packs: list[tuple[Tensor, Tensor]] = []
        self._new: list[tuple[Tensor, Tensor]] = []
        self._chunks: list[int] = []
        self._uint8: list[bool] = []

    def hear(self, images: Tensor, answers: Tensor) -> None:
        """See :class:`~simulator.service.oracle.Listener`."""
        for part in chunked(images, self._classes):
            self._chunks.append(len(part))
            self._uint8.append(part.dtype == torch.uint8)
        if self._new and self._new[-1][0].dtype != images.dtype:
            self._pack()
        self._new.append((images.clone(), answers))

    def state(self) -> State:
        """See :class:`~simulator.service.oracle.Listener`."""
        self._pack()
        state: State = self._sizes()
        for number, (images, answers) in enumerate(self._packs):
            state |= {f"images.{number}": images, f"answers.{number}": answers}
        return {**state, "packs": len(self._packs)}

    def restore(self, state: State) -> None:
        """See :class:`~simulator.service.oracle.Listener`."""
        self._packs = [(state[f"images.{number}"], state[f"answers.{number}"]) for number in range(state["packs"])]
        self._new, self._chunks, self._uint8 = [], state["chunks"].tolist(), state["uint8"].tolist()

    def transfer_set(self) -> bytes:
        """All that was asked and answered, as a safetensors file: ``images`` in the order asked, ``answers``, and
        ``chunks``, the size of each paid batch, from which the ledger's digests can be computed again.

        Where uint8 and float images were asked, all are float32 here, and ``uint8`` says which batches were 255 times
        that, rounded.
        """
        kept = [*self._packs, *self._new]
        asked = [images for images, _ in kept]
        if len(set(self._uint8)) > 1:
            asked = [images / 255 if images.dtype == torch.uint8 else images for images in asked]
        tensors = {
            "images": torch.cat(asked) if asked else torch.empty(0, dtype=torch.uint8),
            "answers": torch.cat([torch.empty(0, self._classes), *(answers for _, answers in kept)]),
            **self._sizes(),
        }
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    def _pack(self) -> None:
        if self._new:
            images, answers = zip(*self._new, strict=True)
            self._packs.append((torch.cat(images).contiguous(), torch.cat(answers)))
            self._new = []

    def _sizes(self) -> dict[str, Tensor]:
        return {
            "chunks": torch.tensor(self._chunks, dtype=torch.int64),
            "uint8": torch.tensor(self._uint8, dtype=torch.bool),
        }
