"""The table of measures: each turns what is stored about a sample into one score.

Every score is oriented so that larger means more uncertain, computed in float64 from counts, and kept as
float32. It is NaN unless every checkpoint has an assignment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal.hashing import mix64
from distal.reduce.kernels import ENTROPY_SCALE, count_votes, entropy_table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Votes:
    """What T assignments of N samples come to; from `count`.

    Attributes:
        n_rows: T.
        mode_count: (N,) count of the most frequent class, f in the paper.
        entropy: (N,) of the votes in nats: (T ln T - sum over classes of h ln h) / T, h the count of a class.
        flips: (N,) how often the class differs from that of the checkpoint before.
        complete: (N,) bool, whether every checkpoint has an assignment.
    """

    n_rows: int
    mode_count: NDArray[np.int64]
    entropy: Floats
    flips: NDArray[np.int64]
    complete: NDArray[np.bool_]


def count(assignments: NDArray[np.unsignedinteger[Any]], n_classes: int) -> Votes:
    """Count the votes of (T, N) assignments; values of at least `n_classes` count as not assigned."""
    n_rows, n_samples = assignments.shape
    outputs = [np.empty(n_samples, dtype=np.int64) for _ in range(4)]
    table = entropy_table(n_rows)
    count_votes(np.ascontiguousarray(assignments), n_classes, table, *outputs)
    mode_count, sum_k_ln_k, flips, n_missing = outputs
    entropy = (table[n_rows] - sum_k_ln_k) / (ENTROPY_SCALE * n_rows)  # exactly 0 when all votes agree
    return Votes(n_rows, mode_count, entropy, flips, n_missing == 0)


def dispersion(votes: Votes) -> Floats:
    """1 - f / T, where f is the count of the most frequent class (arXiv 2107.14707, section 3).

    In [0, 1 - ceil(T / C) / T]. 0 when the network never changed its mind.
    """
    return 1 - votes.mode_count / votes.n_rows


def vote_entropy(votes: Votes) -> Floats:
    """Entropy of the votes in nats, -sum (h / T) ln (h / T) (Dagan and Engelson 1995); in [0, ln min(C, T)]."""
    return votes.entropy


def flips(votes: Votes) -> Floats:
    """Checkpoints at which the class differs from that of the checkpoint before; in [0, T - 1]."""
    return votes.flips.astype(np.float64)


def margin(recorded: NDArray[np.float16]) -> Floats:
    """1 - (p1 - p2) at the last checkpoint; in [0, 1]."""
    return 1 - recorded.astype(np.float64)


def entropy(recorded: NDArray[np.float16]) -> Floats:
    """Entropy of the class probabilities at the last checkpoint, in nats; in [0, ln C]."""
    return recorded.astype(np.float64)


def random(seed: int, cycle: int, keys: NDArray[np.uint64]) -> Floats:
    """Uniform in [0, 1): a function of (seed, cycle, sample_key)."""
    return (mix64("random", seed, cycle, keys) >> np.uint64(40)) / 2.0**24  # 24 bits: exact in float32


FROM_VOTES: dict[str, Callable[[Votes], Floats]] = {
    "dispersion": dispersion,
    "vote_entropy": vote_entropy,
    "flips": flips,
}
"""Measures of the assignments."""

FROM_RECORDED: dict[str, Callable[[NDArray[np.float16]], Floats]] = {"margin": margin, "entropy": entropy}
"""Measures of an array that was recorded at the last checkpoint under the same name."""

SEEDED = {"random": random}
"""Measures of nothing but the sample's name."""
