"""The simulation behind docs/scaling.md, against what can be worked out by hand."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from projection import Costs, simulate

from distal.score.plan import Task

FREE = Costs(images_per_s=100.0, hand_out_s=0.0, pending_s=0.0)


def no_time() -> float:
    return 0.0


@pytest.mark.parametrize("publish_every", [0.0, 7.0])
@pytest.mark.parametrize("slow", [0.0, 0.3])
@pytest.mark.parametrize("n_actors", [1, 3, 40])
def test_every_block_of_every_checkpoint_is_committed_once(n_actors: int, slow: float, publish_every: float) -> None:
    committed: Counter[tuple[int, int]] = Counter()

    def count(task: Task) -> None:
        committed.update((row, task.block) for row in task.rows)

    found = simulate(
        1050, 100, 6, n_actors, FREE, publish_every=publish_every, slow=slow, timer=no_time, on_commit=count
    )
    assert committed == Counter((row, block) for row in range(6) for block in range(11))
    assert found.images == 6 * 1050
    assert found.pairs == 66


def test_one_actor_takes_the_sum() -> None:
    found = simulate(1050, 100, 6, 1, FREE, timer=no_time)
    assert found.seconds == pytest.approx(6 * 1050 / 100)
    assert found.busy_s == pytest.approx(found.seconds)


def test_actors_beyond_the_blocks_are_of_no_use() -> None:
    few, many = (simulate(1000, 100, 1, n_actors, FREE, timer=no_time) for n_actors in (10, 40))
    assert few.seconds == many.seconds == pytest.approx(1.0)


def test_a_slow_driver_sets_the_pace() -> None:
    """Ten actors could do ten blocks in a second; the driver hands out five."""
    costs = Costs(images_per_s=100.0, hand_out_s=0.2, pending_s=0.0)
    found = simulate(20_000, 100, 1, 10, costs, timer=no_time)
    assert found.driver_s == pytest.approx(200 * 0.2)
    assert found.seconds == pytest.approx(200 * 0.2 + 1, abs=0.5)


def test_a_checkpoint_is_not_scored_before_it_is_published() -> None:
    """Two actors need 5 s for a checkpoint, and one comes every 20 s."""
    found = simulate(1000, 100, 3, 2, FREE, publish_every=20.0, timer=no_time)
    assert found.seconds == pytest.approx(45.0)
    assert found.lag_s == pytest.approx(5.0)
