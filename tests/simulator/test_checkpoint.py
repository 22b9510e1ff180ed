"""What was packed comes back bit for bit, and training that is interrupted ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from simulator.checkpoint import (
    NO_CHECKPOINT,
    CheckpointFolder,
    FileCheckpoint,
    TimedCheckpoint,
    from_bytes,
    pack,
    to_bytes,
    unpack,
)
from simulator.context import Context
from simulator.errors import InputError
from simulator.models import build
from simulator.seeding import generator_for
from simulator.training.fit import fit
from simulator.training.recipe import Recipe


class Interrupt(Exception):
    """Stands for a kill."""


class Always(FileCheckpoint):
    """Saves at every step."""

    def due(self) -> bool:
        return True


def trained(recipe: Recipe, checkpoint: FileCheckpoint | None, stop_after: int | None) -> dict[str, torch.Tensor]:
    """Two phases of training of a net with dropout, interrupted after some epochs."""
    generator = generator_for("data")
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (64,), generator=generator)
    generator = generator_for("training")
    model = build("vgglike", channels=1, size=16, classes=3, generator=generator)
    epochs = 0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == stop_after:
            raise Interrupt

    for phase in ("first", "second"):
        context = Context(generator, progress, NO_CHECKPOINT if checkpoint is None else checkpoint)
        fit(model, images, labels, recipe, context, phase=phase)
    return model.state_dict()


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad", "adamax", "rmsprop"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_training_gives_the_same_weights(tmp_path: Path, optimizer: str, stop_after: int) -> None:
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=0.01, optimizer=optimizer)
    calm = trained(recipe, None, None)
    checkpoint = Always(tmp_path / "state.safetensors")
    with pytest.raises(Interrupt):
        trained(recipe, checkpoint, stop_after)
    again = trained(recipe, checkpoint, None)
    assert all(torch.equal(calm[name], again[name]) for name in calm)


def test_a_phase_that_is_over_is_not_trained_again(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=16)
    checkpoint = Always(tmp_path / "state.safetensors")
    with pytest.raises(Interrupt):
        trained(recipe, checkpoint, 3)
    steps: list[str] = []
    model = build("vgglike", channels=1, size=16, classes=3, generator=generator_for("training"))
    images, labels = torch.zeros(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)
    context = Context(generator_for("x"), lambda phase, _done, _total: steps.append(phase), checkpoint)
    fit(model, images, labels, recipe, context, phase="first")
    assert steps == []


def test_modules_optimisers_and_generators_come_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    generator = generator_for("x")
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    checkpoint = CheckpointFolder(tmp_path).checkpoint("work", interval=0)
    checkpoint.save({"step": 3, "names": ["a"], **pack(net=net, optimizer=optimizer, generator=generator)})
    expected = torch.rand(3, generator=generator)

    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).to(memory_format=torch.channels_last)
    second = torch.optim.Adam(other.parameters(), fused=True)
    state = checkpoint.load()
    assert state is not None
    assert (state["step"], state["names"]) == (3, ["a"])
    unpack(state, net=other, optimizer=second, generator=(fresh := generator_for("y")))
    assert torch.equal(torch.rand(3, generator=fresh), expected)
    for parts in ((net, optimizer), (other, second)):
        parts[1].zero_grad()
        parts[0](torch.ones(2, 3, 8, 8)).square().sum().backward()
        parts[1].step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_damaged_checkpoint_is_one_line() -> None:
    data = to_bytes({"a": torch.ones(3), "b": 1})
    assert from_bytes(data)["b"] == 1
    with pytest.raises(InputError) as caught:
        from_bytes(data[:20])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 20])
def test_work_whose_checkpoint_is_damaged_begins_anew(length: int, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.write("x", to_bytes({"a": torch.ones(3)})[:length])
    assert folder.checkpoint("x").load() is None


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "none")
    assert folder.checkpoint("x").load() is None
    folder.write("x", b"1")
    folder.clear("x")
    folder.clear("x")
    assert folder.read("x") is None


def test_saving_takes_a_small_part_of_the_time_however_large_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that takes three seconds to gather and to write is saved a minute after the last saving ended."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def write(_: bytes) -> None:
        clock[0] += 2

    checkpoint = TimedCheckpoint(lambda: None, write, interval=10)
    clock[0] += 10
    assert checkpoint.due()
    clock[0] += 1  # in which the state is gathered
    checkpoint.save({})
    clock[0] += 59
    assert not checkpoint.due()
    clock[0] += 1
    assert checkpoint.due()
    often = TimedCheckpoint(lambda: None, write, interval=0)
    often.save({})
    assert often.due()
