from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distal.artifacts.ledger import LABELED, SKIPPED, Ledger, label_files, too_few, write_labels
from distal.errors import Damage


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


def declined(path: Path, indices: list[int]) -> Path:
    names = [f"s{i}" for i in indices]
    write_labels(path, np.array(indices), names, [None] * len(names), "someone", [SKIPPED] * len(names))
    return path


def test_a_label_supersedes_that_its_sample_was_declined(tmp_path: Path) -> None:
    first, later = declined(tmp_path / "a.parquet", [4, 1]), write(tmp_path / "b.parquet", [1, 7], [3, 2])
    ledger = Ledger.read([first, later])
    assert (ledger.indices.tolist(), ledger.labels.tolist(), ledger.declined.tolist()) == ([1, 7], [3, 2], [4])
    assert ledger.asked(0, 8).tolist() == [False, True, False, False, True, False, False, True]
    assert ledger.sha256 == Ledger(np.array([1, 7]), np.array([3, 2]), np.array([4])).sha256
    assert Ledger.read([first]).declined.tolist() == [1, 4]


@pytest.mark.parametrize("order", ["LD", "DD", "LL", "DLL", "DLD", "DDL", "LDL"])
def test_nothing_else_is_said_twice(tmp_path: Path, order: str) -> None:
    """D: declined, L: labelled, file by file; the label is the same each time."""
    files = []
    for number, kind in enumerate(order):
        path = tmp_path / f"{number}.parquet"
        files.append(write(path, [2, 5 + number], [1, 0]) if kind == "L" else declined(path, [2, 5 + number]))
    with pytest.raises(Damage, match="sample s2 is labelled in more than one file"):
        Ledger.read(files)


def test_one_file_does_not_supersede_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_labels(path, np.array([2, 2]), ["s2", "s2"], [None, 1], "someone", [SKIPPED, LABELED])
    with pytest.raises(Damage, match="sample s2"):
        Ledger.read([path])


@pytest.mark.parametrize(
    ("labels", "workers", "reason"),
    [
        ([0, 1], 1, None),
        ([0, 1, 1, 1], 2, None),
        ([], 1, "0 labelled samples of 0 classes; training needs at least 2 (2 per rank) of 2 classes"),
        ([1, 1, 1], 1, "3 labelled samples of 1 classes; training needs at least 2 (2 per rank) of 2 classes"),
        ([0, 1, 0], 2, "3 labelled samples of 2 classes; training needs at least 4 (2 per rank) of 2 classes"),
    ],
)
def test_what_training_needs(labels: list[int], workers: int, reason: str | None) -> None:
    assert too_few(labels, workers) == reason


def test_the_hash_is_of_everything() -> None:
    """Also of what is an index here, a label there, and declined elsewhere."""
    ledgers = [
        Ledger(np.array(indices), np.array(labels), np.array(declined, np.int64))
        for indices, labels, declined in (
            ([1, 2], [3, 4], []),
            ([1, 2], [3, 5], []),
            ([1, 3], [3, 4], []),
            ([1, 2], [3, 4], [5]),
            ([1, 2], [3, 4], [6]),
            ([1], [2], [3, 4]),
            ([1], [2], []),
        )
    ]
    assert len({each.sha256 for each in [*ledgers, Ledger.empty()]}) == 8
    assert ledgers[0].sha256 == Ledger(np.array([1, 2]), np.array([3, 4])).sha256


def test_label_files_of_a_cycle(tmp_path: Path) -> None:
    for name in ("labels.parquet", "labels-2.parquet", "labels.json", "selection.parquet"):
        (tmp_path / name).touch()
    assert [file.name for file in label_files(tmp_path)] == ["labels-2.parquet", "labels.parquet"]
