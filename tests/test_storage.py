from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal import storage
from distal.artifacts import arrays
from distal.errors import ConfigError, Damage, DiskFull, UnknownFormat
from distal.storage import parquet


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


class TestReadRegular:
    def test_what_is_there_is_read_up_to_the_limit(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        (tmp_path / "link").symlink_to("file")
        assert storage.read_regular(tmp_path / "file", 5) == b"12345"
        assert storage.read_regular(tmp_path / "link", 5) == b"12345"
        with pytest.raises(OSError, match="more than 4 bytes"):
            storage.read_regular(tmp_path / "file", 4)
        with pytest.raises(FileNotFoundError):
            storage.read_regular(tmp_path / "missing", 5)

    def test_a_file_that_is_longer_than_it_says(self) -> None:
        """Files in /proc say that they have no bytes."""
        path = Path("/proc/self/cmdline")
        assert path.stat().st_size == 0
        whole = path.read_bytes()
        assert storage.read_regular(path, len(whole)) == whole
        with pytest.raises(OSError, match="more than"):
            storage.read_regular(path, len(whole) - 1)
        assert storage.read_regular(path, 2**63 - 1) == whole

    def test_it_is_read_on_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("distal.storage.files._PIECE_BYTES", 3)
        whole = Path("/proc/self/cmdline").read_bytes()
        for limit in (len(whole), len(whole) + 1, 2**63 - 1):
            assert storage.read_regular(Path("/proc/self/cmdline"), limit) == whole
        for limit in (0, 1, len(whole) - 1):
            with pytest.raises(OSError, match=f"more than {limit:,} bytes"):
                storage.read_regular(Path("/proc/self/cmdline"), limit)

    @pytest.mark.timeout(10)
    def test_anything_else_is_refused_at_once(self, tmp_path: Path) -> None:
        """Nobody writes into the FIFO, and /dev/zero has no end."""
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "linked").symlink_to("fifo")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(tmp_path / "socket"))  # the names of sockets are short
            for path in ("fifo", "linked", "socket", ".", "/dev/zero"):
                with pytest.raises(OSError, match="not a regular file"):
                    storage.read_regular(tmp_path / path, 5)

    @pytest.mark.timeout(10)
    def test_a_fifo_that_takes_the_place_of_a_file(self, tmp_path: Path) -> None:
        """The kind is looked at again when it is open; opening does not wait for a writer."""
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "file").write_bytes(b"12345")
        path = tmp_path / "path"
        path.symlink_to("file")
        ended = threading.Event()

        def exchange() -> None:
            while not ended.is_set():
                for target in ("fifo", "file"):
                    (tmp_path / "next").symlink_to(target)
                    (tmp_path / "next").replace(path)

        thread = threading.Thread(target=exchange)
        thread.start()
        seen: set[object] = set()
        for _ in range(3000):
            try:
                seen.add(storage.read_regular(path, 5))
            except OSError as error:
                seen.add(error.strerror)
        ended.set()
        thread.join()
        assert seen == {b"12345", "not a regular file"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_are_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DiskFull, match=rf"file: {os.strerror(number).lower()}; everything committed so far stays"):
        storage.write_bytes(tmp_path / "file", b"new")


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
    whole = path.read_text()
    path.write_text(whole.replace("3", "4", 1))
    with pytest.raises(UnknownFormat, match=r"format 4 is unknown; .* reads format 3; use the version that wrote it"):
        read(path)
    path.write_text(whole.replace("1", "7", 1))
    with pytest.raises(Damage, match="what it says has changed since it was written"):
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


def test_parquet_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distal.storage.parquet.FORMAT", 4)
    storage.write_table(tmp_path / "table.parquet", pa.table({"a": [1]}))
    monkeypatch.undo()
    with pytest.raises(
        UnknownFormat, match=r"table.parquet: format 4 is unknown; this version of distal reads format 3"
    ):
        storage.read_table(tmp_path / "table.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UnknownFormat, match="format none is unknown"):
        storage.read_table(tmp_path / "other.parquet")


def test_durable_files_are_on_the_disk_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes before the name, the name before the call returns."""
    monkeypatch.setenv(storage.DURABLE, "1")
    flushed: list[str] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        flushed.append(os.path.relpath(Path(f"/proc/self/fd/{handle}").readlink(), tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    storage.write_json(tmp_path / "a.json", {})
    storage.create_json(tmp_path / "b.json", {})
    storage.write_table(tmp_path / "c.parquet", pa.table({"a": [1]}))
    assert [name.split(".")[1] if name != "." else name for name in flushed] == ["a", ".", "b", ".", "c", "."]
    flushed.clear()
    array = arrays.create_array(tmp_path / "z", (4,), (2,), "uint8", 0, ("sample",))
    assert flushed == ["z/zarr.json", "z", "."]
    flushed.clear()
    array.write((slice(0, 4),), np.arange(4))
    assert flushed == ["z/c/0", "z/c", "z", "z/c/1", "z/c", "z"]
    flushed.clear()
    storage.write_bytes(tmp_path / "new/deep/d", b"")
    assert [name.split("/")[-1].split(".")[1] if name.endswith("tmp") else name for name in flushed] == [
        ".", "new", "d", "new/deep",
    ]  # fmt: skip


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    kept = tmp_path / "deep" / "labels.parquet"
    storage.write_bytes(kept, b"x")
    (kept.parent / f".{kept.name}.0123.tmp").touch()
    (tmp_path / "7.0123.partial").touch()
    assert storage.sweep(tmp_path) == 0  # they may be being written
    assert storage.sweep(tmp_path, older_than=0) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [kept.name]


def test_folders_that_killed_processes_left_are_swept(tmp_path: Path) -> None:
    """Each as a whole, when nothing in it is young; a folder of somebody's own stays."""
    with storage.temporary_folder(tmp_path / "cycle" / "assignments.zarr") as ours:
        name = ours.name
    left, young, other = tmp_path / "cycle" / name, tmp_path / name, tmp_path / "notes.tmp"
    for folder in (left, young, other):
        storage.write_bytes(folder / "deep" / "zarr.json", b"x")
        (folder / "deep" / "c.0123.partial").touch()
    (tmp_path / f".link.{'0' * 32}.tmp").symlink_to(other)
    for path in (*tmp_path.rglob("*"), tmp_path):
        os.utime(path, (0, 0), follow_symlinks=False)
    (young / "deep" / "zarr.json").touch()
    assert storage.sweep(tmp_path) == 2
    assert not left.exists()
    assert sorted(path.name for path in young.rglob("*")) == ["c.0123.partial", "deep", "zarr.json"]
    assert (other / "deep" / "zarr.json").exists()
    assert storage.sweep(tmp_path, older_than=0) == 1
    assert not young.exists()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_flipped_bit_in_parquet_is_damage(tmp_path: Path, streamed: bool) -> None:
    """Anywhere: the pages have checksums of Parquet's own, the footer has none but ours."""
    path = tmp_path / "table.parquet"
    table = pa.table({"label": pa.array(range(1000), pa.int32())})
    if streamed:
        with storage.parquet_writer(path, table.schema) as writer:
            writer.write_table(table)
    else:
        storage.write_table(path, table)
    assert storage.read_table(path) == table
    assert pq.read_table(path) == table  # for anyone
    whole = path.read_bytes()
    for where in range(4, len(whole), 13):
        data = bytearray(whole)
        data[where] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            (Damage, UnknownFormat), match=r"table\.parquet: (damaged|not a valid Parquet|format .* is)"
        ):
            storage.read_table(path)


def test_a_large_file_is_hashed_unless_it_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distal.machine.memory_bytes", lambda: 2000)
    storage.write_sealed(tmp_path / "state", b"x" * 10**6)
    storage.check_sealed(tmp_path / "state")
    assert storage.file_sha256(tmp_path / "state") == storage.sha256((tmp_path / "state").read_bytes())
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)
    for read in (storage.check_sealed, storage.file_sha256):
        with pytest.raises(OSError, match="next to nothing of its 1,099,511,627,776 bytes is on the disk"):
            read(tmp_path / "hole")


def test_sealed_bytes_that_changed_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "state"
    storage.write_sealed(path, b"weights")
    assert storage.read_sealed(path) == b"weights"
    storage.check_sealed(path)
    for where in (3, 70):
        data = bytearray(path.read_bytes())
        data[where] ^= 1
        (tmp_path / "flipped").write_bytes(data)
        with pytest.raises(Damage, match="flipped: its bytes have changed"):
            storage.read_sealed(tmp_path / "flipped")
        with pytest.raises(Damage, match="flipped: its bytes have changed"):
            storage.check_sealed(tmp_path / "flipped")


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


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As Linux answers on vfat (EPERM), and mounts of object stores do. None of them can be mounted here."""

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ConfigError, match=f"{tmp_path}: its file system has no hard links .* use a local disk, NFS"):
        storage.require_writable(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}: its file system has no hard links .* use a local disk, NFS"):
        storage.create_json(tmp_path / "first.json", {})
    assert os.listdir(tmp_path) == []


def test_another_fault_of_the_probe_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.require_writable(tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
    with pytest.raises(OSError, match="input/output error"):
        storage.require_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("read", [storage.read_json, storage.read_yaml, storage.read_sealed, storage.read_table])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, read: Callable[[Path], object], kind: str) -> None:
    path = tmp_path / "record"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(Damage, match=f"{path}: not a regular file"):
        read(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.json", b"[" * 200_000),
        ("digits.json", b'{"format": 3, "n": ' + b"9" * 5000 + b"}"),
        ("list.json", b"[1, 2]"),
        ("text.json", b"\xff\xfe"),
        ("deep.yaml", b"[" * 20_000),
        ("digits.yaml", b"n: " + b"9" * 5000),
        ("date.yaml", b"format: 3\nn: 2001-99-99"),
        ("day.yaml", b"format: 3\nn: 2001-01-01"),
        ("keys.yaml", b"format: 3\n? [1, 2]\n: 3"),
        ("laughs.yaml", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"),
        ("code.yaml", b"!!python/object/apply:os.abort []"),
    ],
)
def test_records_of_any_content_are_damage_in_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    read = storage.read_json if path.suffix == ".json" else storage.read_yaml
    with pytest.raises((Damage, UnknownFormat), match=rf"^{path}: [^\n]{{1,300}}$"):
        read(path)


def test_a_record_without_end_is_not_read(tmp_path: Path) -> None:
    for name, read in (("r.json", storage.read_json), ("r.yaml", storage.read_yaml)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)  # sparse
        with pytest.raises(Damage, match=r"more than [\d,]+ bytes"):
            read(tmp_path / name)


def test_a_parquet_file_that_is_replaced_meanwhile_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "table.parquet", tmp_path / "other.parquet"
    storage.write_table(path, pa.table({"label": [1, 2, 3]}))
    storage.write_table(other, pa.table({"label": pa.array(range(1000))}))
    opened = parquet.open_parquet

    def and_replaced(path: Path) -> pq.ParquetFile:
        file = opened(path)
        other.replace(path)
        return file

    monkeypatch.setattr(parquet, "open_parquet", and_replaced)
    parquet.check_parquet(path)
    assert not other.exists()
