"""Knockoff Nets here and in a peer, the Adversarial Robustness Toolbox 1.20: same victim, pool, net, budget and epochs.

Needs the optional dependencies ``peers`` (``pip install -e ".[peers]"``). Each side steals with every strategy and
reward, from the same seeds: the mean accuracy of the stolen models, and the processor time of collecting, an answer
(asking, learning the policy, and training meanwhile; not the final training, of which both do the same).

What cannot be equal: the peer's ``reward`` is made for a victim that gives logits, and gets them; its adaptive strategy
trains on hard labels whatever the victim gives, goes on from the model it collected with, and asks one image at a time.
Here the service gives probabilities (soft) or labels (hard), and the final training starts afresh.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from simulator.analysis.agreement import accuracy
from simulator.attacks.knockoff import Knockoff
from simulator.context import Context
from simulator.data.dataset import DataConfig, Dataset, load
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import build
from simulator.service.oracle import ModelOracle
from simulator.training.fit import fit
from simulator.training.predict import predict_labels, use_one_thread
from simulator.training.recipe import Recipe

#: of the peer's seconds an answer to ours, for the adaptive strategy
TARGET = 20.0
#: our rewards by the peer's names
REWARDS = {"cert": "certainty", "div": "diversity", "loss": "loss", "all": "mean"}
DATASETS = {
    "digits": DataConfig(name="digits", size=8),
    "fashion_mnist": DataConfig(name="fashion_mnist", owner=12000, attacker=8000),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared: the victim's data, and how much of it is stolen how often."""

    dataset: str = "digits"
    budget: int = 400
    epochs: int = 20
    seeds: int = 5
    architecture: str = "naivenet"

    @property
    def recipe(self) -> Recipe:
        """Adam at one rate: the peer passes no schedule on."""
        return Recipe(epochs=self.epochs, batch_size=64, learning_rate=2e-3, decay_factor=1.0)


@dataclass(frozen=True)
class Theft:
    """One stolen model: its accuracy on the test set, and the seconds of collecting an answer."""

    accuracy: float
    seconds: float


class Bench:
    """A victim and what is stolen from it."""

    def __init__(self, settings: Comparison) -> None:
        self.settings = settings
        self.data: Dataset = load(DATASETS[settings.dataset])
        self.pool = Pool("attacker", self.data.attacker.images, self.data.attacker.labels)
        self.victim = self._model(0, mean=self.data.mean, std=self.data.std)
        owner, recipe = self.data.owner, settings.recipe.model_copy(update={"epochs": 10})
        fit(self.victim, owner.images, owner.labels, recipe, Context(torch.Generator().manual_seed(0)))

    def _model(self, seed: int, **normalisation: Any) -> nn.Module:
        return build(
            self.settings.architecture,
            channels=self.data.channels,
            size=self.data.size,
            classes=self.data.classes,
            generator=torch.Generator().manual_seed(seed),
            **normalisation,
        )

    def accuracy(self, model: nn.Module) -> float:
        """Of a model on the test set."""
        return float(accuracy(predict_labels(model, self.data.test.images), self.data.test.labels))

    def ours(self, seed: int, labels: str, **strategy: Any) -> Theft:
        """Steals with :class:`~simulator.attacks.knockoff.Knockoff`."""
        attack, generator = Knockoff(training=self.settings.recipe, **strategy), torch.Generator().manual_seed(seed)
        data, budget = self.data, self.settings.budget
        shape = (data.channels, data.size, data.size)
        oracle = ModelOracle(self.victim, labels=labels, classes=data.classes, shape=shape, budget=budget)
        start = time.process_time()
        images, answers = attack.collect(oracle, self._model(100 + seed), self.pool, Context(generator))
        seconds = time.process_time() - start
        model = attack.train(self._model(100 + seed), images, answers, Context(generator))
        return Theft(self.accuracy(model), seconds / budget)

    def theirs(self, seed: int, **strategy: Any) -> Theft:
        """Steals with the peer's ``KnockoffNets``."""
        np.random.seed(seed)  # noqa: NPY002 (the peer draws from the global generators)
        torch.manual_seed(seed)
        data, settings = self.data, self.settings
        probabilities = bool(strategy.get("use_probability"))
        victim = self._classifier(nn.Sequential(self.victim, nn.Softmax(1)) if probabilities else self.victim)
        model = self._model(100 + seed)
        thief = self._classifier(model)
        fits: list[float] = []
        thief.fit = _timed(thief.fit, fits)
        attack = _peer("art.attacks.extraction").KnockoffNets(
            victim,
            batch_size_fit=settings.recipe.batch_size,
            batch_size_query=256,
            nb_epochs=settings.epochs,
            nb_stolen=settings.budget,
            verbose=False,
            **strategy,
        )
        images, labels = self.pool.images.numpy().astype(np.float32) / 255, None
        if strategy["sampling_strategy"] == "adaptive":
            labels = np.eye(data.classes, dtype=np.float32)[self.pool.groups.numpy()]
        start = time.process_time()
        attack.extract(images, labels, thieved_classifier=thief)
        seconds = time.process_time() - start - fits[-1]
        return Theft(self.accuracy(model.eval()), seconds / settings.budget)

    def _classifier(self, model: nn.Module) -> Any:
        data, recipe = self.data, self.settings.recipe
        return _peer("art.estimators.classification").PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            optimizer=torch.optim.Adam(model.parameters(), lr=recipe.learning_rate),
            input_shape=(data.channels, data.size, data.size),
            nb_classes=data.classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        times.append(time.process_time() - start)
        return result

    return timed


def _peer(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f'{error}: install the optional dependencies first: pip install -e ".[peers]"') from None


def _row(name: str, labels: str, ours: list[Theft], theirs: list[Theft] | None, target: float | None) -> list[str]:
    def accuracies(thefts: list[Theft]) -> str:
        values = torch.tensor([theft.accuracy for theft in thefts], dtype=torch.float64)
        return f"{values.mean():.3f}±{values.std(correction=1) if len(values) > 1 else 0:.3f}"

    def milliseconds(thefts: list[Theft]) -> float:
        return 1e3 * float(np.median([theft.seconds for theft in thefts]))

    row = [name, labels, accuracies(ours), f"{milliseconds(ours):.3f}"]
    if theirs is None:
        return [*row, "", "", "", ""]
    ratio = milliseconds(theirs) / max(milliseconds(ours), 1e-9)
    met = "" if target is None else "[green]yes[/]" if ratio >= target else "[red]no[/]"
    return [*row, accuracies(theirs), f"{milliseconds(theirs):.3f}", f"{ratio:.1f}", met]


def compare(settings: Comparison) -> Table:
    """Every strategy on both sides, seed by seed in turn."""
    bench = Bench(settings)
    table = Table(
        title=f"Knockoff Nets and the Adversarial Robustness Toolbox, {settings.dataset}",
        caption=f"Victim's accuracy {bench.accuracy(bench.victim):.3f}; {settings.architecture}, {settings.budget} "
        f"queries of {len(bench.pool)} images, {settings.epochs} epochs, {settings.seeds} seeds; mean ± deviation; "
        "milliseconds of one processor to collect an answer, median.",
    )
    columns = ("strategy", "labels", "accuracy", "ms", "peer's accuracy", "peer's ms", "ratio", f"≥ {TARGET:g}")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    seeds = range(settings.seeds)
    for labels in ("soft", "hard"):
        theirs = [bench.theirs(seed, sampling_strategy="random", use_probability=labels == "soft") for seed in seeds]
        table.add_row(*_row("random", labels, [bench.ours(seed, labels) for seed in seeds], theirs, None))
    for their_reward, reward in REWARDS.items():
        pairs = [
            (
                bench.ours(seed, "soft", strategy="adaptive", reward=reward),
                bench.theirs(seed, sampling_strategy="adaptive", reward=their_reward),
            )
            for seed in seeds
        ]
        name = f"adaptive, {reward}"
        table.add_row(*_row(name, "soft", [pair[0] for pair in pairs], [pair[1] for pair in pairs], TARGET))
        hard = [bench.ours(seed, "hard", strategy="adaptive", reward=reward) for seed in seeds]
        table.add_row(*_row(name, "hard", hard, None, None))
    return table


def run(console: Console, settings: Comparison | None = None) -> None:
    """Prints the comparison.

    Raises:
        InputError: the peer is not installed, or the data set is not there.
    """
    _peer("art.attacks.extraction")
    console.print(compare(settings or Comparison()))


def main() -> None:
    """``python -m benchmarks.peers [--dataset NAME] [--budget N] [--epochs N] [--seeds N]``."""
    default = Comparison()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset", choices=list(DATASETS), default=default.dataset)
    for name in ("budget", "epochs", "seeds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    arguments = parser.parse_args()
    use_one_thread()
    try:
        run(Console(), Comparison(**vars(arguments)))
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
