"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, pack, unpack
from simulator.context import Context
from simulator.seeding import global_randomness
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Objective, Recipe, recipe_objective

Parts = dict[str, nn.Module | torch.optim.Optimizer | torch.Generator]


@dataclass(frozen=True)
class Hooks:
    """What a training does around the steps of the loop.

    Attributes:
        around_epoch: makes the context of an epoch, such as one that draws masks before it and fine-tunes after it. It
            stands in place of the one seed that dropout gets for the whole training, so it seeds dropout itself, by
            :func:`simulator.seeding.global_randomness`.
        around_step: makes the context of the optimiser's step on a batch.
        least_batch: the smallest batch that is trained on. Batch normalisation cannot train on one image; an objective
            that adds images of its own can have a batch of one.
    """

    around_epoch: Callable[[], AbstractContextManager[object]] | None = None
    around_step: Callable[[], AbstractContextManager[object]] = nullcontext
    least_batch: int = 2


def fit(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    context: Context,
    *,
    objective: Objective | None = None,
    epochs: int | None = None,
    phase: str = "train",
    companions: Mapping[str, nn.Module] | None = None,
    hooks: Hooks = Hooks(),
) -> nn.Module:
    """Trains ``model`` in place and returns it in evaluation mode.

    Between epochs the state goes to the context's checkpoint under the name of the phase; training that is started
    again goes on from there, or returns at once if the phase is known to be over, and gives the same model.

    Args:
        images: ``(N, C, H, W)`` uint8 or float in [0, 1], N >= 2.
        targets: ``(N,)`` int64 labels or ``(N, K)`` float probability rows.
        context: its generator draws the order of the images and seeds dropout; its progress is told after every epoch.
        objective: from the model, a batch of inputs and their targets to the scalar loss; the recipe's if not given.
        epochs: in place of the recipe's.
        companions: modules of the objective's, by name: they stand in the checkpoint, and their parameters are learned
            beside the model's own.
        hooks: what happens around epochs and steps.
    """
    device, generator, checkpoint = device_of(model), context.generator, context.checkpoint
    companions = companions or {}
    epochs = recipe.epochs if epochs is None else epochs
    objective = objective or recipe_objective(recipe)
    model.to(memory_format=torch.channels_last)
    more = [parameter for module in companions.values() for parameter in module.parameters()]
    optimizer = recipe.build([*model.parameters(), *more])
    parts: Parts = {"model": model, "optimizer": optimizer, "generator": generator, **companions}
    resumption = _Resumption.of(checkpoint, phase, parts)
    if phase in resumption.over:
        return model.eval()
    model.train()
    with nullcontext() if hooks.around_epoch else resumption.randomness(generator):
        for epoch in range(resumption.epoch, epochs):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch, epochs)
            with hooks.around_epoch() if hooks.around_epoch else nullcontext():
                for index in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
                    if len(index) < hooks.least_batch:
                        continue
                    answers = targets[index].to(device, non_blocking=True)
                    loss = objective(model, to_input(images[index], device), answers)
                    optimizer.zero_grad()
                    loss.backward()
                    with hooks.around_step():
                        optimizer.step()
            if checkpoint.due():
                resumption.save(checkpoint, phase, epoch + 1, parts)
            context.progress(phase, epoch + 1, epochs)
    if checkpoint is not NO_CHECKPOINT:
        resumption.save(checkpoint, phase, epochs, parts)  # so that a later phase knows that this one is over
    return model.eval()


@dataclass
class _Resumption:
    """Where training goes on: which phases are over, the epoch, and the state of torch's global generators."""

    over: list[str] = field(default_factory=list)
    epoch: int = 0
    global_states: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, phase: str, parts: Parts) -> _Resumption:
        """Reads the checkpoint; puts a state of this phase back into its parts."""
        state = checkpoint.load()
        if state is None:
            return cls()
        if state["phase"] != phase:
            return cls(over=[*state["over"], state["phase"]] if phase not in state["over"] else state["over"])
        unpack(state, **parts)
        states = [state[name] for name in ("global", "global.cuda") if name in state]
        return cls(state["over"], int(state["epoch"]), states)

    def save(self, checkpoint: Checkpoint, phase: str, epoch: int, parts: Parts) -> None:
        """Writes where training stands after an epoch."""
        state = {"phase": phase, "over": self.over, "epoch": epoch, "global": torch.get_rng_state(), **pack(**parts)}
        if torch.cuda.is_available():
            state["global.cuda"] = torch.cuda.get_rng_state()
        checkpoint.save(state)

    @contextmanager
    def randomness(self, generator: torch.Generator) -> Iterator[None]:
        """As :func:`global_randomness`, or where the saved state left off."""
        if not self.global_states:
            with global_randomness(generator):
                yield
            return
        with torch.random.fork_rng():
            torch.set_rng_state(self.global_states[0])
            if torch.cuda.is_available() and len(self.global_states) > 1:
                torch.cuda.set_rng_state(self.global_states[1])
            yield
