"""The connection to Ray: start a cluster here, or join one."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distal.errors import ConfigError
from distal.storage import DURABLE


def secure(address: str) -> None:
    """Turn on token authentication for a cluster that this process starts.

    Ray reads the mode when it is imported, so call this before. A cluster that is joined has its own mode.
    """
    if is_own(address):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_own(address: str) -> bool:
    """Whether `connect` starts a cluster for this address instead of joining one."""
    return _resolved(address) == "local"


def _resolved(address: str) -> str:
    return os.environ.get("RAY_ADDRESS", address) if address == "local" else address


@contextmanager
def connect(address: str) -> Iterator[None]:
    """Connect to Ray for the block.

    Args:
        address: `local` starts a cluster on this machine that ends with the block, unless RAY_ADDRESS names
            one, as it does in a submitted job. `auto` or `host:port` joins an existing cluster.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    import ray

    address = _resolved(address)
    if ray.is_initialized():  # the caller's connection: not ours to end
        yield
        return
    try:
        if ":" in address:
            host, _, port = address.rpartition(":")
            if not port.isdigit() or "/" in host:
                raise OSError("not host:port")
            knock(host.strip("[]"), int(port))
        with _keeping_signal_handlers():
            _init(address)
    except OSError as error:
        if address == "local":
            if "AF_UNIX" in str(error):
                raise ConfigError(
                    f"TMPDIR: {tempfile.gettempdir()} is too long for the names of Ray's sockets, which go there; set "
                    "RAY_TMPDIR to a folder with a short name"
                ) from error
            raise
        given = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "ray.address"
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{given}: no Ray cluster at {address} ({reason}); start one with `ray start --head`, "
            f"or leave {given} out to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def knock(host: str, port: int) -> None:
    """Raise OSError when nobody listens there: Ray itself would retry for minutes."""
    with socket.create_connection((host, port), timeout=10):
        pass


def _init(address: str) -> None:
    import ray

    ray.init(
        address=address,
        namespace="distal",
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {DURABLE: os.environ[DURABLE]}} if DURABLE in os.environ else None,
    )


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Restore our handler for SIGTERM, which Ray replaces when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler raised it for a SIGTERM that came meanwhile
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
