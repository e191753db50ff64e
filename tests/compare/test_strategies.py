"""Strategies x seeds: what is shared, what is scored, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from distal import Run
from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.compare.strategies import compare, first_config, strategy_config
from distal.config import CompareConfig, load
from distal.config.needs import scored_epochs
from distal.errors import ConfigError
from distal.pool import Pool
from distal.report.verify import verify
from tests.helpers import SMALL_RUN

pytestmark = pytest.mark.usefixtures("stand_ins")

STRATEGIES = {
    "random": {"measure": "random"},
    "entropy": {"measure": "entropy"},
    "dispersion": {"measure": "dispersion"},
    "covering": {"measure": "flips", "batch": "k_center", "tie_break": "hash"},
}


def config(
    tmp_path: Path, pool: Pool, test: Pool | None, *overrides: str, **strategies: dict[str, str]
) -> CompareConfig:
    tree = {
        **SMALL_RUN,
        "run": str(tmp_path / "all"),
        "pool": {**SMALL_RUN["pool"], "path": str(pool.path)},
        "eval": {"test": str(test.path) if test else None},
        "compare": {"seeds": 2, "strategies": strategies or STRATEGIES},
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load(file, overrides, CompareConfig)


def test_a_strategy_scores_what_it_needs_and_the_first_cycle_what_any_does(
    pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    whole = config(tmp_path, pool, test_pool)
    each = {name: strategy_config(whole, name, 3, tmp_path / name) for name in STRATEGIES}
    assert {name: len(scored_epochs(one)) for name, one in each.items()} == {
        "random": 0, "entropy": 1, "dispersion": 3, "covering": 3,
    }  # fmt: skip
    assert {name: one.score.record for name, one in each.items()} == {
        "random": (), "entropy": ("margin", "entropy"), "dispersion": ("margin",), "covering": (),
    }  # fmt: skip
    assert {one.seed for one in each.values()} == {3}
    assert not each["random"].loop.balance
    first = first_config(whole, 3, tmp_path / "first")
    assert first.loop.cycles == 1
    assert len(scored_epochs(first)) == 3
    assert set(first.score.record) == {"margin", "entropy"}
    few = config(tmp_path, pool, test_pool, random=STRATEGIES["random"], entropy=STRATEGIES["entropy"])
    assert len(scored_epochs(first_config(few, 0, tmp_path))) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.references=[random, best]"], "best is none of the strategies, covering"),
        (["compare.metric=ece"], "ece is not in eval.metrics, accuracy"),
        (["label.oracle=files"], "label.oracle must be pool"),
        (["compare.strategies={a: {measure: random}}"], "at least 2 items"),
        (["compare.strategies={random: {measure: random}, a b: {measure: entropy}}"], "pattern"),
        (["compare.strategies={random: {measure: random}, entropy: {measure: dispersio}}"], "'dispersio' is unknown"),
        (["compare.strategies={random: {measure: random}, first: {measure: entropy}}"], "'first' is the folder"),
        (["compare.seeds=0"], "greater than or equal to 1, got 0"),
    ],
)
def test_mistakes_get_one_line(pool: Pool, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, pool, None, *overrides)


def test_without_test_images_there_is_nothing_to_compare(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.test: null: strategies are compared on test images"):
        compare(config(tmp_path, pool, None))


@pytest.mark.slow
def test_a_comparison(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """Paired, shared, resumable, and told truthfully."""
    whole = config(tmp_path, pool, test_pool)
    told = compare(whole)
    assert told.state == "complete"
    names = ("report.md", "results.csv", "comparison.json", "curves.png", "curves.svg", "classes.png")
    assert all((tmp_path / "all" / name).stat().st_size for name in names)
    rows = pq.read_table(tmp_path / "all/results.parquet").to_pylist()
    assert len(rows) == 2 * len(STRATEGIES) * 2
    accuracy = {(row["seed"], row["strategy"], row["cycle"]): row["accuracy"] for row in rows}
    for seed in (0, 1):
        folder = tmp_path / "all/seeds" / str(seed)
        assert len({accuracy[seed, name, 0] for name in STRATEGIES}) == 1
        runs = {name: Run.open(folder / name) for name in STRATEGIES}
        assert len({checkpoints.read(run.cycle(0).checkpoints, 2).sha256 for run in runs.values()}) == 1
        assert len({tuple(run.ledger(before=0).indices.tolist()) for run in runs.values()}) == 1
        batches = {name: run.cycle(0).chosen().sha256 for name, run in runs.items()}
        assert len(set(batches.values())) == len(STRATEGIES)
        assert [Assignments.open(run.cycle(1).assignments).n_rows for run in runs.values()] == [0, 1, 3, 3]
        assert all(verify(run.path).state == "sound" for run in runs.values())
        # A run on its own, which shares nothing, chooses the same.
        alone = strategy_config(whole, "dispersion", seed, tmp_path / f"alone-{seed}")
        from distal import run as run_alone

        run_alone(alone)
        for index in (0, 1):
            assert Run.open(alone.run).cycle(index).chosen().sha256 == runs["dispersion"].cycle(index).chosen().sha256
    scored = {(row["strategy"], row["cycle"]): row["images_scored"] for row in rows if row["seed"] == 0}
    assert scored["random", 0] == 0
    assert scored["entropy", 0] == 238 - 24
    assert scored["dispersion", 0] == 3 * (238 - 24)
    assert all("not tested: needs" in test.verdict for test in told.tests.each)

    # Cut off in the middle of beginning a run, and in its second cycle: the same again.
    before = json.loads((tmp_path / "all/comparison.json").read_text())
    cut = tmp_path / "all/seeds/1/entropy"
    (cut / "run.yaml").unlink()
    for name in ("train.json", "score.json", "select.json"):
        (tmp_path / "all/seeds/1/random/cycles/001" / name).unlink()
    again = compare(whole)
    assert json.loads((tmp_path / "all/comparison.json").read_text())["aubc"] == before["aubc"]
    assert np.isfinite(again.aubc[0].mean)
