"""Statistics of a comparison, against numbers worked by hand, enumeration, and SciPy where it is exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distal.compare.statistics import (
    aubc,
    bootstrap_mean,
    compare_pairs,
    holm,
    labels_saved,
    min_pairs,
    signed_rank,
    smallest_detectable,
    t_interval,
)

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)
accuracies = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=9)


def test_aubc_by_hand() -> None:
    """Over [0, 0.25, 1]: 0.25 x 0.6 + 0.75 x 0.75."""
    assert aubc([100, 200, 500], [0.5, 0.7, 0.8]) == pytest.approx(0.15 + 0.5625)
    assert aubc([3, 9], [0.4, 0.4]) == pytest.approx(0.4)
    for budgets in ([100], [100, 100], [200, 100]):
        with pytest.raises(ValueError, match="budgets"):
            aubc(budgets, [0.5] * len(budgets))
    with pytest.raises(ValueError, match="must be numbers"):
        aubc([1, 2], [0.5, np.nan])


def test_labels_saved_by_hand() -> None:
    x = [100, 200, 300]
    # a rises from 0.6 at 200 to 0.9 at 300, so it has 0.8 at 266.67; b has it at 300.
    assert labels_saved(x, [0.5, 0.6, 0.9], x, [0.5, 0.7, 0.8]) == pytest.approx(300 - (200 + 100 * 2 / 3))
    assert labels_saved(x, [0.5, 0.6, 0.79], x, [0.5, 0.7, 0.8]) is None  # nothing is extrapolated
    assert labels_saved(x, [0.5, 0.8, 0.6], x, [0.5, 0.7, 0.8]) == 100  # the first crossing counts
    assert labels_saved(x, [0.9, 0.95, 0.99], x, [0.5, 0.7, 0.8]) == 200  # reached at its first budget
    # b itself first had its last value, 0.7, at 150; a has it at 200 only.
    assert labels_saved(x, [0.5, 0.7, 0.8], x, [0.5, 0.9, 0.7]) == pytest.approx(-50)
    assert labels_saved([10, 20], [0, 1], [100, 200], [0, 1]) == 180


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_a_curve_saves_nothing_against_itself(values: list[int]) -> None:
    budgets = np.arange(len(values))
    assert labels_saved(budgets, values, budgets, values) == 0


def test_the_pairs_that_a_level_needs() -> None:
    assert [min_pairs(level) for level in (1, 0.0625, 0.05, 0.03125, 0.05 / 11, 0.00390625, 0.0039)] == [
        1, 5, 6, 6, 9, 9, 10,
    ]  # fmt: skip
    for n in range(2, 12):
        _, p = signed_rank(np.arange(1, n + 1))
        assert p == 2.0 ** (1 - n)
        assert min_pairs(p) == n
    with pytest.raises(ValueError, match="level must be in"):
        min_pairs(0)


def test_signed_rank_by_hand() -> None:
    """Ranks 1 to 5, of which 1 and 2 are negative: W- = 3, and {}, 1, 2, 3, 1+2 of 32 subsets sum to at most 3."""
    r, p = signed_rank([3, -1, 4, -2, 5])
    assert p == pytest.approx(2 * 5 / 32)
    assert r == pytest.approx((12 - 3) / 15)
    # Sizes 1, 1, 2: ranks 1.5, 1.5, 3, one of 1.5 negative; the subsets {}, 1.5, 1.5 of 8 sum to at most 1.5.
    assert signed_rank([1, -1, 2, 0]) == (pytest.approx(4.5 / 6 - 1.5 / 6), pytest.approx(2 * 3 / 8))
    assert signed_rank([0, 0]) == (0, 1)
    assert signed_rank([]) == (0, 1)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_signed_rank_is_exact_with_ties(differences: list[int]) -> None:
    d = np.array([each for each in differences if each])
    ranks = stats.rankdata(np.abs(d))
    sums = np.array([ranks @ np.array(signs) for signs in itertools.product([0, 1], repeat=len(d))])
    seen = ranks @ (d > 0)
    expected = min(1, 2 * min(np.mean(sums <= seen), np.mean(sums >= seen)))
    assert signed_rank(differences)[1] == pytest.approx(expected)


@given(st.permutations(range(1, 13)), st.lists(st.booleans(), min_size=12, max_size=12))
@settings(deadline=None)
def test_signed_rank_is_that_of_scipy_without_ties(sizes: list[int], signs: list[bool]) -> None:
    d = np.where(signs, sizes, np.negative(sizes))
    assert signed_rank(d)[1] == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_signed_rank_is_that_of_scipy_over_all_permutations(seed: int) -> None:
    """SciPy visits all 2^n signs, which no more than a handful of pairs allows."""
    d = np.random.default_rng(seed).integers(1, 4, 8) * np.array([1, -1, 1, 1, -1, 1, 1, 1])
    every = stats.PermutationMethod(n_resamples=2**8)
    assert signed_rank(d)[1] == pytest.approx(stats.wilcoxon(d, method=every).pvalue, abs=1e-12)


def test_rounding_breaks_no_ties() -> None:
    """0.3 - 0.2 and 0.2 - 0.1 are the same difference, and 0.1 + 0.2 is 0.3."""
    told = compare_pairs([0.3, 0.2, 0.2, 0.4, 0.9, 0.1 + 0.2], [0.2, 0.1, 0.3, 0.3, 0.8, 0.3])
    assert told.p == signed_rank([1, 1, -1, 1, 1, 0])[1]
    assert told.p != signed_rank(np.array([0.3, 0.2, 0.2, 0.4, 0.9]) - [0.2, 0.1, 0.3, 0.3, 0.8])[1]


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, of which the last may not be below .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(p_values, st.data())
def test_holm_is_monotone(p: list[float], data: st.DataObject) -> None:
    corrected = holm(p)
    for i, j in itertools.product(range(len(p)), repeat=2):
        assert p[i] > p[j] or corrected[i] <= corrected[j]
    assert all(each <= found <= min(1, len(p) * each) for each, found in zip(p, corrected, strict=True))
    order = data.draw(st.permutations(range(len(p))))
    assert holm([p[i] for i in order]) == [corrected[i] for i in order]
    larger = [data.draw(st.floats(each, 1)) for each in p]
    assert all(before <= after for before, after in zip(corrected, holm(larger), strict=True))


@given(p_values)
def test_holm_rejects_what_its_steps_reject(p: list[float]) -> None:
    """Its own definition: go up from the smallest while p(i) <= level / (m - i + 1)."""
    rejected = set()
    for step, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - step) > 0.05:
            break
        rejected.add(int(i))
    assert {i for i, each in enumerate(holm(p)) if each <= 0.05} == rejected


def test_intervals() -> None:
    """1, 2, 3: standard error 1 / sqrt(3), and 4.303 of them on two degrees of freedom."""
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert t_interval([1]) is None
    assert bootstrap_mean([1], seed=0) is None
    assert bootstrap_mean([0.7] * 5, seed=0) == (0.7, 0.7)
    values = np.random.default_rng(1).normal(5, 2, 200)
    low, high = bootstrap_mean(values, seed=0) or (0, 0)
    assert (low, high) == pytest.approx(t_interval(values), abs=0.05)  # many values: both are the normal interval
    assert bootstrap_mean(values[::-1], seed=0) == (low, high)
    assert bootstrap_mean(values, seed=1) != (low, high)
    wide = bootstrap_mean(values, seed=0, level=0.99) or (0, 0)
    assert wide[0] < low < high < wide[1]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9))
@settings(deadline=None, max_examples=25)
def test_a_bootstrap_interval_lies_among_its_values(values: list[int]) -> None:
    low, high = bootstrap_mean(np.array(values) / 1000, seed=0) or (np.nan, np.nan)
    assert min(values) / 1000 - 1e-9 <= low <= high <= max(values) / 1000 + 1e-9


def test_the_smallest_detectable_difference() -> None:
    """Ten pairs show an effect of one standard deviation with power 0.803, 34 half of one with 0.808."""
    assert smallest_detectable(1, 10, power=0.8031) == pytest.approx(1, abs=1e-3)
    assert smallest_detectable(1, 34, power=0.8078) == pytest.approx(0.5, abs=1e-3)
    assert smallest_detectable(2, 10) == pytest.approx(2 * smallest_detectable(1, 10))
    rng = np.random.default_rng(0)
    shift = smallest_detectable(1, 9, level=0.05 / 11)
    p = stats.ttest_1samp(rng.normal(shift, 1, (20_000, 9)), 0, axis=1).pvalue
    assert np.mean(p <= 0.05 / 11) == pytest.approx(0.8, abs=0.012)  # four standard errors


def test_a_test_that_cannot_reach_its_level_is_not_run() -> None:
    told = compare_pairs(np.arange(1, 6), np.zeros(5))
    assert (told.p, told.detectable, told.needed) == (None, None, 6)
    assert (
        told.verdict(1.0) == "not tested: needs 6 seeds, has 5; so far mean difference +3, 95% interval [+1.04, +4.96]"
    )
    assert compare_pairs([2], [1]).verdict(1.0) == "not tested: needs 6 seeds, has 1"
    assert compare_pairs([], []).verdict(1.0) == "not tested: needs 6 seeds, has 0"
    eight, nine = (compare_pairs(np.arange(1, n + 1), np.zeros(n), n_tests=11) for n in (8, 9))
    assert (eight.p, eight.needed) == (None, 9)
    assert nine.p == 2 / 2**9


def test_verdicts() -> None:
    told = compare_pairs([3, 4, 5, 6, 7, 8], [2, 2, 2, 2, 2, 2])
    assert told.p is not None
    assert told.shown(told.p)
    assert (
        told.verdict(told.p) == "shown: mean difference +3.5, 95% interval [+1.54, +5.46], corrected p 0.031 at 6 seeds"
    )
    assert told.verdict(0.06).startswith(
        "not shown: mean difference +3.5, 95% interval [+1.54, +5.46], smallest detect"
    )
    none = compare_pairs([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], level=0.1)
    assert none.verdict(1.0) == (
        "not shown: mean difference +0, 90% interval [-3.08, +3.08], smallest detectable difference 4.44 at 6 seeds"
    )
    assert compare_pairs([0.5] * 6, [0.5] * 6).verdict(1.0) == (
        "not shown: mean difference +0, 95% interval [+0, +0]; without any spread no smallest detectable difference, at 6 seeds"
    )


def test_ranks_and_mean_that_disagree_show_nothing() -> None:
    """Eleven small gains and one enormous loss: the ranks are certain, the mean has the other sign."""
    told = compare_pairs([*range(1, 12), -1000], np.zeros(12))
    assert told.p is not None
    assert told.p < 0.05
    assert told.rank_biserial is not None
    assert told.difference is not None
    assert told.rank_biserial > 0 > told.difference
    assert not told.shown(told.p)


@given(accuracies, st.integers(-40, 40), st.data())
@settings(deadline=None)
def test_a_constant_and_the_order_of_the_seeds_change_nothing(
    pairs: list[tuple[int, int]], constant: int, data: st.DataObject
) -> None:
    first, second = np.array(pairs).T / 40
    told = compare_pairs(first, second)
    order = data.draw(st.permutations(range(len(pairs))))
    for other in (
        compare_pairs(first + constant / 30, second + constant / 30),
        compare_pairs(first[order], second[order]),
    ):
        assert other.difference == pytest.approx(told.difference, abs=1e-12)
        assert (other.p, other.rank_biserial) == (told.p, told.rank_biserial)
        assert other.interval == pytest.approx(told.interval, abs=1e-9)
        assert other.detectable == pytest.approx(told.detectable, abs=1e-9)
    swapped = compare_pairs(second, first)
    assert swapped.p == told.p
    assert swapped.difference == pytest.approx(-(told.difference or 0), abs=1e-12)
