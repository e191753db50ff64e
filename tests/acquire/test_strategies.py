"""Ways to compose a batch, from scores and from what the network gives."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distal.acquire.batch import drawn, listed_batch, select
from distal.acquire.k_center import k_center
from distal.acquire.strategy import Shown
from distal.artifacts.assignments import Assignments
from distal.artifacts.ledger import Ledger
from distal.artifacts.scores import Scores
from distal.config import SelectSection, parse
from distal.config.needs import scored_epochs
from distal.errors import ConfigError, ModelError, SourceError
from distal.hashing import mix64
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.records import split_blocks

N, BLOCK, ROWS = 240, 32, 3
HERE = __name__


class Second:
    """Every second candidate, by what it was shown."""

    needs = frozenset({"all", "probabilities"})
    seen: Shown

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        type(self).seen = candidates
        return np.arange(budget) * 2


class Short:
    needs = ("embeddings",)

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return list(range(budget - 1))


class Twice(Short):
    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return [0] * budget


class Below(Short):
    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return np.arange(budget) - 1


class Beyond(Short):
    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return len(candidates) - np.arange(budget)


class Fractions(Short):
    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return np.arange(budget) / 1.0


class Drawn:
    needs = frozenset({"final"})
    seen: Shown

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        type(self).seen = candidates
        return rng.permutation(len(candidates))[:budget]


class Wishes:
    needs = ("gradients",)

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> Any:
        return []


@pytest.fixture
def stored(pool: Pool, tmp_path: Path) -> tuple[Scores, Assignments, np.ndarray]:
    """Random votes and scores without ties; every seventh sample has no score."""
    rng = np.random.default_rng(0)
    score = rng.permutation(N).astype(np.float32) / N
    score[::7] = np.nan
    votes = rng.integers(0, 4, (ROWS, N)).astype(np.uint8)
    blocks = split_blocks(N, BLOCK)
    assignments = Assignments.create(
        tmp_path / "a.zarr", n_rows=ROWS, n_samples=N, block_size=BLOCK, n_classes=4,
        eligible=(np.ones(len(block), bool) for block in blocks),
    )  # fmt: skip
    scores = Scores.create(tmp_path / "scores.zarr", ["dispersion"], N, BLOCK)
    for block in blocks:
        span = slice(block.start, block.stop)
        for row in range(ROWS):
            assignments.write(row, block, votes[row, span])
        scores.write(block, {"dispersion": score[span]})
    return scores, assignments, score


EMBEDDINGS = np.random.default_rng(5).normal(size=(N, 6)).astype(np.float32)


def outputs(indices: np.ndarray, names: Collection[str]) -> dict[str, np.ndarray]:
    """Stands for the network: a fixed table."""
    assert (np.diff(indices) > 0).all()
    tables = {"embeddings": EMBEDDINGS, "probabilities": EMBEDDINGS[:, :4]}
    return {name: tables[name][indices] for name in names}


def choose(
    pool: Pool, stored: Any, folder: Path, budget: int = 20, *, seed: int = 4, cycle: int = 1, **config: Any
) -> list[int]:
    scores, assignments, _ = stored
    section = SelectSection(tie_break="hash", **config)
    dest = folder / "s.parquet"
    selection = select(
        scores, assignments, pool, section, dest,
        budget=budget, seed=seed, cycle=cycle, last_row=ROWS - 1, outputs=outputs,
    )  # fmt: skip
    return selection.indices.tolist()


def ranked(score: np.ndarray) -> np.ndarray:
    return np.argsort(-np.where(np.isnan(score), -1, score))


def test_k_center_chooses_among_the_best(pool: Pool, stored, tmp_path: Path) -> None:
    chosen = choose(pool, stored, tmp_path, batch="k_center", candidate_factor=3)
    best = ranked(stored[2])[:60]
    assert chosen == best[k_center(EMBEDDINGS[best], 20)].tolist()
    assert choose(pool, stored, tmp_path, batch="k_center", candidate_factor=1)[0] == best[0]
    everything = choose(pool, stored, tmp_path, budget=400, batch="k_center", candidate_factor=1)
    assert len(everything) == np.count_nonzero(~np.isnan(stored[2]))


def test_a_strategy_of_the_users_own(pool: Pool, stored, tmp_path: Path) -> None:
    chosen = choose(pool, stored, tmp_path, batch=f"{HERE}:Second", candidate_factor=2)
    best = ranked(stored[2])[:40]
    assert chosen == best[::2].tolist()
    seen = Second.seen
    assert seen.index.tolist() == best.tolist()
    assert np.array_equal(seen.score, stored[2][best])
    assert np.array_equal(seen.assignments, stored[1].read(0, N)[:, best])
    assert np.array_equal(seen.probabilities, EMBEDDINGS[best, :4])
    assert seen.embeddings is None
    assert seen.sample_id[0] == f"s1-{best[0]:05d}"


def test_a_strategy_sees_the_final_votes_of_as_many_candidates_as_were_asked_for(
    pool: Pool, stored, tmp_path: Path
) -> None:
    choose(pool, stored, tmp_path, batch=f"{HERE}:Drawn", candidate_factor=1.97)
    best = ranked(stored[2])[:40]  # 39.4 of them, rounded up
    assert Drawn.seen.index.tolist() == best.tolist()
    assert np.array_equal(Drawn.seen.assignments, stored[1].read(0, N)[-1:, best])
    assert (Drawn.seen.probabilities, Drawn.seen.embeddings) == (None, None)


@pytest.mark.parametrize("batch", [f"{HERE}:Drawn", "power"])
def test_what_is_drawn_depends_on_seed_and_cycle_alone(pool: Pool, stored, tmp_path: Path, batch: str) -> None:
    drawn = [choose(pool, stored, tmp_path, seed=s, cycle=c, batch=batch) for s, c in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] == choose(pool, stored, tmp_path, seed=0, cycle=0, batch=batch)
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Short", ConfigError, r"shape \(19,\); it must return 20 positions"),
        ("Twice", ConfigError, "a position twice"),
        ("Below", ConfigError, r"or one outside \[0, 100\)"),
        ("Beyond", ConfigError, r"or one outside \[0, 100\)"),
        ("Fractions", ConfigError, "returned float64 of shape"),
        ("Wishes", ConfigError, r"needs must be a set of some of final, all, probabilities, embeddings, got \('grad"),
        ("Nothing", ModelError, "has no function or class 'Nothing'"),
    ],
)
def test_a_strategy_that_does_not_do_as_it_should(
    pool: Pool, stored, tmp_path: Path, name: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose(pool, stored, tmp_path, batch=f"{HERE}:{name}", candidate_factor=5)
    assert not (tmp_path / "s.parquet").exists()


def test_power_draws_in_proportion_to_the_power(pool: Pool, stored, tmp_path: Path) -> None:
    score = np.array([0, 1, 2, 4, np.nan], np.float32)
    for beta in (1.0, 2.0):
        keys = drawn(np.tile(score, 20_000), beta, mix64("power", 7, np.arange(100_000))).reshape(-1, 5)
        assert np.isnan(keys[:, [0, 4]]).all()
        shares = np.bincount(np.nanargmax(keys, axis=1), minlength=5)[1:4] / len(keys)
        assert np.allclose(shares, score[1:4] ** beta / (score[1:4] ** beta).sum(), atol=0.015)
    nearly_top = choose(pool, stored, tmp_path, batch="power", beta=1e4)
    assert set(nearly_top) == set(choose(pool, stored, tmp_path))
    assert choose(pool, stored, tmp_path, batch="power") != nearly_top


def test_samples_that_a_file_names(pool: Pool, tmp_path: Path) -> None:
    eligible = Eligibility(pool, 0, None).without(Ledger(np.array([3]), np.array([0])))
    file = tmp_path / "ids.txt"

    def chosen(*ids: str) -> list[int]:
        file.write_text("\n".join(ids))
        return listed_batch(pool, eligible, file, tmp_path / "s.parquet").indices.tolist()

    assert chosen("s1-00200", "s1-00005", "s1-00010") == [200, 5, 10]
    with pytest.raises(SourceError, match="s1-00005 is there more than once"):
        chosen("s1-00005", "s1-00200", "s1-00005")
    with pytest.raises(SourceError, match=r"sample nobody is not in the pool \(1 of 2"):
        chosen("s1-00005", "nobody")
    with pytest.raises(ConfigError, match=r"s1-00003 is labelled already.*\(2 of 3 are\)"):
        chosen("s1-00005", "s1-00003", "s1-00007")


def test_a_random_part(pool: Pool) -> None:
    whole = Eligibility(pool, 0, None)
    parts = [whole.within(0.3, cycle).read(0, N) for cycle in range(40)]
    assert abs(np.mean(parts) - 0.3 * whole.count() / N) < 0.02
    assert not np.array_equal(parts[0], parts[1])
    assert np.array_equal(parts[0], np.concatenate([whole.within(0.3, 0).read(s, s + 40) for s in range(0, N, 40)]))
    assert not np.any(parts[0] & ~whole.read(0, N))


@pytest.mark.parametrize(
    ("select_section", "n_rows"),
    [
        ({"measure": "dispersion"}, 5),
        ({"measure": "flips@last=0.5"}, 5),
        ({"measure": "margin"}, 1),
        ({"measure": "random"}, 0),
        ({"measure": "random", "batch": "k_center"}, 0),
        ({"measure": "margin", "batch": "k_center"}, 1),
        ({"measure": "random", "batch": f"{HERE}:Second"}, 5),
        ({"measure": "random", "batch": f"{HERE}:Short"}, 0),
        ({"from": "ids.txt"}, 0),
        ({"measure": "dispersion", "from": "ids.txt"}, 0),
    ],
)
def test_only_what_is_needed_is_scored(select_section: dict[str, str], n_rows: int) -> None:
    tree = {"run": "r", "pool": {"path": "p"}, "train": {"epochs": 10, "checkpoint_every": 2}, "select": select_section}
    assert scored_epochs(parse(tree)) == [2, 4, 6, 8, 10][5 - n_rows :]
    assert len(scored_epochs(parse(tree, ["score.checkpoints=all"]))) == 5
