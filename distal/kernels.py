"""Counting: of votes, compiled, and of places within groups. Legend: T checkpoints, N samples of a block, C classes.

An assignment of at least C counts as missing, which includes UNASSIGNED. Samples are walked in tiles
whose counts stay in the processor's cache. Indices are unsigned: numba checks signed ones for being negative, which
keeps a loop from being vectorised. Counts are as narrow as T allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

ENTROPY_SCALE = 2.0**40
_TILE_BYTES = 2**15  # of counts: they stay in the level-one cache
_FEW_CLASSES = 255  # up to here the counts of all classes are compared in the end; beyond, while counting


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile on first use, and keep the result for later processes where there is a place that can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no such place
        return numba.njit(nogil=True)(function)


_Unsigned = NDArray[np.unsignedinteger[Any]]


def mode_counts(assignments: _Unsigned, n_classes: int) -> tuple[_Unsigned, _Unsigned]:
    """How often each sample's most frequent class was assigned; all that dispersion needs.

    Args:
        assignments: (T, N).

    Returns:
        mode_count, n_missing: (N,) each, of the narrowest dtype that holds T.
    """
    n_rows, n_samples = assignments.shape
    dtype = np.min_scalar_type(n_rows)
    mode_count, n_missing = np.empty(n_samples, dtype), np.empty(n_samples, dtype)
    if n_classes <= _FEW_CLASSES:
        counts = np.empty((n_classes + 1, _tile(n_classes, dtype)), dtype)
        _mode_counts_of_few(assignments, counts, mode_count, n_missing)
    else:
        counts = np.zeros((_tile(n_classes, dtype), n_classes + 1), dtype)
        _mode_counts_of_many(assignments, counts, mode_count, n_missing)
    return mode_count, n_missing


def _tile(n_classes: int, dtype: np.dtype[Any]) -> int:
    """Samples counted together: a power of two."""
    fitting = _TILE_BYTES // ((n_classes + 1) * dtype.itemsize)
    return max(64, min(256, 2 ** int(fitting).bit_length() // 2))


@_compiled
def _mode_counts_of_few(assignments: Any, counts: Any, mode_count: Any, n_missing: Any) -> None:
    """Count class by class: neighbouring samples have neighbouring counts, which are compared many at a time."""
    T, N = assignments.shape
    C, tile = np.uint64(counts.shape[0] - 1), np.uint64(counts.shape[1])
    one = counts.dtype.type(1)
    last = assignments.dtype.type(C)
    flat = counts.ravel()
    classes = np.empty(counts.shape[1], assignments.dtype)
    for start in range(0, N, counts.shape[1]):
        n = min(counts.shape[1], N - start)
        flat[:] = 0
        for t in range(T):
            row = assignments[t, start : start + n]
            for i in range(n):
                classes[i] = min(row[i], last)  # missing is a class of its own, so that counting has no branch
            for i in range(n):
                at = np.uint64(classes[i]) * tile + np.uint64(i)
                flat[at] = counts.dtype.type(flat[at] + one)
        largest = mode_count[start : start + n]
        largest[:] = 0
        for c in range(C):
            of_class = counts[c, :n]
            for i in range(n):
                largest[i] = of_class[i] if of_class[i] > largest[i] else largest[i]
        n_missing[start : start + n] = counts[C, :n]


@_compiled
def _mode_counts_of_many(assignments: Any, counts: Any, mode_count: Any, n_missing: Any) -> None:
    """Keep the largest count while counting, and clear only what was counted: nothing costs C operations."""
    T, N = assignments.shape
    C, width = counts.shape[1] - 1, np.uint64(counts.shape[1])
    one, zero = counts.dtype.type(1), counts.dtype.type(0)
    last = assignments.dtype.type(C)
    flat = counts.ravel()
    classes = np.empty((T, counts.shape[0]), assignments.dtype)
    for start in range(0, N, counts.shape[0]):
        n = min(counts.shape[0], N - start)
        largest = mode_count[start : start + n]
        largest[:] = 0
        for t in range(T):
            row, clipped = assignments[t, start : start + n], classes[t]
            for i in range(n):
                clipped[i] = min(row[i], last)
            for i in range(n):
                at = np.uint64(i) * width + np.uint64(clipped[i])
                k = counts.dtype.type(flat[at] + one)
                flat[at] = k
                largest[i] = k if k > largest[i] and clipped[i] != last else largest[i]
        n_missing[start : start + n] = counts[:n, C]
        for t in range(T):
            clipped = classes[t]
            for i in range(n):
                flat[np.uint64(i) * width + np.uint64(clipped[i])] = zero


@dataclass(frozen=True)
class Tally:
    """What the counts of each sample's classes come to; h is the count of a class.

    Attributes:
        mode, runner_up: (N,) the most frequent class and the next one; the smaller index wins a tie. -1: none.
        mode_count, runner_up_count: (N,) their counts.
        sum_of_squares: (N,) sum of h^2.
        sum_k_ln_k: (N,) sum of h ln h as in `entropy_table`.
    """

    mode: NDArray[np.int64]
    runner_up: NDArray[np.int64]
    mode_count: NDArray[np.int64]
    runner_up_count: NDArray[np.int64]
    sum_of_squares: NDArray[np.int64]
    sum_k_ln_k: NDArray[np.int64]


def entropy_table(n_rows: int) -> NDArray[np.int64]:
    """k ln k for k = 0..T as fixed-point integers.

    Integer sums do not depend on their order, so the entropy of the counts does not depend on the order of
    the classes, not even in its last bit.
    """
    k = np.arange(n_rows + 1, dtype=np.float64)
    return np.rint(k * np.log(np.maximum(k, 1)) * ENTROPY_SCALE).astype(np.int64)


def tally(assignments: _Unsigned, n_classes: int) -> Tally:
    """Look at the counts of all classes of (T, N) assignments."""
    n_rows, n_samples = assignments.shape
    out = np.empty((6, n_samples), np.int64)
    _tally(assignments, n_classes, entropy_table(n_rows), out)
    return Tally(*out)


@_compiled
def _tally(assignments: Any, C: int, table: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    T, N = assignments.shape
    counts = np.zeros(C + 1, np.int64)
    for i in range(N):
        for t in range(T):
            counts[min(np.uint64(assignments[t, i]), np.uint64(C))] += 1
        counts[C] = 0
        mode: Any = -1
        runner_up: Any = -1
        mode_count: Any = 0
        runner_up_count: Any = 0
        squares, k_ln_k = 0, 0
        for t in range(T):  # each class that occurs, once; not all C of them
            c = np.int64(min(np.uint64(assignments[t, i]), np.uint64(C)))
            k = counts[c]
            if k == 0:
                continue
            counts[c] = 0
            squares += k * k
            k_ln_k += table[k]
            if k > mode_count or (k == mode_count and c < mode):
                runner_up, runner_up_count = mode, mode_count
                mode, mode_count = c, k
            elif k > runner_up_count or (k == runner_up_count and c < runner_up):
                runner_up, runner_up_count = c, k
        out[0, i], out[1, i], out[2, i], out[3, i] = mode, runner_up, mode_count, runner_up_count
        out[4, i], out[5, i] = squares, k_ln_k


def changes(assignments: _Unsigned) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """When the class changed from one checkpoint to the next.

    Returns:
        flips: (N,) how often. last_flip: (N,) the last row t whose class differs from that of the last row, counted
        from 1; 0 when there is none.
    """
    flips, last_flip = np.zeros((2, assignments.shape[1]), np.int64)
    _changes(assignments, flips, last_flip)
    return flips, last_flip


@_compiled
def _changes(assignments: Any, flips: NDArray[np.int64], last_flip: NDArray[np.int64]) -> None:
    T, N = assignments.shape
    for t in range(1, T):
        before, now = assignments[t - 1], assignments[t]
        for i in range(N):
            flips[i] += before[i] != now[i]
    final = assignments[T - 1]
    for t in range(T - 1):
        row = assignments[t]
        for i in range(N):
            last_flip[i] = t + 1 if row[i] != final[i] else last_flip[i]


def largest_weights(assignments: _Unsigned, n_classes: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest sum of the weights of the checkpoints that agree on a class: (N,). `weights` is (T,)."""
    largest = np.empty(assignments.shape[1], np.float64)
    _largest_weights(assignments, n_classes, weights, largest)
    return largest


@_compiled
def _largest_weights(assignments: Any, C: int, weights: NDArray[np.float64], largest: NDArray[np.float64]) -> None:
    T, N = assignments.shape
    sums = np.zeros(C + 1, np.float64)
    for i in range(N):
        for t in range(T):
            sums[min(np.uint64(assignments[t, i]), np.uint64(C))] += weights[t]
        sums[C] = 0.0
        best = 0.0
        for t in range(T):
            c = min(np.uint64(assignments[t, i]), np.uint64(C))
            best = max(best, sums[c])
            sums[c] = 0.0
        largest[i] = best


def rank_in_group(group: NDArray[np.integer[Any]], order: NDArray[np.number[Any]]) -> NDArray[np.int64]:
    """The place of each sample among those of its group: (n,) int64, 0 for the smallest `order`."""
    sorted_ = np.lexsort((order, group))
    _, first, counts = np.unique(group[sorted_], return_index=True, return_counts=True)
    rank = np.empty(len(group), dtype=np.int64)
    rank[sorted_] = np.arange(len(group)) - np.repeat(first, counts)
    return rank
