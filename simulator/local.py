"""The old place of :func:`run_config`, kept for one release: import it from :mod:`simulator.experiment.local`."""

from simulator.experiment.local import run_config

__all__ = ["run_config"]
