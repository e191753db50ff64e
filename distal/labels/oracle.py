"""The pool's own labels as the oracle, for experiments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distal.artifacts.ledger import write_labels
from distal.errors import PoolError
from distal.hashing import mix64
from distal.kernels import rank_in_group
from distal.pool import Pool
from distal.pool.eligibility import Eligibility

ANNOTATOR = "pool"


def label_from_pool(pool: Pool, indices: NDArray[np.int64], dest: Path) -> None:
    """Write the pool's labels of some samples to `dest`.

    Raises:
        PoolError: one of them has no label in the pool.
    """
    samples = pool.take_samples(indices, ["sample_id", "label"])
    labels = samples["label"].fill_null(-1).to_numpy()
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        raise PoolError(
            f"{pool.path}: sample {samples['sample_id'][int(unknown[0])].as_py()} has no label in the pool; "
            "label.oracle: pool needs a label for every image"
        )
    write_labels(dest, indices, samples["sample_id"].to_pylist(), labels, ANNOTATOR)


def choose_initial(eligibility: Eligibility, n: int, seed: int) -> NDArray[np.int64]:
    """The samples to start from: seeded, and balanced over the classes as far as they reach.

    Each class gives n/C samples; what a class lacks, and the remainder, comes from the others. Balancing reads
    labels that have not been paid for, so it is for experiments.

    Returns:
        (n,) int64 sample indices, ascending; fewer when there are not so many, or when a whole group would be too many.
    """
    index, label, draw = _best_of_each_class(eligibility, n, seed)
    order = np.lexsort((draw, rank_in_group(label, draw)))  # every class's first, then every class's second, ...
    return _whole_groups(eligibility, index[order], n, label[order])


def choose_at_random(eligibility: Eligibility, n: int, seed: int) -> NDArray[np.int64]:
    """The samples to start from when nothing is known of them: those with the smallest seeded draws.

    Returns:
        (n,) int64 sample indices, ascending; fewer when there are not so many, or when a whole group would be too many.
    """
    n_candidates = 4 * n if eligibility.pool.has_groups else n
    index, draw = np.empty(0, np.int64), np.empty(0, np.uint64)
    for start, stop, eligible in eligibility.stripes():
        (keys,) = eligibility.pool.columns(start, stop, "sample_key")
        index = np.concatenate([index, start + np.flatnonzero(eligible)])
        draw = np.concatenate([draw, mix64("initial", seed, keys[eligible])])
        best = np.lexsort((index, draw))[:n_candidates]
        index, draw = index[best], draw[best]
    return _whole_groups(eligibility, index, n)


def _whole_groups(
    eligibility: Eligibility, order: NDArray[np.int64], n: int, labels: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The first `n` of some samples, ascending; where samples have groups, only whole ones.

    Each sample in turn brings all of its group that is eligible; one that does not fit any more is passed over.

    Args:
        labels: classes of `order`, to be balanced: at first a class takes no more than its share, then what is left.
    """
    pool = eligibility.pool
    if not pool.has_groups:
        return np.sort(order[:n])
    group_of = pool.take_samples(order, ["group_id"])["group_id"].to_pylist()
    members: dict[str, list[int]] = {group: [] for group in group_of if group is not None}
    wanted = pa.array(list(members), pa.string())
    for start, stop, eligible in eligibility.stripes():
        groups = pool.samples(start, stop, ["group_id"])["group_id"]
        inside = pc.is_in(groups, value_set=wanted).to_numpy() & eligible
        for place in np.flatnonzero(inside).tolist():
            members[groups[place].as_py()].append(start + place)
    classes = [0] * len(order) if labels is None else labels.tolist()
    share = -(-n // len(set(classes))) if classes else n
    chosen: set[int] = set()
    for most in (share, n):
        taken = dict.fromkeys(classes, 0)
        for index, group, label in zip(order.tolist(), group_of, classes, strict=True):
            brought = [index] if group is None else members[group]
            if index not in chosen and len(chosen) + len(brought) <= n and taken[label] + len(brought) <= most:
                chosen.update(brought)
                taken[label] += len(brought)
    return np.array(sorted(chosen), np.int64)


def _best_of_each_class(
    eligibility: Eligibility, n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Of every class the (up to) `n` eligible samples with the smallest draw: index, label, draw."""
    index, label, draw = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64)
    for start, stop, eligible in eligibility.stripes():
        labels, keys = eligibility.pool.columns(start, stop, "label", "sample_key")
        keep = np.flatnonzero(eligible & (labels >= 0))
        index = np.concatenate([index, start + keep])
        label = np.concatenate([label, labels[keep].astype(np.int64)])
        draw = np.concatenate([draw, mix64("initial", seed, keys[keep])])
        best = rank_in_group(label, draw) < n
        index, label, draw = index[best], label[best], draw[best]
    return index, label, draw
