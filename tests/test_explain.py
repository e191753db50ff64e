from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distal import driver
from distal.assignments import Assignments
from distal.errors import RunConflict, UserError
from distal.explain import diff, explain
from distal.pool import Pool
from distal.runs import Run
from distal.scores import Scores
from tests.helpers import small_config


@pytest.fixture(scope="module")
def run(small_run: Path) -> Path:
    return small_run


def test_the_timeline_of_every_sample(run: Path, pool: Pool) -> None:
    """Against the arrays themselves: labels, scores, rank, and whether it was chosen."""
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    cycle = Run.open(run).cycle(0)
    votes = Assignments.open(cycle.assignments).read(0, 240)
    scores = Scores.open(cycle.scores).read("dispersion", 0, 240)
    chosen = set(cycle.chosen().sample_ids)
    reasons = set()
    for index in (*cycle.chosen().indices[:2].tolist(), *range(0, 240, 17), 7):
        told = explain(run, ids[index])["cycles"][0]
        assert told["labels"] == [None if v == 255 else pool.classes[v] for v in votes[:, index]]  # type: ignore[index]
        assert told["chosen"] == (ids[index] in chosen)
        if not np.isnan(scores[index]):
            assert told["scores"]["dispersion"] == scores[index]
            assert told["rank"] == 1 + int((scores > scores[index]).sum())
            assert told["ties"] == int((scores == scores[index]).sum()) - 1
        reasons.add(told["why"].partition(":")[0].partition(" at ")[0].partition(",")[0])
    assert {"chosen", "not chosen", "not eligible"} <= reasons


def test_a_chosen_sample_is_labelled_in_the_next_cycle(run: Path) -> None:
    first = Run.open(run).cycle(0).chosen().sample_ids[0]
    told = explain(run, first)["cycles"][1]
    assert told["why"].startswith("labelled already, as ")
    assert told["labels"] == [None] * 3


def test_what_two_selections_share(run: Path, pool: Pool, tmp_path: Path) -> None:
    driver.run(small_config(tmp_path / "other", pool, None, "select.measure=margin", "loop.cycles=1"))
    told = diff(run, tmp_path / "other")
    batches = [set(Run.open(path).cycle(0).chosen().sample_ids) for path in (run, tmp_path / "other")]
    assert told["cycle"] == 0
    assert told["shared"] == len(batches[0] & batches[1])
    assert set(told["only_in_first"]) == batches[0] - batches[1]
    assert set(told["only_in_second"]) == batches[1] - batches[0]
    assert told["configuration"]["select.measure"] == ["dispersion", "margin"]
    assert diff(run, run)["jaccard"] == 1


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody: the pool .* has no such sample"):
        explain(run, "nobody")
    with pytest.raises(RunConflict, match="no selection of the same cycle in both; in both are"):
        diff(run, run, cycle=7)
