from __future__ import annotations

import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from distal import storage
from distal.errors import ConfigError, Damage, UnknownFormat


def test_a_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    storage.write_bytes(path, b"one")
    storage.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    storage.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="input/output"):
        storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_first_creator_wins(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    barrier = threading.Barrier(8)
    won: list[int] = []

    def create(i: int) -> None:
        barrier.wait()
        if storage.create_json(path, {"by": i}):
            won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_json(path) == {"by": won[0]}
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize(
    ("suffix", "write", "read"),
    [
        ("json", storage.write_json, storage.read_json),
        ("yaml", storage.write_yaml, storage.read_yaml),
    ],
)
def test_records_round_trip_and_are_checked(tmp_path: Path, suffix: str, write, read) -> None:
    path = tmp_path / f"record.{suffix}"
    write(path, {"a": 1, "b": [None, "x"]})
    assert read(path) == {"a": 1, "b": [None, "x"]}
    path.write_text(path.read_text().replace("1", "2", 1))  # the format version
    with pytest.raises(UnknownFormat, match=r"format 2 is unknown; .* reads format 1"):
        read(path)
    path.write_text('{"a": [')
    with pytest.raises(Damage, match=str(path)):
        read(path)
    path.write_text("3")
    with pytest.raises(Damage, match="not a record"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    storage.write_table(path, pa.table({"a": [1]}))
    assert storage.read_table(path)["a"].to_pylist() == [1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Damage, match=r"table\.parquet"):
        storage.read_table(path)


def test_a_flipped_bit_in_parquet_is_damage(tmp_path: Path) -> None:
    """Without page checksums most of them would read as other ids or other labels."""
    path = tmp_path / "table.parquet"
    storage.write_table(path, pa.table({"label": pa.array(range(1000), pa.int32())}))
    whole = path.read_bytes()
    for where in range(40, 1000, 97):  # in the pages: the footer comes last
        data = bytearray(whole)
        data[where] ^= 1
        path.write_bytes(data)
        with pytest.raises(Damage, match=r"table\.parquet: (damaged|not a valid Parquet file)"):
            storage.read_table(path)


def test_sealed_bytes_that_changed_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "state"
    storage.write_sealed(path, b"weights")
    assert storage.read_sealed(path) == b"weights"
    for where in (3, 70):
        data = bytearray(path.read_bytes())
        data[where] ^= 1
        (tmp_path / "flipped").write_bytes(data)
        with pytest.raises(Damage, match="flipped: its bytes have changed"):
            storage.read_sealed(tmp_path / "flipped")


@pytest.mark.parametrize(
    ("location", "expected"),
    [("file:///data/pool", "/data/pool"), ("/data/../x", "/x"), ("pool", "pool")],
)
def test_local_paths(location: str, expected: str) -> None:
    assert storage.local_path(location) == Path(expected).absolute()


@pytest.mark.parametrize("location", ["s3://bucket/pool", "gs://b/p", "http://host/pool"])
def test_other_urls_are_refused(location: str) -> None:
    with pytest.raises(ConfigError, match=r"pool.path: .* only local and shared file systems"):
        storage.local_path(location, "pool.path")


def test_names_leave_out_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    (tmp_path / ".a.123.tmp").touch()
    assert storage.names_in(tmp_path) == ["a", "b"]
    assert storage.names_in(tmp_path / "missing") == []
