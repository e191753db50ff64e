from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.errors import SourceError
from distal.lists import find, read_ids, read_labels, require_readable
from distal.pool import Pool

CLASSES = ("cat", "dog", "7")


def test_ids_of_text_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n\n y \nx\n")
    (tmp_path / "a.csv").write_text("label,sample_id\n1,x\n2,y\n")
    pq.write_table(pa.table({"sample_id": ["x", "y"]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.csv", "a.parquet"):
        assert read_ids(tmp_path / name, "pool.exclude") == ["x", "y"]


def test_labels_are_indices_or_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sample_id,label\nx,dog\ny,0\nz,7\n")
    assert read_labels(tmp_path / "a.csv", "--check", CLASSES, 3) == (["x", "y", "z"], [1, 0, 2])
    (tmp_path / "b.csv").write_text("sample_id,label\nx,1\n")
    assert read_labels(tmp_path / "b.csv", "--check", None, 3) == (["x"], [1])


def test_what_looks_like_a_number_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sample_id,label\n007,2\n011,10\n")
    assert read_ids(tmp_path / "a.csv", "pool.exclude") == ["007", "011"]
    classes = ("0", "1", "10", "2")  # as the folders of a pool sort
    assert read_labels(tmp_path / "a.csv", "--check", classes, 4) == (["007", "011"], [3, 2])
    pq.write_table(pa.table({"sample_id": [7], "label": [2]}), tmp_path / "a.parquet")
    assert read_labels(tmp_path / "a.parquet", "--check", classes, 4) == (["7"], [2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_id,label\nx,bird\n", "label 'bird' of x is none of the 3 classes"),
        ("sample_id,label\nx,3\n", "label '3' of x is none of the 3 classes"),
        ("sample_id,label\nx,-1\n", "label '-1' of x is none of the 3 classes"),
        ("sample_id,label\nx,0\ny,0\nx,1\n", "sample x is there more than once"),
        ("sample_id,label\nx,\n", "of x is none of the 3 classes"),
        ("id,label\nx,1\n", "has no column 'sample_id'; it has id, label"),
        ("sample_id,label\n", "names no sample"),
        ("", "a.csv cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SourceError, match=f"--check: .*{message}"):
        read_labels(tmp_path / "a.csv", "--check", CLASSES, 3)


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv"):
        with pytest.raises(SourceError, match=f"pool.exclude: .*{name}: no such file"):
            read_ids(tmp_path / name, "pool.exclude")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(SourceError, match="names no sample"):
        read_ids(tmp_path / "b.txt", "pool.exclude")


def test_samples_are_found_by_id(pool: Pool) -> None:
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    order = np.random.default_rng(0).permutation(240)[:100]
    assert np.array_equal(find(pool, [ids[i] for i in order]), order)
    assert find(pool, ["nobody", ids[3]]).tolist() == [-1, 3]


def test_unreadable_samples_are_named(pool: Pool) -> None:
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    unreadable = [i for i, told in enumerate(pool.samples(0, 240)["status"].to_pylist()) if told != "ok"]
    assert len(unreadable) == 2
    readable = [i for i in range(240) if i not in unreadable]
    require_readable(pool, [ids[i] for i in readable], np.array(readable), "file")
    with pytest.raises(SourceError, match=rf"file: sample {ids[unreadable[0]]} is unreadable; leave it out \(2 are\)"):
        require_readable(pool, ids, np.arange(240), "file")
