"""The connection to Ray, and how its resources are shared between training and scoring."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from distal.errors import ConfigError, DistalError
from distal.storage import DURABLE

ROLE_LABEL = "distal-role"
STUCK_S = 600.0
MAX_SILENT = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Node:
    """What matters of one node of a cluster: its CPUs, its GPUs, and its `distal-role` label."""

    cpus: int
    gpus: int = 0
    role: str | None = None


@dataclass(frozen=True)
class Slots:
    """How a cluster is shared between training and scoring, in slots: CPUs, or GPUs when they are used.

    Attributes:
        device: "cpu" or "cuda".
        train_nodes, score_nodes: the nodes that may train, and that may score.
        selectors: the label selector of each of the two roles, None for any node.
    """

    device: str
    train_nodes: tuple[Node, ...]
    score_nodes: tuple[Node, ...]
    selectors: dict[str, dict[str, str] | None]

    @property
    def shared(self) -> bool:
        """Whether training and scoring use the same nodes."""
        return self.selectors["train"] is None

    @property
    def scoring(self) -> int:
        """Slots of the nodes that may score."""
        return self.scoring_of(self.score_nodes)

    def scoring_of(self, nodes: Iterable[Node]) -> int:
        """Slots of those of some nodes that may score. Which may is decided once: what the selector fits."""
        return sum(_slots(node, self.device) for node in nodes if _fits(node, self.selectors["score"]))

    def training(self, workers: int, threads: int) -> int:
        """Slots that the ranks take from scoring: none where they have nodes of their own."""
        if not self.shared:
            return 0
        return workers if self.device == "cuda" else workers * threads

    def train_threads(self, workers: int) -> int:
        """CPU threads of a rank: the most with which all ranks find room, and those of a node's GPUs share its CPUs.

        On shared nodes training takes half of the CPUs: the rest scores, which is most of the work.
        """
        cuda = self.device == "cuda"
        part = 2 if self.shared else 1
        nodes = [(node.cpus // part, node.gpus if cuda else workers) for node in self.train_nodes]
        most = max(cpus // (ranks if cuda else 1) for cpus, ranks in nodes)
        enough = (n for n in range(most, 1, -1) if sum(min(cpus // n, ranks) for cpus, ranks in nodes) >= workers)
        return next(enough, 1)


def divide(nodes: Sequence[Node], device: str) -> Slots:
    """Decide which nodes train and which score.

    Nodes labelled for a role have that role alone; when only one role is labelled, the other gets the other nodes.
    Without labels, or when that would leave a role without a node, all nodes do both.

    Raises:
        ConfigError: no node has what the device needs.
    """
    gpus = any(node.gpus for node in nodes)
    if missing := _missing(nodes, device):
        otherwise = "; add one, or set device=cpu in a new run" if device == "cuda" else "; add one"
        raise ConfigError(f"device: {device}, but the cluster has no {missing}{otherwise}")
    device = "cuda" if gpus and device != "cpu" else "cpu"
    able = tuple(node for node in nodes if _slots(node, device))
    labelled = {role: tuple(node for node in able if node.role == role) for role in ("train", "score")}
    chosen: dict[str, tuple[Node, ...]] = {}
    selectors: dict[str, dict[str, str] | None] = {}
    for role, other in (("train", "score"), ("score", "train")):
        if labelled[role]:
            chosen[role], selectors[role] = labelled[role], {ROLE_LABEL: role}
        else:
            chosen[role], selectors[role] = tuple(n for n in able if n.role != other), {ROLE_LABEL: f"!{other}"}
    if not any(labelled.values()) or not all(chosen.values()):
        return Slots(device, able, able, {"train": None, "score": None})
    return Slots(device, chosen["train"], chosen["score"], selectors)


def _missing(nodes: Sequence[Node], device: str) -> str | None:
    """What no node has that one of them must have."""
    if any(node.gpus or (node.cpus and device != "cuda") for node in nodes):
        return None
    return "node with a GPU" if device == "cuda" else "node with a CPU or a GPU"


def _slots(node: Node, device: str) -> int:
    return node.gpus if device == "cuda" else node.cpus


def _fits(node: Node, selector: dict[str, str] | None) -> bool:
    """Whether Ray would place there what has this selector."""
    if selector is None:
        return True
    role = selector[ROLE_LABEL]
    return node.role != role[1:] if role.startswith("!") else node.role == role


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
        raise ConfigError(
            f"{given}: no Ray cluster at {address} ({_first_line(error)}); start one with `ray start --head`, or leave "
            f"{given} out to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def knock(host: str, port: int) -> None:
    """Raise OSError when nobody listens there: Ray itself would try again for minutes."""
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


def wait_for_node(device: str, patience_s: float, say: Callable[[str], None]) -> None:
    """Wait for the first node that has what the device needs: the cluster may just be starting.

    Args:
        device: `device` of the configuration: auto, cpu or cuda.
        patience_s: how long, in seconds. Then `find_slots` tells what is missing.
        say: told what is waited for.
    """
    deadline = time.monotonic() + patience_s
    told = False
    while (missing := _missing(_nodes(), device)) and time.monotonic() < deadline:
        if not told:
            say(f"waiting for a {missing} to join the cluster, for {patience_s:.0f} s at most")
            told = True
        time.sleep(1)


def find_slots(device: str) -> Slots:
    """The slots of the connected cluster.

    Args:
        device: `device` of the configuration: auto, cpu or cuda.

    Raises:
        ConfigError: no node has what the device needs.
    """
    return divide(_nodes(), device)


def scoring_slots(slots: Slots, avoided: Collection[str] = ()) -> int:
    """Slots of the nodes that are there now and may score; 0 when all of them are away.

    Args:
        avoided: ids of nodes that do not count.
    """
    return slots.scoring_of(_nodes(avoided))


def _nodes(avoided: Collection[str] = ()) -> list[Node]:
    """The nodes of the connected cluster that are alive."""
    import ray

    return [
        Node(
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            role=node.get("Labels", {}).get(ROLE_LABEL),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in avoided
    ]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@dataclass(frozen=True)
class Process:
    """A process of a node.

    Attributes:
        started: when, in seconds since 1970: a process id is used again.
    """

    node_id: str
    pid: int
    started: float


def this_process() -> Process:
    """The process of the actor or task that calls this."""
    import psutil
    import ray

    return Process(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())


def kill(process: Process) -> None:
    """SIGKILL a process of the cluster, without waiting for it.

    For one that `ray.kill` does not reach because it is stopped or hangs: it would keep its slot for ever.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    ray.remote(num_cpus=0, scheduling_strategy=there)(_kill).remote(process)


def _kill(process: Process) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        if abs(found.create_time() - process.started) < 1:
            found.kill()


def is_alone() -> bool:
    """Whether the node of this process does all the work of the cluster."""
    import ray

    return set(_workers()) <= {ray.get_runtime_context().get_node_id()}


def _workers() -> dict[str, str]:
    """The nodes with a CPU or a GPU: their ids, and what people call them."""
    import ray

    return {
        node["NodeID"]: f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


def on_each_node(work: Callable[[], Result], timeout_s: float) -> dict[str, Result | Exception]:
    """Do `work` once on every node that has a CPU or a GPU, whether it is free or not.

    Returns:
        By the name of each node, what came of it, or why nothing did: what it raised, that the node is gone, or that
        `timeout_s` passed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(lambda: work())
    names: dict[Any, str] = {}
    for node_id, name in _workers().items():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        names[task.options(scheduling_strategy=there).remote()] = name
    ended, _ = ray.wait(list(names), num_returns=len(names), timeout=timeout_s)
    found: dict[str, Result | Exception] = {}
    for ref, name in names.items():
        if ref not in ended:
            ray.cancel(ref, force=True)
            found[name] = TimeoutError(f"no answer within {timeout_s:.0f} s")
            continue
        try:
            found[name] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            found[name] = error.cause
        except ray.exceptions.RayError as error:
            found[name] = error
    return found


def n_cpus() -> int:
    """CPUs of the cluster now, at least 1: they may come and go."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_for(n_tasks: int) -> int:
    """CPUs that each of some tasks can have when all of them run at once, on any node with CPUs; at least 1."""
    smallest = min((node.cpus for node in _nodes() if node.cpus), default=1)
    return max(1, min(smallest, n_cpus() // n_tasks))


def in_tasks(
    work: Callable[[Item], Result], items: Sequence[Item], *, stuck_after: float = STUCK_S
) -> Iterator[Result]:
    """Do `work` for every item in Ray tasks, a bounded number at a time, and yield the results as they come.

    When nothing has come for `stuck_after` seconds, a process may have stopped, and Ray would wait for it for ever: the
    items that are out are given to other processes, too, and the first result of each counts.

    Args:
        work: may be done twice for an item.

    Raises:
        DistalError: nothing came for `stuck_after` seconds, several times in a row.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(lambda shared, item: shared(item))
    shared = ray.put(work)
    waiting, missing = deque(range(len(items))), set(range(len(items)))
    running: dict[Any, int] = {}  # the place of its item
    silent = 0
    while missing:
        window = 2 * n_cpus()
        while waiting and len(running) < window:
            place = waiting.popleft()
            running[task.remote(shared, items[place])] = place
        ready, _ = ray.wait(list(running), timeout=stuck_after)
        silent = 0 if ready else silent + 1
        if silent == MAX_SILENT:
            raise DistalError(
                f"no task has answered for {MAX_SILENT * stuck_after:.0f} s, and {len(missing)} are left; "
                "look at the nodes with `ray status`, and give the command again"
            )
        if silent:
            running |= {task.remote(shared, items[place]): place for place in set(running.values())}
        for place in {running[ref] for ref in ready} & missing:
            try:
                result = ray.get(next(ref for ref in ready if running[ref] == place))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            missing.remove(place)
            yield result
        running = {ref: place for ref, place in running.items() if place in missing}
