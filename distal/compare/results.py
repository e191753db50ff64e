"""Figures and paired tests of strategies x seeds, from one table and the selections; nothing is run.

Strategies are compared by their AUBC, one number per seed, so that the family of tests stays small
enough for a handful of seeds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distal.compare import render
from distal.compare.comparison import (
    Aubc,
    Budget,
    BudgetSpread,
    ClassCounts,
    ClassesSelected,
    Comparison,
    Cost,
    LabelsSaved,
    Missing,
    MissingCycles,
    MissingValue,
    Overlap,
    PairedTest,
    PairedTests,
    Saved,
    Spread,
)
from distal.compare.statistics import POWER, Paired, aubc, bootstrap_mean, compare_pairs, holm, labels_saved
from distal.errors import ConfigError
from distal.pool.sample_files import csv_text
from distal.storage import write_bytes, write_table

if TYPE_CHECKING:
    import pyarrow as pa

_KEYS = ("seed", "strategy", "cycle", "n_labeled", "seconds", "images_scored")
_SMALLER_IS_BETTER = {"ece"}

_BOOTSTRAP_SEED = 0

_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))
_Selections = Mapping[tuple[int, str, int], tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Report(Comparison):
    """A comparison, and the folder that it was written into."""

    out: Path


def report(
    results: pa.Table,
    selections: _Selections,
    *,
    out: Path,
    references: Sequence[str] = ("random", "entropy"),
    metric: str = "accuracy",
    level: float = 0.05,
    conditions: Mapping[str, Any],
    classes: Sequence[str] = (),
) -> Report:
    """Compare strategies over seeds, and write the comparison.

    Into `out` go `results.parquet` and `results.csv`, `comparison.json`, `report.md`, `curves.png`
    and `.svg`, and, when there are selections, `classes.png`. The same arguments give the same
    JSON, Markdown and SVG; the order of the rows changes nothing but the order of the strategies.

    Args:
        results: one row per seed, strategy and cycle: `seed` int64, `strategy` string, `cycle`
            int64, `n_labeled` int64 (labels paid for), `seconds` float64 and `images_scored` int64
            of that cycle, and a nullable float64 column for each metric; NaN counts as null.
            Strategies come in the order of their first row.
        selections: (seed, strategy, cycle) -> the samples of that cycle: `sample_index` (n,) int64,
            and the class (n,) int64, below 0 where unknown.
        references: see `Comparison`; one that is not in `results` is named and left out.
        metric, level: see `Comparison`.
        conditions: see `Comparison`. `initial_set`, such as "class-balanced", is named in every
            table.
        classes: names of the classes; by default their numbers, as far as they were selected.

    Raises:
        ConfigError: there are no results, or no such metric.
        ValueError: two rows have the same seed, strategy and cycle, or a column is missing.
    """
    runs = _Runs.of(results)
    if metric not in runs.metrics:
        raise ConfigError(f"metric: {metric!r} was not measured; measured were {', '.join(runs.metrics) or 'none'}")
    areas = _areas(runs, metric)
    against = [name for name in references if name in runs.strategies]
    others = [name for name in runs.metrics if name != metric]
    comparison = Comparison(
        conditions=dict(conditions),
        metric=metric,
        level=level,
        seeds=runs.seeds,
        strategies=runs.strategies,
        references=against,
        missing=Missing(
            references=[name for name in references if name not in runs.strategies],
            cycles=_missing_cycles(runs),
            values={name: _missing_values(runs, name) for name in runs.metrics},
        ),
        budgets={name: _budgets(runs, name) for name in (metric, *others)},
        aubc=_aubc(runs, areas, level),
        tests=_tests(runs, areas, against, level),
        labels_saved=_labels_saved(runs, metric, against),
        classes=_classes(runs, selections, classes),
        overlap=_overlap(runs, selections),
        cost=_cost(runs),
    )
    write_table(out / "results.parquet", results)
    write_bytes(out / "results.csv", _csv(results))
    text = json.dumps(comparison.to_record(), indent=1, allow_nan=False) + "\n"
    write_bytes(out / "comparison.json", text.encode())
    write_bytes(out / "report.md", render.markdown(comparison).encode())
    curves = render.plot_curves(comparison)
    for name in ("curves.png", "curves.svg"):
        render.save(curves, out / name)
    if comparison.classes is not None:
        render.save(render.plot_classes(comparison.classes), out / "classes.png")
    return Report(**vars(comparison), out=out)


@dataclass(frozen=True)
class _Runs:
    """The results as arrays over (seed, strategy, cycle).

    Attributes:
        present: bool; the other arrays are 0, or NaN, elsewhere.
        n_labeled: int64.
        metrics: float64 by name, NaN where null.
        seconds: float64.
        images: int64.
    """

    seeds: list[int]
    strategies: list[str]
    cycles: list[int]
    present: NDArray[np.bool_]
    n_labeled: NDArray[np.int64]
    metrics: dict[str, NDArray[np.float64]]
    seconds: NDArray[np.float64]
    images: NDArray[np.int64]

    @classmethod
    def of(cls, results: pa.Table) -> _Runs:
        lacking = [name for name in _KEYS if name not in results.column_names]
        if lacking:
            raise ValueError(f"results lack the column {lacking[0]}")
        if not results.num_rows:
            raise ConfigError("there is nothing to compare: no strategy has finished a cycle")
        seeds, seed_at = np.unique(results["seed"].to_numpy(), return_inverse=True)
        cycles, cycle_at = np.unique(results["cycle"].to_numpy(), return_inverse=True)
        named = results["strategy"].to_pylist()
        strategies = list(dict.fromkeys(named))
        place = (seed_at, np.array([strategies.index(name) for name in named]), cycle_at)
        shape = (len(seeds), len(strategies), len(cycles))
        present = np.zeros(shape, bool)
        present[place] = True
        if present.sum() < results.num_rows:
            raise ValueError("results have two rows of the same seed, strategy and cycle")

        def column(name: str, empty: float, dtype: type) -> NDArray[Any]:
            array: NDArray[Any] = np.full(shape, empty, dtype)
            array[place] = results[name].to_numpy()
            return array

        return cls(
            seeds=seeds.tolist(),
            strategies=strategies,
            cycles=cycles.tolist(),
            present=present,
            n_labeled=column("n_labeled", 0, np.int64),
            metrics={name: column(name, np.nan, np.float64) for name in results.column_names if name not in _KEYS},
            seconds=column("seconds", 0, np.float64),
            images=column("images_scored", 0, np.int64),
        )

    def pairs(self, values: NDArray[np.float64], first: int, second: int) -> list[int]:
        """Seeds (by place) of which two strategies have all values, at the same budgets."""
        whole = ~np.isnan(values[:, [first, second]].reshape(len(self.seeds), -1)).any(axis=1)
        same = (self.n_labeled[:, first] == self.n_labeled[:, second]).all(axis=1)
        return [int(each) for each in np.flatnonzero(whole & same)]


def _spread(values: NDArray[np.float64]) -> Spread:
    """Of the values that are not NaN; a single one has no standard deviation."""
    numbers = values[~np.isnan(values)]
    return Spread(
        n=len(numbers),
        mean=float(numbers.mean()) if len(numbers) else None,
        sd=float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
    )


def _missing_cycles(runs: _Runs) -> list[MissingCycles]:
    n_cycles = len(runs.cycles)
    return [
        MissingCycles(seed=runs.seeds[s], strategy=runs.strategies[k], cycles=int(n), of=n_cycles)
        for (s, k), n in np.ndenumerate(runs.present.sum(axis=2))
        if n < n_cycles
    ]


def _missing_values(runs: _Runs, metric: str) -> list[MissingValue]:
    null = runs.present & np.isnan(runs.metrics[metric])
    return [
        MissingValue(seed=runs.seeds[s], strategy=runs.strategies[k], cycle=runs.cycles[c])
        for s, k, c in np.argwhere(null)
    ]


def _budgets(runs: _Runs, metric: str) -> list[Budget]:
    """Mean and spread over the seeds, per budget and strategy."""
    budgets = []
    for n_labeled in np.unique(runs.n_labeled[runs.present]):
        at = runs.present & (runs.n_labeled == n_labeled)
        spreads = {}
        for k, name in enumerate(runs.strategies):
            spread = _spread(runs.metrics[metric][:, k][at[:, k]])
            spreads[name] = BudgetSpread(**vars(spread), rows=int(at[:, k].sum()))
        budgets.append(Budget(n_labeled=int(n_labeled), strategies=spreads))
    return budgets


def _areas(runs: _Runs, metric: str) -> NDArray[np.float64]:
    """AUBC: (n_seeds, n_strategies), NaN where a cycle or its metric is missing, or there is one budget only."""
    values = runs.metrics[metric]
    areas = np.full(values.shape[:2], np.nan)
    if len(runs.cycles) > 1:
        for s, k in np.argwhere(~np.isnan(values).any(axis=2)):
            areas[s, k] = aubc(runs.n_labeled[s, k], values[s, k])
    return areas


def _aubc(runs: _Runs, areas: NDArray[np.float64], level: float) -> list[Aubc]:
    rows = []
    for k, name in enumerate(runs.strategies):
        known = areas[:, k][~np.isnan(areas[:, k])]
        low, high = bootstrap_mean(known, seed=_BOOTSTRAP_SEED, level=1 - level) or (None, None)
        each = [None if np.isnan(area) else float(area) for area in areas[:, k]]
        spread = _spread(areas[:, k])
        rows.append(Aubc(**vars(spread), strategy=name, low=low, high=high, each=each))
    return rows


def _tests(runs: _Runs, areas: NDArray[np.float64], references: Sequence[str], level: float) -> PairedTests:
    """Each strategy against each reference; two references meet once. Tests that were not run count."""
    family: list[tuple[str, str]] = []
    for reference in references:
        family += [(n, reference) for n in runs.strategies if n != reference and (reference, n) not in family]
    compared: list[Paired] = []
    for pair in family:
        first, second = (runs.strategies.index(name) for name in pair)
        seeds = runs.pairs(areas[:, :, np.newaxis], first, second)
        compared.append(compare_pairs(areas[seeds, first], areas[seeds, second], level=level, n_tests=len(family)))
    corrected = holm([1.0 if paired.p is None else paired.p for paired in compared])
    return PairedTests(
        n_tests=len(family),
        needed_seeds=compared[0].needed if compared else None,
        power=POWER,
        each=[
            PairedTest(
                strategy=first,
                reference=second,
                n=paired.n,
                difference=paired.difference,
                interval=paired.interval,
                p=paired.p,
                corrected_p=None if paired.p is None else p,
                rank_biserial=paired.rank_biserial,
                smallest_detectable_difference=paired.detectable,
                shown=None if paired.p is None else paired.shown(p),
                verdict=paired.verdict(p),
            )
            for (first, second), paired, p in zip(family, compared, corrected, strict=True)
        ],
    )


def _labels_saved(runs: _Runs, metric: str, references: Sequence[str]) -> list[LabelsSaved]:
    values = -runs.metrics[metric] if metric in _SMALLER_IS_BETTER else runs.metrics[metric]
    rows = []
    for reference in references:
        b = runs.strategies.index(reference)
        for a, name in enumerate(runs.strategies):
            if a != b:
                seeds = runs.pairs(values, a, b)
                x = runs.n_labeled
                each = [
                    Saved(
                        seed=runs.seeds[s],
                        saved=labels_saved(x[s, a], values[s, a], x[s, b], values[s, b]),
                    )
                    for s in seeds
                ]
                reached = [one.saved for one in each if one.saved is not None]
                rows.append(
                    LabelsSaved(
                        strategy=name,
                        reference=reference,
                        n=len(each),
                        not_reached=len(each) - len(reached),
                        mean=float(np.mean(reached)) if reached else None,
                        each=each,
                    )
                )
    return rows


def _classes(runs: _Runs, selections: _Selections, names: Sequence[str]) -> ClassesSelected | None:
    """How often each class was selected, over all cycles and seeds; None when nothing was."""
    largest = max((int(label.max()) for _, label in selections.values() if len(label)), default=-1)
    if largest < 0:
        return None
    n_classes = max(largest + 1, len(names))
    names = [*names, *map(str, range(len(names), n_classes))]
    rows = []
    for strategy in runs.strategies:
        per_seed = np.zeros((len(runs.seeds), n_classes), np.int64)
        unknown = 0
        for s, seed in enumerate(runs.seeds):
            for cycle in runs.cycles:
                _, label = selections.get((seed, strategy, cycle), _NOTHING)
                per_seed[s] += np.bincount(label[label >= 0], minlength=n_classes)
                unknown += int((label < 0).sum())
        chosen = per_seed[per_seed.sum(axis=1) > 0]
        counts = chosen.sum(axis=0)
        rows.append(
            ClassCounts(
                strategy=strategy,
                seeds=len(chosen),
                counts=counts.tolist(),
                unknown=unknown,
                balance=float(np.mean([_balance(each) for each in chosen])) if len(chosen) else None,
            )
        )
    return ClassesSelected(names=names, strategies=rows)


def _balance(counts: NDArray[np.int64]) -> float:
    """Entropy of the classes over its maximum (Pielou's evenness): 1 when all are as frequent, 0 when there is one."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0


def _overlap(runs: _Runs, selections: _Selections) -> Overlap | None:
    """The common samples of first batches, as a share of the larger one; None without batches."""
    cycle, size = runs.cycles[0], len(runs.strategies)
    first = {(seed, name): np.unique(index) for (seed, name, at), (index, _) in selections.items() if at == cycle}
    if not first:
        return None
    mean: list[list[float | None]] = [[None] * size for _ in range(size)]
    n = [[0] * size for _ in range(size)]
    for i, a in enumerate(runs.strategies):
        for j, b in enumerate(runs.strategies):
            batches = [(first[s, a], first[s, b]) for s in runs.seeds if (s, a) in first and (s, b) in first]
            common = [len(np.intersect1d(x, y)) / max(len(x), len(y)) for x, y in batches if len(x) and len(y)]
            mean[i][j] = float(np.mean(common)) if common else None
            n[i][j] = len(common)
    return Overlap(cycle=cycle, strategies=runs.strategies, mean=mean, seeds=n)


def _cost(runs: _Runs) -> list[Cost]:
    """Per seed, over all cycles; a seed that lacks a cycle is left out."""
    whole: NDArray[np.bool_] = np.all(runs.present, axis=2)
    seconds, images = runs.seconds.sum(axis=2), runs.images.sum(axis=2)
    return [
        Cost(
            strategy=name,
            n=int(whole[:, k].sum()),
            seconds=_spread(seconds[whole[:, k], k]),
            images_scored=_spread(images[whole[:, k], k].astype(np.float64)),
        )
        for k, name in enumerate(runs.strategies)
    ]


def _csv(results: pa.Table) -> bytes:
    import pyarrow as pa
    from pyarrow import csv

    for place, field in enumerate(results.schema):
        if pa.types.is_string(field.type):
            texts = [None if text is None else csv_text(text) for text in results[field.name].to_pylist()]
            results = results.set_column(place, field, pa.array(texts, pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(results, buffer)
    return buffer.getvalue()
