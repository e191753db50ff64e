"""Kernels on assignments of which some are missing, against plain counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distal import kernels

T, N = 7, 150


@pytest.fixture(params=[(np.uint8, 6), (np.uint16, 300)], ids=["few classes", "many classes"])
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, int]:
    """(T, N) assignments, more samples than a tile, a third of the cells UNASSIGNED; some columns miss all of them."""
    dtype, n_classes = request.param
    rng = np.random.default_rng(0)
    assignments = rng.integers(0, 3, (T, N)).astype(dtype) * ((n_classes - 1) // 2)
    assignments[rng.random((T, N)) < 1 / 3] = np.iinfo(dtype).max
    assignments[:, ::20] = np.iinfo(dtype).max
    return assignments, n_classes


def counts_of(column: np.ndarray, n_classes: int) -> list[tuple[int, int]]:
    """(class, count) of what is assigned, the most frequent first, the smaller index first among equals."""
    counted = Counter(int(c) for c in column if c < n_classes)
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def test_mode_counts_leave_out_what_is_missing(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    mode_count, n_missing = kernels.mode_counts(assignments, n_classes)
    columns = [counts_of(column, n_classes) for column in assignments.T]
    assert mode_count.tolist() == [counts[0][1] if counts else 0 for counts in columns]
    assert n_missing.tolist() == (assignments >= n_classes).sum(axis=0).tolist()


def test_a_tally_leaves_out_what_is_missing(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    tally = kernels.tally(assignments, n_classes)
    table = kernels.entropy_table(T)
    for i, column in enumerate(assignments.T):
        counts = [*counts_of(column, n_classes), (-1, 0), (-1, 0)]
        assert (tally.mode[i], tally.mode_count[i]) == counts[0]
        assert (tally.runner_up[i], tally.runner_up_count[i]) == counts[1]
        assert tally.sum_of_squares[i] == sum(k**2 for _, k in counts)
        assert tally.sum_k_ln_k[i] == sum(int(table[k]) for _, k in counts)


def test_weights_leave_out_what_is_missing(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    weights = 2.0 ** np.arange(T)  # every set of rows has a sum of its own
    largest = kernels.largest_weights(assignments, n_classes, weights)
    for i, column in enumerate(assignments.T):
        sums = [weights[column == c].sum() for c in set(column.tolist()) if c < n_classes]
        assert largest[i] == max(sums, default=0)
