"""A comparison for people: Markdown and two figures."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distal.compare.comparison import (
    ClassCounts,
    ClassesSelected,
    Comparison,
    Overlap,
    PairedTests,
    Spread,
)
from distal.compare.statistics import RESAMPLES
from distal.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_CLASS_COLUMNS = 20
_MAX_NAME = 40  # characters of a name in a figure
_LITERAL = {"text.parse_math": False}  # a name with two dollars is no formula

# Okabe and Ito's colours (2008) with grey instead of their yellow, which is hard to see on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")


def markdown(comparison: Comparison) -> str:
    """The report, as kept beside the figures."""
    n_seeds, metric, strategies = len(comparison.seeds), comparison.metric, comparison.strategies
    start = comparison.conditions.get("initial_set")
    common = f"Initial set: {_text(start)}." if start else ""
    share = f"{100 * (1 - comparison.level):g}%"
    parts = [f"# {len(strategies)} strategies, {n_seeds} seed{'s' * (n_seeds != 1)}", *_conditions(comparison)]
    parts.append("![learning curves](curves.png)")
    for name, budgets in comparison.budgets.items():
        parts += [
            f"## {name} by labels paid for",
            f"{_mean_of(n_seeds)} {common}",
            _table(
                ["labelled", *strategies],
                ([f"{row.n_labeled:,}", *(_cell(row.strategies[each], n_seeds) for each in strategies)]
                 for row in budgets),
            ),
        ]  # fmt: skip
    tests = comparison.tests
    parts += [
        f"## AUBC of {metric}",
        f"The trapezoid of {metric} over the labels scaled to [0, 1]: its mean height. {share} interval of the mean by "
        f"bootstrap (BCa, {RESAMPLES:,} resamples), too narrow when seeds are few. {common}",
        _table(
            ["strategy", "AUBC", f"{share} interval", "seeds"],
            ([row.strategy, _mean_sd(row), _interval(row.low, row.high), str(row.n)]
             for row in comparison.aubc),
        ),
        "## Paired tests of AUBC",
        *(_tests_text(tests, comparison.level, n_seeds, common) if tests.each else ["No reference to test against."]),
    ]  # fmt: skip
    if comparison.labels_saved:
        parts += [
            "## Labels saved",
            f"Labels that a strategy needs less than the reference to reach the reference's last {metric}, by linear "
            "interpolation at the first crossing; below 0 it needs more. The mean is over the seeds that reached it, "
            f"which flatters a strategy that often did not. {common}",
            _table(
                ["strategy", *(f"against {name}" for name in comparison.references)],
                (
                    [name, *(_saved(comparison, name, reference) for reference in comparison.references)]
                    for name in strategies
                ),
            ),
        ]
    parts += _classes_text(comparison.classes, common) + _overlap_text(comparison.overlap, common)
    parts += [
        "## Cost",
        f"Per seed, over all cycles: seconds (mean ± standard deviation) and images scored (mean). {common}",
        _table(
            ["strategy", "seconds", "images scored", "seeds"],
            ([row.strategy, _mean_sd(row.seconds, ",.1f"), _number(row.images_scored.mean, ",.0f"),
              str(row.n)] for row in comparison.cost),
        ),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _conditions(comparison: Comparison) -> list[str]:
    """Conditions, and all gaps."""
    lines = [
        f"- {_text(name)}: {_text(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in comparison.conditions.items()
    ]
    lines.append(f"- seeds: {', '.join(map(str, comparison.seeds))}")
    if "balanced" in str(comparison.conditions.get("initial_set", "")):
        lines.append("- The initial set is balanced over the classes: for that, labels were read that nobody paid for.")
    missing = comparison.missing
    lines += [
        f"- Reference {_text(name)} is not among the strategies: nothing is tested against it."
        for name in missing.references
    ]
    if missing.cycles:
        each = [f"{_text(row.strategy)} seed {row.seed} ({row.cycles} of {row.of} cycles)" for row in missing.cycles]
        lines.append(f"- Incomplete, so left out of AUBC, tests, labels saved and cost: {', '.join(each)}.")
    for name, rows in missing.values.items():
        if rows:
            each = [f"{_text(row.strategy)} seed {row.seed} cycle {row.cycle}" for row in rows]
            rest = (
                "; its seed is in no AUBC, test or labels saved of that strategy" if name == comparison.metric else ""
            )
            lines.append(f"- No {name} in {len(each)} cycle(s) ({', '.join(each)}): in no mean of that budget{rest}.")
    if len(comparison.seeds) == 1:
        needed = comparison.tests.needed_seeds
        tests = f"; tests need {needed} seeds" if needed else ""
        lines.append(f"- One seed: no spread, no interval and no test{tests}. What differs here may be chance.")
    if len(comparison.budgets[comparison.metric]) == 1:
        lines.append("- One budget: AUBC, and all that rests on it, needs at least two cycles.")
    return ["\n".join(lines)]


def _tests_text(tests: PairedTests, level: float, n_seeds: int, common: str) -> list[str]:
    n_tests = tests.n_tests
    return [
        "Strategy minus reference, over the seeds that both completed at the same budgets. Wilcoxon's signed-rank "
        f"test, two-sided and exact; p corrected by Holm over {n_tests} test{'s' * (n_tests != 1)} at level {level:g}, "
        f"so none is run with fewer than {tests.needed_seeds} seeds. Intervals by Student's t, not corrected. "
        f"Smallest detectable difference: of a paired t-test at level {level:g} / {n_tests} with power "
        f"{tests.power:g}. {common}",
        _table(
            ["strategy", "against", "p", "corrected p", "verdict"],
            ([row.strategy, row.reference, _number(row.p, ".2g"), _number(row.corrected_p, ".2g"),
              row.verdict + (f" ({n_seeds - row.n} seeds left out)" if row.n < n_seeds else "")]
             for row in tests.each),
        ),
    ]  # fmt: skip


def _saved(comparison: Comparison, strategy: str, reference: str) -> str:
    if strategy == reference:
        return "-"
    (row,) = (each for each in comparison.labels_saved if (each.strategy, each.reference) == (strategy, reference))
    if not row.n:
        return "no complete pair"
    lost = f"not reached in {row.not_reached} of {row.n}"
    if row.mean is None:
        return lost
    return f"{row.mean:+,.0f}" + (f" ({lost})" if row.not_reached else f" (n = {row.n})")


def _classes_text(classes: ClassesSelected | None, common: str) -> list[str]:
    if classes is None:
        return []
    wide = len(classes.names) <= _MAX_CLASS_COLUMNS
    rows = []
    for row in classes.strategies:
        total = sum(row.counts)
        shares = [f"{count / total:.1%}" if total else "-" for count in (*row.counts, min(row.counts), max(row.counts))]
        rows.append(
            [
                row.strategy,
                f"{total:,}",
                _number(row.balance, ".3f"),
                *shares[-2:],
                *(shares[:-2] if wide else []),
            ]
        )
    unknown = sum(row.unknown for row in classes.strategies)
    lost = f" {unknown:,} selected sample(s) have no known class and do not count." if unknown else ""
    return [
        "## Classes selected",
        "Shares over all cycles and seeds. Balance: entropy over its maximum, 1 when all classes are as frequent; mean "
        f"over the seeds.{lost} {common}",
        "![selected classes](classes.png)",
        _table(["strategy", "selected", "balance", "rarest", "most frequent", *(classes.names if wide else [])], rows),
    ]


def _overlap_text(overlap: Overlap | None, common: str) -> list[str]:
    if overlap is None:
        return []
    names = overlap.strategies
    return [
        "## Overlap of the first batch",
        f"Share of the batch of cycle {overlap.cycle} that two strategies have in common, mean over "
        f"{_range(each for row in overlap.seeds for each in row)} seeds. {common}",
        _table(
            ["", *names],
            ([name, *(_number(v, ".2f") for v in row)] for name, row in zip(names, overlap.mean, strict=True)),
        ),
    ]


def _range(numbers: Iterable[int]) -> str:
    each = sorted(numbers)
    return str(each[0]) if each[0] == each[-1] else f"{each[0]} to {each[-1]}"


def _mean_of(n_seeds: int) -> str:
    return f"Mean ± standard deviation over {n_seeds} seeds, n where it is over fewer." if n_seeds > 1 else "One seed."


def _cell(spread: Spread, n_seeds: int) -> str:
    return _mean_sd(spread) + (f" (n = {spread.n})" if 0 < spread.n < n_seeds else "")


def _mean_sd(spread: Spread, form: str = ".4f") -> str:
    return _number(spread.mean, form) + ("" if spread.sd is None else f" ± {spread.sd:{form}}")


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[_text(cell) for cell in head], ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _text(data: str) -> str:
    """Something as Markdown shows it, whatever is in it: names of classes and strategies are no markup."""
    escaped = re.sub(r"[\\`*$~]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(", r"\\\g<0>", _printable(data))
    return re.sub("[&<>|]", lambda found: f"&#{ord(found[0])};", escaped)


def _printable(data: str) -> str:
    return "".join(character if character.isprintable() else " " for character in data)


def _short(name: str) -> str:
    """A name for a figure."""
    name = _printable(name)
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."


def plot_curves(comparison: Comparison) -> Figure:
    """The metric against the labels paid for: the mean over the seeds, and a standard deviation to each side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_LITERAL):
        return _curves(comparison, Figure(figsize=(8, 5), layout="constrained"))


def _curves(comparison: Comparison, figure: Figure) -> Figure:
    axes = figure.subplots()
    lines = []
    budgets = comparison.budgets[comparison.metric]
    for k, name in enumerate(comparison.strategies):
        points = [(row.n_labeled, row.strategies[name]) for row in budgets if row.strategies[name].n]
        x = [n_labeled for n_labeled, _ in points]
        mean = np.array([spread.mean for _, spread in points])
        sd = np.array([spread.sd or 0.0 for _, spread in points])
        colour, line = _COLOURS[k % len(_COLOURS)], _LINES[k // len(_COLOURS) % len(_LINES)]
        marker = _MARKERS[k % len(_MARKERS)]
        lines += axes.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=5)
        axes.fill_between(x, mean - sd, mean + sd, alpha=0.1, color=colour, linewidth=0)
    n_seeds = len(comparison.seeds)
    fewer = any(each.n < n_seeds for row in budgets for each in row.strategies.values())
    spread = f"mean and standard deviation over {'up to ' * fewer}{n_seeds} seeds" if n_seeds > 1 else "one seed"
    axes.set(xlabel="labels paid for", ylabel=comparison.metric, title=spread)
    axes.grid(alpha=0.3)
    # Labels that begin with _ would be left out, so they are given afterwards.
    legend = figure.legend(lines, ["-"] * len(lines), loc="outside right upper", frameon=False)
    for text, name in zip(legend.get_texts(), comparison.strategies, strict=True):
        text.set_text(_short(name))
    return figure


def plot_classes(classes: ClassesSelected) -> Figure:
    """One panel per strategy: the share of each class in what was selected; dashed where all would be as frequent."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names, rows = classes.names, classes.strategies
    size = max(6.0, min(16.0, 0.3 * len(names))), 1.0 + 1.1 * len(rows)
    with rc_context(_LITERAL):
        return _panels([_short(name) for name in names], rows, Figure(figsize=size, layout="constrained"))


def _panels(names: Sequence[str], rows: Sequence[ClassCounts], figure: Figure) -> Figure:
    panels: list[Axes] = list(figure.subplots(len(rows), sharex=True, sharey=True, squeeze=False)[:, 0])
    for k, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        share = np.array(row.counts) / max(1, sum(row.counts))
        axes.bar(range(len(names)), share, color=_COLOURS[k % len(_COLOURS)])
        axes.axhline(1 / len(names), linestyle="--", linewidth=1, color="#444444")
        axes.set_title(_short(row.strategy), loc="left", fontsize="medium")
    if len(names) <= _MAX_CLASS_COLUMNS:
        panels[-1].set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    panels[-1].set_xlabel("class")
    figure.supylabel("share of what was selected")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As the suffix says; an SVG without date and random ids, so that the same numbers give the same bytes."""
    from matplotlib import rc_context

    form = path.suffix.removeprefix(".")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "distal", **_LITERAL}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    write_bytes(path, buffer.getvalue())
