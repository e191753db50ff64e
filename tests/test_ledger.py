from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distal.errors import Damage
from distal.ledger import Ledger, label_files, write_labels


def write(path: Path, indices: list[int], labels: list[int]) -> Path:
    write_labels(path, np.array(indices), [f"s{i}" for i in indices], np.array(labels), "someone")
    return path


def test_the_ledger_is_the_union_of_its_files(tmp_path: Path) -> None:
    files = [write(tmp_path / "initial.parquet", [9, 2], [0, 1]), write(tmp_path / "labels.parquet", [5], [3])]
    ledger = Ledger.read(files)
    assert ledger.indices.tolist() == [2, 5, 9]
    assert ledger.labels.tolist() == [1, 3, 0]
    assert len(ledger) == 3
    assert Ledger.read(reversed(files)).sha256 == ledger.sha256
    assert Ledger.read(files[:1]).sha256 != ledger.sha256


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 3, [0, 0, 1]), (2, 6, [1, 0, 0, 1]), (6, 9, [0, 0, 0]), (9, 10, [1]), (4, 4, [])],
)
def test_labelled_samples_of_a_range(tmp_path: Path, start: int, stop: int, expected: list[int]) -> None:
    ledger = Ledger.read([write(tmp_path / "initial.parquet", [9, 2, 5], [0, 0, 0])])
    assert ledger.asked(start, stop).tolist() == [bool(flag) for flag in expected]


def test_a_sample_is_labelled_once(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.parquet", [1, 2], [0, 1]), write(tmp_path / "b.parquet", [2], [1])]
    with pytest.raises(Damage, match="sample s2 is labelled in more than one file"):
        Ledger.read(files)


def test_label_files_of_a_cycle(tmp_path: Path) -> None:
    for name in ("labels.parquet", "labels-2.parquet", "labels.json", "selection.parquet"):
        (tmp_path / name).touch()
    assert [file.name for file in label_files(tmp_path)] == ["labels-2.parquet", "labels.parquet"]
