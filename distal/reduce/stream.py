"""Assignments in, scores out, a few blocks at a time: memory does not grow with the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distal import machine
from distal.artifacts.assignments import Assignments
from distal.artifacts.scores import Scores
from distal.errors import Damage
from distal.pool import Pool
from distal.records import Block, Window, split_blocks
from distal.reduce.measures import ANNOTATIONS, FROM_RECORDED, FROM_VOTES, SEEDED, Votes

STRIPE_BYTES = 16 * 2**20  # of assignments at most in the stripe of one worker
_MAX_SAMPLES = 2**18  # and samples, which take `_SAMPLE_BYTES` each

_SAMPLE_BYTES = 130  # that counts and scores of a sample take; measured, tests/reduce/test_stream.py
_MEMORY_SHARE = 4  # a part of this many of the memory is for threads


class Work(Protocol):
    """Does a piece of work for a stripe; doing it twice writes the same bytes.

    Attributes:
        n_bytes: memory that it takes.
    """

    @property
    def n_bytes(self) -> int:
        """See above."""
        ...

    def __call__(self, stripe: Block) -> Block:
        """Returns the stripe."""
        ...


Mapper = Callable[[Work, Sequence[Block]], Iterable[Block]]


def in_threads(work: Work, stripes: Sequence[Block]) -> Iterator[Block]:
    """Do `work` for every stripe in `n_threads`: decoding and counting let go of the GIL."""
    with ThreadPoolExecutor(n_threads(work.n_bytes)) as threads:
        yield from threads.map(work, stripes)


def n_threads(n_bytes: int) -> int:
    """As many as this process may use CPUs, and as fit into a quarter of the memory that it may use.

    Args:
        n_bytes: memory that one of them takes.
    """
    return max(1, min(machine.cpus(), machine.memory_bytes() // _MEMORY_SHARE // max(1, n_bytes)))


def stripe_samples(n_rows: int, itemsize: int, block_size: int) -> int:
    """Samples looked at together: a whole number of blocks, so that each chunk is read once."""
    samples = min(_MAX_SAMPLES, STRIPE_BYTES // max(1, n_rows * itemsize))
    return max(1, samples // block_size) * block_size


def stripe_bytes(n_rows: int, itemsize: int, samples: int) -> int:
    """Memory that a stripe takes: its assignments twice, row by row and joined, and what is computed of them."""
    return samples * (2 * n_rows * itemsize + _SAMPLE_BYTES)


@dataclass(frozen=True)
class Reduction:
    """What to compute, of what; picklable.

    Attributes:
        measures: names of measures, with a window of `rows` if need be; those of recorded arrays are of the last row.
        rows: rows of the assignments, ascending.
        annotate: whether to keep the most frequent class and the next one, too.
        remaining: of each block, how many samples were scored to the end; None: all that are eligible.
        seed, cycle: for `random`.
    """

    assignments: Assignments
    pool: Pool
    measures: tuple[str, ...]
    rows: Sequence[int]
    annotate: bool = False
    remaining: tuple[int, ...] | None = None
    seed: int = 0
    cycle: int = 0


def reduce(
    reduction: Reduction,
    dest: Path,
    *,
    mapper: Mapper = in_threads,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Compute some measures of every sample.

    Args:
        dest: `scores.zarr`; an older one is replaced.
        mapper: does a piece of work for every stripe and yields the stripes, in any order.
        on_progress: called with (samples done, samples).

    Raises:
        Damage: a chunk does not decode, or an eligible sample lacks an assignment.
    """
    assignments = reduction.assignments
    n_samples, block_size = assignments.n_samples, assignments.block_size
    annotations = tuple(ANNOTATIONS) if reduction.annotate else ()
    scores = Scores.create(dest, reduction.measures, n_samples, block_size, annotations)
    samples = stripe_samples(len(reduction.rows), assignments.dtype.itemsize, block_size)
    stripes = split_blocks(n_samples, samples)
    done = 0
    for stripe in mapper(_Stripe(reduction, scores), stripes):
        done += len(stripe)
        on_progress(done, n_samples)
    return scores


@dataclass(frozen=True)
class _Stripe:
    """Reduces one stripe. Doing it twice writes the same bytes."""

    reduction: Reduction
    scores: Scores

    @property
    def n_bytes(self) -> int:
        """Memory that the largest one takes."""
        assignments, n_rows = self.reduction.assignments, len(self.reduction.rows)
        samples = stripe_samples(n_rows, assignments.dtype.itemsize, assignments.block_size)
        return stripe_bytes(n_rows, assignments.dtype.itemsize, min(samples, assignments.n_samples))

    def __call__(self, stripe: Block) -> Block:
        values = _reduced(self.reduction, stripe)
        self.scores.write(stripe, values)
        return stripe


def _reduced(reduction: Reduction, stripe: Block) -> dict[str, NDArray[Any]]:
    assignments, span = reduction.assignments, (stripe.start, stripe.stop)
    eligible = assignments.eligible(*span)
    values: dict[str, NDArray[Any]] = {}
    scored = eligible
    windows = {name: Window.of_name(name) for name in reduction.measures}
    from_votes = [name for name, (measure, _) in windows.items() if measure in FROM_VOTES]
    if from_votes or reduction.annotate or reduction.remaining is not None:
        read = assignments.read(*span, reduction.rows)
        votes = {Window(): Votes(read, assignments.n_classes)}
        scored = _scored(reduction, stripe, eligible, votes[Window()].complete)
        for name in from_votes:
            measure, window = windows[name]
            if window not in votes:
                votes[window] = Votes(read[window.rows(len(read))], assignments.n_classes)
            values[name] = np.where(scored, FROM_VOTES[measure](votes[window]), np.nan)
        for name in ANNOTATIONS if reduction.annotate else ():
            values[name] = np.where(scored, ANNOTATIONS[name](votes[Window()]), -1)
    for name in reduction.measures:
        if name in FROM_RECORDED:
            last = assignments.read_recorded(name, reduction.rows[-1], *span)
            _require(scored <= ~np.isnan(last), stripe, f"{assignments.path}: array {name}")
            values[name] = FROM_RECORDED[name](last)
        elif name in SEEDED:
            (keys,) = reduction.pool.columns(*span, "sample_key")
            values[name] = np.where(scored, SEEDED[name](reduction.seed, reduction.cycle, keys), np.nan)
    return values


def _scored(
    reduction: Reduction, stripe: Block, eligible: NDArray[np.bool_], complete: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The samples with an assignment at every row; an eligible one that lacks one must have been left out."""
    if reduction.remaining is None:
        _require(eligible <= complete, stripe, str(reduction.assignments.path))
        return eligible
    scored = eligible & complete
    block_size = reduction.assignments.block_size
    for start in range(stripe.start, stripe.stop, block_size):
        block = start // block_size
        n = int(scored[start - stripe.start :][:block_size].sum())
        if n != reduction.remaining[block]:
            raise Damage(
                f"{reduction.assignments.path}: block {block} has {n} samples with a value at every checkpoint, and "
                f"{reduction.remaining[block]} were not left out"
            )
    return scored


def _require(there: NDArray[np.bool_], stripe: Block, what: str) -> None:
    """Raise Damage naming the first sample of a stripe whose value is not there."""
    lacking = np.flatnonzero(~there)
    if len(lacking):
        raise Damage(f"{what}: sample {stripe.start + lacking[0]} is eligible and has no value")
