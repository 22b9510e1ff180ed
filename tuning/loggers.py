"""Ray's own logger callbacks, by the names that a sweep's configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, LoggerCallback, TBXLoggerCallback

from simulator.errors import InputError, one_line


def callbacks(loggers: Mapping[str, Mapping[str, Any]]) -> list[LoggerCallback]:
    """The callbacks of a sweep.

    Raises:
        InputError: a logger's package is not installed, or does not take the arguments.
    """
    made: list[LoggerCallback] = []
    for name, arguments in loggers.items():
        try:
            if name in ("mlflow", "wandb"):
                import_module(name)  # Ray's callback would complain only once the sweep has begun
            made.append(_kind(name)(**arguments))
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"loggers.{name}: {one_line(error)}") from None
    return made


def _kind(name: str) -> Any:
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        return MLflowLoggerCallback
    if name == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        return WandbLoggerCallback
    return {"tensorboard": TBXLoggerCallback, "csv": CSVLoggerCallback, "json": JsonLoggerCallback}[name]
