"""Compiled counting. Legend: T checkpoints, N samples of a block, C classes.

The samples of a block are walked in tiles whose counts stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

TILE_BYTES = 2**17
ENTROPY_SCALE = 2.0**40


def entropy_table(n_rows: int) -> NDArray[np.int64]:
    """k ln k for k = 0..T as fixed-point integers.

    Integer sums do not depend on their order, so the entropy of the counts does not depend on the order of
    the classes, not even in its last bit.
    """
    k = np.arange(n_rows + 1, dtype=np.float64)
    return np.rint(k * np.log(np.maximum(k, 1)) * ENTROPY_SCALE).astype(np.int64)


@numba.njit(nogil=True)
def count_votes(
    assignments: Any,  # NDArray[np.unsignedinteger]
    n_classes: int,
    table: NDArray[np.int64],
    mode_count: NDArray[np.int64],
    sum_k_ln_k: NDArray[np.int64],
    flips: NDArray[np.int64],
    n_missing: NDArray[np.int64],
) -> None:
    """One pass over a block of assignments.

    Args:
        assignments: (T, N); a value of at least `n_classes` counts as not assigned.
        table: (T + 1,) from `entropy_table`.
        mode_count: out, (N,): the count of the most frequent class.
        sum_k_ln_k: out, (N,): sum over classes of table[count].
        flips: out, (N,): rows whose value differs from that of the row before.
        n_missing: out, (N,): rows without an assignment.
    """
    T, N = assignments.shape
    C = n_classes
    tile = max(16, min(512, TILE_BYTES // (4 * (C + 1))))
    counts: Any = np.zeros((tile, C + 1), dtype=np.int32)
    for start in range(0, N, tile):
        n = min(tile, N - start)
        counts[:n] = 0
        for t in range(T):
            for i in range(n):
                # Not assigned is counted in a column of its own, so the loop has no branch.
                counts[i, min(assignments[t, start + i], C)] += 1
        for i in range(n):
            largest = np.int64(0)
            total = np.int64(0)
            for c in range(C):
                k = np.int64(counts[i, c])
                largest = max(largest, k)
                total += table[k]
            mode_count[start + i] = largest
            sum_k_ln_k[start + i] = total
            n_missing[start + i] = counts[i, C]
        flips[start : start + n] = 0
        for t in range(1, T):
            for i in range(start, start + n):
                flips[i] += assignments[t, i] != assignments[t - 1, i]
