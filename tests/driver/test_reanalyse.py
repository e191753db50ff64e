from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.driver import run as driver
from distal.driver.reanalyse import reduce_run, select_run
from distal.errors import ConfigError, Damage, PoolError, RunConflict, UserError
from distal.pool import Pool
from distal.pool.build import build
from distal.records import Window
from distal.reduce.measures import FROM_VOTES, Votes
from tests.helpers import small_config, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")

N, ROWS = 240, 5


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cycles of five checkpoints."""
    path = tmp_path_factory.mktemp("analysed") / "run"
    driver.run(small_config(path, pool, None, f"train.epochs={ROWS}"))
    return path


@pytest.mark.parametrize(
    ("window", "rows", "name"),
    [
        (Window(), [0, 1, 2, 3, 4], ""),
        (Window(last=0.5), [2, 3, 4], "@last=0.5"),
        (Window(last=2), [3, 4], "@last=2"),
        (Window(every=2), [0, 2, 4], "@every=2"),
        (Window(first=1, every=3), [1, 4], "@from=1,every=3"),
        (Window(first=1, last=0.75, every=2), [2, 4], "@from=1,last=0.75,every=2"),
        (Window(first=9), [], "@from=9"),
        (Window(last=99), [0, 1, 2, 3, 4], "@last=99"),
    ],
)
def test_windows(window: Window, rows: list[int], name: str) -> None:
    assert window.rows(ROWS) == rows
    assert str(window) == name


def test_measures_of_a_window_without_inference(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "cycles/001").rglob("*") if path.is_file()}
    measures = tuple(name for name in FROM_VOTES if name != "dispersion_authors")  # of augmented images
    result = reduce_run(run, measures=measures, window=Window(last=3))
    assert result.cycle == 1
    votes = Votes(Assignments.open(run / "cycles/001/assignments.zarr").read(0, N, [2, 3, 4]), 4)
    for each in result.analyses:
        folder = run / f"cycles/001/analyses/{each.measure}@last=3"
        assert each.scores == folder / "scores.zarr" / each.measure
        found = Scores.open(folder / "scores.zarr").read(each.measure, 0, N)
        expected = np.where(votes.complete, FROM_VOTES[each.measure](votes), np.nan).astype(np.float32)
        assert np.array_equal(found, expected, equal_nan=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the cycle's own record


def test_the_whole_window_gives_the_cycles_own_selection(run: Path) -> None:
    cycle = Run.open(run).cycle(0)
    again = select_run(run, cycle=0, measure="dispersion", budget=16)
    assert again.selection_sha256 == cycle.chosen().sha256
    assert again.selection == run / "cycles/000/analyses/dispersion/selection-16.parquet"
    smaller = select_run(run, cycle=0, measure="dispersion", budget=7)
    assert Selection.read(smaller.selection).sample_ids == cycle.chosen().sample_ids[:7]
    assert select_run(run, cycle=0, measure="dispersion", budget=16) == again


@pytest.mark.parametrize("measure", ["margin", "random", "vote_margin", "last_flip"])
def test_any_measure_can_select(run: Path, measure: str) -> None:
    chosen = Selection.read(select_run(run, measure=measure, budget=9, annotate=True).selection).table
    scores = chosen[measure].to_numpy()
    assert (np.diff(scores) <= 0).all()
    assert set(chosen["mode"].to_pylist()) <= set(range(4))


def test_what_cannot_be_computed(run: Path) -> None:
    for options, message in (
        ({"measures": ("surprise",)}, "--measure: 'surprise' is unknown; known: dispersion, "),
        ({"measures": ("entropy",)}, r"--measure: entropy was not recorded; score.record was \['margin'\]"),
        ({"measures": ("dispersion_authors",)}, "is defined on images as training sees them"),
        ({"measures": ("least_confidence",)}, "least_confidence was not recorded.* with least_confidence in score"),
        ({"measures": ("margin",), "window": Window(last=2)}, "margin has no window; a window is for"),
        ({"window": Window(first=5)}, "window from=5 selects no checkpoint: there are 5"),
        ({"window": Window(last=1)}, "dispersion of one checkpoint is always 0"),
        ({"window": Window(last=0.01)}, "dispersion of one checkpoint is always 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            reduce_run(run, **options)  # type: ignore[arg-type]
    with pytest.raises(RunConflict, match="cycle 7 has not been scored; scored are 0, 1"):
        reduce_run(run, cycle=7)
    with pytest.raises(UserError, match="--budget: 1000 is more than the 198 candidates; lower it"):
        select_run(run, budget=1000)
    with pytest.raises(RunConflict, match="no run here"):
        reduce_run(run.parent)


def test_a_changed_pool_is_refused_and_damage_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    chunk = copy / "cycles/001/assignments.zarr/assignments/c/3/2"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(Damage, match="assignments: row 3, block 2 does not decode"):
        reduce_run(copy, measures=("gini",))
    chunk.unlink()
    with pytest.raises(Damage, match="sample 128 is eligible and has no value"):
        reduce_run(copy, measures=("gini",))
    selection = select_run(copy, cycle=0, budget=5).selection
    Selection.write(selection, Selection.read(selection).table.slice(1))
    with pytest.raises(Damage, match="selection-5.parquet: not the selection that was made"):
        select_run(copy, cycle=0, budget=5)


@pytest.mark.slow
def test_elimination_in_a_run_selects_the_same(run: Path, pool: Pool, tmp_path: Path) -> None:
    """The whole loop: the first cycle selects the same samples, so the second one trains on the same."""
    config = small_config(tmp_path / "run", pool, None, f"train.epochs={ROWS}", "score.eliminate=exact")
    summary = driver.run(config).cycles
    plain = Run.open(run).summary().cycles
    assert [cycle.selection_sha256 for cycle in summary] == [cycle.selection_sha256 for cycle in plain]
    for mine, full in zip(summary, plain, strict=True):
        assert mine.images_scored + mine.left_out == full.images_scored
    assert full.left_out == 0
    assert select_run(tmp_path / "run", budget=16).n_selected == 16
    with pytest.raises(UserError, match="--budget: 17: samples that could not be among the first 16 were left out"):
        select_run(tmp_path / "run", budget=17)


def test_another_pool_at_the_same_place_is_refused(
    cluster: str, run: Path, pool: Pool, source: Path, tmp_path: Path
) -> None:
    """Also once the scores are there: the ids of a selection come from the pool."""
    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copy)
    shutil.copytree(pool.path, moved)
    chosen = select_run(copy, budget=5, pool=moved)
    assert select_run(copy, budget=5) == chosen
    other = build(str(write_source(tmp_path / "other.parquet", N, seed=5)), tmp_path / "other")
    with pytest.raises(PoolError, match="not the pool of this run"):
        select_run(copy, budget=6, pool=other.path)


def test_scores_that_are_being_replaced_are_not_complete(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    reduce_run(copy, measures=("gini",))
    with monkeypatch.context() as patched:
        patched.setattr("distal.reduce.stream._reduced", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reduce_run(copy, measures=("gini",), annotate=True)
    reduce_run(copy, measures=("gini",))
    scores = Scores.open(copy / "cycles/001/analyses/gini/scores.zarr")
    assert np.isfinite(scores.read("gini", 0, N)).any()
    reduce_run(copy, measures=("gini",), annotate=True)
    before = (copy / "cycles/001/analyses/gini/reduce.json").stat().st_mtime_ns
    reduce_run(copy, measures=("gini",))  # more is there than is asked for
    assert (copy / "cycles/001/analyses/gini/reduce.json").stat().st_mtime_ns == before
