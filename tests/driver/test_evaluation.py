"""What the last checkpoint comes to on a test and a validation set, and that these are not in the pool."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.cli.tables import status_table, summary_table
from distal.driver import run as driver
from distal.driver.run import RunResult
from distal.errors import PoolError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.build import build
from distal.progress import Silent
from distal.report.repair import repair
from distal.report.status import status
from distal.report.verify import verify
from distal.score.predict import Predictor
from tests.helpers import content, distal, flip, small_config, small_overrides, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
METRICS = "eval.metrics=[accuracy, balanced_accuracy, macro_f1, auroc, ece]"
N_VAL = 22
OVERLAP = rf"eval.val: 2 of its {N_VAL} images are in the pool as well, pixel by pixel, such as again-0, which is s1-"


class Said(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def val_pool(cluster: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """20 images of three classes, two of the pool under other names, and one that is unreadable there and here."""
    folder = tmp_path_factory.mktemp("val")
    others = pq.read_table(write_source(folder / "val.parquet", 20, seed=5, n_classes=3))
    table = pq.read_table(source)
    shared = [i for i, label in enumerate(table["label"].to_pylist()) if label < 3 and i > 7][:2]
    again = table.take([*shared, 7])
    again = again.set_column(0, "sample_id", pa.array([f"again-{i}" for i in range(3)]))
    again = again.set_column(2, "label", pa.array([*again["label"].to_pylist()[:2], 0]))
    again = again.set_column(3, "class_name", pa.array([*again["class_name"].to_pylist()[:2], "circle"]))
    pq.write_table(pa.concat_tables([others, again]), folder / "val.parquet")
    return build(str(folder / "val.parquet"), folder / "packed")


@pytest.fixture(scope="module")
def keys(val_pool: Pool) -> list[str]:
    return [f"eval.val={val_pool.path}", METRICS, "loop.cycles=1"]


@pytest.fixture(scope="module")
def evaluated(
    cluster: str, pool: Pool, test_pool: Pool, keys: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompletedProcess[str]]:
    """A run of one cycle that was told to go on, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "evaluated"
    overrides = [*small_overrides(run, pool, test_pool), *keys, f"ray.address={cluster}"]
    done = distal("run", CONFIG, *overrides, "--allow-overlap", "--json")
    assert done.returncode == 0, done.stderr
    return run, done


def test_images_that_are_in_the_pool_are_refused(
    pool: Pool, test_pool: Pool, val_pool: Pool, keys: list[str], tmp_path: Path
) -> None:
    with pytest.raises(PoolError, match=rf"{OVERLAP}.*go on with --allow-overlap") as caught:
        driver.run(small_config(tmp_path / "run", pool, test_pool, *keys))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_that_it_goes_on_is_said_once(
    evaluated: tuple[Path, CompletedProcess[str]],
    pool: Pool,
    test_pool: Pool,
    keys: list[str],
    tmp_path: Path,
) -> None:
    run, done = evaluated
    assert done.stderr.count("are in the pool as well") == 1
    assert "warning: eval.val: 2 of its" in done.stderr
    (run / "cycles/000/select.json").unlink()
    again = Said()
    result = driver.run(small_config(run, pool, test_pool, *keys), again)
    assert result.state == "complete"
    assert "as well" not in "".join(again.lines)


def test_probabilities_are_those_of_the_last_checkpoint(
    evaluated: tuple[Path, CompletedProcess[str]], pool: Pool, test_pool: Pool, val_pool: Pool
) -> None:
    cycle = Run.open(evaluated[0]).cycle(0)
    spec = ModelSpec.of(cycle.config.model, pool)
    predictor = Predictor(spec.build(), spec.preprocess(), batch_size=32)
    predictor.load(checkpoints.load(checkpoints.read(cycle.checkpoints, 2)))
    for name, other in (("test", test_pool), ("val", val_pool)):
        stored = Assignments.open(cycle.held_out(name))
        labels = stored.read(0, other.n_samples)[0]
        probabilities = stored.read_recorded("probabilities", 0, 0, other.n_samples)
        scored = labels != 255
        assert scored.sum() == other.n_readable
        assert (probabilities.shape, probabilities.dtype) == ((other.n_samples, 4), np.float32)
        np.testing.assert_allclose(probabilities[scored].sum(axis=1), 1, atol=1e-6)
        assert np.array_equal(probabilities[scored].argmax(axis=1), labels[scored])
        assert np.isnan(probabilities[~scored]).all()
        images = other.take(np.flatnonzero(scored))
        assert np.array_equal(probabilities[scored], predictor(images).logits.softmax(dim=1).numpy())


def test_numbers_from_what_is_stored(
    evaluated: tuple[Path, CompletedProcess[str]], test_pool: Pool, val_pool: Pool
) -> None:
    cycle = Run.open(evaluated[0]).cycle(0)
    told = json.loads((evaluated[0] / "summary.json").read_text())["cycles"][0]
    for name, other, n_classes in (("test", test_pool, 4), ("val", val_pool, 3)):
        readable = np.flatnonzero(other.columns(0, other.n_samples, "status")[0] == "ok")
        truth = other.columns(0, other.n_samples, "label")[0][readable]
        predicted = Assignments.open(cycle.held_out(name)).read(0, other.n_samples)[0][readable]
        confusion = np.zeros((4, 4))
        np.add.at(confusion, (truth, predicted), 1)
        hits, of_label, of_prediction = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        present = slice(n_classes)
        assert told[name]["accuracy"] == hits.sum() / len(truth)
        assert told[name]["balanced_accuracy"] == pytest.approx((hits / np.maximum(of_label, 1))[present].mean())
        assert told[name]["macro_f1"] == pytest.approx((2 * hits / (of_label + of_prediction))[present].mean())
        assert 0 <= told[name]["ece"] <= 1
    assert 0 <= told["test"]["auroc"] <= 1
    assert told["val"]["auroc"] is None
    assert told["undefined"] == {"val.auroc": "no image has the label 'line', and a curve needs one of every class"}


def test_validation_labels_are_paid_for(
    evaluated: tuple[Path, CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated[0]
    result = json.loads(evaluated[1].stdout)
    told = result["cycles"][0]
    assert (told["n_labeled"], told["n_val"], told["n_paid"]) == (24, N_VAL, 24 + N_VAL)
    assert len(Run.open(run).ledger(before=0)) == 24
    told = status(run).cycles[0]
    assert (told.n_labeled, told.n_val, told.n_paid) == (24, N_VAL, 24 + N_VAL)
    closed = RunResult("complete", run, Run.open(run).summary().cycles)
    record = closed.to_record()
    for cycle in (record["cycles"][0], result["cycles"][0]):
        cycle.pop("seconds")  # the test before selected again
    assert record == result
    closing, present = summary_table(closed), status_table(status(run))
    assert [column.header for column in closing.columns][1:4] == ["labelled", "paid", "accuracy"]
    assert [list(column.cells) for column in closing.columns][2] == ["46"]
    assert "val.auroc: no image has the label 'line'" in str(closing.caption)
    assert "test ece" in [column.header for column in present.columns]
    assert next(list(column.cells) for column in closing.columns if column.header == "val auroc") == ["-"]


def test_damage_is_found_and_made_good(
    evaluated: tuple[Path, CompletedProcess[str]], pool: Pool, test_pool: Pool, keys: list[str]
) -> None:
    run = evaluated[0]
    assert verify(run).state == "sound"
    before = content(run)
    flip(run / "cycles/000/val.zarr/probabilities/c/0/0/0")
    assert "val.zarr/probabilities" in verify(run).damage[0]
    repair(run)
    driver.run(small_config(run, pool, test_pool, *keys))
    assert content(run) == before
    assert verify(run).state == "sound"
