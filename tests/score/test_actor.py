"""One scoring actor, called as an object."""

from __future__ import annotations

from pathlib import Path

from distal.artifacts import checkpoints
from distal.pool import Pool
from distal.score.actor import Scorer
from tests.score.test_loop import ROWS, folder_of, prepare, score_block


def identity(path: Path) -> tuple[int, int]:
    """Another one when the file is written again, also with the same bytes: a file is replaced whole."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def test_a_committed_block_is_neither_scored_nor_written_again(pool: Pool, tmp_path: Path) -> None:
    job, assignments = prepare(tmp_path, pool)
    scorer = Scorer("alone", 2**20, threads=1)
    block = assignments.blocks[1]
    n_eligible = int(assignments.eligible(block.start, block.stop).sum())
    refs = tuple(checkpoints.read(folder_of(job), row) for row in range(ROWS))
    assert score_block(scorer, job, block, refs[1:2]) == n_eligible
    chunk = assignments.chunk("assignments", 1, block)
    before = identity(chunk)
    n_batches = scorer._load(refs[1]).n_batches

    assert score_block(scorer, job, block, refs) == (ROWS - 1) * n_eligible
    assert identity(chunk) == before
    assert scorer._load(refs[1]).n_batches == n_batches
    every = [identity(assignments.chunk("assignments", row, block)) for row in range(ROWS)]
    assert score_block(scorer, job, block, refs) == 0
    assert [identity(assignments.chunk("assignments", row, block)) for row in range(ROWS)] == every

    last = assignments.chunk("margin", ROWS - 1, block)
    last.unlink()  # recorded values that are missing are made again, and only theirs
    assert score_block(scorer, job, block, refs) == n_eligible
    assert last.exists()
    assert [identity(assignments.chunk("assignments", row, block)) for row in range(ROWS - 1)] == every[:-1]
