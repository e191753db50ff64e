"""The whole loop through the Python API, on a real cluster."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments, begun_path
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import Run
from distal.driver import run as driver
from distal.driver.training import ReusingRows
from distal.errors import ConfigError, Damage, DistalError, ModelError, PoolError, RunConflict, UserError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.build import build
from distal.progress import spoken
from distal.records import CheckpointRef, Progress
from distal.report.status import status
from distal.score.job import AllPublished
from distal.score.predict import Predictor
from distal.train import launch
from tests.helpers import flip, small_config, write_source
from tests.interleave import interleavings
from tests.stand_ins import run_ranks

pytestmark = pytest.mark.usefixtures("stand_ins")

N_READABLE, INITIAL, BUDGET, ROWS = 238, 24, 16, 3


@pytest.fixture(scope="module")
def finished(small_run: Path) -> Path:
    """A finished run of two cycles."""
    return small_run


def test_layout_on_disk(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "run.yaml", "initial.parquet", "summary.json", "events", "driver", "cycles",
    }  # fmt: skip
    expected = {
        "cycle.yaml", "train", "checkpoints", "assignments.zarr", "assignments.zarr.json", "assignments.zarr.begun",
        "test.zarr", "test.zarr.json", "test.zarr.begun", "scores.zarr", "selection.parquet",
        "train.json", "score.json", "test.json", "reduce.json", "select.json",
    }  # fmt: skip
    found = [{path.name for path in (finished / "cycles" / name).iterdir()} for name in ("000", "001")]
    assert found[0] == expected | {"labels.parquet", "label.json"}
    assert found[1] == expected  # the last cycle selects but does not label
    assert (finished / "cycles/000/train/state.pt").exists()
    assert [path.name for path in (finished / "cycles/000/train/owners").iterdir()] == ["000001"]
    assert json.loads((finished / "cycles/000/train.json").read_text())["n_imports"] == 0
    assert json.loads((finished / "cycles/000/checkpoints/0002/manifest.json").read_text())["epoch"] == 3


def laid_out(path: Path, *weights: str) -> Assignments:
    """Assignments of three rows, of which the first ones are scored with these weights."""
    assignments = Assignments.create(
        path, n_rows=3, n_samples=8, block_size=4, n_classes=3, eligible=[np.ones(4, bool)] * 2
    )
    if weights:
        assignments.adopt_fingerprint({"torch": "1"})
    for row, sha256 in enumerate(weights):
        assignments.adopt_weights(row, sha256)
        for block in assignments.blocks:
            assignments.write(row, block, np.full(4, row, np.uint8))
    return assignments


def refs_of(*weights: str) -> list[CheckpointRef]:
    return [CheckpointRef(index, index + 1, Path("no.pt"), sha256, {}) for index, sha256 in enumerate(weights)]


def test_what_earlier_starts_were_begun_with_is_read_once(tmp_path: Path) -> None:
    """Its rows and those of many starts would be read for every row otherwise."""
    earlier = [laid_out(tmp_path / "b.zarr", "a", "b", "x"), laid_out(tmp_path / "a.zarr", "a", "b", "c")]
    now, events = laid_out(tmp_path / "now.zarr"), []
    reusing = ReusingRows(AllPublished(refs_of("a", "b", "c")), now, earlier, 0, lambda name, **_: events.append(name))
    for each in earlier:
        for row in range(3):
            (begun_path(each.path) / f"{row:05d}.json").unlink()
    assert len(reusing.published()) == 3
    assert now.read(0, 8, complete=True).tolist() == [[row] * 8 for row in range(3)]
    assert events == []


@pytest.mark.parametrize(("given", "n_kept"), [("abc", 3), ("abx", 2), ("axc", 1), ("xbc", 0)])
def test_a_row_counts_while_all_before_it_have_the_weights_of_before(tmp_path: Path, given: str, n_kept: int) -> None:
    earlier, now, events = laid_out(tmp_path / "a.zarr", *"abc"), laid_out(tmp_path / "now.zarr"), []
    reusing = ReusingRows(AllPublished(refs_of(*given)), now, [earlier], 0, lambda name, **_: events.append(name))
    reusing.published()
    assert [len(now.committed(row)) for row in range(3)] == [2] * n_kept + [0] * (3 - n_kept)
    assert events == ["other_weights"] * (n_kept < 3)


def test_a_row_is_never_taken_over_without_its_weights(tmp_path: Path) -> None:
    """Whenever the driver is killed, what is committed says which weights it was scored with."""
    numbers = itertools.count()
    state: dict[str, Assignments] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        folder = tmp_path / str(next(numbers))
        earlier, now = laid_out(folder / "a.zarr", "a", "b"), laid_out(folder / "now.zarr")
        state["now"] = now

        def sound() -> None:
            assert now.weights.keys() >= {row for row in range(3) if now.committed(row)}

        return ReusingRows(AllPublished(refs_of("a", "b")), now, [earlier], 0, print).published, sound

    def check() -> None:
        assert state["now"].weights == {0: "a", 1: "b"}

    assert interleavings(begin, check) > 3


def test_assignments_scores_and_selection_belong_together(finished: Path, pool: Pool) -> None:
    """Recomputed from the committed weights with plain numpy and torch."""
    run = Run.open(finished)
    for index in range(2):
        cycle = run.cycle(index)
        labeled = run.ledger(before=index).indices
        eligible = np.setdiff1d(np.arange(240), [*labeled, 7, 201])
        array = zarr.open(cycle.assignments)["assignments"]
        assert (array.shape, array.dtype, array.chunks, array.fill_value) == ((ROWS, 240), np.uint8, (1, 64), 255)
        stored = array[:]
        for row in range(ROWS):
            spec = ModelSpec.of(cycle.config.model, pool)
            predictor = Predictor(spec.build(), spec.preprocess(), batch_size=32)
            predictor.net.load_state_dict(torch.load(checkpoints.read(cycle.checkpoints, row).path))
            assert np.array_equal(stored[row, eligible], predictor(pool.take(eligible)).labels)
        others = np.setdiff1d(np.arange(240), eligible)
        assert np.all(stored[:, others] == 255)

        counts = np.stack([(stored == label).sum(axis=0) for label in range(4)])
        dispersion = (1 - counts.max(axis=0) / ROWS).astype(np.float32)
        scores = zarr.open(cycle.scores)["dispersion"][:]
        assert np.array_equal(scores[eligible], dispersion[eligible])
        assert np.isnan(scores[others]).all()

        selection = pq.read_table(cycle.selection)
        chosen = selection["sample_index"].to_numpy()
        assert len(np.unique(chosen)) == BUDGET
        assert np.isin(chosen, eligible).all()
        assert sorted(dispersion[chosen], reverse=True) == sorted(dispersion[eligible], reverse=True)[:BUDGET]


def test_the_ledger_grows_by_what_was_selected(finished: Path, pool: Pool) -> None:
    run = Run.open(finished)
    first, second = run.ledger(before=0), run.ledger(before=1)
    selected = pq.read_table(finished / "cycles/000/selection.parquet")["sample_index"].to_numpy()
    assert (len(first), len(second)) == (INITIAL, INITIAL + BUDGET)
    assert np.array_equal(second.indices, np.union1d(first.indices, selected))
    truth = pool.take_samples(second.indices, ["label"])["label"].to_numpy()
    assert np.array_equal(second.labels, truth)


def test_summary(finished: Path, test_pool: Pool, pool: Pool) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [cycle["cycle"] for cycle in summary["cycles"]] == [0, 1]
    assert [cycle["n_labeled"] for cycle in summary["cycles"]] == [INITIAL, INITIAL + BUDGET]
    for index, cycle in enumerate(summary["cycles"]):
        assert cycle["images_scored"] == ROWS * (N_READABLE - INITIAL - index * BUDGET)
        assert {"train", "score", "test", "reduce", "select"} <= set(cycle["seconds"])
        assert len(cycle["selection_sha256"]) == 64
        config = Run.open(finished).cycle(index).config
        spec = ModelSpec.of(config.model, pool)
        predictor = Predictor(spec.build(), spec.preprocess(), batch_size=32)
        ref = checkpoints.read(Run.open(finished).cycle(index).checkpoints, ROWS - 1)
        predictor.net.load_state_dict(checkpoints.load(ref))
        labels = test_pool.columns(0, 100, "label")[0]
        assert cycle["test"] == {"accuracy": (predictor(test_pool.read(0, 100)).labels == labels).mean()}


def test_what_a_run_is_and_what_its_autos_came_to(finished: Path, pool: Pool, test_pool: Pool) -> None:
    run = Run.open(finished)
    assert run.identity.constants == {
        "device": "cpu", "pool.block_size": 64, "train.threads": 1, "score.precision": "fp32", "score.batch_size": 32,
    }  # fmt: skip
    assert run.identity.fixed == {
        "seed": 0, "pool.limit": None, "pool.block_size": 64, "loop.initial": INITIAL, "loop.balance": True,
        "pool content (pool.path)": pool.content_sha256, "test content (eval.test)": test_pool.content_sha256,
        "validation content (eval.val)": None,
    }  # fmt: skip
    assert run.cycle(0).config.autos() == []


def test_again_is_complete_and_touches_nothing(finished: Path, pool: Pool, test_pool: Pool) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = driver.run(small_config(finished, pool, test_pool))
    assert result.state == "complete"
    assert len(result.cycles) == 2
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {finished / "summary.json"}


def test_status_from_storage_alone(finished: Path) -> None:
    told = status(finished)
    assert told.state == "complete"
    assert [cycle.next for cycle in told.cycles] == [None, None]
    assert told.cycles[0].blocks_scored == told.cycles[0].blocks == ROWS * 4
    with pytest.raises(RunConflict, match="no run here"):
        status(finished / "cycles")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lr=0.1",
            r"train.lr: 0.05 -> 0.1: cycle 1 has begun .* may apply from cycle 2, when cycle 1 is finished",
        ),
        ("seed=1", "seed: 0 -> 1: it is part of what the run in .* is; give another run directory"),
        ("loop.initial=30", "loop.initial: 24 -> 30: it is part of what the run in .* is; give another run directory"),
        (
            "pool.block_size=128",
            "pool.block_size: 64 -> 128: it is part of what the run in .* is; give another run directory",
        ),
    ],
)
def test_what_a_finished_run_is_cannot_change(
    finished: Path, pool: Pool, test_pool: Pool, override: str, message: str
) -> None:
    with pytest.raises(RunConflict, match=message):
        driver.run(small_config(finished, pool, test_pool, override))


def test_another_pool_is_another_run(finished: Path, test_pool: Pool) -> None:
    with pytest.raises(RunConflict, match=r"pool content \(pool.path\): .* it is part of what the run in"):
        driver.run(small_config(finished, test_pool, None, "loop.cycles=3"))


def test_a_begun_cycle_keeps_its_configuration(finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """A run that was cut off while it selected: results are fixed, speed is not."""
    cut_off = copy_run(finished, tmp_path / "run")
    (cut_off / "cycles/001/select.json").unlink()
    with pytest.raises(RunConflict, match=r"train.lr: 0.05 -> 0.1: cycle 1 has begun .* may apply from cycle 2"):
        driver.run(small_config(cut_off, pool, test_pool, "train.lr=0.1"))
    result = driver.run(small_config(cut_off, pool, test_pool, "score.actors=2", "score.cache_gb=0.5"))
    assert hashes(result.to_record()) == hashes(json.loads((finished / "summary.json").read_text()))


def test_a_changed_input_of_a_complete_stage_is_noticed(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    labels = copy / "cycles/000/labels.parquet"
    table = pq.read_table(labels)
    turned = pa.array([(label + 1) % 4 for label in table["label"].to_pylist()], pa.int32())
    pq.write_table(table.set_column(2, table.schema.field(2), turned), labels)
    with pytest.raises(Damage, match=r"cycles/000/labels.parquet: damaged"):
        driver.run(small_config(copy, pool, test_pool, "loop.cycles=3"))
    labels.unlink()
    with pytest.raises(Damage, match=r"cycles/000/labels.parquet: missing"):
        driver.run(small_config(copy, pool, test_pool, "loop.cycles=3"))


def test_a_finished_run_whose_answers_were_altered_is_not_complete(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    initial = copy / "initial.parquet"
    kept = initial.read_bytes()
    pq.write_table(pq.read_table(initial).slice(1), initial)
    with pytest.raises(Damage, match="initial.parquet: damaged"):
        driver.run(small_config(copy, pool, test_pool))
    initial.write_bytes(kept)
    (copy / "cycles/001/selection.parquet").unlink()
    with pytest.raises(Damage, match=r"cycles/001/selection.parquet: missing"):
        driver.run(small_config(copy, pool, test_pool))


def test_a_selection_that_was_altered_is_not_labelled(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    selection = copy / "cycles/001/selection.parquet"
    pq.write_table(pq.read_table(selection).slice(1), selection)
    with pytest.raises(Damage, match=r"cycles/001/selection.parquet: damaged"):
        driver.run(small_config(copy, pool, test_pool, "loop.cycles=3"))


def unfinish(run: Path, *stages: str) -> Path:
    """Take the completion markers of some stages of the last cycle away."""
    for stage in stages:
        (run / f"cycles/001/{stage}.json").unlink()
    return run / "cycles/001"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_an_unfinished_stage_is_scored_again(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    cycle = unfinish(copy, "score", "test", "reduce", "select")
    flip_a_bit(cycle / "assignments.zarr/assignments/c/1/2")
    display = Lines()
    result = driver.run(small_config(copy, pool, test_pool), display)
    assert hashes(result.to_record()) == hashes(json.loads((finished / "summary.json").read_text()))
    (line,) = [line for line in display.lines if "damaged block" in line]
    assert "assignments: row 1, block 2 does not decode" in line
    both = [zarr.open(run / "cycles/001/assignments.zarr")["assignments"][:] for run in (copy, finished)]
    assert np.array_equal(*both)


def test_a_flipped_bit_in_a_finished_stage_is_damage(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    flip_a_bit(unfinish(copy, "reduce", "select") / "assignments.zarr/assignments/c/1/2")
    with pytest.raises(Damage, match="assignments: row 1, block 2 does not decode") as caught:
        driver.run(small_config(copy, pool, test_pool))
    assert caught.value.exit_code == 4


def test_a_lost_score_is_not_left_out_of_the_selection(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    copy = copy_run(finished, tmp_path / "run")
    (unfinish(copy, "select") / "scores.zarr/dispersion/c/1").unlink()
    with pytest.raises(Damage, match="dispersion: block 1 is missing"):
        driver.run(small_config(copy, pool, test_pool))


def test_a_run_may_grow_with_other_settings(finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """The next cycle takes the new configuration; the cycle that was last is labelled first."""
    longer = copy_run(finished, tmp_path / "run")
    overrides = ["loop.cycles=3", "train.epochs=2", "loop.budget=1000", "train.init=warm", "select.measure=margin"]
    display = Lines()
    result = driver.run(small_config(longer, pool, test_pool, *overrides), display)
    left = N_READABLE - INITIAL - 2 * BUDGET
    assert hashes(result.to_record())[:2] == hashes(json.loads((finished / "summary.json").read_text()))
    assert (longer / "cycles/001/labels.parquet").exists()
    assert result.cycles[2].n_labeled == INITIAL + 2 * BUDGET
    assert result.cycles[2].images_scored == left  # for margin the last checkpoint is enough
    assert result.cycles[2].n_selected == left  # a short cycle takes what is left, and says so
    assert any(f"{left} eligible images are left, fewer than the budget of 1000" in line for line in display.lines)
    assert json.loads((longer / "cycles/002/train.json").read_text())["inputs"]["warm_from"]

    display.lines.clear()
    result = driver.run(small_config(longer, pool, test_pool, *overrides, "loop.cycles=4"), display)
    assert any("every eligible image is labelled: the loop ends before cycle 3" in line for line in display.lines)
    assert len(result.cycles) == 3
    assert status(longer).state == "complete"
    display.lines.clear()
    driver.run(small_config(longer, pool, test_pool, *overrides, "loop.cycles=4"), display)
    assert display.lines == [f"{longer}: complete"]
    assert len(Ledger.read(Run.open(longer).label_files(before=3))) == N_READABLE


@pytest.mark.slow
def test_ranks_stop_when_the_run_fails(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Ray of the caller's, training must not go on behind its back."""
    monkeypatch.setattr(launch, "_run_ranks", run_ranks)  # real ranks

    class Broken(Lines):
        def progress(self, state: Progress) -> None:
            if state.published:
                raise BrokenPipeError("nobody is watching")

    with pytest.raises(BrokenPipeError):
        driver.run(small_config(tmp_path / "run", pool, None, "train.epochs=500"), Broken())
    folder = Run.open(tmp_path / "run").cycle(0).checkpoints
    deadline = time.monotonic() + 60
    published = -1
    while published != (published := len(checkpoints.committed(folder))):
        assert time.monotonic() < deadline
        time.sleep(2)
    assert published < 500


class Lines:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def event(self, record: dict) -> None:
        if line := spoken(record):
            self.say(line)

    def progress(self, state: Progress) -> None:
        pass


def copy_run(source: Path, dest: Path) -> Path:
    import shutil

    shutil.copytree(source, dest)
    return dest


def hashes(summary: dict) -> list[str]:
    return [cycle["selection_sha256"] for cycle in summary["cycles"]]


class TestMistakes:
    """Refused before anything is written."""

    def refuse(
        self, kind: type[DistalError], message: str, run: Path, pool: Pool, test: Pool | None, *overrides: str
    ) -> None:
        with pytest.raises(kind, match=message) as caught:
            driver.run(small_config(run, pool, test, *overrides))
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert not run.exists()

    def test_a_first_set_of_unreadable_images(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        ids = pool.samples(0, 8)["sample_id"].to_pylist()
        file = tmp_path / "first.csv"
        file.write_text("sample_id,label\n" + "".join(f"{name},{i % 4}\n" for i, name in enumerate(ids)))
        with pytest.raises(UserError, match=rf"loop.initial: .*first.csv: sample {ids[7]} is unreadable; leave it out"):
            driver.run(small_config(tmp_path / "run", pool, None, f"loop.initial={file}"))

    def test_a_budget_that_the_first_cycle_cannot_have(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"loop.budget: 239 is more than the \d+ candidates; lower it"):
            driver.run(small_config(tmp_path / "run", pool, None, "loop.budget=239"))

    def test_no_such_pool(self, pool: Pool, tmp_path: Path) -> None:
        missing = f"pool.path={tmp_path / 'missing'}"
        self.refuse(PoolError, "no such pool; make it with `distal pool build", tmp_path / "run", pool, None, missing)

    def test_a_pool_that_was_packed_from_something_else(self, pool: Pool, source: Path, tmp_path: Path) -> None:
        message = f"pool.source: .* was packed from {source}, not from .*/other.parquet; remove it to pack it again"
        self.refuse(PoolError, message, tmp_path / "run", pool, None, "pool.source=other.parquet")

    def test_more_ranks_than_this_machine_has_slots(self, pool: Pool, tmp_path: Path) -> None:
        message = "train.workers: 8 ranks of 1 threads need 8 CPU slots, this machine has 3; lower train.workers"
        self.refuse(ConfigError, message, tmp_path / "run", pool, None, "train.workers=8")

    def test_a_run_directory_that_is_a_file(self, pool: Pool, tmp_path: Path) -> None:
        (tmp_path / "run").touch()
        with pytest.raises(NotADirectoryError):
            driver.run(small_config(tmp_path / "run", pool, None))

    def test_fewer_images_than_initial_and_one(self, pool: Pool, tmp_path: Path) -> None:
        run = tmp_path / "run"
        self.refuse(UserError, "need 239 readable images, the pool has 238", run, pool, None, "loop.initial=238")
        self.refuse(UserError, "need 25 readable images, the pool has 20", run, pool, None, "pool.limit=20")

    def test_one_class_only(self, cluster: str, tmp_path: Path) -> None:
        path = write_source(tmp_path / "a.parquet", 40, seed=4, n_classes=1)
        one = build(str(path), tmp_path / "pool")
        self.refuse(PoolError, r"one class only \(circle\); at least two", tmp_path / "run", one, None)

    def test_no_labels(self, cluster: str, tmp_path: Path) -> None:
        path = write_source(tmp_path / "a.parquet", 40, seed=4)
        pq.write_table(pq.read_table(path).drop_columns(["label", "class_name"]), path)
        unlabelled = build(str(path), tmp_path / "pool")
        self.refuse(
            PoolError, "has no labels, so its classes are not known; name them", tmp_path / "run", unlabelled, None
        )

    def test_a_test_pool_of_another_shape_or_with_other_classes(self, pool: Pool, tmp_path: Path) -> None:
        path = write_source(tmp_path / "a.parquet", 40, seed=4)
        other_shape = build(str(path), tmp_path / "shape", size=(9, 9))
        message = r"eval.test: its images have shape \(1, 9, 9\), those of the pool \(1, 12, 12\)"
        self.refuse(PoolError, message, tmp_path / "run", pool, other_shape)
        table = pq.read_table(path)
        names = ["bird" if name == "dot" else name for name in table["class_name"].to_pylist()]
        pq.write_table(table.set_column(3, "class_name", pa.array(names)), path)
        other_class = build(str(path), tmp_path / "class")
        self.refuse(PoolError, "eval.test: class 'bird' is not in the pool", tmp_path / "run", pool, other_class)

    def test_a_model_that_does_not_fit(self, pool: Pool, tmp_path: Path) -> None:
        self.refuse(ModelError, "'resnet19' is unknown", tmp_path / "run", pool, None, "model.name=resnet19")

    def test_a_folder_that_is_no_run(self, pool: Pool, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(RunConflict, match="not an empty folder and not a run"):
            driver.run(small_config(tmp_path, pool, None))
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("before", "now", "reused"),
    [
        ([["a", "b", None]], ["a", "b", "c"], {0: 0, 1: 0}),
        ([["a", "b", "c"]], ["a", "x", "c"], {0: 0}),  # from the first row that differs it is another training
        ([["a", "b", "c"]], ["x", "b", "c"], {}),
        ([["a", None, None], ["a", "b", None]], ["a", "b", "c"], {0: 0, 1: 1}),
        ([["x", "y", None], ["a", "b", None]], ["a", "b", "c"], {0: 1, 1: 1}),
        ([["a", "x", None], ["a", "b", "c"]], ["a", "b", "c"], {0: 0, 1: 1, 2: 1}),
    ],
)
def test_what_is_scored_counts_while_all_weights_so_far_are_the_same(
    tmp_path: Path, before: list[list[str | None]], now: list[str], reused: dict[int, int]
) -> None:
    """Of the attempts before, the latest first: whose rows a script that was started again keeps."""
    said: list[str] = []

    def scored(name: str, weights: list[str | None], value: int) -> Assignments:
        made = Assignments.create(
            tmp_path / name, n_rows=3, n_samples=6, block_size=3, n_classes=9, eligible=[np.ones(3, bool)] * 2
        )
        made.adopt_fingerprint({"cpu": "one"})
        for row, sha256 in enumerate(weights):
            if sha256 is not None:
                made.adopt_weights(row, sha256)
                made.write(row, made.blocks[0], np.full(3, value, np.uint8))
        return made

    earlier = [scored(f"before-{i}.zarr", weights, i) for i, weights in enumerate(before)]
    mine = scored("mine.zarr", [], 9)
    refs = [CheckpointRef(row, row + 1, tmp_path, sha256) for row, sha256 in enumerate(now)]
    reusing = ReusingRows(
        AllPublished(refs),  # type: ignore[arg-type]
        mine,
        earlier,
        first_index=0,
        on_event=lambda name, **values: said.append(name),
    )
    assert list(reusing.published()) == refs
    found = {row: int(mine.read(0, 3, [row])[0, 0]) for row in range(3) if mine.has(row, mine.blocks[0])}
    assert found == reused
    assert not any(mine.has(row, mine.blocks[1]) for row in range(3))
    differs = any(each is not None for row in range(3) if row not in reused for each in [w[row] for w in before])
    assert said == (["other_weights"] if differs else [])


def test_nothing_is_reused_that_is_damaged_or_that_another_machine_scored(tmp_path: Path) -> None:
    made = []
    for name in ("before.zarr", "mine.zarr", "other.zarr"):
        made.append(
            Assignments.create(
                tmp_path / name, n_rows=1, n_samples=6, block_size=3, n_classes=9, eligible=[np.ones(3, bool)] * 2
            )
        )
    before, mine, other = made
    before.adopt_fingerprint({"cpu": "one"})
    other.adopt_fingerprint({"cpu": "another"})
    before.adopt_weights(0, "a")
    for block in before.blocks:
        before.write(0, block, np.zeros(3, np.uint8))
    flip(before.chunk("assignments", 0, before.blocks[0]))
    said: list[str] = []
    for each in (mine, other):
        ReusingRows(
            AllPublished([CheckpointRef(0, 1, tmp_path, "a")]),  # type: ignore[arg-type]
            each,
            [before],
            first_index=0,
            on_event=lambda name, **values: said.append(name),
        ).published()
    assert mine.committed(0) == {1}
    assert mine.fingerprint == {"cpu": "one"}
    assert other.committed(0) == set()
    assert said == ["damaged_block"]
