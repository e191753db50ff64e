from __future__ import annotations

from pathlib import Path

from distal import inputs
from distal.cluster import Node, divide
from distal.pool import Pool
from tests.helpers import small_config

AUTO = ["pool.block_size=auto", "train.threads=auto", "score.batch_size=auto", "device=auto"]


def test_what_auto_comes_to(pool: Pool, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", pool, None, *AUTO)
    assert inputs.constants(config, pool, divide([Node(8)], "auto")) == {
        "device": "cpu",
        "pool.block_size": 128,
        "train.threads": 4,
    }
    resolved = inputs.resolved(config, inputs.constants(config, pool, divide([Node(8)], "auto")))
    assert resolved.autos() == ["score.batch_size"]  # tried on a scoring actor
    assert inputs.eligible_per_block(resolved, pool, n_labeled=24) == 114  # of the 128 images of a block
    assert inputs.constants(config, pool, divide([Node(8, gpus=2)], "auto"))["device"] == "cuda"


def test_what_is_given_is_taken(pool: Pool, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", pool, None)
    constants = inputs.constants(config, pool, divide([Node(8)], "auto"))
    assert (constants["pool.block_size"], constants["train.threads"]) == (64, 1)


def test_what_auto_came_to_holds_on_another_machine(pool: Pool, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", pool, None, *AUTO)
    tried = {"score.batch_size": 64}
    here = inputs.constants(config, pool, divide([Node(8)], "auto")) | tried
    there = inputs.constants(config, pool, divide([Node(2)], "auto"))
    assert here != there
    resolved = inputs.resolved(config, here)
    assert resolved.autos() == []
    assert (resolved.train.threads, resolved.device) == (4, "cpu")
    assert inputs.resolved(resolved, there) == resolved


def test_a_pool_is_known_by_its_content(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", pool, test_pool)
    fixed = inputs.fixed(config, pool, {"test": test_pool})
    assert inputs.content(pool).items() <= fixed.items()
    moved = small_config(tmp_path / "elsewhere", test_pool, None)
    assert inputs.fixed(moved, pool, {"test": test_pool}) == fixed
    assert inputs.fixed(config, test_pool, {"test": test_pool}) != fixed
