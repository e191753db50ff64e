"""The paper's figure from stored trajectories, against brute force."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.compare.informativeness import SHARES, error_of_top, informativeness, interval
from distal.driver import run as driver
from distal.driver.score_folder import score_directory
from distal.errors import ConfigError, PoolError
from distal.pool import Pool
from distal.pool.build import build
from tests.helpers import foreign_config, small_config, write_checkpoints, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6), st.floats(0.01, 1))
def test_ties_at_the_border_count_as_the_mean_over_all_orders(samples: list[tuple[int, bool]], share: float) -> None:
    score = np.array([s for s, _ in samples], np.float32)
    wrong = np.array([w for _, w in samples])
    k = max(1, int(np.ceil(share * len(samples))))
    each = []
    for order in itertools.permutations(range(len(samples))):
        best = sorted(order, key=lambda i: -score[i])[:k]
        each.append(wrong[best].mean())
    assert error_of_top(score, wrong, share) == pytest.approx(np.mean(each))


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard error 1/sqrt(3), and 4.303 of them on two degrees of freedom."""
    told = interval([1.0, 2.0, 3.0])
    assert told.mean == 2
    assert told.high - 2 == pytest.approx(4.302653 / np.sqrt(3), abs=1e-5)
    assert told.low == pytest.approx(4 - told.high)
    assert interval([5.0]).to_record() == {"mean": 5.0, "low": None, "high": None, "each": [5.0]}


def test_a_run(pool: Pool, tmp_path: Path) -> None:
    for seed in (0, 1):
        driver.run(
            small_config(
                tmp_path / f"run{seed}", pool, None, "train.epochs=6", "score.record=[margin, entropy]",
                "loop.cycles=1", f"seed={seed}",
            )
        )  # fmt: skip
    runs = [tmp_path / "run0", tmp_path / "run1"]
    told = informativeness(runs, out=tmp_path / "out", budget=16).to_record()
    rows = {row["measure"]: row for row in told["measures"]}
    assert {"dispersion", "dispersion@last=0.5", "dispersion@every=2", "margin", "entropy", "random"} <= rows.keys()
    assert "dispersion@every=8" not in rows  # one checkpoint
    assert rows["dispersion@last=0.5"]["checkpoints"] == 3

    for number, path in enumerate(runs):
        cycle = Run.open(path).cycle(0)
        assignments = Assignments.open(cycle.assignments)
        votes = assignments.read(0, pool.n_samples)
        (labels,) = pool.columns(0, pool.n_samples, "label")
        eligible = assignments.eligible(0, pool.n_samples)
        wrong = (votes[-1] != labels)[eligible]
        dispersion = 1 - np.array([np.bincount(v, minlength=4).max() for v in votes[:, eligible].T]) / 6
        expected = [error_of_top(dispersion, wrong, share) for share in SHARES]
        assert [each["each"][number] for each in rows["dispersion"]["error"]] == pytest.approx(expected)
        assert rows["random"]["error"][-1]["each"][number] == pytest.approx(wrong.mean())
    assert rows["dispersion"]["overlap_dispersion"]["mean"] == 1
    assert rows["dispersion"]["spearman_dispersion"]["each"] == pytest.approx([1, 1])
    assert json.loads((tmp_path / "out" / "informativeness.json").read_text())["measures"] == told["measures"]
    assert "| dispersion@last=0.5 | 0." in (tmp_path / "out" / "informativeness.md").read_text()
    with Image.open(tmp_path / "out" / "informativeness.png") as figure:
        assert figure.size == (900, 600)
    with pytest.raises(ConfigError, match="--measure: least_confidence was not recorded"):
        informativeness(runs, measures=["least_confidence"])
    only = informativeness(runs[:1], measures=["flips@last=3"])
    assert [row.measure for row in only.measures] == ["flips@last=3"]


def test_what_cannot_be_compared(pool: Pool, cluster: str, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "known", pool, range(8))
    score_directory(
        foreign_config(tmp_path / "run", pool, tmp_path / "known", "score.eliminate=exact", "score.budget=4")
    )
    with pytest.raises(ConfigError, match="samples were left out .* score again with score.eliminate=none"):
        informativeness([tmp_path / "run"])
    source = write_source(tmp_path / "a.parquet", 60, seed=1)
    pq.write_table(pq.read_table(source).drop_columns(["label", "class_name"]), tmp_path / "b.parquet")
    bare = build(str(tmp_path / "b.parquet"), tmp_path / "bare")
    write_checkpoints(tmp_path / "ck", bare, range(2))
    score_directory(foreign_config(tmp_path / "scored", bare, tmp_path / "ck"))
    with pytest.raises(PoolError, match="no label is known of what was scored"):
        informativeness([tmp_path / "scored"])
