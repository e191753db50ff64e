"""`distal score` on real checkpoints, with real actors on a real cluster."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.config import ModelSection
from distal.driver import reanalyse
from distal.driver.score_folder import ScoreResult, score_directory
from distal.errors import ConfigError, ModelError, RunConflict, SourceError, UserError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.progress import spoken
from distal.records import Progress
from distal.report.explain import explain
from tests.helpers import foreign_config, write_checkpoints

pytestmark = pytest.mark.usefixtures("stand_ins")

T, N, READABLE = 8, 240, 238


class Lines:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def event(self, record: dict) -> None:
        if line := spoken(record):
            self.say(line)

    def progress(self, state: Progress) -> None:
        pass


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder, pool, range(T))
    return folder


@pytest.fixture(scope="module")
def scored(
    cluster: str, pool: Pool, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ScoreResult]:
    run = tmp_path_factory.mktemp("scored") / "run"
    return run, score_directory(foreign_config(run, pool, folder, "score.actors=auto"))


def assignments(run: Path) -> np.ndarray:
    return Assignments.open(run / "cycles/000/assignments.zarr").read(0, N)[:T]


def test_assignments_are_what_each_checkpoint_predicts(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path
) -> None:
    """Against a plain loop, and read with plain Zarr."""
    run, result = scored
    stored = zarr.open(run / "cycles/000/assignments.zarr")["assignments"]
    assert stored.shape[0] > T  # spare rows
    assert (stored.shape[1], stored.dtype, stored.chunks, stored.fill_value) == (N, np.uint8, (1, 64), 255)
    spec = ModelSpec(ModelSection(), 4, pool.image_shape, pool.mean, pool.std)
    net, preprocess = spec.build().eval(), spec.preprocess()
    readable = np.array([status == "ok" for status in pool.samples(0, N)["status"].to_pylist()])
    for row in range(T):
        net.load_state_dict(torch.load(folder / f"epoch{row + 1}.pt"))
        with torch.no_grad():
            expected = net(preprocess(torch.from_numpy(pool.read(0, N)))).argmax(1).numpy()
        assert np.array_equal(stored[row][readable], expected[readable])
        assert (stored[row][~readable] == 255).all()
    assert result.images_scored == T * READABLE
    assert result.seconds > 0
    assert result.images_per_s > 0
    assert set(result.peak_rss_bytes) == {"driver", "actor"}
    right = (stored[T - 1] == pool.columns(0, N, "label")[0])[readable].mean()
    assert result.accuracy == pytest.approx(right)


def test_the_selection_is_of_the_most_dispersed(scored: tuple[Path, ScoreResult]) -> None:
    run, result = scored
    votes = assignments(run)
    counts = np.stack([(votes == c).sum(axis=0) for c in range(4)])
    dispersion = np.where((votes < 4).all(axis=0), 1 - counts.max(axis=0) / T, -1)
    chosen = Selection.read(result.selection)
    assert len(chosen) == 20
    assert dispersion[chosen.indices].min() >= np.sort(dispersion)[-20]
    assert chosen.sha256 == result.selection_sha256


def test_a_selection_is_explained(scored: tuple[Path, ScoreResult], pool: Pool) -> None:
    run, result = scored
    ids = pool.samples(0, N)["sample_id"].to_pylist()
    chosen = Selection.read(result.selection).sample_ids
    assert explain(run, chosen[0]).cycles[0].why.startswith("chosen at place 1 of 20, by ")
    said = {name: explain(run, name).cycles[0].why for name in ids[::16] if name not in chosen}
    assert all(why.startswith(("not chosen: its dispersion is ", "not eligible: unreadable")) for why in said.values())


def test_again_does_nothing_and_says_the_same(scored: tuple[Path, ScoreResult], pool: Pool, folder: Path) -> None:
    run, result = scored
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*/c/*") if path.is_file()}
    assert score_directory(foreign_config(run, pool, folder)) == result
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_late_checkpoints_are_added_without_scoring_the_old_ones_again(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    early = tmp_path / "early"
    write_checkpoints(early, pool, range(5))
    config = foreign_config(tmp_path / "run", pool, early)
    first = score_directory(config)
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("cycles/000/assignments.zarr/*/c/[0-4]/*")
    }
    write_checkpoints(early, pool, range(5, T))
    second = score_directory(config)
    assert (first.checkpoints, second.checkpoints) == (5, T)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert np.array_equal(assignments(tmp_path / "run"), assignments(scored[0]))
    assert second.selection_sha256 == scored[1].selection_sha256
    assert first.selection.exists()  # the earlier one is not overwritten
    assert first.selection != second.selection


def test_watch_scores_checkpoints_as_they_come(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    early = tmp_path / "early"
    early.mkdir()

    def publish() -> None:
        for row in range(T):
            shutil.copy2(folder / f"epoch{row + 1}.pt", early)
            time.sleep(0.1)

    thread = threading.Thread(target=publish)
    thread.start()
    result = score_directory(foreign_config(tmp_path / "run", pool, early, f"checkpoints.expect={T}"), watch=True)
    thread.join()
    assert result.checkpoints == T
    assert np.array_equal(assignments(tmp_path / "run"), assignments(scored[0]))
    assert result.selection_sha256 == scored[1].selection_sha256


def test_watch_ends_when_nothing_comes_any_more(pool: Pool, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "ck", pool, range(2))
    lines = Lines()
    config = foreign_config(tmp_path / "run", pool, tmp_path / "ck", "checkpoints.idle=1")
    assert score_directory(config, lines, watch=True).checkpoints == 2
    assert "no new checkpoint for 1 s: going on with the 2 that are there" in lines.said


@pytest.mark.parametrize("eliminate", ["none", "exact"])
def test_watch_when_fewer_come_than_were_expected(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path, eliminate: str
) -> None:
    """The margin, which breaks ties, is wanted of the row that turned out to be the last one."""
    overrides = (f"checkpoints.expect={T + 1}", "checkpoints.idle=1", f"score.eliminate={eliminate}", "score.budget=4")
    result = score_directory(foreign_config(tmp_path / "run", pool, folder, *overrides), watch=True)
    assert result.checkpoints == T
    assert result.selection_sha256 == reanalyse.select_run(scored[0], budget=4).selection_sha256


def test_a_checkpoint_that_comes_too_late_belongs_to_another_pass(pool: Pool, folder: Path, tmp_path: Path) -> None:
    early = tmp_path / "early"
    write_checkpoints(early, pool, range(5))
    lines = Lines()
    lines.progress = lambda state: write_checkpoints(early, pool, [5]) if state.rows_scored else None  # type: ignore
    config = foreign_config(tmp_path / "run", pool, early, "checkpoints.expect=5")
    assert score_directory(config, lines, watch=True).checkpoints == 5
    assert (early / "epoch6.pt").exists()
    more = foreign_config(tmp_path / "run", pool, early, "checkpoints.expect=6")
    assert score_directory(more).checkpoints == 6


def test_watch_leaves_alone_what_is_scored(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored[0], run)
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("cycles/000/assignments.zarr/*/c/*/*")}
    result = score_directory(foreign_config(run, pool, folder, "checkpoints.idle=1"), watch=True)
    assert result.selection_sha256 == scored[1].selection_sha256
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_another_measure_selects_again_without_scoring(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored[0], run)
    other = score_directory(foreign_config(run, pool, folder, "select.measure=flips", "select.tie_break=hash"))
    assert other.measure == "flips"
    assert other.selection_sha256 != scored[1].selection_sha256
    assert other.images_scored == scored[1].images_scored


def test_another_kind_of_batch_selects_again_without_scoring(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    """As a run that asked for it from the start."""
    run = tmp_path / "run"
    shutil.copytree(scored[0], run)
    power = ("select.batch=power", "select.beta=0.1")
    again = score_directory(foreign_config(run, pool, folder, *power))
    fresh = score_directory(foreign_config(tmp_path / "fresh", pool, folder, *power))
    assert again.selection_sha256 == fresh.selection_sha256 != scored[1].selection_sha256


def test_the_order_of_checkpoints_is_told(pool: Pool, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "ck")
    shutil.copy2(folder / f"epoch{T}.pt", tmp_path / "ck" / "best.pt")
    lines = Lines()
    result = score_directory(foreign_config(tmp_path / "run", pool, tmp_path / "ck"), lines, select=False)
    assert lines.said[1:3] == [
        f"{T} checkpoints, in this order: epoch1.pt, epoch2.pt, ..., epoch7.pt, epoch8.pt",
        "best.pt is left out: it has the weights of epoch8.pt",
    ]
    assert result.checkpoints == T


def test_elimination_selects_the_same_with_fewer_passes(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = score_directory(foreign_config(run, pool, folder, "score.eliminate=exact", "score.budget=4"))
    full = reanalyse.select_run(scored[0], budget=4)
    assert result.selection_sha256 == full.selection_sha256
    assert 0 < result.images_left_out < result.images_scored
    assert result.images_scored + result.images_left_out == T * READABLE
    votes, every = assignments(run), assignments(scored[0])
    assert result.images_scored == (votes < 4).sum()
    assert np.array_equal(votes[votes < 4], every[votes < 4])
    with pytest.raises(ConfigError, match="only dispersion over all checkpoints can be computed"):
        reanalyse.select_run(run, budget=5, measure="gini")
    write_checkpoints(tmp_path / "more", pool, range(T + 1))
    with pytest.raises(UserError, match="laid out with score.eliminate: exact for 8 checkpoints, and there are 9"):
        score_directory(foreign_config(run, pool, tmp_path / "more", "score.eliminate=exact", "score.budget=4"))


def test_excluded_samples_are_neither_scored_nor_selected(
    scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
) -> None:
    best = Selection.read(Path(scored[1].selection))
    (tmp_path / "labelled.txt").write_text("\n".join([*best.sample_ids[:10], "somewhere else"]))
    lines = Lines()
    config = foreign_config(tmp_path / "run", pool, folder, f"pool.exclude={tmp_path / 'labelled.txt'}")
    result = score_directory(config, lines)
    assert "pool.exclude: 1 of its 11 samples are not in the pool" in lines.said
    assert result.images_scored == T * (READABLE - 10)
    chosen = Selection.read(result.selection).sample_ids
    assert chosen[:10] == best.sample_ids[10:]
    with pytest.raises(RunConflict, match=r"excluded samples \(pool.exclude\)"):
        score_directory(foreign_config(tmp_path / "run", pool, folder))
    (tmp_path / "others.txt").write_text("nobody\n")
    with pytest.raises(UserError, match="none of its 1 samples, such as nobody, is in the pool"):
        score_directory(foreign_config(tmp_path / "r", pool, folder, f"pool.exclude={tmp_path / 'others.txt'}"))


class TestKnownSamples:
    def known(self, tmp_path: Path, pool: Pool, labels: np.ndarray) -> Path:
        ids = pool.samples(20, 60)["sample_id"].to_pylist()
        rows = "\n".join(f"{sample_id},{label}" for sample_id, label in zip(ids, labels, strict=True))
        (tmp_path / "known.csv").write_text(f"sample_id,label\n{rows}\n")
        return tmp_path / "known.csv"

    def test_accuracy_is_told_first(
        self, scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
    ) -> None:
        last = assignments(scored[0])[T - 1, 20:60]
        lines = Lines()
        config = foreign_config(tmp_path / "run", pool, folder)
        result = score_directory(config, lines, check=self.known(tmp_path, pool, last), expect_accuracy=0.99)
        assert result.known_accuracy[-1] == 1.0
        assert len(result.known_accuracy) == T
        assert f"epoch{T}.pt: 1.0000 of 40 known samples right" in lines.said

    def test_below_what_is_expected_nothing_is_scored(
        self, scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
    ) -> None:
        wrong = (assignments(scored[0])[T - 1, 20:60] + 1) % 4
        config = foreign_config(tmp_path / "run", pool, folder)
        with pytest.raises(UserError, match=r"epoch8.pt is right on 0.0000 of the known samples, less than 0.5"):
            score_directory(config, check=self.known(tmp_path, pool, wrong), expect_accuracy=0.5)
        assert not (tmp_path / "run").exists()  # so that it can be tried with another model.normalize

    def test_watch_checks_the_first_one_that_comes(
        self, scored: tuple[Path, ScoreResult], pool: Pool, folder: Path, tmp_path: Path
    ) -> None:
        wrong = (assignments(scored[0])[0, 20:60] + 1) % 4
        known = self.known(tmp_path, pool, wrong)
        (tmp_path / "ck").mkdir()
        threading.Timer(1.0, shutil.copy2, (folder / "epoch1.pt", tmp_path / "ck")).start()
        config = foreign_config(tmp_path / "run", pool, tmp_path / "ck", "checkpoints.idle=60")
        with pytest.raises(UserError, match=r"epoch1.pt is right on 0.0000 of the known samples"):
            score_directory(config, watch=True, check=known, expect_accuracy=0.5)

    def test_samples_that_are_not_in_the_pool(self, pool: Pool, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "known.csv").write_text("sample_id,label\nnobody,1\n")
        with pytest.raises(UserError, match="sample nobody is not in the pool"):
            score_directory(foreign_config(tmp_path / "run", pool, folder), check=tmp_path / "known.csv")
        with pytest.raises(SourceError, match="no such file"):
            score_directory(foreign_config(tmp_path / "run", pool, folder), check=tmp_path / "missing.csv")
        bad = pool.samples(7, 8)["sample_id"][0].as_py()
        (tmp_path / "known.csv").write_text(f"sample_id,label\n{bad},1\n")
        with pytest.raises(UserError, match=rf"--check: .*known.csv: sample {bad} is unreadable; leave it out"):
            score_directory(foreign_config(tmp_path / "run", pool, folder), check=tmp_path / "known.csv")


def test_bf16_is_compared_with_fp32(pool: Pool, folder: Path, tmp_path: Path) -> None:
    config = foreign_config(tmp_path / "run", pool, folder, "score.precision=bf16")
    report = score_directory(config, check_precision=2).precision_check
    assert report.blocks == 2
    assert report.images == 110  # two of four blocks: the first, of 64, and the last, of 48, each with a damaged one
    assert 0.9 < report.label_agreement <= 1
    assert 0.5 < report.dispersion_spearman <= 1
    assert 0 < report.selection_overlap <= 1
    with pytest.raises(ConfigError, match="score.precision is fp32 already"):
        score_directory(foreign_config(tmp_path / "fp32", pool, folder), check_precision=2)


def test_auto_is_tried_once_and_kept(pool: Pool, folder: Path, tmp_path: Path) -> None:
    config = foreign_config(tmp_path / "run", pool, folder, "score.precision=auto", "score.batch_size=auto")
    result = score_directory(config, select=False)
    assert result.precision in ("fp32", "bf16")
    assert result.batch_size in (32, 64, 128)
    assert result.selection is None
    identity = Run.open(tmp_path / "run").identity
    assert identity is not None
    assert identity.constants["score.batch_size"] == result.batch_size
    assert score_directory(config, select=False).batch_size == result.batch_size


class TestMistakes:
    def refuse(
        self, message: str, kind: type[Exception], pool: Pool, tmp_path: Path, *overrides: str, **options
    ) -> None:
        folder = options.pop("folder", tmp_path / "ck")
        with pytest.raises(kind, match=message):
            score_directory(foreign_config(tmp_path / "run", pool, folder, *overrides), **options)
        assert not (tmp_path / "run").exists()

    def test_one_checkpoint_only(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        write_checkpoints(tmp_path / "ck", pool, [0])
        self.refuse("dispersion of one checkpoint is always 0", ModelError, pool, tmp_path)

    def test_a_few_checkpoints_are_warned_of(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        write_checkpoints(tmp_path / "ck", pool, range(3))
        lines = Lines()
        score_directory(foreign_config(tmp_path / "run", pool, tmp_path / "ck"), lines, select=False)
        assert any("warning: 3 checkpoints only" in line for line in lines.said)

    def test_no_checkpoint_and_too_few(self, cluster: str, pool: Pool, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "ck").mkdir()
        self.refuse(r"has no file \*.pt; wait for them with --watch", ModelError, pool, tmp_path)
        self.refuse("9, and 8 are there", ModelError, pool, tmp_path, "checkpoints.expect=9", folder=folder)

    def test_a_budget_above_the_candidates(self, cluster: str, pool: Pool, folder: Path, tmp_path: Path) -> None:
        message = "score.budget: 239 is more than the 238 candidates"
        self.refuse(message, UserError, pool, tmp_path, "score.budget=239", folder=folder)

    def test_another_network(self, cluster: str, pool: Pool, folder: Path, tmp_path: Path) -> None:
        message = r"shape \(4, 128\), the network needs \(7, 128\); set model.num_classes=4"
        self.refuse(message, ModelError, pool, tmp_path, "model.num_classes=7", folder=folder)

    def test_elimination_without_knowing_how_many_will_come(
        self, cluster: str, pool: Pool, folder: Path, tmp_path: Path
    ) -> None:
        message = "score.eliminate: exact needs to know how many"
        self.refuse(message, ConfigError, pool, tmp_path, "score.eliminate=exact", folder=folder, watch=True)

    def test_weights_that_are_not_finite(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        """Refused before they have an index, so without the file the same command goes on."""
        write_checkpoints(tmp_path / "ck", pool, range(5))
        state = torch.load(tmp_path / "ck/epoch3.pt")
        state["14.bias"][1] = torch.nan
        torch.save(state, tmp_path / "ck/epoch3.pt")
        self.refuse(r"epoch3.pt: 14.bias has values that are not finite", ModelError, pool, tmp_path)
        (tmp_path / "ck/epoch3.pt").unlink()
        assert score_directory(foreign_config(tmp_path / "run", pool, tmp_path / "ck")).checkpoints == 4

    def test_a_logit_that_is_not_finite(self, cluster: str, pool: Pool, tmp_path: Path) -> None:
        write_checkpoints(tmp_path / "ck", pool, range(5))
        state = torch.load(tmp_path / "ck/epoch3.pt")
        state["14.bias"][1] = 3e38
        state["14.weight"][1] = 3e38  # finite, and their sums are not
        torch.save(state, tmp_path / "ck/epoch3.pt")
        with pytest.raises(
            UserError, match=r"checkpoint 2 \(epoch3.pt\) gives a logit that is not finite for sample s1-"
        ):
            score_directory(foreign_config(tmp_path / "run", pool, tmp_path / "ck"))
        assert (assignments(tmp_path / "run")[2] == 255).all()

    def test_another_pool(self, scored: tuple[Path, ScoreResult], test_pool: Pool, folder: Path) -> None:
        with pytest.raises(RunConflict, match=r"pool content \(pool.path\)"):
            score_directory(foreign_config(scored[0], test_pool, folder))
        with pytest.raises(RunConflict, match="score.batch_size: 32 -> 64"):
            score_directory(foreign_config(scored[0], test_pool, folder, "score.batch_size=64"))
