"""Scores in, selection out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distal.acquire.topk import Candidates, TopK
from distal.assignments import Assignments
from distal.config import SelectConfig
from distal.errors import Damage
from distal.hashing import mix64, sample_keys
from distal.pool import Pool
from distal.records import STRIPE_SAMPLES, split_blocks
from distal.scores import Scores
from distal.selection import Selection


def select(
    scores: Scores,
    assignments: Assignments,
    pool: Pool,
    config: SelectConfig,
    dest: Path,
    *,
    last_row: int,
    budget: int,
    seed: int,
    cycle: int,
    expected: str | None = None,
) -> Selection:
    """Choose the `budget` samples with the largest scores, and write `selection.parquet`.

    With fewer samples that have a score, or that `max_per_group` leaves, all of them are chosen.

    Args:
        assignments: supplies the margin of `last_row`, the last checkpoint, when ties are broken by it.
        dest: `selection.parquet`.
        expected: the sha256 that the selection must have, None for any.

    Raises:
        Damage: it is another one than expected; nothing is written.
    """
    top = TopK(budget, config.max_per_group)
    blocks_per_stripe = max(1, STRIPE_SAMPLES // assignments.block_size)
    for stripe in split_blocks(assignments.n_samples, blocks_per_stripe * assignments.block_size):
        span = (stripe.start, stripe.stop)
        score = scores.read(config.measure, *span)
        (keys,) = pool.columns(*span, "sample_key")
        if config.tie_break == "margin":
            margin = assignments.read_recorded("margin", last_row, *span)
        else:
            margin = np.zeros(len(stripe), dtype=np.float16)
        groups = None if config.max_per_group is None else _groups(pool, *span)
        top.add(Candidates(np.arange(*span), score, margin, mix64("tie", seed, cycle, keys), groups))
    chosen, decided_by = top.result()

    samples = pool.take_samples(chosen.index, ["sample_id", "uri"])
    columns = {
        "rank": pa.array(range(len(chosen)), pa.int64()),
        "sample_index": pa.array(chosen.index, pa.int64()),
        "sample_id": samples["sample_id"],
        "uri": samples["uri"],
        **{name: pa.array(_gather(scores, name, chosen.index)) for name in (*scores.measures, *scores.annotations)},
        "measure": pa.array([config.measure] * len(chosen), pa.string()),
        "decided_by": pa.array(decided_by, pa.string()),
    }
    selection = Selection(pa.table(columns))
    if expected not in (None, selection.sha256):
        raise Damage(
            f"{dest}: the selection that comes out now ({selection.sha256[:12]}) is not the one that was made "
            f"({str(expected)[:12]}); nothing was changed; put the run back from a copy"
        )
    return Selection.write(dest, selection.table)


def _groups(pool: Pool, start: int, stop: int) -> NDArray[np.int64]:
    """A number for the group of each sample, the same in every part of the pool; -1 where there is none."""
    encoded = pool.samples(start, stop, ["group_id"])["group_id"].combine_chunks().dictionary_encode()
    numbers = (sample_keys(encoded.dictionary.to_pylist()) >> np.uint64(1)).astype(np.int64)
    places = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.append(numbers, -1)[places]


def random_batch(pool: Pool, indices: NDArray[np.int64], dest: Path) -> Selection:
    """Write samples that were drawn, as a selection: the first ones that people label."""
    samples = pool.take_samples(indices, ["sample_id", "uri"])
    n = len(indices)
    columns = {
        "rank": pa.array(range(n), pa.int64()),
        "sample_index": pa.array(indices, pa.int64()),
        "sample_id": samples["sample_id"],
        "uri": samples["uri"],
        "measure": pa.array(["random"] * n, pa.string()),
        "decided_by": pa.array(["score"] * n, pa.string()),
    }
    return Selection.write(dest, pa.table(columns))


def _gather(scores: Scores, name: str, index: np.ndarray) -> np.ndarray:
    """The scores of some samples, reading the scores between the first and the last of each stripe."""
    values = np.empty(len(index), dtype=scores.read(name, 0, 0).dtype)
    stripes = index // STRIPE_SAMPLES
    for stripe in np.unique(stripes):
        at = np.flatnonzero(stripes == stripe)
        first, last = index[at].min(), index[at].max()
        values[at] = scores.read(name, int(first), int(last) + 1)[index[at] - first]
    return values
