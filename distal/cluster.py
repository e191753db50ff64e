"""The connection to Ray, and how its resources are shared between training and scoring."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distal.errors import ConfigError

ROLE_LABEL = "distal-role"


@dataclass(frozen=True)
class Slots:
    """What training and scoring may take, in slots: CPUs, or GPUs when there are some.

    Attributes:
        device: "cpu" or "cuda".
        total: slots of the cluster.
        cpus: CPUs of the cluster.
        roles: the `distal-role` labels found on its nodes.
    """

    device: str
    total: int
    cpus: int
    roles: frozenset[str]

    def training(self, workers: int, threads: int) -> int:
        """Slots that training takes from scoring: none where it has nodes of its own."""
        if "train" in self.roles:
            return 0
        return workers if self.device == "cuda" else workers * threads

    def train_threads(self, workers: int) -> int:
        """CPU threads of a rank: training takes half of the CPUs, and scoring, which has more to do, the rest."""
        return max(1, self.cpus // 2 // workers)

    def selector(self, role: str) -> dict[str, str] | None:
        """Nodes on which a role runs: those labelled for it if there are any, else all."""
        return {ROLE_LABEL: role} if role in self.roles else None


def secure(address: str) -> None:
    """Have the processes of a cluster that this one starts authenticate each other with a token.

    Ray reads the mode when it is imported, so this comes before. A cluster that is joined has its own mode.
    """
    if is_own(address):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_own(address: str) -> bool:
    """Whether `connect` starts a cluster at this address, rather than join one."""
    return _resolved(address) == "local"


def _resolved(address: str) -> str:
    return os.environ.get("RAY_ADDRESS", address) if address == "local" else address


@contextmanager
def connect(address: str) -> Iterator[None]:
    """Be connected to Ray inside the block.

    Args:
        address: `local` starts a cluster on this machine that ends with the block, unless RAY_ADDRESS names
            one: a submitted job is told its cluster that way. `auto` or `host:port` joins an existing one.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    import ray

    address = _resolved(address)
    if ray.is_initialized():  # the caller's own connection, which stays theirs
        yield
        return
    try:
        if ":" in address:
            _knock(address)
        with _keeping_signal_handlers():
            _init(address)
    except OSError as error:
        if address == "local":
            raise
        raise ConfigError(
            f"ray.address: no Ray cluster at {address} ({_first_line(error)}); start one with `ray start --head`, "
            "or set ray.address=local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at the address: Ray itself would try again for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
        pass


def _init(address: str) -> None:
    import ray

    ray.init(
        address=address,
        namespace="distal",
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Ray puts its own handler for SIGTERM in place when it starts; put ours back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # what Ray's handler makes of a SIGTERM that came meanwhile
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def find_slots(device: str) -> Slots:
    """The slots of the connected cluster.

    Args:
        device: `device` of the configuration: auto, cpu or cuda.

    Raises:
        ConfigError: cuda was asked for and no node has a GPU.
    """
    import ray

    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node["Resources"].get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    roles = frozenset(node.get("Labels", {}).get(ROLE_LABEL) for node in nodes) - {None}
    if device == "cuda" and not gpus:
        raise ConfigError("device: cuda, but no node of the cluster has a GPU; set device=cpu")
    if device == "cpu" or not gpus:
        return Slots("cpu", _scoring(nodes, roles, "CPU"), cpus, roles)
    return Slots("cuda", _scoring(nodes, roles, "GPU"), cpus, roles)


def _scoring(nodes: list[dict[str, Any]], roles: frozenset[str], kind: str) -> int:
    """Slots on the nodes that may score."""
    allowed = [n for n in nodes if "score" not in roles or n.get("Labels", {}).get(ROLE_LABEL) == "score"]
    return int(sum(node["Resources"].get(kind, 0) for node in allowed))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
