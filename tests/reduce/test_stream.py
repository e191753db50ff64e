from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from distal import machine
from distal.artifacts.assignments import Assignments, unassigned
from distal.artifacts.scores import Scores
from distal.cluster import in_tasks
from distal.errors import Damage
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.records import Window, split_blocks
from distal.reduce import stream
from distal.reduce.measures import FROM_VOTES, Votes, random
from distal.reduce.stream import Reduction, n_threads

N, ROWS, CLASSES = 240, 5, 4


def filled(path: Path, pool: Pool, block_size: int, recorded: tuple[str, ...] = ("margin", "entropy")) -> Assignments:
    """Random assignments of the readable samples, and a margin and an entropy at the last row."""
    eligible = Eligibility(pool, 0, None)
    blocks = split_blocks(N, block_size)
    assignments = Assignments.create(
        path,
        n_rows=ROWS,
        n_samples=N,
        block_size=block_size,
        n_classes=CLASSES,
        eligible=(eligible.read(block.start, block.stop) for block in blocks),
        recorded=recorded,
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, (ROWS, N)).astype(np.uint8)
    values = rng.random(N).astype(np.float32)
    for row in range(ROWS):
        for block in blocks:
            flags = eligible.read(block.start, block.stop)
            part = np.where(flags, labels[row, block.start : block.stop], unassigned(assignments.dtype))
            kept = {name: np.where(flags, values[block.start : block.stop], np.nan) for name in recorded}
            assignments.write(row, block, part.astype(np.uint8), kept if row == ROWS - 1 else {})
    return assignments


def reduce(
    assignments: Assignments, pool: Pool, dest: Path, seed: int = 0, cycle: int = 0, **options: object
) -> Scores:
    """Every measure there is."""
    measures = options.pop("measures", (*FROM_VOTES, *assignments.recorded, "random"))
    rows = options.pop("rows", range(ROWS))
    mapper = options.pop("mapper", stream.in_threads)
    return stream.reduce(
        Reduction(assignments, pool, measures, rows, seed=seed, cycle=cycle, **options), dest, mapper=mapper
    )


@pytest.fixture
def eligible(pool: Pool) -> np.ndarray:
    return Eligibility(pool, 0, None).read(0, N)


@pytest.mark.parametrize("stripe_bytes", [1, 64 * ROWS, 150 * ROWS, 2**25])
def test_scores_on_disk(pool: Pool, tmp_path: Path, eligible: np.ndarray, monkeypatch, stripe_bytes: int) -> None:
    """However many blocks are read at a time, the same scores as from the whole array at once."""
    monkeypatch.setattr(stream, "STRIPE_BYTES", stripe_bytes)
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    reduce(assignments, pool, tmp_path / "scores.zarr", seed=3, cycle=1)
    group = zarr.open_group(tmp_path / "scores.zarr", mode="r")
    assert sorted(group.array_keys()) == sorted([*FROM_VOTES, "entropy", "margin", "random"])
    counted = Votes(assignments.read(0, N), CLASSES)
    for name, measure in FROM_VOTES.items():
        array = group[name]
        assert (array.shape, array.dtype, array.chunks) == ((N,), np.float32, (64,))
        assert np.array_equal(array[:][eligible], measure(counted).astype(np.float32)[eligible])
        assert np.isnan(array[:][~eligible]).all()
    margin = assignments.read_recorded("margin", ROWS - 1, 0, N)
    assert np.array_equal(group["margin"][:], (1 - margin.astype(np.float64)).astype(np.float32), equal_nan=True)
    (keys,) = pool.columns(0, N, "sample_key")
    expected = np.where(eligible, random(3, 1, keys), np.nan).astype(np.float32)
    assert np.array_equal(group["random"][:], expected, equal_nan=True)


def test_nothing_recorded_nothing_reduced(pool: Pool, tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64, recorded=())
    scores = reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)
    assert set(scores.measures) == {*FROM_VOTES, "random"}


@pytest.mark.parametrize("rows", [range(2, 5), [0, 2, 4], [1]])
def test_a_window_is_the_same_as_those_rows_alone(pool: Pool, tmp_path: Path, eligible: np.ndarray, rows) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    scores = reduce(assignments, pool, tmp_path / "scores.zarr", rows=rows, measures=tuple(FROM_VOTES))
    counted = Votes(assignments.read(0, N)[list(rows)], CLASSES)
    for name, measure in FROM_VOTES.items():
        expected = np.where(eligible, measure(counted), np.nan).astype(np.float32)
        assert np.array_equal(scores.read(name, 0, N), expected, equal_nan=True)


def test_a_window_in_the_name_of_a_measure(pool: Pool, tmp_path: Path, eligible: np.ndarray) -> None:
    """Several windows and the whole, of one array that is read once; the whole decides who is counted."""
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    names = ("dispersion", "dispersion@last=0.5", "flips@from=1,every=2", "margin")
    scores = reduce(assignments, pool, tmp_path / "scores.zarr", measures=names)
    votes = assignments.read(0, N)
    for name in names[:3]:
        measure, window = Window.of_name(name)
        counted = Votes(votes[window.rows(ROWS)], CLASSES)
        expected = np.where(eligible, FROM_VOTES[measure](counted), np.nan).astype(np.float32)
        assert np.array_equal(scores.read(name, 0, N), expected, equal_nan=True)
    assert not np.array_equal(scores.read(names[0], 0, N), scores.read(names[1], 0, N), equal_nan=True)


def test_ray_tasks_write_the_same_bytes_as_threads(cluster: str, pool: Pool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "_MAX_SAMPLES", 64)
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    for name, mapper in (("threads", stream.in_threads), ("tasks", in_tasks)):
        reduce(assignments, pool, tmp_path / name, mapper=mapper, annotate=True)
    threads, tasks = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*/c/*")}
        for name in ("threads", "tasks")
    )
    assert threads == tasks
    assert len(threads) == 4 * (len(FROM_VOTES) + 5)


def test_damage_in_a_ray_task_is_still_damage(cluster: str, pool: Pool, tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    (assignments.path / "assignments/c/3/1").unlink()
    with pytest.raises(Damage, match="a.zarr: sample 64 is eligible and has no value"):
        reduce(assignments, pool, tmp_path / "scores.zarr", mapper=in_tasks)


def test_annotations_are_classes(pool: Pool, tmp_path: Path, eligible: np.ndarray) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    scores = reduce(assignments, pool, tmp_path / "scores.zarr", measures=("dispersion",), annotate=True)
    assert (scores.measures, scores.annotations) == (("dispersion",), ("mode", "runner_up"))
    mode = scores.read("mode", 0, N)
    assert mode.dtype == np.int32
    assert (mode[~eligible] == -1).all()
    assert np.array_equal(mode[eligible], Votes(assignments.read(0, N), CLASSES).tally.mode[eligible])


def test_only_what_was_left_out_may_lack_a_value(pool: Pool, tmp_path: Path, eligible: np.ndarray) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    block = assignments.blocks[1]
    labels = assignments.read(block.start, block.stop)[ROWS - 1].copy()
    labels[10:20] = 255
    assignments.write(ROWS - 1, block, labels, {})
    remaining = [int(eligible[b.start : b.stop].sum()) for b in assignments.blocks]
    remaining[1] -= 10
    scores = reduce(assignments, pool, tmp_path / "s.zarr", measures=("dispersion",), remaining=tuple(remaining))
    assert np.isnan(scores.read("dispersion", 74, 84)).all()
    assert np.isnan(scores.read("dispersion", 0, N)).sum() == (~eligible).sum() + 10
    remaining[1] -= 1
    with pytest.raises(Damage, match="block 1 has 54 samples with a value at every checkpoint, and 53 were not left"):
        reduce(assignments, pool, tmp_path / "s.zarr", measures=("dispersion",), remaining=tuple(remaining))


def test_a_sample_that_was_not_left_out_and_lacks_a_value_is_damage(
    pool: Pool, tmp_path: Path, eligible: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples may lack values after an elimination; those of a lost cell are too many. In any stripe."""
    monkeypatch.setattr(stream, "STRIPE_BYTES", 1)
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    block = assignments.blocks[2]
    labels = assignments.read(block.start, block.stop)[ROWS - 1].copy()
    labels[10:20] = 255
    assignments.write(ROWS - 1, block, labels, {})
    remaining = tuple(int(eligible[b.start : b.stop].sum()) for b in assignments.blocks)
    with pytest.raises(Damage, match=f"block 2 has {remaining[2] - 10} samples .* and {remaining[2]} were not left"):
        reduce(assignments, pool, tmp_path / "s.zarr", measures=("dispersion",), remaining=remaining)


@pytest.mark.parametrize("stripe_bytes", [1, 2**25])
def test_a_lost_block_is_no_score(pool: Pool, tmp_path: Path, monkeypatch, stripe_bytes: int) -> None:
    """A chunk that is gone reads as UNASSIGNED: that must not pass for an answer."""
    monkeypatch.setattr(stream, "STRIPE_BYTES", stripe_bytes)
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    (assignments.path / "assignments/c/3/1").unlink()
    with pytest.raises(Damage, match="a.zarr: sample 64 is eligible and has no value"):
        reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)


@pytest.mark.parametrize("array", ["margin/c/4/1", "eligible/c/1"])
def test_a_lost_recorded_or_eligible_chunk_is_no_score(pool: Pool, tmp_path: Path, array: str) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    (assignments.path / array).unlink()
    with pytest.raises(Damage, match=f"{array.partition('/')[0]}: (row 4, )?block 1 is missing"):
        reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)


def test_a_margin_that_was_never_recorded_is_no_score(pool: Pool, tmp_path: Path) -> None:
    """NaN for an eligible sample: it would silently drop out of the selection."""
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    block = assignments.blocks[1]
    labels = assignments.read(block.start, block.stop)[ROWS - 1]
    nothing = np.full(len(block), np.nan, np.float32)
    assignments.write(ROWS - 1, block, labels, {"margin": nothing, "entropy": nothing})
    with pytest.raises(Damage, match="array margin: sample 64 is eligible and has no value"):
        reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)


def test_a_lost_score_is_no_number(pool: Pool, tmp_path: Path) -> None:
    reduce(filled(tmp_path / "a.zarr", pool, 64), pool, tmp_path / "scores.zarr", seed=0, cycle=0)
    (tmp_path / "scores.zarr/dispersion/c/2").unlink()
    with pytest.raises(Damage, match="dispersion: block 2 is missing"):
        Scores.open(tmp_path / "scores.zarr").read("dispersion", 0, N)


def test_a_flipped_bit_is_named(pool: Pool, tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    chunk = assignments.path / "assignments/c/4/2"
    data = bytearray(chunk.read_bytes())
    data[-6] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(Damage, match="assignments: row 4, block 2 does not decode"):
        reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)


def test_reducing_again_replaces_the_scores(pool: Pool, tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr", pool, 64)
    reduce(assignments, pool, tmp_path / "scores.zarr", seed=0, cycle=0)
    first = Scores.open(tmp_path / "scores.zarr").read("random", 0, N)
    reduce(assignments, pool, tmp_path / "scores.zarr", seed=1, cycle=0)
    with pytest.raises(Damage, match="no scores here"):
        Scores.open(tmp_path / "nothing.zarr")
    assert not np.array_equal(Scores.open(tmp_path / "scores.zarr").read("random", 0, N), first, equal_nan=True)
    chunk = tmp_path / "scores.zarr/random/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(Damage, match=r"random: block 0 does not decode"):
        Scores.open(tmp_path / "scores.zarr").read("random", 0, 10)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from distal import machine
from distal.artifacts.assignments import Assignments
from distal.records import split_blocks
from distal.reduce.stream import Reduction, n_threads, reduce, stripe_bytes, stripe_samples

N, ROWS, BLOCK, THREADS = 2**19, 16, 65_536, int(sys.argv[2])
machine.cpus = lambda: THREADS
path = Path(sys.argv[1])
blocks = split_blocks(N, BLOCK)
assignments = Assignments.create(
    path / "a.zarr", n_rows=ROWS, n_samples=N, block_size=BLOCK, n_classes=10,
    eligible=(np.ones(len(block), bool) for block in blocks),
)
rng = np.random.default_rng(0)
for row in range(ROWS):
    for block in blocks:
        assignments.write(row, block, rng.integers(0, 10, len(block), np.uint8))


def status(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024


measures = ("dispersion", "vote_entropy", "flips")
small = Assignments.create(
    path / "small.zarr", n_rows=ROWS, n_samples=4, block_size=4, n_classes=10, eligible=[np.ones(4, bool)]
)
for row in range(ROWS):
    small.write(row, small.blocks[0], np.zeros(4, np.uint8))
reduce(Reduction(small, None, measures, range(ROWS)), path / "small-scores.zarr")  # compiles
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
reduce(Reduction(assignments, None, measures, range(ROWS)), path / "scores.zarr")
stripe = stripe_bytes(ROWS, 1, stripe_samples(ROWS, 1, BLOCK))
assert n_threads(stripe) == THREADS
print(status("VmHWM") - before, THREADS * stripe)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of a part of a process")
def test_memory_is_what_is_forecast_per_thread(tmp_path: Path) -> None:
    """Measured with 64 rows: 50 MB of 68 for one thread, 84 MB of 135 for two."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    used, expected = map(int, done.stdout.split())
    assert expected / 3 < used < expected * 4 / 3


def test_threads_fit_into_the_memory_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpus", lambda: 192)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 * 2**30)
    assert n_threads(40 * 2**20) == 51
    assert n_threads(2**20) == 192
    assert n_threads(2**40) == 1
