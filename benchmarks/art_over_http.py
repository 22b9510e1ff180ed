"""The Adversarial Robustness Toolbox, as it is, attacks a door of ``exsim serve``: BlackBoxClassifier and KnockoffNets.

Needs the optional dependencies ``peers`` (``pip install -e ".[peers]"``), and a door that serves a classifier of
handwritten digits (docs/http.md). Of this project the theft uses nothing but the digits that the attacker has.

    EXSIM_TOKEN=... python -m benchmarks.art_over_http --url http://127.0.0.1:8000 --budget 400
"""

from __future__ import annotations

import argparse
import io
import os
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from torch import nn

from simulator.data.dataset import DataConfig, load


class Door:
    """What an attacker needs of the API: two requests."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> Any:
        """A JSON value."""
        reply = self._session.get(self._url + path, timeout=60)
        reply.raise_for_status()
        return reply.json()

    def predict(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities ``(B, K)`` of images ``(B, C, H, W)`` in [0, 1]: ART's ``predict_fn``."""
        body = io.BytesIO()
        np.save(body, images.astype(np.float32))
        headers = {"Content-Type": "application/octet-stream"}
        reply = self._session.post(f"{self._url}/v1/predict", data=body.getvalue(), headers=headers, timeout=60)
        reply.raise_for_status()
        return np.array(reply.json()["probabilities"], dtype=np.float32)


def steal(url: str, token: str, budget: int, epochs: int) -> dict[str, float]:
    """Steals with ART; returns the accuracies and what was asked and paid."""
    from art.attacks.extraction import KnockoffNets
    from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier

    door = Door(url, token)
    model, before = door.get("/v1/model"), door.get("/v1/account")
    channels, height, width = model["shape"]
    data = load(DataConfig(name="digits", size=height))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (ART draws from the global generators)

    victim = BlackBoxClassifier(door.predict, (channels, height, width), model["classes"], clip_values=(0.0, 1.0))
    hidden = 256
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, model["classes"])
    )
    thief = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=2e-3),
        input_shape=(channels, height, width),
        nb_classes=model["classes"],
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = KnockoffNets(
        victim,
        batch_size_fit=64,
        batch_size_query=100,
        nb_epochs=epochs,
        nb_stolen=budget,
        sampling_strategy="random",
        use_probability=True,
        verbose=False,
    )
    attack.extract(data.attacker.images.numpy().astype(np.float32) / 255, thieved_classifier=thief)
    after = door.get("/v1/account")

    images, labels = data.test.images.numpy().astype(np.float32) / 255, data.test.labels.numpy()
    stolen = float((thief.predict(images).argmax(1) == labels).mean())
    return {
        "nb_stolen": float(budget),
        "charged": float(after["spent"] - before["spent"]),
        "remaining": float(after["remaining"]),
        "test_accuracy": stolen,
    }


def main() -> None:
    """``python -m benchmarks.art_over_http --url URL [--budget N] [--epochs N]``; the token is in ``EXSIM_TOKEN``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--budget", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    token = os.environ.get("EXSIM_TOKEN")
    if not token:
        parser.exit(2, "the account's token is expected in EXSIM_TOKEN\n")
    try:
        found = steal(arguments.url, token, arguments.budget, arguments.epochs)
    except (ModuleNotFoundError, requests.RequestException) as error:
        parser.exit(2, f"{error}\n")
    for name, value in found.items():
        print(f"{name}: {value:g}")


if __name__ == "__main__":
    main()
