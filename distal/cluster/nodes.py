"""The nodes of the connected cluster, and processes on them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from distal.cluster.slots import ROLE_LABEL, Node, Slots, divide, missing_for


def wait_for_node(device: str, patience_s: float, say: Callable[[str], None]) -> None:
    """Wait for the first node that can do the work: the cluster may still be starting.

    Args:
        device: `device` of the configuration: auto, cpu or cuda.
        patience_s: seconds to wait at most. After that `find_slots` raises.
        say: prints the kind of node that is missing.
    """
    deadline = time.monotonic() + patience_s
    announced = False
    while (missing := missing_for(device, _nodes())) and time.monotonic() < deadline:
        if not announced:
            say(f"waiting for a {missing} to join the cluster, for {patience_s:.0f} s at most")
            announced = True
        time.sleep(1)


def find_slots(device: str) -> Slots:
    """The slots of the connected cluster.

    Args:
        device: `device` of the configuration: auto, cpu or cuda.

    Raises:
        ConfigError: no node has a CPU, or the GPU that the device asks for.
    """
    return divide(_nodes(), device)


def scoring_slots(slots: Slots, avoided: Collection[str] = ()) -> int:
    """Slots of the nodes that are alive and may score; 0 when none is.

    Args:
        avoided: ids of nodes to leave out.
    """
    return slots.scoring_of(_nodes(avoided))


def _nodes(avoided: Collection[str] = ()) -> list[Node]:
    """The nodes that are alive."""
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


def n_cpus() -> int:
    """CPUs of the cluster now, at least 1; nodes may join and leave."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_for(n_tasks: int) -> int:
    """CPUs per task, at least 1, so that `n_tasks` fit at once and each fits on any node with CPUs."""
    smallest = min((node.cpus for node in _nodes() if node.cpus), default=1)
    return max(1, min(smallest, n_cpus() // n_tasks))


def is_alone() -> bool:
    """Whether the node of this process does all the work of the cluster."""
    import ray

    return set(workers()) <= {ray.get_runtime_context().get_node_id()}


def workers() -> dict[str, str]:
    """The nodes with a CPU or a GPU: id and readable name."""
    import ray

    return {
        node["NodeID"]: f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


@dataclass(frozen=True)
class Process:
    """A process on a node.

    Attributes:
        started: in seconds since 1970, because process ids are reused.
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

    `ray.kill` does not reach a process that is stopped or hangs; it would keep its slot for ever.
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
