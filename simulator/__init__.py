"""Model-extraction attacks against watermarked classifiers, in plain PyTorch. Knows no Ray.

``import simulator as exsim`` gives the public functions and classes of :mod:`simulator.api`. They are imported when
they are first used, because torch takes seconds to import.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simulator.api import Rows, Run, Victim, load_config, run, steal, train_victim, verify

__all__ = ["Rows", "Run", "Victim", "__version__", "load_config", "run", "steal", "train_victim", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from simulator import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
