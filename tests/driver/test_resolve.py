"""A value in the place of every `auto`."""

from __future__ import annotations

from pathlib import Path

from distal.artifacts.runs import Run
from distal.cluster import Node, divide
from distal.config import Config
from distal.driver.resolve import _eligible_per_block, resolve, resolved_autos, with_recorded
from distal.pool import Pool
from distal.score.job import ActorJob, Owner
from tests.helpers import small_config

AUTO = (
    "pool.block_size=auto",
    "train.threads=auto",
    "score.batch_size=auto",
    "score.precision=auto",
    "device=auto",
)


class Trial:
    """A fleet whose actors find bf16 and batches of 64 the quickest."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int | str, int]] = []

    def choose(
        self, job: ActorJob, precision: str, batch_size: int | str, n_images: int, owner: Owner
    ) -> tuple[str, int]:
        self.calls.append((job.device, precision, batch_size, n_images))
        return "bf16" if precision == "auto" else precision, 64 if batch_size == "auto" else int(batch_size)


def on(nodes: list[Node], config: Config, pool: Pool, trial: Trial) -> Config:
    return resolve(config, pool, divide(nodes, config.device), trial, Owner(), 24)  # type: ignore[arg-type]


def test_every_auto_gets_a_value(pool: Pool, tmp_path: Path) -> None:
    config, trial = small_config(tmp_path / "run", pool, None, *AUTO), Trial()
    resolved = on([Node(8)], config, pool, trial)
    assert resolved.autos() == []
    assert resolved_autos(resolved) == {
        "device": "cpu",
        "pool.block_size": 128,
        "train.threads": 4,
        "score.precision": "bf16",
        "score.batch_size": 64,
    }
    assert trial.calls == [("cpu", "auto", "auto", 114)]  # of the 128 images of a block
    assert _eligible_per_block(resolved, pool, n_labeled=24) == 114
    assert on([Node(8, gpus=2)], config, pool, trial).device == "cuda"


def test_given_values_stay_and_nothing_is_tried(pool: Pool, tmp_path: Path) -> None:
    config, trial = small_config(tmp_path / "run", pool, None), Trial()
    resolved = on([Node(8)], config, pool, trial)
    assert (resolved.pool.block_size, resolved.train.threads) == (64, 1)
    assert trial.calls == []


def test_recorded_values_win_on_another_cluster(pool: Pool, tmp_path: Path) -> None:
    config, trial = small_config(tmp_path / "run", pool, None, *AUTO), Trial()
    here = on([Node(8)], config, pool, trial)
    assert on([Node(2)], config, pool, trial) != here
    run = Run(tmp_path / "run")
    assert with_recorded(config, run) == config
    run.begin({"seed": 0}, resolved_autos(here))
    trial.calls.clear()
    recorded = with_recorded(config, Run(tmp_path / "run"))
    assert recorded == here
    assert on([Node(2)], recorded, pool, trial) == here
    assert trial.calls == []
