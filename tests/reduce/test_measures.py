"""Measures against brute force, and against scikit-activeml as an independent oracle."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skactiveml.pool._query_by_committee import variation_ratios
from skactiveml.pool._query_by_committee import vote_entropy as skactiveml_vote_entropy

from distal.config import Measure
from distal.hashing import sample_keys
from distal.reduce import measures
from distal.reduce.measures import ANNOTATIONS, DECAY, FROM_RECORDED, FROM_VOTES, SEEDED, Votes

HAND_WORKED = np.array([[0, 0, 2], [1, 0, 2], [2, 1, 2], [0, 0, 0]], dtype=np.uint8).T  # (T, N)


@st.composite
def votes(draw: st.DrawFn, complete: bool = True) -> tuple[np.ndarray, int]:
    """(T, N) assignments in any dtype, T and N different more often than not, and the number of classes."""
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    n_classes = draw(st.integers(2, 255 if dtype == np.uint8 else 700))
    T, N = draw(st.integers(1, 40)), draw(st.integers(0, 70))
    values = st.integers(0, draw(st.integers(0, n_classes - 1)))
    if not complete:
        values |= st.just(int(np.iinfo(dtype).max))
    return draw(arrays(dtype, (T, N), elements=values)), n_classes


def brute_force(column: np.ndarray) -> dict[str, float]:
    counts = Counter(column.tolist())
    T = len(column)
    tail = Counter(column[T * 3 // 4 :].tolist())
    return {
        "dispersion": 1 - max(counts.values()) / T,
        "vote_entropy": -sum(n / T * math.log(n / T) for n in counts.values()),
        "gini": 1 - sum((n / T) ** 2 for n in counts.values()),
        "vote_margin": 1 - (sorted(counts.values())[-1] - sorted([0, *counts.values()])[-2]) / T,
        "dispersion_authors": 1 - max((tail[c], n) for c, n in counts.items())[1] / (T + 1),
        "flips": int((column[1:] != column[:-1]).sum()),
        "last_flip": max([t + 1 for t in range(T) if column[t] != column[-1]], default=0),
        "decayed": 1
        - max(sum(DECAY ** (T - 1 - t) for t in range(T) if column[t] == c) for c in counts)
        / sum(DECAY**k for k in range(T)),
    }


@settings(max_examples=150, deadline=None)
@given(votes())
def test_against_brute_force(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    counted = Votes(assignments, n_classes)
    assert counted.complete.all()
    for name, measure in FROM_VOTES.items():
        expected = [brute_force(column)[name] for column in assignments.T]
        np.testing.assert_allclose(measure(counted), expected, rtol=1e-12, atol=1e-11)


def test_worked_by_hand() -> None:
    """The vectors that scikit-activeml tests its variation ratios with."""
    assert measures.dispersion(Votes(HAND_WORKED, 3)).tolist() == [1 - 2 / 3, 1 - 1 / 3, 1 - 2 / 3, 0]
    assert measures.flips(Votes(HAND_WORKED, 3)).tolist() == [1, 2, 2, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(2, 50), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_against_scikit_activeml(T: int, N: int, C: int, seed: int) -> None:
    assignments = np.random.default_rng(seed).integers(0, C, (T, N)).astype(np.uint8)
    counted = Votes(assignments, C)
    assert np.array_equal(measures.dispersion(counted), variation_ratios(assignments.T.astype(int)))
    oracle = skactiveml_vote_entropy(assignments.T.astype(int), np.arange(C))
    np.testing.assert_allclose(measures.vote_entropy(counted), oracle, atol=1e-11)


@settings(max_examples=50, deadline=None)
@given(votes(), st.randoms(use_true_random=False))
def test_permutations(case: tuple[np.ndarray, int], rng) -> None:
    """Permuting samples permutes scores; renaming classes changes no bit; nor does the order of checkpoints,
    but for flips."""
    assignments, n_classes = case
    scores = {name: measure(Votes(assignments, n_classes)) for name, measure in FROM_VOTES.items()}
    T, N = assignments.shape
    samples, rows = rng.sample(range(N), N), rng.sample(range(T), T)
    names = np.array(rng.sample(range(n_classes), n_classes), dtype=assignments.dtype)
    for name, measure in FROM_VOTES.items():
        assert np.array_equal(measure(Votes(assignments[:, samples], n_classes)), scores[name][samples])
        assert np.array_equal(measure(Votes(names[assignments], n_classes)), scores[name])
        if name not in ("flips", "last_flip", "decayed", "dispersion_authors"):  # these depend on the order
            assert np.array_equal(measure(Votes(assignments[rows], n_classes)), scores[name])


@settings(max_examples=50, deadline=None)
@given(votes(), st.integers(0, 70))
def test_blocked_is_whole(case: tuple[np.ndarray, int], cut: int) -> None:
    assignments, n_classes = case
    parts = [Votes(part, n_classes) for part in (assignments[:, :cut], assignments[:, cut:])]
    whole = Votes(assignments, n_classes)
    for measure in FROM_VOTES.values():
        assert np.array_equal(np.concatenate([measure(part) for part in parts]), measure(whole))


@settings(max_examples=50, deadline=None)
@given(votes(complete=False))
def test_a_missing_assignment_is_noticed(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    expected = (assignments < n_classes).all(axis=0)
    assert np.array_equal(Votes(assignments, n_classes).complete, expected)


@pytest.mark.parametrize("T", [1, 2, 7, 100])
def test_extremes(T: int) -> None:
    never = Votes(np.full((T, 3), 4, np.uint8), 200)
    always = Votes(np.arange(T, dtype=np.uint8)[:, None] % 200, 200)
    assert measures.dispersion(never).tolist() == [0] * 3
    assert measures.vote_entropy(never).tolist() == [0] * 3
    assert measures.dispersion(always).tolist() == [1 - 1 / T]
    assert measures.flips(always).tolist() == [T - 1]


def test_many_classes() -> None:
    """More classes than a tile of samples has room for in the cache."""
    rng = np.random.default_rng(0)
    assignments = rng.integers(0, 65_000, (5, 100)).astype(np.uint16)
    expected = [brute_force(column)["dispersion"] for column in assignments.T]
    np.testing.assert_allclose(measures.dispersion(Votes(assignments, 65_000)), expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(votes())
def test_annotations_are_the_two_most_frequent_classes(case: tuple[np.ndarray, int]) -> None:
    assignments, n_classes = case
    counted = Votes(assignments, n_classes)
    for i, column in enumerate(assignments.T):
        order = sorted(Counter(column.tolist()).items(), key=lambda item: (-item[1], item[0]))
        assert ANNOTATIONS["mode"](counted)[i] == order[0][0]
        assert ANNOTATIONS["runner_up"](counted)[i] == (order[1][0] if len(order) > 1 else -1)


def test_more_checkpoints_than_a_byte_counts() -> None:
    assignments = np.zeros((300, 4), np.uint8)
    assignments[:40, 1] = 3
    assert measures.dispersion(Votes(assignments, 10)).tolist() == [0, 1 - 260 / 300, 0, 0]


def test_recorded_measures_grow_with_uncertainty() -> None:
    assert measures.margin(np.array([0, 0.25, 1], np.float16)).tolist() == [1, 0.75, 0]
    assert measures.entropy(np.array([0, 0.5], np.float16)).tolist() == [0, 0.5]
    assert measures.least_confidence(np.array([0, 0.5], np.float16)).tolist() == [0, 0.5]


def test_random_is_seeded_and_uniform() -> None:
    keys = sample_keys(f"s{i}" for i in range(20_000))
    scores = measures.random(0, 1, keys)
    assert np.array_equal(scores, measures.random(0, 1, keys))
    assert np.array_equal(scores, scores.astype(np.float32))
    assert not np.array_equal(scores, measures.random(0, 2, keys))
    assert not np.array_equal(scores, measures.random(1, 1, keys))
    assert 0 <= scores.min() < 0.001 < 0.999 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.01


def test_the_configuration_names_exactly_these_measures() -> None:
    assert set(get_args(Measure)) == {*FROM_VOTES, *FROM_RECORDED, *SEEDED}
