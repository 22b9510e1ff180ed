"""The old place of :func:`read_config`, kept for one release: import it from :mod:`simulator.plan.config`."""

from simulator.plan.config import RunConfig, check_config, read_config

__all__ = ["RunConfig", "check_config", "read_config"]
