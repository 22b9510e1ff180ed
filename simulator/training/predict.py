"""Prediction over images held in memory, and where a model computes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: images in one forward pass of :func:`predict`; fixed, because a batch's size changes the last bits of a logit
PREDICT_BATCH = 256


def choose_device(name: str = "auto") -> torch.device:
    """``"auto"`` is the first CUDA device if this process has one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie."""
    return next(model.parameters()).device


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """A batch as models take it: float in [0, 1], on the device, channels last.

    To a GPU it goes by way of pinned memory, so that the copy runs beside the kernels before it.
    """
    if device.type == "cuda" and images.device.type == "cpu":
        images = images.pin_memory()
    batch = images.to(device, non_blocking=True)
    batch = batch.to(torch.float32).div_(255.0) if batch.dtype == torch.uint8 else batch
    return batch.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, batch: int = PREDICT_BATCH) -> Tensor:
    """Logits ``(N, K)`` float32 on the CPU, in evaluation mode, ``batch`` images at a time."""
    return _batched(model, model, images, batch)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int = PREDICT_BATCH) -> Tensor:
    """Probability rows ``(N, K)`` float32 on the CPU, in evaluation mode."""
    return _batched(model, lambda inputs: model(inputs).float().softmax(1), images, batch)


@torch.inference_mode()
def predict_features(model: nn.Module, images: Tensor, batch: int = PREDICT_BATCH) -> Tensor:
    """Penultimate features ``(N, D)`` float32 on the CPU, in evaluation mode."""
    return _batched(model, model.features, images, batch)  # type: ignore[arg-type]


def predict_labels(model: nn.Module, images: Tensor, batch: int = PREDICT_BATCH) -> Tensor:
    """Top-1 labels ``(N,)`` int64 on the CPU."""
    return predict_logits(model, images, batch).argmax(1)


def _batched(model: nn.Module, function: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    training, device = model.training, device_of(model)
    model.eval()
    # copies from a GPU are queued behind the kernels; the CPU meanwhile prepares the next part
    gpu = device.type == "cuda"
    outputs = [function(to_input(part, device)).float().to("cpu", non_blocking=gpu) for part in images.split(batch)]
    if gpu:
        torch.cuda.current_stream(device).synchronize()
    model.train(training)
    return torch.cat(outputs)


@functools.cache
def use_one_thread() -> None:
    """One thread a process: on shared cores more threads only wait for each other, and sums keep their order."""
    torch.set_num_threads(1)
