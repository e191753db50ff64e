"""Assignments in, scores out, a few blocks at a time: memory does not grow with the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distal.assignments import Assignments
from distal.errors import Damage
from distal.pool import Pool
from distal.records import STRIPE_SAMPLES, Block, split_blocks
from distal.reduce.measures import FROM_RECORDED, FROM_VOTES, SEEDED, count
from distal.scores import Scores

STRIPE_BYTES = 32 * 2**20


def reduce(
    assignments: Assignments,
    pool: Pool,
    dest: Path,
    *,
    seed: int,
    cycle: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Compute every measure that the stored arrays allow.

    Args:
        dest: `scores.zarr`; an older one is replaced.
        on_progress: called with (samples done, samples).

    Raises:
        Damage: a chunk does not decode, or an eligible sample lacks an assignment.
    """
    recorded = [name for name in FROM_RECORDED if name in assignments.recorded]
    measures = [*FROM_VOTES, *recorded, *SEEDED]
    n_samples, block_size = assignments.n_samples, assignments.block_size
    scores = Scores.create(dest, measures, n_samples, block_size)
    # A stripe is a whole number of blocks: each chunk is read once, many at a time.
    samples_per_stripe = min(STRIPE_SAMPLES, STRIPE_BYTES // (assignments.n_rows * assignments.dtype.itemsize))
    blocks_per_stripe = max(1, samples_per_stripe // block_size)
    for stripe in split_blocks(n_samples, blocks_per_stripe * block_size):
        span = (stripe.start, stripe.stop)
        eligible = assignments.eligible(*span)
        votes = count(assignments.read(*span), assignments.n_classes)
        _require(eligible <= votes.complete, stripe, str(assignments.path))
        values = {name: np.where(votes.complete, measure(votes), np.nan) for name, measure in FROM_VOTES.items()}
        for name in recorded:
            last = assignments.read_recorded(name, assignments.n_rows - 1, *span)
            _require(eligible <= ~np.isnan(last), stripe, f"{assignments.path}: array {name}")
            values[name] = FROM_RECORDED[name](last)
        (keys,) = pool.columns(*span, "sample_key")
        for name, draw in SEEDED.items():
            values[name] = np.where(eligible, draw(seed, cycle, keys), np.nan)
        scores.write(stripe, values)
        on_progress(stripe.stop, n_samples)
    return scores


def _require(there: NDArray[np.bool_], stripe: Block, what: str) -> None:
    """Raise Damage naming the first sample of a stripe whose value is not there."""
    lacking = np.flatnonzero(~there)
    if len(lacking):
        raise Damage(f"{what}: sample {stripe.start + lacking[0]} is eligible and has no value")
