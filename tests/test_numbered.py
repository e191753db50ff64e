from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distal.storage import Numbered, create_bytes, create_json, read_json


def test_numbers_are_padded_and_other_names_are_ignored(tmp_path: Path) -> None:
    files = Numbered(tmp_path / "log", digits=3, suffix=".json")
    assert (files.numbers(), files.last()) == ([], None)
    for n in (1, 2):
        assert files.append(create_json, lambda last: {"before": last}) == n
    assert [read_json(files.path(n)) for n in files.numbers()] == [{"before": None}, {"before": 1}]
    for name in ("7.json", "0007.txt", "x003.json", ".0009.json"):
        (tmp_path / "log" / name).touch()
    (tmp_path / "log" / "1234.json").touch()
    assert files.numbers() == [1, 2, 1234]
    assert files.last() == 1234


def test_the_first_number_may_be_zero_and_nothing_may_be_appended(tmp_path: Path) -> None:
    files = Numbered(tmp_path, digits=5)
    assert files.append(create_bytes, lambda _: None) is None
    assert files.append(create_bytes, lambda _: b"a", first=0) == 0
    assert files.append(create_bytes, lambda _: b"b", first=0) == 1


def test_a_writer_that_was_paused_checks_again(tmp_path: Path) -> None:
    """Between its choice of a number and its write another one takes that number."""
    files = Numbered(tmp_path, digits=6)
    seen: list[int | None] = []

    def content(last: int | None) -> bytes:
        seen.append(last)
        if len(seen) == 1:
            create_bytes(files.path(1), b"other")
        return b"late"

    assert files.append(create_bytes, content) == 2
    assert seen == [None, 1]
    assert files.path(1).read_bytes() == b"other"


def test_a_check_that_fails_writes_nothing(tmp_path: Path) -> None:
    def content(_: int | None) -> bytes:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        Numbered(tmp_path, digits=6).append(create_bytes, content)
    assert list(tmp_path.iterdir()) == []


def test_every_writer_gets_a_number_of_its_own(tmp_path: Path) -> None:
    files = Numbered(tmp_path, digits=6)
    with ThreadPoolExecutor(8) as threads:
        given = [*threads.map(lambda i: files.append(create_bytes, lambda _: b"%d" % i), range(40))]
    assert sorted(given) == files.numbers() == list(range(1, 41))
    assert [files.path(n).read_bytes() for n in given] == [b"%d" % i for i in range(40)]
