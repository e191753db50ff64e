"""The table of measures: each turns what is stored about a sample into one score.

Every score is oriented so that larger means more uncertain, computed in float64 from counts, and kept as
float32. It is NaN unless every checkpoint of the window has an assignment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal import kernels
from distal.config import Config
from distal.config.needs import scored_epochs
from distal.hashing import mix64

_Floats = NDArray[np.float64]

DECAY = 0.9
"""Weight of a checkpoint relative to the next one in `decayed`."""


class Votes:
    """T assignments of N samples. What a measure does not ask for is not counted.

    Args:
        assignments: (T, N) unsigned; a value of at least `n_classes` counts as not assigned.
    """

    def __init__(self, assignments: NDArray[np.unsignedinteger[Any]], n_classes: int) -> None:
        self.assignments = assignments
        self.n_classes = n_classes
        self.n_rows = len(assignments)
        self.mode_count, n_missing = kernels.mode_counts(assignments, n_classes)
        self.complete: NDArray[np.bool_] = n_missing == 0

    @cached_property
    def tally(self) -> kernels.Tally:
        """The counts of all classes, summed up."""
        return kernels.tally(self.assignments, self.n_classes)

    @cached_property
    def changes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How often the class changed, and when last."""
        return kernels.changes(self.assignments)


def dispersion(votes: Votes) -> _Floats:
    """1 - f / T, where f is the count of the most frequent class (arXiv 2107.14707, section 3).

    In [0, 1 - ceil(T / C) / T]. 0 when the network never changed its mind.
    """
    return 1 - votes.mode_count / votes.n_rows


def dispersion_authors(votes: Votes) -> _Floats:
    """Dispersion as the first author's code of February 2021 computes it (Class-Balanced-AL, commit f2a460a).

    1 - f / (T + 1), where f counts, over all checkpoints, the class that is most frequent in the last quarter of them;
    of classes that tie there, the one with the larger f. That code predicts under the training transform; see
    `score.transform`. In (0, 1].
    """
    n_rows = votes.n_rows
    weights = np.ones(n_rows)
    weights[n_rows * 3 // 4 :] += n_rows + 1  # a count in the tail outweighs any number of votes
    count = kernels.largest_weights(votes.assignments, votes.n_classes, weights) % (n_rows + 1)
    return 1 - count / (n_rows + 1)


def vote_entropy(votes: Votes) -> _Floats:
    """Entropy of the votes in nats, -sum (h / T) ln (h / T) (Dagan and Engelson 1995); in [0, ln min(C, T)]."""
    total = kernels.entropy_table(votes.n_rows)[votes.n_rows]
    return (total - votes.tally.sum_k_ln_k) / (kernels.ENTROPY_SCALE * votes.n_rows)  # exactly 0 when all votes agree


def gini(votes: Votes) -> _Floats:
    """1 - sum (h / T)^2: the chance that two checkpoints drawn at random disagree; in [0, 1 - 1 / min(C, T)]."""
    return 1 - votes.tally.sum_of_squares / votes.n_rows**2


def vote_margin(votes: Votes) -> _Floats:
    """1 - (h1 - h2) / T of the two most frequent classes; in [0, 1]."""
    return 1 - (votes.tally.mode_count - votes.tally.runner_up_count) / votes.n_rows


def flips(votes: Votes) -> _Floats:
    """Checkpoints at which the class differs from that of the checkpoint before; in [0, T - 1]."""
    return votes.changes[0].astype(np.float64)


def last_flip(votes: Votes) -> _Floats:
    """The last checkpoint, counted from 1, whose class is not the final one; in [0, T - 1], 0 when there is none."""
    return votes.changes[1].astype(np.float64)


def decayed(votes: Votes) -> _Floats:
    """Dispersion with votes that count less the older they are.

    1 - max_c w_c / sum_c w_c, w_c the sum of 0.9^(T - t) over the checkpoints t that assign c; in [0, 1).
    """
    weights = DECAY ** np.arange(votes.n_rows - 1, -1, -1, dtype=np.float64)
    total = kernels.largest_weights(np.zeros((votes.n_rows, 1), np.uint8), 1, weights)[0]  # summed in the same order
    return 1 - kernels.largest_weights(votes.assignments, votes.n_classes, weights) / total


def margin(recorded: NDArray[np.float16]) -> _Floats:
    """1 - (p1 - p2) at the last checkpoint; in [0, 1]."""
    return 1 - recorded.astype(np.float64)


def entropy(recorded: NDArray[np.float16]) -> _Floats:
    """Entropy of the class probabilities at the last checkpoint, in nats; in [0, ln C]."""
    return recorded.astype(np.float64)


def least_confidence(recorded: NDArray[np.float16]) -> _Floats:
    """1 - the largest class probability at the last checkpoint; in [0, 1 - 1 / C]."""
    return recorded.astype(np.float64)


def random(seed: int, cycle: int, keys: NDArray[np.uint64]) -> _Floats:
    """Uniform in [0, 1): a function of (seed, cycle, sample_key)."""
    return (mix64("random", seed, cycle, keys) >> np.uint64(40)) / 2.0**24  # 24 bits: exact in float32


FROM_VOTES: dict[str, Callable[[Votes], _Floats]] = {
    "dispersion": dispersion,
    "dispersion_authors": dispersion_authors,
    "vote_entropy": vote_entropy,
    "gini": gini,
    "vote_margin": vote_margin,
    "flips": flips,
    "last_flip": last_flip,
    "decayed": decayed,
}
"""Measures of the assignments, of all checkpoints or of a window."""

FROM_RECORDED: dict[str, Callable[[NDArray[np.float16]], _Floats]] = {
    "margin": margin,
    "entropy": entropy,
    "least_confidence": least_confidence,
}
"""Measures of an array that was recorded at the last checkpoint under the same name."""

SEEDED = {"random": random}
"""Measures of nothing but the sample's name."""

ANNOTATIONS: dict[str, Callable[[Votes], NDArray[np.int64]]] = {
    "mode": lambda votes: votes.tally.mode,
    "runner_up": lambda votes: votes.tally.runner_up,
}
"""Not scores but classes: the most frequent one, and the next; the smaller index wins a tie, -1 when there is none."""


def measures_of(config: Config) -> tuple[str, ...]:
    """What a cycle of a run is reduced to: what it selects by, and what comes for little beside it."""
    if config.score.eliminate == "exact":
        return ("dispersion",)  # of the others only a part would be there
    rows = scored_epochs(config)
    if not rows or config.select.from_ is not None:
        return ("random",)
    recorded = [name for name in config.score.record if name in FROM_RECORDED]
    if len(rows) < len(config.train.checkpoint_epochs):
        return tuple(dict.fromkeys((*recorded, config.select.measure)))
    return tuple(dict.fromkeys(("dispersion", "vote_entropy", "flips", *recorded, config.select.measure)))
