"""How informative are the samples that each measure ranks first? From stored trajectories alone.

For samples with a known label: the final network's error on the most uncertain part of the pool. A
measure that finds the network's mistakes has a large one (the paper's own figure, arXiv 2107.14707).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distal.acquire.topk import Candidates, TopK
from distal.artifacts.scores import Scores
from distal.compare.statistics import t_interval
from distal.driver.reanalyse import ScoredCycle
from distal.errors import ConfigError, PoolError
from distal.hashing import mix64
from distal.progress import Display, Silent
from distal.records import OPTIONAL, Result, Window
from distal.reduce.measures import FROM_RECORDED, FROM_VOTES, SEEDED
from distal.storage import write_bytes

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
_LEVEL = 0.95
_WINDOWS = ("@last=0.75", "@last=0.5", "@last=0.25", "@every=2", "@every=4", "@every=8")
_REFERENCE = "dispersion"
_PLOTTED = ("dispersion", "dispersion@last=0.5", "vote_entropy", "margin", "entropy", "random")


@dataclass(frozen=True)
class MeanInterval(Result):
    """A mean over runs, and its interval at `_LEVEL`; None for one run."""

    mean: float
    low: float | None
    high: float | None
    each: list[float]

    def __str__(self) -> str:
        text = f"{self.mean:.3f}"
        return text if self.low is None else f"{text} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class MeasureFigures(Result):
    """The figures of one measure.

    Attributes:
        checkpoints: in its window.
        error: of the final network, for each of `SHARES`.
        spearman_error, spearman_dispersion: rank correlations with the error and with dispersion.
        overlap_dispersion: share of the batch that dispersion would select too.
    """

    measure: str
    checkpoints: int
    error: list[MeanInterval]
    spearman_error: MeanInterval
    spearman_dispersion: MeanInterval
    overlap_dispersion: MeanInterval

    def texts(self) -> list[str]:
        """Errors, correlations and overlap, in this order."""
        others = (self.spearman_error, self.spearman_dispersion, self.overlap_dispersion)
        return [str(figure) for figure in (*self.error, *others)]


@dataclass(frozen=True, kw_only=True)
class InformativenessResult(Result):
    """Measures compared over runs.

    Attributes:
        cycles: of each run.
        samples: with a known label, of each run.
        budget: size of the batch for the overlap.
        shares: parts of the pool, most uncertain first.
        out: folder that it was written into.
    """

    state: Literal["complete"] = "complete"
    runs: list[Path]
    cycles: list[int]
    samples: list[int]
    budget: int
    shares: list[float]
    level: float
    measures: list[MeasureFigures]
    out: Path | None = field(default=None, metadata=OPTIONAL)

    @property
    def share_names(self) -> list[str]:
        """Headings of the parts of the pool."""
        return [f"top {share:.0%}" if share < 1 else "all" for share in self.shares]


@dataclass(frozen=True)
class _MeasureResult:
    """The figures of one measure in one run."""

    checkpoints: int
    errors: list[float]
    spearman_error: float
    spearman_reference: float
    overlap: float


def informativeness(
    paths: Sequence[Path],
    *,
    measures: Sequence[str] = (),
    cycle: int | None = None,
    budget: int | None = None,
    out: Path | None = None,
    pool: Path | None = None,
    display: Display | None = None,
) -> InformativenessResult:
    """Compare measures, and windows of them, by the error of the final network on their first samples.

    Args:
        paths: run directories; with several, means and intervals over them.
        measures: names, with a window if need be; by default all that a run can be reduced to, and
            windows and strides of dispersion.
        cycle: by default the last one that has been scored.
        budget: size of the batch for the overlap; by default the run's own.
        out: folder for `informativeness.json`, `.md` and `.png`; None: nothing is written.
        pool: where the pool of the runs is now, if it has moved.

    Raises:
        PoolError: the pool has no labels.
        UserError: a run has not been scored, or cannot be reduced to a measure.
    """
    display = display or Silent()
    runs = [ScoredCycle(path, cycle, pool) for path in paths]
    names = tuple(dict.fromkeys(measures)) or _all_measures(runs)
    results: dict[str, list[_MeasureResult]] = {name: [] for name in names}
    sizes = []
    for run in runs:
        display.say(f"{run.directory.path}: cycle {run.cycle.index}")
        labelled = _LabelledScores.of(run)
        sizes.append(len(labelled.wrong))
        reference = labelled.scores(_REFERENCE, display)
        k = min(budget or run.budget, len(reference))
        best = labelled.top(reference, k)
        for name in names:
            score = labelled.scores(name, display)
            results[name].append(
                _MeasureResult(
                    len(Window.of_name(name)[1].rows(run.n_rows)),
                    [error_of_top(score, labelled.wrong, share) for share in SHARES],
                    _spearman(score, labelled.wrong),
                    _spearman(score, reference),
                    len(np.intersect1d(labelled.top(score, k), best)) / k,
                )
            )
    result = InformativenessResult(
        runs=[run.directory.path for run in runs],
        cycles=[run.cycle.index for run in runs],
        samples=sizes,
        budget=budget or runs[0].budget,
        shares=list(SHARES),
        level=_LEVEL,
        measures=[_figures(name, of_runs) for name, of_runs in results.items()],
    )
    if out is None:
        return result
    text = json.dumps(result.to_record(), indent=1) + "\n"
    write_bytes(out / "informativeness.json", text.encode())
    write_bytes(out / "informativeness.md", markdown(result).encode())
    _plot(result, out / "informativeness.png")
    return replace(result, out=out)


def error_of_top(score: NDArray[np.floating[Any]], wrong: NDArray[np.bool_], share: float) -> float:
    """The error on the `share` of the samples with the largest scores.

    Samples that tie at the border count in part: the error is the mean over all ways to break the tie.

    Args:
        score: (n,) without NaN.
        wrong: (n,) whether the network errs.
        share: in (0, 1]; rounded up to whole samples.
    """
    k = max(1, int(np.ceil(share * len(score))))
    cut = np.partition(score, len(score) - k)[len(score) - k]
    above, tied = score > cut, score == cut
    return float((wrong[above].sum() + wrong[tied].mean() * (k - above.sum())) / k)


def interval(values: Iterable[float]) -> MeanInterval:
    """The mean, and its 95% interval by Student's t; no interval for a single value."""
    each = list(values)
    low, high = t_interval(each, _LEVEL) or (None, None)
    return MeanInterval(float(np.mean(each)), low, high, each)


@dataclass(frozen=True)
class _LabelledScores:
    """The samples of a cycle that were scored to the end and have a label in the pool.

    Attributes:
        index: (n,) int64.
        wrong: (n,) whether the last checkpoint predicts another class.
    """

    run: ScoredCycle
    index: NDArray[np.int64]
    wrong: NDArray[np.bool_]

    @classmethod
    def of(cls, run: ScoredCycle) -> _LabelledScores:
        if run.config.score.eliminate == "exact":
            raise ConfigError(
                f"{run.directory.path}: samples were left out (score.eliminate: exact), so no measure can be compared "
                "on all; score again with score.eliminate=none in another run directory"
            )
        assignments = run.assignments
        index, wrong = [], []
        for block in assignments.blocks:
            (label,) = run.pool.columns(block.start, block.stop, "label")
            known = assignments.eligible(block.start, block.stop) & (label >= 0)
            last = assignments.read(block.start, block.stop, [run.n_rows - 1])[0]
            index.append(block.start + np.flatnonzero(known))
            wrong.append((last != label)[known])
        labelled = np.concatenate(index)
        if not len(labelled):
            raise PoolError(
                f"{run.pool.path}: no label is known of what was scored; this comparison needs a pool with labels"
            )
        return cls(run, labelled, np.concatenate(wrong))

    def scores(self, name: str, display: Display) -> NDArray[np.float32]:
        """Of these samples: (n,) float32."""
        stored = Scores.open(self.run.scores_of(name, display))
        measure = stored.measures[0]
        return stored.read(measure, 0, stored.n_samples)[self.index]

    def top(self, score: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """The `k` with the largest scores, ties by a seeded hash: `sample_index`, (k,) int64."""
        ties = mix64("tie", self.run.config.seed, self.run.cycle.index, self.index.astype(np.uint64))
        top = TopK(k)
        top.add(Candidates(self.index, score, np.zeros(len(score), np.float16), ties))
        return top.result()[0].index


def _spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Rank correlation; 0 when one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second.astype(np.float32)) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _all_measures(runs: Sequence[ScoredCycle]) -> tuple[str, ...]:
    """The measures that all runs have, and windows of dispersion with at least two checkpoints."""
    recorded = [name for name in FROM_RECORDED if all(name in run.config.score.record for run in runs)]
    n_rows = min(run.n_rows for run in runs)
    windows = [f"{_REFERENCE}{each}" for each in _WINDOWS]
    wide = [name for name in windows if len(Window.of_name(name)[1].rows(n_rows)) > 1]
    votes = [name for name in FROM_VOTES if name != "dispersion_authors" or all(run.augmented for run in runs)]
    return (*votes, *wide, *recorded, *SEEDED)


def _figures(name: str, results: Sequence[_MeasureResult]) -> MeasureFigures:
    return MeasureFigures(
        measure=name,
        checkpoints=results[0].checkpoints,
        error=[interval(result.errors[i] for result in results) for i in range(len(SHARES))],
        spearman_error=interval(result.spearman_error for result in results),
        spearman_dispersion=interval(result.spearman_reference for result in results),
        overlap_dispersion=interval(result.overlap for result in results),
    )


def markdown(result: InformativenessResult) -> str:
    """The table in Markdown."""
    names = result.share_names
    lines = [
        f"Error of the final network on the most uncertain part of {len(result.runs)} run(s); mean "
        f"[{result.level:.0%} interval].",
        "",
        "| measure | " + " | ".join([*names, "Spearman with error", f"with {_REFERENCE}", "overlap at budget"]) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in result.measures:
        lines.append(f"| {row.measure} | " + " | ".join(row.texts()) + " |")
    return "\n".join(lines) + "\n"


def _plot(result: InformativenessResult, path: Path) -> None:
    """Error against the share of the pool, most uncertain first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares = [100 * share for share in result.shares]
    for row in result.measures:
        if row.measure in _PLOTTED:
            mean = [error.mean for error in row.error]
            (line,) = axes.plot(shares, mean, marker="o", label=row.measure)
            if row.error[0].low is not None:
                low = np.array([error.low for error in row.error], np.float64)
                high = np.array([error.high for error in row.error], np.float64)
                axes.fill_between(shares, low, high, alpha=0.15, color=line.get_color())
    axes.set(
        xscale="log", xlabel="most uncertain part of the pool, %", ylabel="error of the final network", ylim=(0, 1)
    )
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
