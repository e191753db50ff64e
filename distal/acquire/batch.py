"""Scores in, selection out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distal.acquire.k_center import k_center
from distal.acquire.strategy import Shown, strategy
from distal.acquire.topk import Candidates, TopK
from distal.artifacts.assignments import Assignments
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.config import SelectSection
from distal.config.needs import K_CENTER
from distal.errors import ConfigError, Damage
from distal.hashing import mix64, sample_keys, seed_for
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.sample_files import listed
from distal.records import STRIPE_SAMPLES, split_blocks

_Outputs = Callable[[NDArray[np.int64], Collection[str]], dict[str, NDArray[np.float32]]]
"""Of samples, ascending, what the last checkpoint gives under some names: "probabilities", "embeddings"."""


def _no_outputs(indices: NDArray[np.int64], names: Collection[str]) -> dict[str, NDArray[np.float32]]:
    raise AssertionError(f"{names} of {len(indices)} samples are needed, and there is no network")


def select(
    scores: Scores,
    assignments: Assignments,
    pool: Pool,
    config: SelectSection,
    dest: Path,
    *,
    budget: int,
    seed: int,
    cycle: int,
    last_row: int,
    outputs: _Outputs = _no_outputs,
    expected: str | None = None,
) -> Selection:
    """Choose `budget` samples by their scores, and write `selection.parquet`.

    With fewer samples that have a score, or that `max_per_group` leaves, all of them are chosen.

    Args:
        assignments: supplies the margin of `last_row`, the last checkpoint, when ties are broken by it.
        dest: `selection.parquet`.
        outputs: asks the network, when the batch is composed by more than scores.
        expected: the sha256 that the selection must have, None for any.

    Raises:
        Damage: it is another one than expected; nothing is written.
        ConfigError: the user's own strategy does not choose as it should.
    """
    own = strategy(config)
    order = Order(scores, assignments, pool, config, seed, cycle, last_row)
    chosen, decided_by = order.first(budget)
    if order.composed:
        budget = min(budget, len(chosen))
        if own is None:
            found = _asked(outputs, chosen.index, {"embeddings"})
            positions, decided_by = k_center(found["embeddings"], budget), [K_CENTER] * budget
        else:
            shown = _shown(chosen, frozenset(own.needs), assignments, pool, outputs)
            picked = own.select(shown, budget, np.random.default_rng(seed_for("strategy", seed, cycle)))
            positions, decided_by = _checked(picked, config.batch, budget, len(shown)), ["strategy"] * budget
        chosen = chosen.at(positions)

    gathered = {name: _gather(scores, name, chosen.index) for name in (*scores.measures, *scores.annotations)}
    table = _table(pool, chosen.index, config.measure, decided_by, gathered)
    selection = Selection(table)
    if expected not in (None, selection.sha256):
        raise Damage(
            f"{dest}: the selection that comes out now ({selection.sha256[:12]}) is not the one that was made "
            f"({str(expected)[:12]}); nothing was changed; put the run back from a copy"
        )
    return Selection.write(dest, table)


@dataclass(frozen=True)
class Order:
    """The order in which samples are chosen, or become candidates of a batch that is composed by more than scores.

    Attributes:
        assignments: supplies the margin of `last_row`, the last checkpoint, when ties are broken by it.
    """

    scores: Scores
    assignments: Assignments
    pool: Pool
    config: SelectSection
    seed: int
    cycle: int
    last_row: int

    @property
    def composed(self) -> bool:
        """Whether something else than this order chooses, from the candidates that come first in it."""
        return self.config.batch == K_CENTER or ":" in self.config.batch

    def n_first(self, budget: int) -> int:
        """How many that come first are the batch, or its candidates, unless groups leave fewer."""
        return math.ceil(self.config.candidate_factor * budget) if self.composed else budget

    def of(self, start: int, stop: int) -> Candidates:
        """What decides where the samples [start, stop) come."""
        config, span = self.config, (start, stop)
        score = self.scores.read(config.measure, *span)
        (keys,) = self.pool.columns(*span, "sample_key")
        if config.batch == "power":
            score = drawn(score, config.beta, mix64("power", self.seed, self.cycle, keys))
        if config.breaks_ties_by_margin:
            margin = self.assignments.read_recorded("margin", self.last_row, *span)
        else:
            margin = np.zeros(stop - start, dtype=np.float16)
        groups = None if config.max_per_group is None else _groups(self.pool, *span)
        return Candidates(np.arange(*span), score, margin, mix64("tie", self.seed, self.cycle, keys), groups)

    def first(self, budget: int) -> tuple[Candidates, list[str]]:
        """Those that come first, and what decided on each; see `TopK.result`."""
        top = TopK(self.n_first(budget), self.config.max_per_group)
        blocks_per_stripe = max(1, STRIPE_SAMPLES // self.assignments.block_size)
        for stripe in split_blocks(self.assignments.n_samples, blocks_per_stripe * self.assignments.block_size):
            top.add(self.of(stripe.start, stripe.stop))
        return top.result()


def drawn(score: NDArray[np.float32], beta: float, draws: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Keys whose largest are a sample without replacement, each s in proportion to s^beta (Kirsch et al. 2021,
    arXiv 2106.12059): beta ln s + a Gumbel variable. NaN, so never chosen, where s is 0.

    Args:
        score: (n,), at least 0, or NaN. draws: (n,) uniform 64-bit integers that decide alone.
    """
    uniform = ((draws >> np.uint64(11)) + 0.5) / 2.0**53
    positive = np.where(score > 0, score, np.nan).astype(np.float64)
    return (beta * np.log(positive) - np.log(-np.log(uniform))).astype(np.float32)


def listed_batch(pool: Pool, eligible: Eligibility, file: Path, dest: Path) -> Selection:
    """Write the samples that a file names, in its order, as the selection.

    Raises:
        SourceError: the file cannot be read, or names a sample twice.
        ConfigError: a sample is not in the pool, or cannot be chosen.
    """
    ids, indices = listed(pool, file)
    barred = []
    for start, stop, flags in eligible.stripes():
        inside = np.flatnonzero((indices >= start) & (indices < stop))
        barred += inside[~flags[indices[inside] - start]].tolist()
    if barred:
        raise ConfigError(
            f"select.from: {file}: sample {ids[min(barred)]} is labelled already, unreadable or outside pool.limit "
            f"({len(barred)} of {len(ids)} are); leave it out"
        )
    return Selection.write(dest, _table(pool, indices, "file", ["file"] * len(ids)))


def random_batch(pool: Pool, indices: NDArray[np.int64], dest: Path) -> Selection:
    """Write samples that were drawn, as a selection: the first ones that people label."""
    return Selection.write(dest, _table(pool, indices, "random", ["score"] * len(indices)))


def _table(
    pool: Pool,
    indices: NDArray[np.int64],
    measure: str,
    decided_by: Sequence[str],
    scores: dict[str, NDArray[Any]] | None = None,
) -> pa.Table:
    samples = pool.take_samples(indices, ["sample_id", "uri"])
    columns = {
        "rank": pa.array(range(len(indices)), pa.int64()),
        "sample_index": pa.array(indices, pa.int64()),
        "sample_id": samples["sample_id"],
        "uri": samples["uri"],
        **{name: pa.array(values) for name, values in (scores or {}).items()},
        "measure": pa.array([measure] * len(indices), pa.string()),
        "decided_by": pa.array(decided_by, pa.string()),
    }
    return pa.table(columns)


def _groups(pool: Pool, start: int, stop: int) -> NDArray[np.int64]:
    """A number for the group of each sample, the same in every part of the pool; -1 where there is none."""
    encoded = pool.samples(start, stop, ["group_id"])["group_id"].combine_chunks().dictionary_encode()
    numbers = (sample_keys(encoded.dictionary.to_pylist()) >> np.uint64(1)).astype(np.int64)
    places = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.append(numbers, -1)[places]


def _shown(chosen: Candidates, needs: frozenset[str], assignments: Assignments, pool: Pool, outputs: _Outputs) -> Shown:
    rows = range(assignments.n_rows)
    return Shown(
        index=chosen.index,
        sample_id=pool.take_samples(chosen.index, ["sample_id"])["sample_id"].to_pylist(),
        score=chosen.score,
        assignments=_columns(assignments, chosen.index, rows if "all" in needs else rows[-1:])
        if needs & {"all", "final"}
        else None,
        **_asked(outputs, chosen.index, needs & {"probabilities", "embeddings"}),
    )


def _asked(outputs: _Outputs, index: NDArray[np.int64], names: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """What the network gives for samples in any order."""
    if not names:
        return {}
    order = np.argsort(index)
    back = np.argsort(order)
    return {name: values[back] for name, values in outputs(index[order], names).items()}


def _columns(assignments: Assignments, index: NDArray[np.int64], rows: Sequence[int]) -> NDArray[Any]:
    """The assignments of some samples, a block at a time: (rows, n)."""
    columns = np.empty((len(rows), len(index)), assignments.dtype)
    for block in assignments.blocks:
        inside = np.flatnonzero((index >= block.start) & (index < block.stop))
        if len(inside):
            columns[:, inside] = assignments.read(block.start, block.stop, rows)[:, index[inside] - block.start]
    return columns


def _checked(picked: Any, name: str, budget: int, n: int) -> NDArray[np.int64]:
    """What a user's strategy chose, if it is as many different candidates as were asked for."""
    positions = np.asarray(picked)
    if positions.shape != (budget,) or not np.issubdtype(positions.dtype, np.integer):
        raise ConfigError(
            f"select.batch: {name}.select returned {positions.dtype} of shape {positions.shape}; it must return "
            f"{budget} positions, integers in [0, {n})"
        )
    if len(set(positions.tolist())) < budget or positions.min() < 0 or positions.max() >= n:
        raise ConfigError(
            f"select.batch: {name}.select returned a position twice, or one outside [0, {n}); each candidate can be "
            "chosen once"
        )
    return positions.astype(np.int64)


def _gather(scores: Scores, name: str, index: np.ndarray) -> np.ndarray:
    """The scores of some samples, reading the scores between the first and the last of each stripe."""
    values = np.empty(len(index), dtype=scores.read(name, 0, 0).dtype)
    stripes = index // STRIPE_SAMPLES
    for stripe in np.unique(stripes):
        at = np.flatnonzero(stripes == stripe)
        first, last = index[at].min(), index[at].max()
        values[at] = scores.read(name, int(first), int(last) + 1)[index[at] - first]
    return values
