"""How the nodes of a cluster are shared between training and scoring: decided without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distal.errors import ConfigError

ROLE_LABEL = "distal-role"


@dataclass(frozen=True)
class Node:
    """A node of a cluster: its CPUs, its GPUs, and its `distal-role` label."""

    cpus: int
    gpus: int = 0
    role: str | None = None


@dataclass(frozen=True)
class Slots:
    """The slots of each role: CPUs, or GPUs when they are used.

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
        """Slots of those `nodes` that may score: the ones that match the selector, decided once."""
        return sum(_slots(node, self.device) for node in nodes if _fits(node, self.selectors["score"]))

    def training(self, workers: int, threads: int) -> int:
        """Slots that the ranks take from scoring: none when training has its own nodes."""
        if not self.shared:
            return 0
        return workers if self.device == "cuda" else workers * threads

    def train_threads(self, workers: int) -> int:
        """CPU threads of a rank: the most with which all ranks fit; ranks on GPUs share the CPUs of their node.

        On shared nodes training takes half of the CPUs and leaves the rest to scoring, which is most of the work.
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
    Without labels, or when a role would be left without a node, all nodes do both.

    Raises:
        ConfigError: no node has a CPU, or the GPU that the device asks for.
    """
    gpus = any(node.gpus for node in nodes)
    if missing := missing_for(device, nodes):
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


def missing_for(device: str, nodes: Sequence[Node]) -> str | None:
    """The kind of node that the device needs and none of the nodes is, in words; None when there is one."""
    if any(node.gpus or (node.cpus and device != "cuda") for node in nodes):
        return None
    return "node with a GPU" if device == "cuda" else "node with a CPU or a GPU"


def _slots(node: Node, device: str) -> int:
    return node.gpus if device == "cuda" else node.cpus


def _fits(node: Node, selector: dict[str, str] | None) -> bool:
    """Whether Ray would place an actor with this label selector there."""
    if selector is None:
        return True
    role = selector[ROLE_LABEL]
    return node.role != role[1:] if role.startswith("!") else node.role == role
