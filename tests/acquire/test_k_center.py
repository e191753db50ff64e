from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distal.acquire.k_center import k_center


def reference(points: np.ndarray, k: int) -> list[int]:
    """Every distance again at every step."""
    chosen = [0]
    while len(chosen) < k:
        nearest = np.min([((points - points[c]) ** 2).sum(axis=1) for c in chosen], axis=0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


@pytest.mark.parametrize("d", [1, 3, 64])
def test_agrees_with_brute_force(d: int) -> None:
    points = np.random.default_rng(d).normal(size=(80, d)).astype(np.float32)
    assert k_center(points, 30).tolist() == reference(points.astype(np.float64), 30)


def test_agrees_with_scikit_activeml() -> None:
    """Its k-center greedy, starting from the same first point as the one labelled sample."""
    from skactiveml.pool import CoreSet

    points = np.random.default_rng(0).normal(size=(60, 5))
    labels = np.full(60, np.nan)
    labels[0] = 0
    theirs = CoreSet(random_state=0).query(points, labels, batch_size=15)
    assert k_center(points, 16).tolist() == [0, *theirs.tolist()]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
def test_distinct_points_come_before_duplicates(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    points = np.random.default_rng(3).normal(size=(5, 7))[values]
    chosen = k_center(points, k)
    assert len(set(chosen.tolist())) == k
    n_distinct = len(set(values))
    assert len({values[i] for i in chosen}) == min(k, n_distinct)
    assert chosen[n_distinct:].tolist() == sorted(chosen[n_distinct:].tolist())
