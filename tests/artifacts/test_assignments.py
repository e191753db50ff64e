from __future__ import annotations

import errno
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.artifacts import arrays
from distal.artifacts.arrays import Array, create_array
from distal.artifacts.assignments import Assignments, dtype_for, unassigned
from distal.errors import ConfigError, Damage
from distal.records import split_blocks

N, BLOCK, ROWS = 10, 4, 3


def create(path: Path, *, n_classes: int = 5, recorded: tuple[str, ...] = ("margin",)) -> Assignments:
    """Ten samples in blocks of 4, 4 and 2; the second block has no eligible sample."""
    eligible = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 1], dtype=bool)
    return Assignments.create(
        path,
        n_rows=ROWS,
        n_samples=N,
        block_size=BLOCK,
        n_classes=n_classes,
        eligible=(eligible[block.start : block.stop] for block in split_blocks(N, BLOCK)),
        recorded=recorded,
    )


@pytest.mark.parametrize(
    ("n_classes", "dtype"),
    [(2, "uint8"), (255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32"), (2**32 - 1, "uint32")],
)
def test_dtype_leaves_room_for_unassigned(n_classes: int, dtype: str) -> None:
    assert dtype_for(n_classes) == np.dtype(dtype)
    assert unassigned(np.dtype(dtype)) >= n_classes


def test_more_classes_than_any_dtype_holds() -> None:
    with pytest.raises(ConfigError, match="4294967296 classes; at most 4294967295"):
        dtype_for(2**32)


@pytest.mark.parametrize(("n_classes", "dtype", "fill"), [(5, "uint8", 255), (300, "uint16", 65_535)])
def test_layout_as_plain_zarr_sees_it(tmp_path: Path, n_classes: int, dtype: str, fill: int) -> None:
    create(tmp_path / "a.zarr", n_classes=n_classes)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    array = group["assignments"]
    assert (array.shape, array.dtype, array.chunks, array.shards) == ((ROWS, N), np.dtype(dtype), (1, BLOCK), None)
    assert array.fill_value == fill
    assert np.all(array[:] == fill)
    margin = group["margin"]
    assert (margin.shape, margin.dtype, margin.chunks) == ((ROWS, N), np.float16, (1, BLOCK))
    assert np.isnan(margin[:]).all()
    assert group["eligible"][:].tolist() == [True, True, False, True, *[False] * 4, True, True]
    for name in ("assignments", "margin", "eligible"):
        assert [type(codec).__name__ for codec in group[name].metadata.codecs][1:] == ["ZstdCodec", "Crc32cCodec"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_was_written_is_read_back_after_reopening(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("round-trip") / "a.zarr"
    assignments = create(path)
    expected = np.full((ROWS, N), 255, dtype=np.uint8)
    cells = [(row, block) for row in range(ROWS) for block in assignments.blocks]
    for row, block in data.draw(st.lists(st.sampled_from(cells), unique=True)):
        labels = np.array(
            data.draw(st.lists(st.sampled_from([0, 1, 4, 255]), min_size=len(block), max_size=len(block)))
        )
        assignments.write(row, block, labels.astype(np.uint8))
        expected[row, block.start : block.stop] = labels
    start = data.draw(st.integers(0, N))
    stop = data.draw(st.integers(start, N))
    again = pickle.loads(pickle.dumps(Assignments.open(path)))
    assert np.array_equal(again.read(start, stop), expected[:, start:stop])


def test_a_block_without_an_eligible_sample_is_committed_too(tmp_path: Path) -> None:
    """Zarr deletes a chunk that equals the fill value unless told not to: the block would look unfinished for ever."""
    assignments = create(tmp_path / "a.zarr")
    block = assignments.blocks[1]
    assert not assignments.has(0, block)
    assignments.write(0, block, np.full(4, 255, np.uint8), {"margin": np.full(4, np.nan, np.float32)})
    assert Assignments.open(assignments.path).has(0, block)
    assert assignments.committed(0) == {1}
    assert assignments.committed(1) == set()


def test_writing_twice_changes_no_byte(tmp_path: Path) -> None:
    assignments = create(tmp_path / "a.zarr")
    block = assignments.blocks[2]
    labels = np.array([1, 2], np.uint8)
    assignments.write(1, block, labels)
    chunk = assignments.path / "assignments/c/1/2"
    first = chunk.read_bytes()
    assignments.write(1, block, labels)
    assert chunk.read_bytes() == first


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, np.uint8), r"labels must be \(4,\) uint8 for block 0, got \(3,\) uint8"),
        (np.zeros(4, np.int64), r"got \(4,\) int64"),
        (np.array([0, 1, 5, 0], np.uint8), "labels must be below 5 or UNASSIGNED, got 5"),
    ],
)
def test_wrong_labels_are_not_written(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    assignments = create(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=message):
        assignments.write(0, assignments.blocks[0], labels)
    assert not assignments.has(0, assignments.blocks[0])


def flip_a_bit(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(data)


def filled(path: Path) -> Assignments:
    assignments = create(path)
    for row in range(ROWS):
        for block in assignments.blocks:
            labels = np.arange(len(block), dtype=np.uint8)
            assignments.write(row, block, labels, {"margin": np.linspace(0, 1, len(block), dtype=np.float32)})
    return assignments


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("array", ["assignments", "margin"])
def test_a_flipped_bit_is_named_and_the_block_scored_again(tmp_path: Path, array: str, where: float) -> None:
    assignments = filled(tmp_path / "a.zarr")
    flip_a_bit(assignments.path / array / "c/2/0", where)
    with pytest.raises(Damage, match=f"{array}: row 2, block 0 does not decode"):
        assignments.read(0, N) if array == "assignments" else assignments.read_recorded("margin", 2, 0, N)
    assert assignments.remove_damaged(0) == []
    (bad,) = assignments.remove_damaged(2)
    assert f"{array}: row 2, block 0 does not decode" in bad
    assert assignments.committed(2, recorded=True) == {1, 2}
    assert assignments.committed(2) == ({1, 2} if array == "assignments" else {0, 1, 2})
    assert assignments.committed(1, recorded=True) == {0, 1, 2}
    assert not (assignments.path / array / "c/2/0").exists()


def test_a_block_can_lack_its_recorded_values(tmp_path: Path) -> None:
    """Its labels count all the same; whoever needs the values scores it again."""
    assignments = filled(tmp_path / "a.zarr")
    (assignments.path / "margin/c/2/1").unlink()
    assert assignments.remove_damaged(2) == []
    block = assignments.blocks[1]
    assert (assignments.has(2, block), assignments.has(2, block, recorded=True)) == (True, False)
    assert assignments.committed(2) == {0, 1, 2}
    assert assignments.committed(2, recorded=True) == {0, 2}


def test_a_disk_that_cannot_be_read_just_now_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting what cannot be read for a moment would throw work away."""
    assignments = filled(tmp_path / "a.zarr")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(arrays, "read_bytes", fail)
    with pytest.raises(OSError, match="input/output error"):
        assignments.remove_damaged(1)
    assert assignments.committed(1) == {0, 1, 2}


def test_a_truncated_chunk_is_damage(tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr")
    chunk = assignments.path / "assignments/c/0/1"
    chunk.write_bytes(chunk.read_bytes()[:5])
    with pytest.raises(Damage, match="assignments: row 0, block 1 does not decode"):
        assignments.read(0, N)


def test_laying_out_that_was_cut_off_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    assert not Assignments.begun(path)
    with pytest.raises(Damage, match="a.zarr: no assignments here"):
        Assignments.open(path)
    create(path)
    assert Assignments.begun(path)
    path.with_name("a.zarr.json").unlink()
    assert not Assignments.begun(path)
    assert create(path).committed(0) == set()


def test_laying_out_that_was_cut_off_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that has arrived since changes no layout."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    layout = {"n_samples": N, "block_size": BLOCK, "n_classes": 5, "recorded": ("margin",)}
    path = tmp_path / "a.zarr"
    for name in ("create_json", "create_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"distal.artifacts.assignments.{name}", die)
            with pytest.raises(KeyboardInterrupt):
                create(path)
        assert not Assignments.begun(path)
    again = Assignments.take_up(
        path,
        n_rows=ROWS + 1,
        **layout,
        eligible=lambda start, stop: np.ones(stop - start, bool),
        on_damage=pytest.fail,
    )
    assert again.n_rows == ROWS
    assert again.eligible(0, N).all()


@pytest.mark.parametrize("text", [None, "", "{", '{"zarr_format": 3, "node_type": "array"}'])
@pytest.mark.parametrize("array", ["assignments", "margin", "eligible"])
def test_metadata_that_is_gone_or_broken_is_damage(tmp_path: Path, array: str, text: str | None) -> None:
    assignments = filled(tmp_path / "a.zarr")
    metadata = assignments.path / array / "zarr.json"
    metadata.unlink() if text is None else metadata.write_text(text)
    with pytest.raises(Damage, match=f"{array}: cannot be opened"):
        Assignments.open(assignments.path)


@pytest.mark.parametrize("array", ["margin", "eligible"])
def test_a_lost_chunk_is_not_read_as_the_fill_value(tmp_path: Path, array: str) -> None:
    assignments = filled(tmp_path / "a.zarr")
    (assignments.path / array / ("c/2/1" if array == "margin" else "c/1")).unlink()
    with pytest.raises(Damage, match=f"{array}: (row 2, )?block 1 is missing"):
        assignments.read_recorded("margin", 2, 0, N) if array == "margin" else assignments.eligible(0, N)


def test_a_row_is_scored_with_one_set_of_weights(tmp_path: Path) -> None:
    assignments = create(tmp_path / "a.zarr")
    assignments.adopt_weights(1, "a" * 64)
    assignments.adopt_weights(1, "a" * 64)
    again = Assignments.open(assignments.path)
    again.adopt_weights(0, "b" * 64)
    with pytest.raises(Damage, match="row 1 was begun with weights a{12}, and row 1 now has c{12}"):
        again.adopt_weights(1, "c" * 64)
    assert Assignments.open(assignments.path).weights == {0: "b" * 64, 1: "a" * 64}


def test_the_first_fingerprint_is_kept(tmp_path: Path) -> None:
    assignments = create(tmp_path / "a.zarr")
    assert assignments.adopt_fingerprint({"torch": "1"}) == {"torch": "1"}
    assert Assignments.open(assignments.path).adopt_fingerprint({"torch": "2"}) == {"torch": "1"}
    assert Assignments.open(assignments.path).recorded == ("margin",)


def test_leftovers_of_a_killed_writer_are_not_blocks(tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr")
    (assignments.path / "assignments/c/0/1.0123456789abcdef.partial").write_bytes(b"half")
    assert assignments.committed(0) == {0, 1, 2}


def test_labels_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of labels is the commit: with a margin that could not be written, nothing is committed."""
    assignments = create(tmp_path / "a.zarr")
    write = Array.write

    def fail(array: Array, *arguments: object) -> None:
        if array.path.name == "margin":
            raise OSError(errno.EIO, "input/output error")
        write(array, *arguments)

    monkeypatch.setattr(Array, "write", fail)
    with pytest.raises(OSError, match="input/output error"):
        assignments.write(0, assignments.blocks[0], np.zeros(4, np.uint8), {"margin": np.zeros(4, np.float32)})
    assert not assignments.has(0, assignments.blocks[0])


@pytest.mark.parametrize(
    ("name", "shape", "chunks", "dtype", "fill"),
    [
        ("assignments", (ROWS + 1, N), (1, BLOCK), "uint8", 255),
        ("assignments", (ROWS, N), (1, BLOCK + 1), "uint8", 255),
        ("assignments", (ROWS, N), (1, BLOCK), "uint16", 255),
        ("assignments", (ROWS, N), (1, BLOCK), "uint8", 0),
        ("margin", (ROWS, N), (1, BLOCK), "float16", 0.0),
        ("eligible", (N,), (BLOCK,), "bool", True),
    ],
)
def test_another_layout_than_the_record_says_is_damage(
    tmp_path: Path, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: object
) -> None:
    create(tmp_path / "a.zarr")
    create_array(tmp_path / "a.zarr" / name, shape, chunks, dtype, fill, ("checkpoint", "sample")[-len(shape) :])
    with pytest.raises(Damage, match=f"{name}: its metadata has changed"):
        Assignments.open(tmp_path / "a.zarr")


def test_what_is_damaged_is_deleted_or_made_again_when_a_cycle_goes_on(tmp_path: Path) -> None:
    assignments = filled(tmp_path / "a.zarr")
    eligible = assignments.eligible(0, N)
    for chunk in ("assignments/c/0/2", "margin/c/1/0", "eligible/c/2"):
        flip_a_bit(assignments.path / chunk)
    layout = {"n_rows": ROWS, "n_samples": N, "block_size": BLOCK, "n_classes": 5, "recorded": ("margin",)}
    said: list[str] = []
    again = Assignments.take_up(
        assignments.path, **layout, eligible=lambda start, stop: eligible[start:stop], on_damage=said.append
    )
    named = ("eligible: block 2", "assignments: row 0, block 2", "margin: row 1, block 0")
    assert [any(name in line for line in said) for name in named] == [True] * 3
    assert len(said) == 3
    assert np.array_equal(again.eligible(0, N), eligible)
    assert [again.committed(row, recorded=True) for row in range(ROWS)] == [{0, 1}, {1, 2}, {0, 1, 2}]


def test_some_rows_are_read_in_their_order(tmp_path: Path) -> None:
    assignments = create(tmp_path / "a.zarr")
    for row in range(ROWS):
        for block in assignments.blocks:
            assignments.write(row, block, np.full(len(block), row, np.uint8))
    for rows in ([1], [2, 0], [0, 2], range(1, 3)):
        assert assignments.read(3, N, rows).tolist() == [[row] * (N - 3) for row in rows]


@pytest.mark.parametrize("rows", [None, [2], [0, 2]])
def test_a_block_that_is_not_committed_is_unassigned_or_damage(tmp_path: Path, rows: list[int] | None) -> None:
    assignments = filled(tmp_path / "a.zarr")
    assignments.chunk("assignments", 2, assignments.blocks[1]).unlink()
    assert assignments.read(0, N, rows)[-1].tolist() == [0, 1, 2, 3, *[255] * 4, 0, 1]
    with pytest.raises(Damage, match="assignments: row 2, block 1 is missing"):
        assignments.read(0, N, rows, complete=True)
