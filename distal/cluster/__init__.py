"""Ray: its nodes and slots, decided purely, then connected; and the metrics it exports."""

from distal.cluster.connection import connect, is_own, knock, secure
from distal.cluster.nodes import (
    Process,
    cpus_for,
    find_slots,
    is_alone,
    kill,
    n_cpus,
    scoring_slots,
    this_process,
    wait_for_node,
)
from distal.cluster.slots import ROLE_LABEL, Node, Slots, divide
from distal.cluster.tasks import STUCK_S, in_tasks, on_each_node

__all__ = [
    "ROLE_LABEL",
    "STUCK_S",
    "Node",
    "Process",
    "Slots",
    "connect",
    "cpus_for",
    "divide",
    "find_slots",
    "in_tasks",
    "is_alone",
    "is_own",
    "kill",
    "knock",
    "n_cpus",
    "on_each_node",
    "scoring_slots",
    "secure",
    "this_process",
    "wait_for_node",
]
