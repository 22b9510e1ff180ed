"""Connects to a Ray cluster, and keeps its log lines off the user's terminal."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simulator.errors import InputError

#: bytes of object store for a local cluster; data sets and models of this field are small
OBJECT_STORE = 1 << 30


#: seconds that a cluster's address may take to answer
CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str | None, logs: Path, *, cpus: int | None = None, gpus: int | None = None) -> Iterator[None]:
    """Connects to the cluster at ``address`` (or ``RAY_ADDRESS``). Without one, starts a local cluster for the block.

    An existing connection is reused and left open. Ray's and Serve's log lines of this process go to
    ``logs/driver.log``. A local cluster's own logs are copied beside it when the block ends.

    Raises:
        InputError: no cluster answers at the address.
    """
    with _logged_to(logs / "driver.log"):
        if address:
            _reach(address)
        if ray.is_initialized():
            yield
            return
        if not address and (address := os.environ.get("RAY_ADDRESS")):
            _reach(address)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                quiet["include_dashboard"] = False
                # "local": with no address at all Ray would join a cluster that somebody has started on this machine
                with _on_localhost():
                    ray.init("local", num_cpus=cpus, num_gpus=gpus, object_store_memory=OBJECT_STORE, **quiet)
        except Exception as error:  # of a node that took too long to start, Ray raises no narrower one
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
        session = None if address else _session_logs()
        try:
            with _terminated_as_interrupted():
                yield
        finally:
            ray.shutdown()
            if session is not None:
                _keep_logs(session, logs / "ray")


@contextmanager
def _on_localhost() -> Iterator[None]:
    """A local cluster that starts inside the block listens on 127.0.0.1 alone, and none but this user may use it.

    By default all its processes listen on every interface. Ray keeps to localhost where it knows of no clusters (macOS,
    Windows) and has no public setting for it; ``_node_ip_address="127.0.0.1"`` is taken for the public address. Its
    token, which it asks of everybody by default, Ray writes to a file that others may read.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        token = Path.home() / ".ray" / "auth_token"
        if token.is_file() and token.stat().st_uid == os.getuid():
            token.chmod(0o600)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM, which a stopped job gets, end the block as Ctrl-C does. Ray's own handler would end the process
    and leave the service on the cluster. Python allows this in the main thread only; in any other, nothing
    changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Checks that something listens at ``host:port``, because Ray would try for many minutes.

    Ray Client (``ray://``) is refused: its driver runs on no node of the cluster, but the ledger and the collector must
    write into the run directory on the driver's node.

    Raises:
        InputError: nothing listens there, or the address is Ray Client's.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"no Ray cluster at {address} for a run: its actors write beside the driver, so start it on a node of the "
            f"cluster, by ray job submit or ray exec; allowed there: auto, HOST:PORT"
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return  # such as "auto": Ray looks for a cluster on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address}: {error}; allowed: HOST:PORT, auto") from None


def _session_logs() -> Path | None:
    """The log folder of the local cluster. Ray has no public call for it."""
    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node else None


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Sends the lines of Ray's loggers and the raylet's complaints to a file inside the block, and not to the
    terminal."""
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    shown = ray._private.worker.print_to_stdstream
    ray._private.worker.print_to_stdstream = _logged
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = shown
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _logged(data: dict[str, Any], *_: Any, **__: Any) -> None:
    """Replaces Ray's function that prints the raylet's errors to standard output, e.g. that many processes have been
    started. Ray has no setting for them: ``log_to_driver`` covers the workers' lines alone."""
    for line in data["lines"]:
        logging.getLogger("ray").error("%s: %s", data.get("pid", "raylet"), line)


def _keep_logs(session: Path, target: Path) -> None:
    """Copies the logs of a local cluster that are not empty. A log that has vanished is skipped."""
    for pattern in ("worker-*", "serve/*", "raylet.*", "gcs_server.*"):
        for file in session.glob(pattern):
            if file.is_file() and file.stat().st_size:
                place = target / file.relative_to(session)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def here() -> NodeAffinitySchedulingStrategy:
    """Pins an actor to the node of this process, because the actor reads and writes its files."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
