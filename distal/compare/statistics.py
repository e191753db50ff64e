"""Statistics of a fair comparison: few seeds, many strategies, and no claim beyond the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

RESAMPLES = 9_999
POWER = 0.8

_RESOLUTION = 1e-12  # of the largest value: below it a difference is rounding, which must not break ties


def aubc(budgets: ArrayLike, values: ArrayLike) -> float:
    """Area under the budget curve: the trapezoid of the values over the budget scaled to [0, 1].

    It is the mean height of the curve, so it has the unit and the range of the values.

    Args:
        budgets: (n,) increasing, at least two.
        values: (n,) without NaN.

    Raises:
        ValueError: fewer than two budgets, or they do not increase.
    """
    x, y = _curve(budgets, values)
    if len(x) < 2:
        raise ValueError(f"an area needs at least 2 budgets, got {len(x)}")
    return float(np.trapezoid(y, (x - x[0]) / (x[-1] - x[0])))


def labels_saved(budgets_a: ArrayLike, values_a: ArrayLike, budgets_b: ArrayLike, values_b: ArrayLike) -> float | None:
    """How many labels fewer curve `a` needs than curve `b` to reach the last value of `b`; below 0: more.

    A curve reaches a value at its first crossing, by linear interpolation, even if it falls below it
    afterwards; both curves are read in this way, so a curve saves nothing against itself. A curve that
    starts above the value has reached it at its first budget: nobody knows whether less would do.

    Returns:
        Labels, or None when `a` never reaches the value: nothing is extrapolated.
    """
    x_a, y_a = _curve(budgets_a, values_a)
    x_b, y_b = _curve(budgets_b, values_b)
    needed_a, needed_b = _first_crossing(x_a, y_a, y_b[-1]), _first_crossing(x_b, y_b, y_b[-1])
    return None if needed_a is None or needed_b is None else needed_b - needed_a


def _first_crossing(x: NDArray[np.float64], y: NDArray[np.float64], target: float) -> float | None:
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(x[0])
    before = after - 1
    return float(x[before] + (x[after] - x[before]) * (target - y[before]) / (y[after] - y[before]))


def _curve(budgets: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(budgets, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"budgets and values must be two lists of the same length, got {x.shape} and {y.shape}")
    if np.any(np.diff(x) <= 0):
        raise ValueError(f"budgets must increase, got {x.tolist()}")
    if np.isnan(y).any():
        raise ValueError(f"values must be numbers, got {y.tolist()}")
    return x, y


def bootstrap_mean(values: ArrayLike, *, seed: int, level: float = 0.95) -> tuple[float, float] | None:
    """A bootstrap interval of the mean: bias-corrected and accelerated (Efron 1987), 9,999 resamples.

    With few values it is too narrow: it knows no others. The values are sorted first, so their order
    changes nothing.

    Returns:
        (low, high); (v, v) when all values are v; None for fewer than two.
    """
    each = np.sort(np.asarray(values, np.float64))
    if len(each) < 2:
        return None
    if np.ptp(each) <= _rounding(each):
        return float(each[0]), float(each[-1])
    interval = stats.bootstrap(
        (each,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def t_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float] | None:
    """An interval of the mean by Student's t: (low, high), None for fewer than two values."""
    each = np.asarray(values, np.float64)
    if len(each) < 2:
        return None
    half = stats.t.ppf((1 + level) / 2, len(each) - 1) * np.std(each, ddof=1) / np.sqrt(len(each))
    return float(np.mean(each) - half), float(np.mean(each) + half)


def min_pairs(level: float) -> int:
    """The least number of pairs with which a two-sided signed-rank test can reach a level.

    With n pairs the smallest possible p is 2 / 2^n: all differences have the same sign.

    Raises:
        ValueError: the level is not in (0, 1].
    """
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], got {level}")
    return next(n for n in itertools.count(1) if 2.0 ** (1 - n) <= level)


def signed_rank(differences: ArrayLike, rounding: float = 0.0) -> tuple[float, float]:
    """Wilcoxon's signed-rank test, two-sided and exact also with ties.

    Differences of zero are left out (Wilcoxon 1945). Sizes that tie share their mean rank, and p
    comes from all 2^n ways to give these ranks a sign, counted by convolution. SciPy's exact method
    is for samples without ties and zeros, and accuracies on a small test set have both; its
    PermutationMethod gives the same p, but visits all 2^n one by one: seconds at 16 pairs, never at 30.

    Args:
        differences: (n,) one per pair.
        rounding: sizes that are no further apart than this tie, and are zero up to it.

    Returns:
        (r, p): the rank-biserial correlation, (W+ - W-) / (W+ + W-) in [-1, 1], and p in (0, 1]; (0, 1) when no
        difference is left.
    """
    each = np.asarray(differences, np.float64)
    each = each[np.abs(each) > rounding]
    if not len(each):
        return 0.0, 1.0
    size = np.abs(each)
    order = np.argsort(size)
    tied = np.empty(len(size), np.int64)
    tied[order] = np.concatenate([[0], np.cumsum(np.diff(size[order]) > rounding)])
    doubled = np.rint(2 * stats.rankdata(tied)).astype(np.int64)  # mean ranks are halves
    chance = np.ones(1)  # of each sum of the positive doubled ranks
    for rank in doubled:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    positive, total = int(doubled[each > 0].sum()), int(doubled.sum())
    p = 2 * min(chance[: positive + 1].sum(), chance[positive:].sum())
    return (2 * positive - total) / total, float(min(1.0, p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values to compare with the level of the whole family.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than one that was smaller before. SciPy
    corrects for the false discovery rate only, which promises less.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(each) for each in corrected]


def smallest_detectable(sd: float, n: int, level: float = 0.05, power: float = POWER) -> float:
    """The true mean difference that a two-sided paired t-test of n pairs would show with probability `power`.

    Exact for normal differences, by the noncentral t distribution (Cohen 1988). For the signed-rank test it is a little
    too small: relative to the t-test its efficiency for normal differences is 3 / pi.

    Args:
        sd: standard deviation of the differences.
        n: pairs, at least 2.
    """
    df = n - 1
    critical = float(stats.t.isf(level / 2, df))

    def lacks(shift: float) -> float:
        return float(stats.nct.sf(critical, df, shift)) - power  # the other tail would show the wrong sign

    above = next(shift for shift in critical * 2.0 ** np.arange(10) if lacks(shift) > 0)
    return float(optimize.brentq(lacks, 0.0, above)) * sd / n**0.5


@dataclass(frozen=True)
class Paired:
    """The difference first - second over n pairs.

    Attributes:
        n: pairs.
        difference: the mean one; None without pairs.
        interval: of it, by Student's t at 1 - level, not corrected for the number of tests; None for fewer than two
            pairs.
        p: two-sided, exact, by the signed-rank test, not corrected; None when the test was not run.
        rank_biserial: see `signed_rank`; None when the test was not run.
        detectable: the smallest detectable difference at level / n_tests with power 0.8, for the spread that was seen;
            None when the test was not run, or the differences have no spread.
        needed: pairs without which no test can reach level / n_tests, so that it is not run.
        level: of the whole family.
    """

    n: int
    difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    rank_biserial: float | None
    detectable: float | None
    needed: int
    level: float

    def shown(self, corrected_p: float) -> bool:
        """Whether there is a difference by the corrected p; never when ranks and mean point in opposite directions."""
        if self.p is None or self.difference is None or self.rank_biserial is None:
            return False
        return corrected_p <= self.level and self.difference * self.rank_biserial > 0

    def verdict(self, corrected_p: float) -> str:
        """In words. An effect that was not shown is not called absent."""
        untested = f"not tested: needs {self.needed} seeds, has {self.n}"
        if self.difference is None or self.interval is None:
            return untested
        low, high = self.interval
        share = 100 * (1 - self.level)
        effect = f"mean difference {self.difference:+.3g}, {share:g}% interval [{low:+.3g}, {high:+.3g}]"
        if self.p is None:
            return f"{untested}; so far {effect}"
        if self.shown(corrected_p):
            return f"shown: {effect}, corrected p {corrected_p:.2g} at {self.n} seeds"
        if self.detectable is None:
            return f"not shown: {effect}; without any spread no smallest detectable difference, at {self.n} seeds"
        return f"not shown: {effect}, smallest detectable difference {self.detectable:.3g} at {self.n} seeds"


def compare_pairs(first: ArrayLike, second: ArrayLike, *, level: float = 0.05, n_tests: int = 1) -> Paired:
    """Compare two strategies over seeds; the pair i has the same seed.

    Args:
        first: (n,) without NaN.
        second: (n,) without NaN.
        level: of the whole family of tests.
        n_tests: in the family. A test that cannot reach level / n_tests with n pairs is not run.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    difference = a - b
    n, needed = len(difference), min_pairs(level / n_tests)
    mean = float(difference.mean()) if n else None
    interval = t_interval(difference, 1 - level)
    if n < max(2, needed):
        return Paired(n, mean, interval, None, None, None, max(2, needed), level)
    rounding = _rounding(np.concatenate([a, b]))
    rank_biserial, p = signed_rank(difference, rounding)
    spreads = np.ptp(difference) > rounding
    detectable = smallest_detectable(float(np.std(difference, ddof=1)), n, level / n_tests) if spreads else None
    return Paired(n, mean, interval, p, rank_biserial, detectable, needed, level)


def _rounding(values: NDArray[Any]) -> float:
    return _RESOLUTION * float(np.abs(values).max(initial=0.0))
