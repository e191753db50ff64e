"""What another precision changes: some blocks of a pool are scored in fp32 too, and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from distal.acquire.topk import Candidates, TopK
from distal.artifacts.assignments import Assignments
from distal.driver.score_inputs import ScoreInputs
from distal.driver.session import Session
from distal.errors import ConfigError
from distal.records import Block, Result
from distal.reduce.measures import Votes, dispersion
from distal.score.job import AllPublished


@dataclass(frozen=True)
class PrecisionResult(Result):
    """What another precision changes.

    Attributes:
        blocks, images: that were compared.
        label_agreement: the share of assignments that are the same.
        dispersion_spearman: rank correlation of the dispersion of the samples.
        selection_overlap: the share of the batch that is the same.
    """

    blocks: int
    images: int
    label_agreement: float
    dispersion_spearman: float
    selection_overlap: float


def check_in_fp32(inputs: ScoreInputs, session: Session, n_blocks: int) -> PrecisionResult:
    """Score some blocks in fp32 too, and compare."""
    if inputs.config.score.precision == "fp32":
        raise ConfigError("--check-precision: score.precision is fp32 already")
    main = Assignments.open(inputs.cycle.assignments)
    blocks = _spread(main.blocks, n_blocks)
    inside = {block.start for block in blocks}
    n_rows = len(inputs.checkpoints.refs)
    other = Assignments.take_up(
        inputs.cycle.folder / f"precision-{n_rows}x{n_blocks}.zarr",
        n_rows=n_rows,
        n_samples=main.n_samples,
        block_size=main.block_size,
        n_classes=main.n_classes,
        eligible=lambda start, stop: main.eligible(start, stop) & (start in inside),
        recorded=main.recorded,
        on_damage=inputs.display.say,
    )
    job = replace(inputs.actor_job(other.path), precision="fp32", recorded_from=n_rows - 1)
    refs = AllPublished(inputs.checkpoints.refs)
    inputs.score(session, job, other, refs, "score in fp32")
    report = _compare(main, other, blocks, n_rows, inputs.config.budget)
    inputs.display.say(
        f"bf16 against fp32 on {report.images:,} images: {report.label_agreement:.2%} of the "
        f"labels agree, rank correlation of dispersion {report.dispersion_spearman:.4f}, "
        f"{report.selection_overlap:.1%} of the batch is the same"
    )
    return report


def _spread(blocks: list[Block], n: int) -> list[Block]:
    """At most `n` of some blocks, evenly spread."""
    places = np.linspace(0, len(blocks) - 1, min(n, len(blocks)))
    return [blocks[i] for i in sorted({int(place) for place in places})]


def _compare(main: Assignments, other: Assignments, blocks: list[Block], n_rows: int, budget: int) -> PrecisionResult:
    """What another precision changes on some blocks. Cells that elimination left out are not compared."""
    rows, agreeing, compared = range(n_rows), 0, 0
    dispersions: list[list[NDArray[np.float64]]] = [[], []]
    for block in blocks:
        votes = [each.read(block.start, block.stop, rows) for each in (main, other)]
        assigned = (votes[0] < main.n_classes) & (votes[1] < main.n_classes)
        agreeing += int((votes[0] == votes[1])[assigned].sum())
        compared += int(assigned.sum())
        complete = assigned.all(axis=0)
        for kept, vote in zip(dispersions, votes, strict=True):
            kept.append(dispersion(Votes(vote[:, complete], main.n_classes)))
    first, second = (np.concatenate(parts) for parts in dispersions)
    share = max(1, round(budget * len(first) / sum(int(main.eligible(b.start, b.stop).sum()) for b in main.blocks)))
    batches = [_top(scores, share) for scores in (first, second)]
    same_rank = bool(np.array_equal(first, second))
    return PrecisionResult(
        blocks=len(blocks),
        images=len(first),
        label_agreement=agreeing / max(1, compared),
        dispersion_spearman=1.0 if same_rank else float(spearmanr(first, second).statistic),
        selection_overlap=len(batches[0] & batches[1]) / share,
    )


def _top(scores: NDArray[np.float64], k: int) -> set[int]:
    top = TopK(k)
    n = len(scores)
    index = np.arange(n, dtype=np.int64)
    top.add(Candidates(index, scores.astype(np.float32), np.zeros(n, np.float16), index.astype(np.uint64)))
    return set(top.result()[0].index.tolist())
