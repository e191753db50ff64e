from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.errors import SourceError
from distal.pool import Pool
from distal.pool.sample_files import (
    csv_text,
    find,
    label_reader,
    read_any_table,
    read_ids,
    read_labels,
    require_readable,
)

CLASSES = ("cat", "dog", "7")


def test_ids_of_text_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n\n y \nx\n")
    (tmp_path / "a.csv").write_text("label,sample_id\n1,x\n2,y\n")
    pq.write_table(pa.table({"sample_id": ["x", "y"]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.csv", "a.parquet"):
        assert read_ids(tmp_path / name, "pool.exclude") == ["x", "y"]


def test_labels_are_indices_or_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sample_id,label\nx,dog\ny,0\nz, cat \n")
    assert read_labels(tmp_path / "a.csv", "--check", ("cat", "dog", "bird"), 3) == (["x", "y", "z"], [1, 0, 0])
    (tmp_path / "b.csv").write_text("sample_id,label\nx,1\n")
    assert read_labels(tmp_path / "b.csv", "--check", None, 3) == (["x"], [1])


def test_what_looks_like_a_number_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sample_id,label\n007,2\n011,10\n")
    assert read_ids(tmp_path / "a.csv", "pool.exclude") == ["007", "011"]
    classes = ("0", "1", "10", "2")  # as the folders of a pool sort
    assert read_labels(tmp_path / "a.csv", "--check", classes, 4) == (["007", "011"], [3, 2])
    pq.write_table(pa.table({"sample_id": [7], "label": [2]}), tmp_path / "a.parquet")
    assert read_labels(tmp_path / "a.parquet", "--check", classes, 4) == (["7"], [3])


LABELS = st.one_of(
    st.integers(-20, 20),
    st.integers(0, 20).map(str),
    st.sampled_from(["cat", " dog ", "7", "007", "1.5", "²", "٣", ""]),
)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["cat", "dog", "7", "1", "2", "-1", "1.5", "007", "٣", "²", "x7"]), min_size=2, unique=True
    ),
    LABELS,
)
def test_one_rule_says_what_a_label_means(classes: list[str], label: int | str) -> None:
    """Independently: a name wins; an index is written like one; and no index among classes that are numbers."""

    def is_number(text: str) -> bool:
        with suppress(ValueError):
            float(text)  # takes digits of every script
            return True
        return False

    text = str(label).strip()
    if text in classes:
        expected = classes.index(text)
    elif text in [str(index) for index in range(len(classes))] and not any(map(is_number, classes)):
        expected = int(text)
    else:
        expected = None
    assert label_reader(classes, len(classes))(label) == expected


@pytest.mark.parametrize(
    "label", [None, True, 1.0, b"0", "9" * 5000, "0" * 5000, "00", "+1", "-1", "1.0", "²", "\u0661", "3"]
)
def test_what_is_no_index(label: object) -> None:
    assert label_reader(("cat", "dog", "bird"), 3)(label) is None
    assert label_reader(None, 3)(label) is None


def test_labels_of_numbered_classes_agree_in_every_format(tmp_path: Path) -> None:
    """The labels that named the classes of a pool, 1 to 4, mean those classes again; the largest may be missing."""
    labels = {"sample_id": ["a", "b", "c"], "label": [1, 3, 2]}
    pq.write_table(pa.table(labels), tmp_path / "a.parquet")
    pyarrow.csv.write_csv(pa.table(labels), tmp_path / "a.csv")
    for name in ("a.parquet", "a.csv"):
        assert read_labels(tmp_path / name, "loop.initial", ("1", "2", "3", "4"), 4)[1] == [0, 2, 1]


def test_class_names_beside_labels_must_agree(tmp_path: Path) -> None:
    """Integer labels 1 to 3 with names: as an index 1 is dog, and the file itself says that it is not."""
    (tmp_path / "a.csv").write_text("sample_id,label,class_name\na,1,cat\n")
    with pytest.raises(SourceError, match="label '1' of a is class dog, and its class_name is cat"):
        read_labels(tmp_path / "a.csv", "loop.initial", ("cat", "dog", "bird"), 3)
    (tmp_path / "a.csv").write_text("sample_id,label,class_name\na,1,dog\n")
    assert read_labels(tmp_path / "a.csv", "loop.initial", ("cat", "dog", "bird"), 3) == (["a"], [1])


FORMULAS = st.tuples(
    st.sampled_from(["", "'", "''"]), st.sampled_from(list("=+-@\t\r\n\uff1d\uff20'a")), st.text(max_size=5)
)
TEXTS = st.one_of(st.text(min_size=1), FORMULAS.map("".join))


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_no_cell_is_a_formula_and_reading_undoes_it(texts: list[str]) -> None:
    cells = [csv_text(text) for text in texts]
    assert not any(cell[0] in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20" for cell in cells)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        pyarrow.csv.write_csv(pa.table({"sample_id": cells, "label": cells}), path)
        _, table = read_any_table(path, ("sample_id", "label"))
    assert table["sample_id"].to_pylist() == table["label"].to_pylist() == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_id,label\nx,bird\n", "label 'bird' of x is none of the 3 classes"),
        ("sample_id,label\nx,0\n", "label '0' of x is none of the 3 classes"),  # one is called 7: labels are names
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
