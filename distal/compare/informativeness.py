"""How informative is what each measure ranks first? Told from stored trajectories, without any retraining.

For samples whose label is known, the final network's error on the most uncertain part of the pool: a measure that
finds what the network gets wrong has a large one (the paper's own figure, arXiv 2107.14707).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from distal.records import JsonObject, Window
from distal.reduce.measures import FROM_RECORDED, FROM_VOTES, SEEDED
from distal.storage import write_bytes

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
LEVEL = 0.95
WINDOWS = ("@last=0.75", "@last=0.5", "@last=0.25", "@every=2", "@every=4", "@every=8")
REFERENCE = "dispersion"
PLOTTED = ("dispersion", "dispersion@last=0.5", "vote_entropy", "margin", "entropy", "random")


@dataclass(frozen=True)
class _Told:
    """What one run tells of one measure."""

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
) -> JsonObject:
    """Compare measures, and windows of them, by the error of the final network on what they rank first.

    Args:
        paths: run directories; with several, means and intervals over them.
        measures: names, with a window if need be; by default all that a run can be reduced to, and windows and strides
            of dispersion.
        cycle: by default the last one that has been scored.
        budget: samples of which the overlap is told; by default the run's own.
        out: folder for `informativeness.json`, `.md` and `.png`; None: nothing is written.
        pool: where the pool of the runs is now, if it has moved.

    Returns:
        `{"runs", "shares", "measures": [{"measure", "checkpoints", "error": [...], ...}]}`; each figure is
        `{"mean", "low", "high", "each"}`, the interval at 95% by Student's t, None for one run.

    Raises:
        PoolError: the pool has no labels.
        UserError: a run has not been scored, or cannot be reduced to a measure.
    """
    display = display or Silent()
    runs = [ScoredCycle(path, cycle, pool) for path in paths]
    names = tuple(dict.fromkeys(measures)) or _all_measures(runs)
    told: dict[str, list[_Told]] = {name: [] for name in names}
    sizes = []
    for run in runs:
        display.say(f"{run.directory.path}: cycle {run.cycle.index}")
        known = _Known.of(run)
        sizes.append(len(known.wrong))
        reference = known.scores(REFERENCE, display)
        k = min(budget or run.budget, len(reference))
        best = known.top(reference, k)
        for name in names:
            score = known.scores(name, display)
            told[name].append(
                _Told(
                    len(Window.of_name(name)[1].rows(run.n_rows)),
                    [error_of_top(score, known.wrong, share) for share in SHARES],
                    _spearman(score, known.wrong),
                    _spearman(score, reference),
                    len(np.intersect1d(known.top(score, k), best)) / k,
                )
            )
    result: JsonObject = {
        "state": "complete",
        "runs": [str(run.directory.path) for run in runs],
        "cycles": [run.cycle.index for run in runs],
        "samples": sizes,
        "budget": budget or runs[0].budget,
        "shares": list(SHARES),
        "level": LEVEL,
        "measures": [_row(name, each) for name, each in told.items()],
    }
    if out is not None:
        write_bytes(out / "informativeness.json", (json.dumps(result, indent=1) + "\n").encode())
        write_bytes(out / "informativeness.md", markdown(result).encode())
        _plot(result, out / "informativeness.png")
        result["out"] = str(out)
    return result


def error_of_top(score: NDArray[np.floating[Any]], wrong: NDArray[np.bool_], share: float) -> float:
    """The error on the `share` of the samples with the largest scores.

    Of samples that tie at the border, each counts with the part that is needed of them: the mean over all ways to break
    the tie.

    Args:
        score: (n,) without NaN.
        wrong: (n,) whether the network is.
        share: in (0, 1]; rounded up to whole samples.
    """
    k = max(1, int(np.ceil(share * len(score))))
    cut = np.partition(score, len(score) - k)[len(score) - k]
    above, tied = score > cut, score == cut
    return float((wrong[above].sum() + wrong[tied].mean() * (k - above.sum())) / k)


def interval(values: Iterable[float]) -> JsonObject:
    """Mean, and where it lies with a confidence of 95% by Student's t; no interval for a single value."""
    each = list(values)
    low, high = t_interval(each, LEVEL) or (None, None)
    return {"mean": float(np.mean(each)), "low": low, "high": high, "each": each}


@dataclass(frozen=True)
class _Known:
    """The samples of a cycle that were scored to the end and whose label the pool knows.

    Attributes:
        index: (n,) int64.
        wrong: (n,) whether the last checkpoint predicts another class.
    """

    run: ScoredCycle
    index: NDArray[np.int64]
    wrong: NDArray[np.bool_]

    @classmethod
    def of(cls, run: ScoredCycle) -> _Known:
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
        found = np.concatenate(index)
        if not len(found):
            raise PoolError(
                f"{run.pool.path}: no label is known of what was scored; this comparison needs a pool with labels"
            )
        return cls(run, found, np.concatenate(wrong))

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
    """Rank correlation; 0 when one of them is constant, of which nothing can be told."""
    if np.ptp(first) == 0 or np.ptp(second.astype(np.float32)) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _all_measures(runs: Sequence[ScoredCycle]) -> tuple[str, ...]:
    """What all runs can be reduced to, and windows of dispersion that have at least two checkpoints."""
    recorded = [name for name in FROM_RECORDED if all(name in run.config.score.record for run in runs)]
    n_rows = min(run.n_rows for run in runs)
    windows = [f"{REFERENCE}{each}" for each in WINDOWS]
    wide = [name for name in windows if len(Window.of_name(name)[1].rows(n_rows)) > 1]
    votes = [name for name in FROM_VOTES if name != "dispersion_authors" or all(run.augmented for run in runs)]
    return (*votes, *wide, *recorded, *SEEDED)


def _row(name: str, told: Sequence[_Told]) -> JsonObject:
    return {
        "measure": name,
        "checkpoints": told[0].checkpoints,
        "error": [interval(each.errors[i] for each in told) for i in range(len(SHARES))],
        "spearman_error": interval(each.spearman_error for each in told),
        "spearman_dispersion": interval(each.spearman_reference for each in told),
        "overlap_dispersion": interval(each.overlap for each in told),
    }


def markdown(result: JsonObject) -> str:
    """The table, as kept beside the figures."""
    names = share_names(result)
    lines = [
        f"Error of the final network on the most uncertain part of {len(result['runs'])} run(s); mean "
        f"[{result['level']:.0%} interval].",
        "",
        "| measure | " + " | ".join([*names, "Spearman with error", f"with {REFERENCE}", "overlap at budget"]) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in result["measures"]:
        lines.append(f"| {row['measure']} | " + " | ".join(figure_texts(row)) + " |")
    return "\n".join(lines) + "\n"


def _plot(result: JsonObject, path: Path) -> None:
    """Error against the share of the pool, most uncertain first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares = [100 * share for share in result["shares"]]
    for row in result["measures"]:
        if row["measure"] in PLOTTED:
            (line,) = axes.plot(shares, [each["mean"] for each in row["error"]], marker="o", label=row["measure"])
            if row["error"][0]["low"] is not None:
                low, high = ([each[end] for each in row["error"]] for end in ("low", "high"))
                axes.fill_between(shares, low, high, alpha=0.15, color=line.get_color())
    axes.set(
        xscale="log", xlabel="most uncertain part of the pool, %", ylabel="error of the final network", ylim=(0, 1)
    )
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def share_names(result: JsonObject) -> list[str]:
    """Headings of the parts of the pool that errors are told of."""
    return [f"top {share:.0%}" if share < 1 else "all" for share in result["shares"]]


def figure_texts(row: JsonObject) -> list[str]:
    """What is told of a measure: errors, correlations and overlap, in this order."""
    figures = [*row["error"], row["spearman_error"], row["spearman_dispersion"], row["overlap_dispersion"]]
    return [_figure_text(each) for each in figures]


def _figure_text(figure: JsonObject) -> str:
    """A mean with its interval, if there is one."""
    text = f"{figure['mean']:.3f}"
    return text if figure["low"] is None else f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]"
