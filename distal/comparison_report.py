"""What strategies x seeds come to: tables, paired tests and figures, from what was measured.

Everything here is computed from one table and the selections; nothing is run. Strategies are compared by their AUBC,
one number per seed, so that the family of tests stays small enough for a handful of seeds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distal.errors import ConfigError
from distal.records import JsonObject
from distal.statistics import POWER, RESAMPLES, Paired, aubc, bootstrap_mean, compare_pairs, holm, labels_saved
from distal.storage import write_bytes, write_table

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = ("seed", "strategy", "cycle", "n_labeled", "seconds", "images_scored")
SMALLER_IS_BETTER = {"ece"}
MAX_CLASS_COLUMNS = 20

# Okabe and Ito's colours (2008) with grey instead of their yellow, which is hard to see on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_BOOTSTRAP_SEED = 0

Selections = Mapping[tuple[int, str, int], tuple[NDArray[np.int64], NDArray[np.int64]]]


def report(
    results: pa.Table,
    selections: Selections,
    *,
    out: Path,
    references: Sequence[str] = ("random", "entropy"),
    metric: str = "accuracy",
    level: float = 0.05,
    conditions: Mapping[str, Any],
    classes: Sequence[str] = (),
) -> JsonObject:
    """Compare strategies over seeds, and write what was found.

    Into `out` go `results.parquet` and `results.csv`, `comparison.json`, `report.md`, `curves.png` and `.svg`, and,
    when there are selections, `classes.png`. The same arguments give the same JSON, Markdown and SVG; the order of the
    rows changes nothing but the order of the strategies.

    Args:
        results: one row per seed, strategy and cycle: `seed` int64, `strategy` string, `cycle` int64, `n_labeled` int64
            (what has been paid for), `seconds` float64 and `images_scored` int64 of that cycle, and a nullable float64
            column for each metric; NaN counts as null. Strategies are told in the order of their first row.
        selections: (seed, strategy, cycle) -> what that cycle selected: `sample_index` (n,) int64, and its class (n,)
            int64, below 0 where unknown.
        references: strategies that all others are tested against; one that is not in `results` is named and left out.
        metric: the column that is compared.
        level: of the whole family of tests; intervals are at 1 - level.
        conditions: what is told above the tables, in this order. `initial_set`, such as "class-balanced", is named in
            every table.
        classes: names of the classes; by default their numbers, as far as they were selected.

    Returns:
        What `comparison.json` holds, and `out`.

    Raises:
        ConfigError: there are no results, or no such metric.
        ValueError: two rows have the same seed, strategy and cycle, or a column is missing.
    """
    runs = _Runs.of(results)
    if metric not in runs.metrics:
        raise ConfigError(f"metric: {metric!r} was not measured; measured were {', '.join(runs.metrics) or 'none'}")
    areas = _areas(runs, metric)
    against = [name for name in references if name in runs.strategies]
    told: JsonObject = {
        "conditions": dict(conditions),
        "metric": metric,
        "level": level,
        "seeds": runs.seeds,
        "strategies": runs.strategies,
        "references": against,
        "missing": {
            "references": [name for name in references if name not in runs.strategies],
            "cycles": _missing_cycles(runs),
            "values": {name: _missing_values(runs, name) for name in runs.metrics},
        },
        "budgets": {name: _budgets(runs, name) for name in (metric, *(n for n in runs.metrics if n != metric))},
        "aubc": _aubc(runs, areas, level),
        "tests": _tests(runs, areas, against, level),
        "labels_saved": _labels_saved(runs, metric, against),
        "classes": _classes(runs, selections, classes),
        "overlap": _overlap(runs, selections),
        "cost": _cost(runs),
    }
    write_table(out / "results.parquet", results)
    write_bytes(out / "results.csv", _csv(results))
    write_bytes(out / "comparison.json", (json.dumps(told, indent=1, allow_nan=False) + "\n").encode())
    write_bytes(out / "report.md", markdown(told).encode())
    curves = _plot_curves(told)
    for name in ("curves.png", "curves.svg"):
        _save(curves, out / name)
    if told["classes"] is not None:
        _save(_plot_classes(told), out / "classes.png")
    return {**told, "out": str(out)}


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
        lacking = [name for name in KEYS if name not in results.column_names]
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
            metrics={name: column(name, np.nan, np.float64) for name in results.column_names if name not in KEYS},
            seconds=column("seconds", 0, np.float64),
            images=column("images_scored", 0, np.int64),
        )

    def pairs(self, values: NDArray[np.float64], first: int, second: int) -> list[int]:
        """Seeds (by place) of which two strategies have all values, at the same budgets."""
        whole = ~np.isnan(values[:, [first, second]].reshape(len(self.seeds), -1)).any(axis=1)
        same = (self.n_labeled[:, first] == self.n_labeled[:, second]).all(axis=1)
        return [int(each) for each in np.flatnonzero(whole & same)]


def _spread(values: NDArray[np.float64]) -> JsonObject:
    """Of the numbers among them; no standard deviation of a single one."""
    each = values[~np.isnan(values)]
    return {
        "n": len(each),
        "mean": float(each.mean()) if len(each) else None,
        "sd": float(each.std(ddof=1)) if len(each) > 1 else None,
    }


def _missing_cycles(runs: _Runs) -> list[JsonObject]:
    return [
        {"seed": runs.seeds[s], "strategy": runs.strategies[k], "cycles": int(n), "of": len(runs.cycles)}
        for (s, k), n in np.ndenumerate(runs.present.sum(axis=2))
        if n < len(runs.cycles)
    ]


def _missing_values(runs: _Runs, metric: str) -> list[JsonObject]:
    null = runs.present & np.isnan(runs.metrics[metric])
    return [
        {"seed": runs.seeds[s], "strategy": runs.strategies[k], "cycle": runs.cycles[c]}
        for s, k, c in np.argwhere(null)
    ]


def _budgets(runs: _Runs, metric: str) -> list[JsonObject]:
    """Mean and spread over the seeds, per budget and strategy."""
    rows = []
    for n_labeled in np.unique(runs.n_labeled[runs.present]):
        at = runs.present & (runs.n_labeled == n_labeled)
        values = {
            name: {**_spread(runs.metrics[metric][:, k][at[:, k]]), "rows": int(at[:, k].sum())}
            for k, name in enumerate(runs.strategies)
        }
        rows.append({"n_labeled": int(n_labeled), "strategies": values})
    return rows


def _areas(runs: _Runs, metric: str) -> NDArray[np.float64]:
    """AUBC: (n_seeds, n_strategies), NaN where a cycle or its metric is missing, or there is one budget only."""
    values = runs.metrics[metric]
    areas = np.full(values.shape[:2], np.nan)
    if len(runs.cycles) > 1:
        for s, k in np.argwhere(~np.isnan(values).any(axis=2)):
            areas[s, k] = aubc(runs.n_labeled[s, k], values[s, k])
    return areas


def _aubc(runs: _Runs, areas: NDArray[np.float64], level: float) -> list[JsonObject]:
    rows = []
    for k, name in enumerate(runs.strategies):
        found = areas[:, k][~np.isnan(areas[:, k])]
        low, high = bootstrap_mean(found, seed=_BOOTSTRAP_SEED, level=1 - level) or (None, None)
        each = [None if np.isnan(area) else float(area) for area in areas[:, k]]
        rows.append({"strategy": name, **_spread(areas[:, k]), "low": low, "high": high, "each": each})
    return rows


def _tests(runs: _Runs, areas: NDArray[np.float64], references: Sequence[str], level: float) -> JsonObject:
    """Each strategy against each reference; two references meet once. Tests that were not run count in the family."""
    family: list[tuple[str, str]] = []
    for reference in references:
        family += [(n, reference) for n in runs.strategies if n != reference and (reference, n) not in family]
    compared: list[Paired] = []
    for pair in family:
        first, second = (runs.strategies.index(name) for name in pair)
        seeds = runs.pairs(areas[:, :, np.newaxis], first, second)
        compared.append(compare_pairs(areas[seeds, first], areas[seeds, second], level=level, n_tests=len(family)))
    corrected = holm([1.0 if each.p is None else each.p for each in compared])
    return {
        "n_tests": len(family),
        "needed_seeds": compared[0].needed if compared else None,
        "power": POWER,
        "each": [
            {
                "strategy": first,
                "reference": second,
                "n": each.n,
                "difference": each.difference,
                "interval": each.interval,
                "p": each.p,
                "corrected_p": None if each.p is None else p,
                "rank_biserial": each.rank_biserial,
                "smallest_detectable_difference": each.detectable,
                "shown": None if each.p is None else each.shown(p),
                "verdict": each.verdict(p),
            }
            for (first, second), each, p in zip(family, compared, corrected, strict=True)
        ],
    }


def _labels_saved(runs: _Runs, metric: str, references: Sequence[str]) -> list[JsonObject]:
    values = -runs.metrics[metric] if metric in SMALLER_IS_BETTER else runs.metrics[metric]
    rows = []
    for reference in references:
        b = runs.strategies.index(reference)
        for a, name in enumerate(runs.strategies):
            if a != b:
                seeds = runs.pairs(values, a, b)
                x = runs.n_labeled
                each = {runs.seeds[s]: labels_saved(x[s, a], values[s, a], x[s, b], values[s, b]) for s in seeds}
                reached = [saved for saved in each.values() if saved is not None]
                rows.append(
                    {
                        "strategy": name,
                        "reference": reference,
                        "n": len(each),
                        "not_reached": len(each) - len(reached),
                        "mean": float(np.mean(reached)) if reached else None,
                        "each": [{"seed": seed, "saved": saved} for seed, saved in each.items()],
                    }
                )
    return rows


def _classes(runs: _Runs, selections: Selections, names: Sequence[str]) -> JsonObject | None:
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
            {
                "strategy": strategy,
                "seeds": len(chosen),
                "counts": counts.tolist(),
                "unknown": unknown,
                "balance": float(np.mean([_balance(each) for each in chosen])) if len(chosen) else None,
            }
        )
    return {"names": names, "strategies": rows}


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def _balance(counts: NDArray[np.int64]) -> float:
    """Entropy of the classes over its maximum (Pielou's evenness): 1 when all are as frequent, 0 when there is one."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0


def _overlap(runs: _Runs, selections: Selections) -> JsonObject | None:
    """What the first batches have in common, as a share of the larger one; None when there are none."""
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
    return {"cycle": cycle, "strategies": runs.strategies, "mean": mean, "seeds": n}


def _cost(runs: _Runs) -> list[JsonObject]:
    """Per seed, over all cycles; a seed that lacks a cycle is left out."""
    whole: NDArray[np.bool_] = np.all(runs.present, axis=2)
    seconds, images = runs.seconds.sum(axis=2), runs.images.sum(axis=2)
    return [
        {
            "strategy": name,
            "n": int(whole[:, k].sum()),
            "seconds": _spread(seconds[whole[:, k], k]),
            "images_scored": _spread(images[whole[:, k], k].astype(np.float64)),
        }
        for k, name in enumerate(runs.strategies)
    ]


def _csv(results: pa.Table) -> bytes:
    from pyarrow import csv

    buffer = io.BytesIO()
    csv.write_csv(results, buffer)
    return buffer.getvalue()


def markdown(told: JsonObject) -> str:
    """The report, as kept beside the figures."""
    n_seeds, metric, strategies = len(told["seeds"]), told["metric"], told["strategies"]
    start = told["conditions"].get("initial_set")
    common = f"Initial set: {start}." if start else ""
    share = f"{100 * (1 - told['level']):g}%"
    parts = [f"# {len(strategies)} strategies, {n_seeds} seed{'s' * (n_seeds != 1)}", *_told_first(told)]
    parts.append("![learning curves](curves.png)")
    for name, budgets in told["budgets"].items():
        parts += [
            f"## {name} by labels paid for",
            f"{_mean_of(n_seeds)} {common}",
            _table(
                ["labelled", *strategies],
                ([f"{row['n_labeled']:,}", *(_cell(row["strategies"][each], n_seeds) for each in strategies)]
                 for row in budgets),
            ),
        ]  # fmt: skip
    tests = told["tests"]
    parts += [
        f"## AUBC of {metric}",
        f"The trapezoid of {metric} over the labels scaled to [0, 1]: its mean height. {share} interval of the mean by "
        f"bootstrap (BCa, {RESAMPLES:,} resamples), too narrow when seeds are few. {common}",
        _table(
            ["strategy", "AUBC", f"{share} interval", "seeds"],
            ([row["strategy"], _mean_sd(row), _interval(row["low"], row["high"]), str(row["n"])]
             for row in told["aubc"]),
        ),
        "## Paired tests of AUBC",
        *(_tests_text(tests, told["level"], n_seeds, common) if tests["each"] else ["No reference to test against."]),
    ]  # fmt: skip
    if told["labels_saved"]:
        parts += [
            "## Labels saved",
            f"Labels that a strategy needs less than the reference to reach the reference's last {metric}, by linear "
            "interpolation at the first crossing; below 0 it needs more. The mean is over the seeds that reached it, "
            f"which flatters a strategy that often did not. {common}",
            _table(
                ["strategy", *(f"against {name}" for name in told["references"])],
                ([name, *(_saved(told, name, reference) for reference in told["references"])] for name in strategies),
            ),
        ]
    parts += _classes_text(told["classes"], common) + _overlap_text(told["overlap"], common)
    parts += [
        "## Cost",
        f"Per seed, over all cycles: seconds (mean ± standard deviation) and images scored (mean). {common}",
        _table(
            ["strategy", "seconds", "images scored", "seeds"],
            ([row["strategy"], _mean_sd(row["seconds"], ",.1f"), _number(row["images_scored"]["mean"], ",.0f"),
              str(row["n"])] for row in told["cost"]),
        ),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _told_first(told: JsonObject) -> list[str]:
    """Conditions, and all that is missing."""
    lines = [
        f"- {name}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in told["conditions"].items()
    ]
    lines.append(f"- seeds: {', '.join(map(str, told['seeds']))}")
    if "balanced" in str(told["conditions"].get("initial_set", "")):
        lines.append("- The initial set is balanced over the classes: for that, labels were read that nobody paid for.")
    missing = told["missing"]
    lines += [
        f"- Reference {name} is not among the strategies: nothing is tested against it."
        for name in missing["references"]
    ]
    if missing["cycles"]:
        each = [
            f"{row['strategy']} seed {row['seed']} ({row['cycles']} of {row['of']} cycles)" for row in missing["cycles"]
        ]
        lines.append(f"- Incomplete, so left out of AUBC, tests, labels saved and cost: {', '.join(each)}.")
    for name, rows in missing["values"].items():
        if rows:
            each = [f"{row['strategy']} seed {row['seed']} cycle {row['cycle']}" for row in rows]
            rest = "; its seed is in no AUBC, test or labels saved of that strategy" if name == told["metric"] else ""
            lines.append(f"- No {name} in {len(each)} cycle(s) ({', '.join(each)}): in no mean of that budget{rest}.")
    if len(told["seeds"]) == 1:
        needed = told["tests"]["needed_seeds"]
        tests = f"; tests need {needed} seeds" if needed else ""
        lines.append(f"- One seed: no spread, no interval and no test{tests}. What differs here may be chance.")
    if len(told["budgets"][told["metric"]]) == 1:
        lines.append("- One budget: AUBC, and all that rests on it, needs at least two cycles.")
    return ["\n".join(lines)]


def _tests_text(tests: JsonObject, level: float, n_seeds: int, common: str) -> list[str]:
    n_tests = tests["n_tests"]
    return [
        "Strategy minus reference, over the seeds that both completed at the same budgets. Wilcoxon's signed-rank "
        f"test, two-sided and exact; p corrected by Holm over {n_tests} test{'s' * (n_tests != 1)} at level {level:g}, "
        f"so none is run with fewer than {tests['needed_seeds']} seeds. Intervals by Student's t, not corrected. "
        f"Smallest detectable difference: of a paired t-test at level {level:g} / {n_tests} with power "
        f"{tests['power']:g}. {common}",
        _table(
            ["strategy", "against", "p", "corrected p", "verdict"],
            ([row["strategy"], row["reference"], _number(row["p"], ".2g"), _number(row["corrected_p"], ".2g"),
              row["verdict"] + (f" ({n_seeds - row['n']} seeds left out)" if row["n"] < n_seeds else "")]
             for row in tests["each"]),
        ),
    ]  # fmt: skip


def _saved(told: JsonObject, strategy: str, reference: str) -> str:
    if strategy == reference:
        return "-"
    (row,) = (each for each in told["labels_saved"] if (each["strategy"], each["reference"]) == (strategy, reference))
    if not row["n"]:
        return "no complete pair"
    lost = f"not reached in {row['not_reached']} of {row['n']}"
    if row["mean"] is None:
        return lost
    return f"{row['mean']:+,.0f}" + (f" ({lost})" if row["not_reached"] else f" (n = {row['n']})")


def _classes_text(classes: JsonObject | None, common: str) -> list[str]:
    if classes is None:
        return []
    wide = len(classes["names"]) <= MAX_CLASS_COLUMNS
    rows = []
    for row in classes["strategies"]:
        total = sum(row["counts"])
        shares = [
            f"{count / total:.1%}" if total else "-"
            for count in (*row["counts"], min(row["counts"]), max(row["counts"]))
        ]
        rows.append(
            [
                row["strategy"],
                f"{total:,}",
                _number(row["balance"], ".3f"),
                *shares[-2:],
                *(shares[:-2] if wide else []),
            ]
        )
    unknown = sum(row["unknown"] for row in classes["strategies"])
    lost = f" {unknown:,} selected sample(s) have no known class and do not count." if unknown else ""
    return [
        "## Classes selected",
        "Shares over all cycles and seeds. Balance: entropy over its maximum, 1 when all classes are as frequent; mean "
        f"over the seeds.{lost} {common}",
        "![selected classes](classes.png)",
        _table(
            ["strategy", "selected", "balance", "rarest", "most frequent", *(classes["names"] if wide else [])], rows
        ),
    ]


def _overlap_text(overlap: JsonObject | None, common: str) -> list[str]:
    if overlap is None:
        return []
    names = overlap["strategies"]
    return [
        "## Overlap of the first batch",
        f"Share of the batch of cycle {overlap['cycle']} that two strategies have in common, mean over "
        f"{_range(each for row in overlap['seeds'] for each in row)} seeds. {common}",
        _table(
            ["", *names],
            ([name, *(_number(v, ".2f") for v in row)] for name, row in zip(names, overlap["mean"], strict=True)),
        ),
    ]


def _range(numbers: Iterable[int]) -> str:
    each = sorted(numbers)
    return str(each[0]) if each[0] == each[-1] else f"{each[0]} to {each[-1]}"


def _mean_of(n_seeds: int) -> str:
    return f"Mean ± standard deviation over {n_seeds} seeds, n where it is over fewer." if n_seeds > 1 else "One seed."


def _cell(spread: JsonObject, n_seeds: int) -> str:
    return _mean_sd(spread) + (f" (n = {spread['n']})" if 0 < spread["n"] < n_seeds else "")


def _mean_sd(spread: JsonObject, form: str = ".4f") -> str:
    return _number(spread["mean"], form) + ("" if spread["sd"] is None else f" ± {spread['sd']:{form}}")


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _plot_curves(told: JsonObject) -> Figure:
    """The metric against the labels paid for: the mean over the seeds, and a standard deviation to each side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    budgets = told["budgets"][told["metric"]]
    for k, name in enumerate(told["strategies"]):
        found = [(row["n_labeled"], row["strategies"][name]) for row in budgets if row["strategies"][name]["n"]]
        x = [n_labeled for n_labeled, _ in found]
        mean = np.array([each["mean"] for _, each in found])
        sd = np.array([each["sd"] or 0.0 for _, each in found])
        colour, line = _COLOURS[k % len(_COLOURS)], _LINES[k // len(_COLOURS) % len(_LINES)]
        marker = _MARKERS[k % len(_MARKERS)]
        axes.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=5, label=name)
        axes.fill_between(x, mean - sd, mean + sd, alpha=0.1, color=colour, linewidth=0)
    n_seeds = len(told["seeds"])
    fewer = any(each["n"] < n_seeds for row in budgets for each in row["strategies"].values())
    spread = f"mean and standard deviation over {'up to ' * fewer}{n_seeds} seeds" if n_seeds > 1 else "one seed"
    axes.set(xlabel="labels paid for", ylabel=told["metric"], title=spread)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _plot_classes(told: JsonObject) -> Figure:
    """One panel per strategy: the share of each class in what was selected; dashed where all would be as frequent."""
    from matplotlib.figure import Figure

    names, rows = told["classes"]["names"], told["classes"]["strategies"]
    figure = Figure(figsize=(max(6.0, min(16.0, 0.3 * len(names))), 1.0 + 1.1 * len(rows)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(rows), sharex=True, sharey=True, squeeze=False)[:, 0])
    for k, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        share = np.array(row["counts"]) / max(1, sum(row["counts"]))
        axes.bar(range(len(names)), share, color=_COLOURS[k % len(_COLOURS)])
        axes.axhline(1 / len(names), linestyle="--", linewidth=1, color="#444444")
        axes.set_title(row["strategy"], loc="left", fontsize="medium")
    if len(names) <= MAX_CLASS_COLUMNS:
        panels[-1].set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    panels[-1].set_xlabel("class")
    figure.supylabel("share of what was selected")
    return figure


def _save(figure: Figure, path: Path) -> None:
    """As the suffix says; an SVG without date and random ids, so that the same numbers give the same bytes."""
    from matplotlib import rc_context

    form = path.suffix.removeprefix(".")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "distal"}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    write_bytes(path, buffer.getvalue())
