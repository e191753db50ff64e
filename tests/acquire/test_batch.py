from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distal.acquire import batch
from distal.acquire.batch import select
from distal.artifacts.assignments import Assignments
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.config import SelectSection
from distal.errors import Damage
from distal.hashing import mix64, sample_keys
from distal.pool import Pool
from distal.records import split_blocks

N, BLOCK = 240, 32


@pytest.fixture
def stored(pool: Pool, tmp_path: Path) -> tuple[Scores, Assignments, np.ndarray, np.ndarray]:
    """Scores with five values and margins with three; every seventh sample has no score."""
    rng = np.random.default_rng(0)
    score = (rng.integers(0, 5, N) / 5).astype(np.float32)
    score[::7] = np.nan
    margin = (rng.integers(0, 3, N) / 4).astype(np.float16)
    assignments = Assignments.create(
        tmp_path / "a.zarr", n_rows=1, n_samples=N, block_size=BLOCK, n_classes=4,
        eligible=(np.ones(len(block), bool) for block in split_blocks(N, BLOCK)), recorded=("margin",),
    )  # fmt: skip
    scores = Scores.create(tmp_path / "scores.zarr", ["dispersion", "flips"], N, BLOCK)
    for block in assignments.blocks:
        span = slice(block.start, block.stop)
        assignments.write(0, block, np.zeros(len(block), np.uint8), {"margin": margin[span]})
        scores.write(block, {"dispersion": score[span], "flips": score[span] * 2})
    return scores, assignments, score, margin


def ids(n: int = N) -> list[str]:
    return [f"s1-{i:05d}" for i in range(n)]


@pytest.mark.parametrize("stripe", [BLOCK, 3 * BLOCK, 10**6])
@pytest.mark.parametrize("tie_break", ["margin", "hash"])
def test_selection_is_the_order_of_promise_4(
    pool: Pool, tmp_path: Path, stored, monkeypatch, stripe: int, tie_break: str
) -> None:
    scores, assignments, score, margin = stored
    monkeypatch.setattr(batch, "STRIPE_SAMPLES", stripe)
    config = SelectSection(tie_break=tie_break)
    selection = select(
        scores, assignments, pool, config, tmp_path / "s.parquet", last_row=0, budget=50, seed=9, cycle=2
    )
    hashes = mix64("tie", 9, 2, sample_keys(ids()))
    order = sorted(
        (i for i in range(N) if score[i] == score[i]),
        key=lambda i: (-score[i], margin[i] if tie_break == "margin" else 0, hashes[i], i),
    )
    assert selection.indices.tolist() == order[:50]
    table = Selection.read(tmp_path / "s.parquet").table
    assert table.column_names == [
        "rank", "sample_index", "sample_id", "uri", "dispersion", "flips", "measure", "decided_by",
    ]  # fmt: skip
    assert table["rank"].to_pylist() == list(range(50))
    assert table["sample_id"].to_pylist() == [ids()[i] for i in order[:50]]
    assert np.array_equal(table["dispersion"].to_numpy(), score[order[:50]])
    assert np.array_equal(table["flips"].to_numpy(), 2 * score[order[:50]])
    assert set(table["measure"].to_pylist()) == {"dispersion"}
    assert selection.sha256 == Selection.read(tmp_path / "s.parquet").sha256


def test_another_seed_or_cycle_breaks_ties_in_another_way(pool: Pool, tmp_path: Path, stored) -> None:
    scores, assignments, _, _ = stored

    def chosen(seed: int, cycle: int) -> list[int]:
        selection = select(
            scores, assignments, pool, SelectSection(), tmp_path / "s", last_row=0, budget=20, seed=seed, cycle=cycle
        )
        return selection.indices.tolist()

    assert chosen(0, 0) == chosen(0, 0)
    assert chosen(0, 0) != chosen(0, 1)
    assert chosen(0, 0) != chosen(1, 0)


def test_more_than_there_is(pool: Pool, tmp_path: Path, stored) -> None:
    scores, assignments, score, _ = stored
    selection = select(
        scores, assignments, pool, SelectSection(), tmp_path / "s", last_row=0, budget=1000, seed=0, cycle=0
    )
    assert len(selection) == np.count_nonzero(~np.isnan(score))
    assert selection.tie_share == 0


def test_tie_share(pool: Pool, tmp_path: Path, stored) -> None:
    scores, assignments, score, _ = stored
    selection = select(
        scores, assignments, pool, SelectSection(), tmp_path / "s", last_row=0, budget=50, seed=0, cycle=0
    )
    cut = selection.table["dispersion"].to_numpy()[-1]
    above = np.count_nonzero(score > cut)
    assert selection.tie_share == (50 - above) / 50


def test_ties_are_broken_by_the_margin_of_the_last_checkpoint(pool: Pool, tmp_path: Path) -> None:
    margin = np.random.default_rng(1).permutation(2 * N).reshape(2, N).astype(np.float16)
    assignments = Assignments.create(
        tmp_path / "a.zarr", n_rows=2, n_samples=N, block_size=BLOCK, n_classes=4,
        eligible=(np.ones(len(block), bool) for block in split_blocks(N, BLOCK)), recorded=("margin",),
    )  # fmt: skip
    scores = Scores.create(tmp_path / "scores.zarr", ["dispersion"], N, BLOCK)
    for block in assignments.blocks:
        span = slice(block.start, block.stop)
        for row in range(2):
            assignments.write(row, block, np.zeros(len(block), np.uint8), {"margin": margin[row, span]})
        scores.write(block, {"dispersion": np.ones(len(block), np.float32)})
    for row in range(2):
        selection = select(
            scores, assignments, pool, SelectSection(), tmp_path / "s", last_row=row, budget=30, seed=0, cycle=0
        )
        assert selection.indices.tolist() == margin[row].argsort()[:30].tolist()


def test_another_selection_than_was_made_is_damage(pool: Pool, tmp_path: Path, stored) -> None:
    scores, assignments, _, _ = stored
    again = {"last_row": 0, "budget": 20, "seed": 0, "cycle": 0}
    made = select(scores, assignments, pool, SelectSection(), tmp_path / "s", **again)
    assert select(scores, assignments, pool, SelectSection(), tmp_path / "t", expected=made.sha256, **again) == made
    with pytest.raises(Damage, match="is not the one that was made"):
        select(scores, assignments, pool, SelectSection(), tmp_path / "u", expected="0" * 64, **again)
    assert not (tmp_path / "u").exists()
