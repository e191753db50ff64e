"""A run that waits for labels, without anything having been trained: what imports and exports need of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distal.acquire.batch import random_batch
from distal.artifacts.runs import Run
from distal.artifacts.stages import SelectOutputs
from distal.labels.answers import Policy
from distal.labels.waiting import Waiting
from distal.pool import Pool


def waiting_run(
    path: Path,
    pool: Pool,
    asked: Sequence[int],
    *,
    needed: int | None = None,
    policy: Policy = "majority",
    workers: int = 1,
) -> Run:
    """A run that has asked for the first labels of some samples."""
    run = Run(path)
    run.begin({}, {})
    random_batch(pool, np.array(asked, np.int64), run.initial_selection)
    waiting = Waiting(
        -1,
        run.initial_selection,
        pool.classes or (),
        len(asked) if needed is None else needed,
        workers,
        policy,
        pool.path,
        pool.content_sha256,
    )
    waiting.write(run)
    return run


def next_cycle(run: Run, waiting: Waiting, pool: Pool, asked: Sequence[int], needed: int = 0) -> Waiting:
    """The next batch, as if a cycle had been trained and had selected it."""
    cycle = run.cycle(waiting.cycle + 1)
    selection = random_batch(pool, np.array(asked, np.int64), cycle.selection)
    cycle.complete("select", {}, SelectOutputs.of(selection), 0.0)
    later = Waiting(
        cycle.index, cycle.selection, waiting.classes, needed, 0, waiting.policy, waiting.pool, waiting.pool_sha256
    )
    later.write(run)
    return later
