"""Every file of a run is damaged in turn, found, repaired, and made again by the same command."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distal import machine
from distal.artifacts.assignments import Assignments
from distal.artifacts.lease import Lease
from distal.artifacts.ledger import LABELED, SKIPPED
from distal.artifacts.runs import Run
from distal.driver import run as driver
from distal.driver.reanalyse import reduce_run, select_run
from distal.driver.score_folder import score_directory
from distal.errors import Damage, PoolError, RunConflict, UnknownFormat
from distal.labels import answers
from distal.labels.answers import Answer
from distal.pool import Pool
from distal.pool.build import build
from distal.report.repair import repair
from distal.report.status import status
from distal.report.verify import verify
from distal.storage import FORMAT, names_in, read_json, read_yaml, write_json, write_yaml
from tests.helpers import content, flip, foreign_config, small_config, write_checkpoints, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")

N = 240
ALSO = [Answer(20 + i, f"s1-{20 + i:05d}", None, SKIPPED, "bob") for i in range(3)]


@pytest.fixture(scope="module")
def finished(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cycles of three checkpoints, and an analysis."""
    run = tmp_path_factory.mktemp("verified") / "run"
    shutil.copytree(small_run, run)
    select_run(run, measure="gini", budget=9)
    return run


def again(run: Path, pool: Pool, test: Pool) -> None:
    driver.run(small_config(run, pool, test))


def test_a_run_that_is_sound(finished: Path) -> None:
    told = verify(finished)
    assert (told.state, told.damage) == ("sound", [])
    assert told.files > 50
    assert repair(finished).state == "sound"


CHUNK = "cycles/000/assignments.zarr/assignments/c/1/2"
MENDED = [
    (CHUNK, "array|assignments: row 1, block 2 does not decode"),
    ("cycles/001/assignments.zarr/margin/c/2/0", "margin: row 2, block 0 does not decode"),
    ("cycles/001/assignments.zarr/eligible/c/1", "eligible: block 1 does not decode"),
    ("cycles/000/test.zarr/assignments/c/0/0", "test.zarr/assignments: row 0, block 0 does not decode"),
    ("cycles/000/scores.zarr/dispersion/c/3", "dispersion: block 3 does not decode"),
    ("cycles/001/scores.zarr/margin/zarr.json", "margin"),
    ("cycles/001/assignments.zarr/assignments/zarr.json", "assignments"),
    ("cycles/000/checkpoints/0001/weights-*.pt", "weights-.*: its bytes have changed"),
    ("cycles/001/checkpoints/0000/manifest.json", "0000/manifest.json: "),
    ("cycles/000/train/state.pt", "state.pt: its bytes have changed"),
    ("cycles/000/selection.parquet", "selection.parquet: "),
    ("cycles/000/labels.parquet", "labels.parquet: "),
    ("initial.parquet", "initial.parquet: "),
    ("summary.json", "summary.json: "),
    *((f"cycles/000/{stage}.json", f"{stage}.json: ") for stage in ("train", "score", "test", "reduce", "label")),
    ("cycles/001/select.json", "select.json: "),
    ("cycles/001/analyses/gini/scores.zarr/gini/c/1", "gini: block 1 does not decode"),
    ("cycles/001/analyses/gini/reduce.json", "gini/reduce.json: "),
    ("cycles/001/analyses/gini/selection-9.parquet", "selection-9.parquet: "),
]


ALWAYS = {CHUNK, "cycles/000/checkpoints/0001/weights-*.pt", "cycles/000/selection.parquet"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [pytest.param(*each, id=each[0], marks=[] if each[0] in ALWAYS else pytest.mark.slow) for each in MENDED],
)
def test_a_flipped_bit_is_named_and_repaired(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path, pattern: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (path,) = run.glob(pattern)
    flip(path)
    told = verify(run)
    assert told.state == "damaged"
    assert len(told.damage) == 1, told.damage
    assert str(path).rsplit("/c/", 1)[0] in told.damage[0] or pattern.endswith("zarr.json")
    assert message.split("|")[-1].rstrip(": ").split(".*")[0] in told.damage[0]

    repaired = repair(run)
    assert (repaired.state, repaired.left) == ("repaired", [])
    again(run, pool, test_pool)
    select_run(run, measure="gini", budget=9)
    assert verify(run).state == "sound"
    assert content(run) == content(finished)


def test_a_missing_chunk_of_a_finished_cycle_is_damage(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / CHUNK).unlink()
    assert verify(run).damage == [f"{run}/cycles/000/assignments.zarr: row 1, block 2 is missing"]
    told = repair(run)
    assert (told.state, told.deleted, told.redone) == ("repaired", [], [f"{run}/cycles/000: score"])
    assert told.next == "run the command that made it again"
    assert not (run / "cycles/000/score.json").exists()
    assert repair(run).state == "sound"
    again(run, pool, test_pool)
    assert content(run) == content(finished)


def test_reduce_refuses_what_is_damaged(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / CHUNK)
    with pytest.raises(Damage, match="assignments: row 1, block 2 does not decode"):
        reduce_run(run, cycle=0, measures=("flips",))


@pytest.mark.parametrize("pattern", ["run.yaml", "cycles/001/cycle.yaml", "cycles/000/assignments.zarr.json"])
def test_what_cannot_be_made_again_is_named_and_left_alone(finished: Path, tmp_path: Path, pattern: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / pattern)
    before = (run / pattern).read_bytes()
    told = repair(run)
    assert told.state == "damaged"
    assert told.deleted == []
    assert f"{pattern}: " in told.left[0]
    assert told.left[0].endswith("put it back from a copy")
    assert (run / pattern).read_bytes() == before


def test_a_selection_that_has_labels_is_never_replaced(
    finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path
) -> None:
    """As if a chunk came out differently, on another kind of machine: labels were asked for the first selection."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "cycles/000/scores.zarr/dispersion/c/0")
    repair(run)
    cycle = Run.open(run).cycle(0)
    kept = Run.open(finished).cycle(0).chosen().sha256
    assert cycle.expected("select", {"other": "inputs"}) is None
    assert cycle.expected("select", {"other": "inputs"}, labelled=True) == kept
    write_json(cycle.folder / "expected.json", {"select": {"inputs": None, "selection_sha256": "0" * 64}})
    before = cycle.selection.read_bytes()
    with pytest.raises(Damage, match=r"the selection that comes out now \(\w{12}\) is not the one that was made"):
        again(run, pool, test_pool)
    assert cycle.selection.read_bytes() == before
    assert cycle.marker("select") is None


def test_what_was_selected_is_known_without_its_marker(finished: Path, tmp_path: Path) -> None:
    for damage in ("select.json", "select.json and label.json"):
        run = tmp_path / damage
        shutil.copytree(finished, run)
        for name in damage.split(" and "):
            (run / "cycles/000" / name).write_bytes(b"")
        repair(run)
        cycle = Run.open(run).cycle(0)
        assert cycle.expected("select", {}, labelled=True) == Run.open(finished).cycle(0).chosen().sha256


def test_other_weights_than_were_scored_are_named_and_nothing_is_deleted(finished: Path, tmp_path: Path) -> None:
    """Training on a GPU may not give the same bits again."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    first, second = (run / f"cycles/000/checkpoints/000{i}" for i in (0, 1))
    record = read_json(second / "manifest.json")
    write_json(first / "manifest.json", {**record, "index": 0})
    shutil.copy(second / record["file"], first)
    told = repair(run)
    assert told.deleted == []
    assert "row 0 was scored with other weights than checkpoint 0 has now; put the old checkpoint" in told.left[0]


def with_command(cycle: Path) -> None:
    """As if a script had trained the cycle."""
    config = read_yaml(cycle / "cycle.yaml")
    write_yaml(cycle / "cycle.yaml", {**config, "train": {**config["train"], "command": "train {checkpoints}"}})


@pytest.mark.parametrize("name", ["weights-*.pt", "manifest.json"])
def test_what_a_script_trained_is_not_deleted(finished: Path, tmp_path: Path, name: str) -> None:
    """Nobody promises that it gives the same bits again."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with_command(run / "cycles/001")
    assert verify(run).damage == []
    (path,) = (run / "cycles/001/checkpoints/0001").glob(name)
    flip(path)
    before = sorted(run.rglob("*"))
    told = repair(run)
    assert (told.state, told.deleted, told.redone) == ("damaged", [], [])
    assert told.left[0].endswith("put it back from a copy")
    assert [path for path in before if not path.exists()] == []


def test_files_of_more_than_half_of_the_memory(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2000)
    assert (finished / "cycles/000/train/state.pt").stat().st_size > 1000
    assert verify(finished).damage == []


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (MemoryError(), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (OSError(errno.EIO, "Input/output error"), True),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("read", ["check_sealed", "file_sha256", "read_json"])
def test_what_cannot_be_read_here_is_left_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, error: Exception, is_damage: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["distal.report.verify"], read, fail)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    told = repair(run)
    assert bool(told.deleted) == is_damage
    if not is_damage:
        assert told.left
        assert all(": could not be read here: " in line for line in told.left)
        assert all(line.endswith("; try again where it can be") for line in told.left)
        assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()


def test_assignments_that_cannot_be_read_here_are_left_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Assignments, "open", fail)
    told = repair(run)
    assert (told.deleted, told.mended) == ([], [])
    assert f"{run}/cycles/000/assignments.zarr: could not be read here: MemoryError; try" in told.left[0]


def of_the_version_before(path: Path) -> None:
    path.write_text(re.sub(rf'("?format"?: ){FORMAT}', rf"\g<1>{FORMAT - 1}", path.read_text(), count=1))


def test_a_run_of_another_version_is_refused(finished: Path, pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """In one line, and none of its files is deleted, though all would look damaged."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in (*run.rglob("*.json"), *run.rglob("*.yaml")):
        of_the_version_before(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    calls: list[Callable[[], object]] = [
        lambda: verify(run), lambda: repair(run), lambda: status(run), lambda: again(run, pool, test_pool)
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UnknownFormat) as caught:
            call()
        assert str(caught.value) == (
            f"{run}/run.yaml: format {FORMAT - 1} is unknown; this version of distal reads format {FORMAT}; use the "
            "version that wrote it, or make it anew: build a pool again, start a run in another directory"
        )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_pool_of_another_version_is_refused(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    shutil.copytree(pool.path, tmp_path / "pool")
    of_the_version_before(tmp_path / "pool/pool.json")
    with pytest.raises(UnknownFormat, match=r"pool/pool\.json: format .* or make it anew: build a pool again"):
        Pool.open(tmp_path / "pool")
    (line,) = verify(tmp_path / "pool").damage
    assert "build a pool again" in line


def test_a_cycle_without_its_configuration_is_missed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "cycles/000/cycle.yaml").unlink()
    assert "cycles/000/cycle.yaml: missing" in verify(run).damage[0]


MINE = """
from pathlib import Path

Path("ran").touch()


class Strategy:
    needs = ("final",)

    def select(self, candidates, budget, rng):
        return range(budget)
"""


def with_batch(cycle: Path, batch: str) -> None:
    """As if the cycle had been begun with it."""
    config = read_yaml(cycle / "cycle.yaml")
    write_yaml(cycle / "cycle.yaml", {**config, "select": {**config["select"], "batch": batch}})


def test_nothing_that_a_run_names_is_imported(finished: Path, tmp_path: Path) -> None:
    """A run may come from anybody, and is looked at in the folder that it came in."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "mine.py").write_text(MINE)
    with_batch(run / "cycles/000", "os:abort")
    with_batch(run / "cycles/001", "mine:Strategy")
    for command in ("verify", "repair"):
        done = subprocess.run(
            [sys.executable, "-m", "distal", command, "."], cwd=run, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert not (run / "ran").exists()


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_strategy_that_cannot_be_imported_here_is_not_needed(
    finished: Path, tmp_path: Path, unfinished: bool
) -> None:
    """Rows are those of the marker, or of the record beside the assignments when the cycle is not finished."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with_batch(run / "cycles/001", "elsewhere:Strategy")
    if unfinished:
        for stage in ("score", "test", "reduce", "select"):
            (run / f"cycles/001/{stage}.json").unlink()
    assert verify(run).damage == []
    (run / "cycles/001/checkpoints/0002/manifest.json").unlink()
    assert "0002/manifest.json: missing" in verify(run).damage[0]


def test_rows_that_were_scored_and_are_not_there_are_missed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    marker = read_json(run / "cycles/000/score.json")
    write_json(run / "cycles/000/score.json", {**marker, "n_rows": 4})
    assert "assignments.zarr: 3 rows, and 4 were scored" in "".join(verify(run).damage)


class TestAnswers:
    """What people said lies in numbered files."""

    @pytest.fixture
    def run(self, finished: Path, tmp_path: Path) -> Path:
        """As if the first cycle had been trained after two imports, and a third came later."""
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        for i in range(3):
            answers.add(run / "answers", [Answer(i, f"s1-{i:05d}", i, LABELED, "ann"), ALSO[i]])
        marker = read_json(run / "cycles/000/train.json")
        assert marker["n_imports"] == 0
        write_json(run / "cycles/000/train.json", {**marker, "n_imports": 2})
        assert verify(run).damage == []
        return run

    @pytest.mark.parametrize("number", [0, 1])
    def test_one_that_was_used_is_missed(self, run: Path, number: int) -> None:
        """Also when none is there that came later."""
        path = answers.import_path(run / "answers", number)
        path.unlink()
        assert str(path) in verify(run).damage[0]
        for later in range(number + 1, 3):
            answers.import_path(run / "answers", later).unlink()
        assert f"{path}: missing, and cycle 0 was trained after it" in verify(run).damage
        assert repair(run).deleted == []

    def test_a_gap_is_missed_also_when_no_cycle_was_trained_since(self, run: Path) -> None:
        answers.add(run / "answers", [Answer(9, "s1-00009", 1, LABELED, "ann")])
        path = answers.import_path(run / "answers", 2)
        path.unlink()
        (damage,) = verify(run).damage
        assert str(path) in damage

    @pytest.mark.timeout(60)
    def test_a_number_far_off_is_one_gap(self, run: Path) -> None:
        """Such as a date."""
        (run / "answers/20241130.parquet").write_bytes(b"x")
        gap, other = verify(run).damage
        some = ", ".join(str(answers.import_path(run / "answers", number)) for number in (3, 4, 5))
        assert gap == f"{some} and 20,241,124 more: missing, and the number of another file is higher"
        assert other.startswith(f"{run}/answers/20241130.parquet: ")

    def test_two_gaps(self, run: Path) -> None:
        for number in (0, 2):
            answers.import_path(run / "answers", number).unlink()
        (run / "answers/000003.parquet").write_bytes(b"x")
        gap, _ = verify(run).damage
        assert gap.startswith(f"{run}/answers/000000.parquet, {run}/answers/000002.parquet: missing")

    def test_a_number_with_other_zeros(self, run: Path) -> None:
        shutil.copy(run / "answers/000001.parquet", run / "answers/0000001.parquet")
        assert verify(run).damage == [f"{run}/answers/0000001.parquet: not a file of answers"]

    def test_a_file_under_the_name_of_another(self, run: Path) -> None:
        first, second, _ = names_in(run / "answers")
        shutil.copy(run / "answers" / first, run / "answers" / second)
        (damage,) = verify(run).damage
        assert f"{run / 'answers' / second}: holds another import than its number says" in damage

    def test_something_else(self, run: Path) -> None:
        (run / "answers/notes.txt").write_text("ask Ann")
        assert verify(run).damage == [f"{run}/answers/notes.txt: not a file of answers"]


def test_repair_waits_for_no_driver(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with Lease(run, "another"), pytest.raises(RunConflict, match=r"attempt another \(process \d+ on .*\) is working"):
        repair(run)


@pytest.mark.slow
def test_a_run_of_foreign_checkpoints(cluster: str, pool: Pool, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "ck", pool, range(8))
    config = foreign_config(tmp_path / "run", pool, tmp_path / "ck", "score.eliminate=exact", "score.budget=4")
    first = score_directory(config)
    assert first.images_left_out > 0
    assert verify(tmp_path / "run").state == "sound"
    whole = content(tmp_path / "run")
    damages: list[Callable[[], object]] = [
        lambda: flip(tmp_path / "run/cycles/000/assignments.zarr/assignments/c/1/0"),
        lambda: flip(tmp_path / "run/cycles/000/assignments.zarr.elimination/00005.json"),
        lambda: flip(next((tmp_path / "run").glob("cycles/000/analyses/*/scores.zarr/dispersion/c/2"))),
    ]
    for damage in damages:
        damage()
        assert len(verify(tmp_path / "run").damage) == 1
        assert repair(tmp_path / "run").state == "repaired"
        assert score_directory(config).selection_sha256 == first.selection_sha256
        assert content(tmp_path / "run") == whole
        assert verify(tmp_path / "run").state == "sound"
    record = tmp_path / "run/cycles/000/checkpoints.json"
    whole_record = read_json(record)
    record.unlink()
    assert verify(tmp_path / "run").damage == [f"{record}: missing"]
    write_json(record, {"checkpoints": whole_record["checkpoints"][:-1]})
    assert verify(tmp_path / "run").damage == [f"{record}: not the checkpoints that were scored"]
    write_json(record, whole_record)
    flip(tmp_path / "ck/epoch2.pt")
    told = repair(tmp_path / "run")
    assert told.left == [f"{tmp_path}/ck/epoch2.pt: its bytes have changed; put the old file back"]


class TestPools:
    @pytest.fixture
    def packed(self, cluster: str, tmp_path: Path) -> tuple[Path, Path]:
        source = write_source(tmp_path / "source.parquet", 300, seed=3)
        return source, build(str(source), tmp_path / "pool").path

    def test_images_are_packed_again(self, packed: tuple[Path, Path]) -> None:
        _, pool = packed
        assert verify(pool).state == "sound"
        chunk = pool / "images.zarr/c/1/0/0/0"
        whole = chunk.read_bytes()
        flip(chunk)
        told = verify(pool)
        assert told.damage == [f"{pool}/images.zarr: block 1 does not decode (its bytes have changed)"]
        assert repair(pool).state == "repaired"
        assert chunk.read_bytes() == whole
        assert verify(pool).state == "sound"

    def test_from_a_source_that_has_changed_nothing_is_repaired(self, packed: tuple[Path, Path]) -> None:
        """Valid chunks of other images would be worse than a damaged one."""
        source, pool = packed
        flip(pool / "images.zarr/c/1/0/0/0")
        before = {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()}
        write_source(source, 300, seed=4)
        told = repair(pool)
        assert told.state == "damaged"
        assert "block 1 does not decode" in told.left[0]
        assert {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()} == before

    def test_valid_chunks_of_other_images(self, packed: tuple[Path, Path]) -> None:
        """Every checksum is right, and it is another pool."""
        _, pool = packed
        chunks = pool / "images.zarr/c"
        shutil.copy(chunks / "0/0/0/0", chunks / "1/0/0/0")
        assert "are not what pool.json says" in verify(pool).damage[0]

    def test_samples(self, packed: tuple[Path, Path]) -> None:
        _, pool = packed
        flip(pool / "samples.parquet", 0.2)
        assert "samples.parquet: " in verify(pool).damage[0]

    def test_neither_run_nor_pool(self, tmp_path: Path) -> None:
        with pytest.raises((RunConflict, PoolError), match="no run here"):
            verify(tmp_path)
