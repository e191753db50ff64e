"""The values of a comparison: what `comparison.json` holds, and the report and the figures show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distal.records import Result


@dataclass(frozen=True, kw_only=True)
class Spread(Result):
    """Mean and standard deviation over `n` seeds; None where there are too few."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True, kw_only=True)
class BudgetSpread(Spread):
    """A metric of one strategy at one budget.

    Attributes:
        rows: cycles at this budget, with or without a value.
    """

    rows: int


@dataclass(frozen=True, kw_only=True)
class Budget(Result):
    """A metric of all strategies at one budget.

    Attributes:
        n_labeled: labels paid for.
    """

    n_labeled: int
    strategies: dict[str, BudgetSpread]


@dataclass(frozen=True, kw_only=True)
class Aubc(Spread):
    """Area under the budget curve of a strategy.

    Attributes:
        low, high: the interval of the mean.
        each: by seed; None where a cycle or its metric is missing.
    """

    strategy: str
    low: float | None
    high: float | None
    each: list[float | None]


@dataclass(frozen=True, kw_only=True)
class MissingCycles(Result):
    """A run with fewer cycles than the others."""

    seed: int
    strategy: str
    cycles: int
    of: int


@dataclass(frozen=True, kw_only=True)
class MissingValue(Result):
    """A cycle in which a metric is undefined."""

    seed: int
    strategy: str
    cycle: int


@dataclass(frozen=True, kw_only=True)
class Missing(Result):
    """The gaps in the results.

    Attributes:
        references: that are not among the strategies.
        values: by metric.
    """

    references: list[str]
    cycles: list[MissingCycles]
    values: dict[str, list[MissingValue]]


@dataclass(frozen=True, kw_only=True)
class PairedTest(Result):
    """A strategy against a reference; see `statistics.Paired`.

    Attributes:
        shown: None when the test was not run.
        verdict: in words.
    """

    strategy: str
    reference: str
    n: int
    difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    corrected_p: float | None
    rank_biserial: float | None
    smallest_detectable_difference: float | None
    shown: bool | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class PairedTests(Result):
    """The family of tests.

    Attributes:
        needed_seeds: below which no test is run; None without a reference.
    """

    n_tests: int
    needed_seeds: int | None
    power: float
    each: list[PairedTest]


@dataclass(frozen=True, kw_only=True)
class Saved(Result):
    """Labels that one seed saved; None when it did not reach the reference."""

    seed: int
    saved: float | None


@dataclass(frozen=True, kw_only=True)
class LabelsSaved(Result):
    """Labels that a strategy saved against a reference.

    Attributes:
        n: complete pairs.
        not_reached: of them.
        mean: over the seeds that reached it.
    """

    strategy: str
    reference: str
    n: int
    not_reached: int
    mean: float | None
    each: list[Saved]


@dataclass(frozen=True, kw_only=True)
class ClassCounts(Result):
    """The classes that a strategy selected.

    Attributes:
        seeds: with a selection.
        counts: samples of each class, over all cycles and seeds.
        unknown: samples without a known class.
        balance: entropy of the classes over its maximum, mean over the seeds.
    """

    strategy: str
    seeds: int
    counts: list[int]
    unknown: int
    balance: float | None


@dataclass(frozen=True, kw_only=True)
class ClassesSelected(Result):
    """The classes that all strategies selected."""

    names: list[str]
    strategies: list[ClassCounts]


@dataclass(frozen=True, kw_only=True)
class Overlap(Result):
    """The share of the first batch that two strategies have in common.

    Attributes:
        mean: over the seeds, for each pair of strategies.
        seeds: for each pair.
    """

    cycle: int
    strategies: list[str]
    mean: list[list[float | None]]
    seeds: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Cost(Result):
    """The cost of a strategy per seed, over all cycles.

    Attributes:
        n: seeds with all cycles.
    """

    strategy: str
    n: int
    seconds: Spread
    images_scored: Spread


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Strategies compared over seeds.

    Attributes:
        conditions: shown above the tables, in this order.
        metric: that is compared.
        level: of the whole family of tests; intervals are at 1 - level.
        references: strategies that the others are tested against.
        budgets: by metric, the compared one first.
        classes, overlap: None when nothing was selected.
    """

    conditions: dict[str, Any]
    metric: str
    level: float
    seeds: list[int]
    strategies: list[str]
    references: list[str]
    missing: Missing
    budgets: dict[str, list[Budget]]
    aubc: list[Aubc]
    tests: PairedTests
    labels_saved: list[LabelsSaved]
    classes: ClassesSelected | None
    overlap: Overlap | None
    cost: list[Cost]
