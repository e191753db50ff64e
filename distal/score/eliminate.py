"""Exact elimination: which samples can no longer be selected by dispersion. Decisions only: no Ray, no disk.

After b of T checkpoints a sample whose most frequent class was assigned m times will have a final count of at least m
and at most m + r, r = T - b. A budget of k goes to the k smallest final counts. So once k samples have an upper bound
of at most theta, a sample with m > theta is behind all of them, whatever comes, ties included.

It is decided at fixed rows, the barriers, which every block reaches before any goes on: what is left out is then the
same in every run. A sample that is left out stays UNASSIGNED from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import LabelArray
from distal.kernels import mode_counts
from distal.records import JsonObject

_STEP = 2  # rows between barriers


@dataclass(frozen=True, slots=True)
class Barrier:
    """What was decided after the rows below `row`.

    Attributes:
        theta: samples with a larger mode count are left out from `row` on.
        remaining: of each block, how many samples go on.
    """

    row: int
    theta: int
    remaining: tuple[int, ...]

    def to_record(self) -> JsonObject:
        """As kept in `assignments.zarr.elimination/<row>.json`."""
        return {"row": self.row, "theta": self.theta, "remaining": list(self.remaining)}

    @classmethod
    def from_record(cls, record: JsonObject) -> Barrier:
        """The inverse of `to_record`."""
        return cls(record["row"], record["theta"], tuple(record["remaining"]))


def barrier_rows(n_rows: int) -> list[int]:
    """Rows before which it is decided. Up to T/2 nothing can be left out: m <= b, and theta > T - b."""
    return list(range(n_rows // 2 + 1, n_rows, _STEP))


def histogram(votes: LabelArray, eligible: NDArray[np.bool_], n_classes: int, n_rows: int) -> NDArray[np.int64]:
    """How many samples of a block have each mode count, among those that are still scored.

    Args:
        votes: (b, n) assignments before the barrier.
        n_rows: T.

    Returns:
        (T + 1,) int64.
    """
    mode_count, n_missing = mode_counts(votes, n_classes)
    return np.bincount(mode_count[eligible & (n_missing == 0)], minlength=n_rows + 1)


def decide(row: int, histograms: list[NDArray[np.int64]], budget: int) -> Barrier:
    """theta is the budget-th smallest upper bound; with fewer samples than the budget nothing is left out.

    Args:
        histograms: of each block, at this barrier.
    """
    n_rows = len(histograms[0]) - 1
    reached = np.flatnonzero(np.sum(histograms, axis=0).cumsum() >= budget)
    theta = min(n_rows, int(reached[0]) + n_rows - row) if len(reached) else n_rows
    return Barrier(row, theta, tuple(int(counts[: theta + 1].sum()) for counts in histograms))


def survivors(votes: LabelArray, eligible: NDArray[np.bool_], n_classes: int, theta: int) -> NDArray[np.bool_]:
    """Which samples of a block are scored from a barrier on: (n,) bool. Arguments as for `histogram`."""
    mode_count, n_missing = mode_counts(votes, n_classes)
    return eligible & (n_missing == 0) & (mode_count <= theta)
