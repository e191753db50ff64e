"""What another precision changes: some blocks of a pool scored in fp32, too, and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from distal.acquire.topk import Candidates, TopK
from distal.artifacts.assignments import Assignments
from distal.records import Block, Result
from distal.reduce.measures import Votes, dispersion


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


def spread(blocks: list[Block], n: int) -> list[Block]:
    """At most `n` of some blocks, evenly spread."""
    places = np.linspace(0, len(blocks) - 1, min(n, len(blocks)))
    return [blocks[i] for i in sorted({int(place) for place in places})]


def compare(main: Assignments, other: Assignments, blocks: list[Block], n_rows: int, budget: int) -> PrecisionResult:
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
