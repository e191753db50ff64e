from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from torchvision import datasets

from distal.errors import SourceError
from distal.pool import parquet_source
from distal.pool.build import build
from distal.pool.decode import decode
from distal.pool.folder_source import FolderSource
from distal.pool.parquet_source import Columns, ParquetSource
from distal.pool.sources import open_source
from distal.records import split_blocks
from tests.helpers import png, write_source

IMAGE = png(np.zeros((2, 2), dtype=np.uint8))


def parquet(path: Path, **columns: object) -> Path:
    n = max(len(column) for column in columns.values())  # type: ignore[arg-type]
    pq.write_table(pa.table({"image": [IMAGE] * n, **columns}), path)
    return path


class TestParquet:
    def test_rows_in_any_range(self, tmp_path: Path) -> None:
        """Row groups of 100: ranges that start and end inside them give the same rows."""
        source = open_source(str(write_source(tmp_path / "a.parquet", 250, seed=3)))
        whole = list(source.rows(0, 250))
        assert [row.sample_id for row in whole] == [f"s3-{i:05d}" for i in range(250)]
        for start, stop in [(0, 0), (99, 101), (100, 200), (249, 250), (30, 220)]:
            assert list(source.rows(start, stop)) == whole[start:stop]

    def test_files_are_read_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        for name, ids in (("b", ["1", "2"]), ("a", ["3"]), ("c", ["0"])):
            parquet(tmp_path / f"{name}.parquet", sample_id=ids)
        source = open_source(str(tmp_path))
        assert [row.sample_id for row in source.rows(0, len(source))] == ["3", "1", "2", "0"]
        assert next(source.rows(2, 3)).uri == f"{tmp_path}/b.parquet#row=1"

    def test_integer_labels_with_names(self, tmp_path: Path) -> None:
        path = parquet(
            tmp_path / "a.parquet", sample_id=list("abc"), label=[7, 3, 7], class_name=["ship", "cat", "ship"]
        )
        source = open_source(str(path))
        assert source.classes == ("cat", "ship")
        assert [row.label for row in source.rows(0, 3)] == [1, 0, 1]

    def test_text_labels_are_their_own_names(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", sample_id=list("abc"), label=["dog", "cat", None])
        source = open_source(str(path))
        assert source.classes == ("cat", "dog")
        assert [row.label for row in source.rows(0, 3)] == [1, 0, None]

    def test_class_names_alone(self, tmp_path: Path) -> None:
        names = pa.array(["dog", "cat"]).dictionary_encode()
        source = open_source(str(parquet(tmp_path / "a.parquet", sample_id=["a", "b"], class_name=names)))
        assert source.classes == ("cat", "dog")
        assert [row.label for row in source.rows(0, 2)] == [1, 0]

    def test_no_labels(self, tmp_path: Path) -> None:
        source = open_source(str(parquet(tmp_path / "a.parquet", sample_id=["a"], group_id=[4])))
        row = next(source.rows(0, 1))
        assert (source.classes, row.label, row.group_id) == (None, None, "4")

    def test_hugging_face(self, tmp_path: Path) -> None:
        """A struct of bytes and path, class names in the metadata, -1 for unlabelled, no ids."""
        (tmp_path / "beside.png").write_bytes(IMAGE)
        images = [
            {"bytes": IMAGE, "path": "x.png"},
            {"bytes": None, "path": "beside.png"},
            {"bytes": None, "path": "no"},
        ]
        features = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
        table = pa.table({"img": images, "label": [1, 0, -1]}).replace_schema_metadata(
            {"huggingface": json.dumps(features)}
        )
        pq.write_table(table, tmp_path / "hf.parquet")
        source = open_source(str(tmp_path / "hf.parquet"), Columns(image="img"))
        rows = list(source.rows(0, 3))
        assert source.classes == ("ant", "bee")
        assert [row.label for row in rows] == [1, 0, None]
        assert [row.data for row in rows] == [IMAGE, IMAGE, None]
        assert rows[2].error == "the file cannot be read (No such file or directory)"
        assert [row.sample_id for row in rows] == ["hf.parquet#0", "hf.parquet#1", "hf.parquet#2"]

    def test_a_path_does_not_lead_out_of_the_folder(self, tmp_path: Path) -> None:
        """Whoever made a data file does not choose which files of this machine end up in a pool."""
        (tmp_path / "secret.png").write_bytes(IMAGE)
        (tmp_path / "data").mkdir()
        images = [{"bytes": None, "path": path} for path in ("../secret.png", str(tmp_path / "secret.png"))]
        path = tmp_path / "data" / "a.parquet"
        pq.write_table(pa.table({"image": images}), path)
        for row in open_source(str(path)).rows(0, 2):
            assert (row.data, row.error) == (None, "its path leads out of the folder of the Parquet file")

    def test_it_can_be_sent_to_a_task(self, tmp_path: Path) -> None:
        source = open_source(str(write_source(tmp_path / "a.parquet", 5, seed=3)))
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.rows(0, 5)) == list(source.rows(0, 5))
        assert copy.classes == source.classes

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"sample_id": ["a", "b", "a"]}, "sample_id 'a' stands in more than one row"),
            ({"sample_id": ["a", None]}, "row 1 has no sample_id"),
            ({"sample_id": ["a", "b"], "label": [1, 1], "class_name": ["x", "y"]}, "label 1 is called both"),
            ({"sample_id": ["a", "b"], "label": [1, 2], "class_name": ["x", "x"]}, "two labels share one name"),
            ({"sample_id": ["a", "b"], "label": [0, -1]}, "label -1 is negative; leave the label of images .* empty"),
            ({"sample_id": pa.array([], pa.string())}, "no rows"),
            (
                {"sample_id": ["a", "b"], "group_id": [[1], [2]]},
                "'group_id' is a list<.*>; as group_id it must hold texts",
            ),
            ({"sample_id": ["a"], "group_id": [{"a": 1}]}, "column 'group_id' is a struct<a: int64>; as group_id"),
            ({"sample_id": [["a"], ["b"]]}, "column 'sample_id' is a list<.*>; as sample_id it must hold texts"),
            ({"sample_id": ["a"], "label": [1], "class_name": [None]}, "label 1 has no class_name; give it one"),
            ({"sample_id": pa.array([b"\xff"])}, "column 'sample_id' cannot be read as texts"),
        ],
    )
    def test_contradictions(self, tmp_path: Path, columns: dict[str, object], message: str) -> None:
        with pytest.raises(SourceError, match=message):
            open_source(str(parquet(tmp_path / "a.parquet", **columns)))

    def test_a_missing_column_lists_those_there_are(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"sample_id": ["a"], "picture": [IMAGE]}), path)
        with pytest.raises(SourceError, match="no column 'image'; it has sample_id, picture; .* --image-column"):
            open_source(str(path))
        with pytest.raises(SourceError, match="no column 'name'; it has sample_id, picture"):
            open_source(str(path), Columns(image="picture", sample_id="name"))

    def test_files_that_differ(self, tmp_path: Path) -> None:
        parquet(tmp_path / "a.parquet", sample_id=["a"])
        parquet(tmp_path / "b.parquet", sample_id=["b"], label=[1])
        with pytest.raises(SourceError, match=r"b\.parquet: its columns differ"):
            open_source(str(tmp_path))

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        names = ["image", "sample_id", "sample_id"]
        pq.write_table(pa.Table.from_arrays([[IMAGE], ["a"], ["b"]], names=names), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match="2 columns are called 'sample_id'; rename all but one"):
            open_source(str(tmp_path / "a.parquet"))

    def test_groups_that_are_no_text(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", sample_id=["a", "b"], group_id=[b"fine", b"\xff\xfe"])
        with pytest.raises(SourceError, match=r"a\.parquet: column 'group_id' cannot be read as texts"):
            list(open_source(str(path)).rows(0, 2))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a", "a"], "its Hugging Face metadata hold 'a' twice; they must be texts that differ"),
            (["a", "b", None], "its Hugging Face metadata hold None; they must be texts that differ"),
            (["a", ["b"]], r"its Hugging Face metadata hold \['b'\]; they must be texts that differ"),
        ],
    )
    def test_class_names_of_hugging_face_that_are_none(self, tmp_path: Path, names: list[object], message: str) -> None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = pa.table({"image": [IMAGE], "label": [0]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / "a.parquet"))

    def test_paths_of_hugging_face_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "loop.png").symlink_to("loop.png")
        os.mkfifo(tmp_path / "fifo.png")
        (tmp_path / "in.png").write_bytes(IMAGE)
        (tmp_path / "link.png").symlink_to("in.png")
        reasons = {
            "a\0b": "the file cannot be read (embedded null byte)",
            "loop.png": "the file cannot be read (Too many levels of symbolic links)",
            "fifo.png": "the file cannot be read (not a regular file)",
            ".": "the file cannot be read (not a regular file)",
            "link.png": None,
        }
        pq.write_table(pa.table({"image": [{"bytes": None, "path": path} for path in reasons]}), tmp_path / "a.parquet")
        rows = list(open_source(str(tmp_path / "a.parquet")).rows(0, 5))
        assert [row.error for row in rows] == list(reasons.values())
        assert rows[-1].data == IMAGE
        pq.write_table(pa.table({"image": [{"bytes": None, "path": 7}]}), tmp_path / "a.parquet")
        assert next(open_source(str(tmp_path / "a.parquet")).rows(0, 1)).error == "its path is not text"

    def test_a_damaged_page_loses_the_rest_of_its_row_group(self, tmp_path: Path) -> None:
        """And no row of another one, whichever range of rows is asked for."""
        path = tmp_path / "a.parquet"
        images = [bytes([i % 256]) * 5000 for i in range(1000)]
        table = pa.table({"image": images, "sample_id": [str(i) for i in range(1000)]})
        options = {"row_group_size": 500, "data_page_size": 100_000, "write_batch_size": 10, "use_dictionary": False}
        pq.write_table(table, path, compression="none", write_page_checksum=True, **options)
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        data = bytearray(path.read_bytes())
        data[column.data_page_offset + column.total_compressed_size * 3 // 4] ^= 1
        path.write_bytes(data)
        source = open_source(str(path))
        whole = list(source.rows(0, 1000))
        bad = [i for i, row in enumerate(whole) if row.error]
        assert bad == list(range(bad[0], 500))
        assert 250 < bad[0] <= 375
        assert all(whole[i].error.startswith("row group 0 of its file is damaged (") for i in bad)
        assert [row.sample_id for row in whole] == [str(i) for i in range(1000)]
        assert all(row.data == images[i] for i, row in enumerate(whole) if not row.error)
        for start, stop in [(490, 510), (bad[0] - 1, bad[0] + 1), (0, 10)]:
            assert list(source.rows(start, stop)) == whole[start:stop]

    def test_a_damaged_page_of_ids_is_one_line(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", sample_id=[f"{i:08}" for i in range(3000)])
        column = pq.ParquetFile(path).metadata.row_group(0).column(1)
        data = bytearray(path.read_bytes())
        for i in range(column.dictionary_page_offset, column.data_page_offset):
            data[i] = 0xFF
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.parquet: row group 0 cannot be read \(.*\); write the file again"):
            open_source(str(path))

    @pytest.mark.timeout(20)
    def test_a_fifo_among_parquet_files(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=r"a\.parquet: not a regular file"):
            open_source(str(tmp_path))

    def test_not_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("x")
        with pytest.raises(SourceError, match="not a readable Parquet file"):
            open_source(str(tmp_path / "a.parquet"))


LAYOUTS = {
    "one row group": [20_000],
    "row groups that divide blocks": [100] * 200,
    "others": [777] * 25 + [575],
    "two large ones": [9_000, 11_000],
}


class TestRanges:
    """What tasks read of Parquet: every row about once, of the files that hold it."""

    @pytest.fixture(params=LAYOUTS)
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> ParquetSource:
        sizes = LAYOUTS[request.param]
        table = pa.table({"image": [b"%d" % i for i in range(20_000)], "group_id": [str(i % 7) for i in range(20_000)]})
        start = 0
        for number, some in enumerate(np.array_split(sizes, min(len(sizes), 5))):
            with pq.ParquetWriter(tmp_path / f"{number}.parquet", table.schema) as writer:
                for size in some.tolist():
                    writer.write_table(table.slice(start, size), row_group_size=size)
                    start += size
        source = open_source(str(tmp_path))
        assert isinstance(source, ParquetSource)
        assert len(source) == 20_000
        return source

    @pytest.mark.parametrize("block_size", [128, 512, 8192])
    def test_every_row_is_decoded_about_once(
        self, source: ParquetSource, block_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded = 0
        read = pq.ParquetFile.iter_batches

        def counting(file: pq.ParquetFile, *args: object, **more: object) -> Iterator[pa.RecordBatch]:
            nonlocal decoded
            for batch in read(file, *args, **more):
                decoded += len(batch) if "image" in batch.schema.names else 0
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
        blocks = split_blocks(20_000, block_size)
        ranges = source.ranges(blocks)
        assert [block for some in ranges for block in some] == blocks
        found = []
        for some in ranges:
            part = pickle.loads(pickle.dumps(source.part(some[0].start, some[-1].stop)))
            found += list(part.rows(some[0].start, some[-1].stop))
        assert 20_000 <= decoded <= 1.1 * 20_000
        assert [row.data for row in found] == [b"%d" % i for i in range(20_000)]
        assert found == list(source.rows(0, 20_000))

    def test_a_task_opens_the_files_that_it_needs(self, source: ParquetSource, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []
        monkeypatch.setattr(
            parquet_source,
            "_open_parquet",
            lambda path, real=parquet_source._open_parquet: (opened.append(path.name), real(path))[1],
        )
        part = source.part(9_990, 10_010)
        rows = list(part.rows(9_990, 10_010))
        assert len(rows) == 20
        assert len(opened) == len(set(opened)) == len({row.uri.split("#")[0] for row in rows})

    def test_a_part_is_small(self, source: ParquetSource) -> None:
        assert len(pickle.dumps(source.part(5_000, 5_128))) < 2000


def test_a_part_of_a_folder_has_its_own_names_only(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:050}.png").write_bytes(IMAGE)
    source = open_source(str(tmp_path))
    whole = list(source.rows(0, 300))
    part = pickle.loads(pickle.dumps(source.part(100, 110)))
    assert list(part.rows(100, 110)) == whole[100:110]
    assert list(part.rows(103, 105)) == whole[103:105]
    assert len(pickle.dumps(source.part(100, 110))) < 2500  # 300 names are 16,000 bytes
    assert source.ranges(split_blocks(300, 128)) == [[block] for block in split_blocks(300, 128)]


class TestFolder:
    def make(self, root: Path, *names: str) -> FolderSource:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(IMAGE)
        source = open_source(str(root))
        assert isinstance(source, FolderSource)
        return source

    def test_class_folders(self, tmp_path: Path) -> None:
        hidden = ("cat/.hidden.png", ".thumbnails/1.png", "dog/.cache/1.png")
        source = self.make(tmp_path, "dog/1.png", "cat/b/2.JPG", "cat/1.png", "cat/notes.txt", *hidden)
        rows = list(source.rows(0, len(source)))
        assert source.classes == ("cat", "dog")
        assert [(row.sample_id, row.label) for row in rows] == [("cat/1.png", 0), ("cat/b/2.JPG", 0), ("dog/1.png", 1)]
        assert rows[0].uri == str(tmp_path / "cat/1.png")
        assert rows[0].data == IMAGE

    def test_flat(self, tmp_path: Path) -> None:
        source = self.make(tmp_path, "2.png", "10.png", "1.png")
        assert source.classes is None
        assert [row.sample_id for row in source.rows(0, 3)] == ["1.png", "10.png", "2.png"]

    def test_both_is_a_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"both at the top \(1.png\) and in sub-folders \(dog/1.png\)"):
            self.make(tmp_path, "1.png", "dog/1.png")

    def test_links_inside_the_folder_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "c").symlink_to("a", target_is_directory=True)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "2.png").symlink_to("../a/1.png")
        source = self.make(tmp_path, "a/1.png")
        assert source.classes == ("a", "b", "c")
        rows = [(row.sample_id, row.label, row.data) for row in source.rows(0, 3)]
        assert rows == [("a/1.png", 0, IMAGE), ("b/2.png", 1, IMAGE), ("c/1.png", 2, IMAGE)]

    @pytest.mark.timeout(20)
    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        for name, target in (("a/up", ".."), ("a/self", "."), ("b/over", "../a"), ("a/over", "../b")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(target, target_is_directory=True)
        source = self.make(tmp_path, "a/1.png", "b/2.png")
        ids = [row.sample_id for row in source.rows(0, 9)]
        assert ids == ["a/1.png", "a/over/2.png", "b/2.png", "b/over/1.png"]

    @pytest.mark.timeout(20)
    def test_links_that_multiply_the_folders(self, tmp_path: Path) -> None:
        """Twelve folders, each with a link to every other one: a billion paths."""
        for i in range(12):
            (tmp_path / str(i)).mkdir()
            for j in range(12):
                (tmp_path / str(i) / f"to-{j}").symlink_to(f"../{j}")
        with pytest.raises(SourceError, match="links lead to this folder over 100 paths"):
            self.make(tmp_path, "0/1.png")

    def test_links_that_lead_out_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "out/deep").mkdir(parents=True)
        (tmp_path / "out/deep/3.png").write_bytes(IMAGE)
        root = tmp_path / "in"
        (root / "b").mkdir(parents=True)
        (root / "b" / "2.png").symlink_to(tmp_path / "out/deep/3.png")
        (root / "b" / "notes.txt").symlink_to("/etc/passwd")  # not looked at
        (root / "c").symlink_to(tmp_path / "out", target_is_directory=True)
        message = r"in: 2 links lead out of this folder, such as b/2.png to .*/out/deep/3.png; .* --follow-symlinks"
        with pytest.raises(SourceError, match=message):
            self.make(root, "a/1.png")
        source = open_source(str(root), follow_symlinks=True)
        assert source.classes == ("a", "b", "c")
        assert [row.sample_id for row in source.rows(0, 3)] == ["a/1.png", "b/2.png", "c/deep/3.png"]
        assert [row.data for row in source.rows(0, 3)] == [IMAGE] * 3
        (tmp_path / "alias").symlink_to("in")  # the folder itself may be a link
        assert len(open_source(str(tmp_path / "alias"), follow_symlinks=True)) == 3

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / os.fsdecode(b"a/\xff.png")).write_bytes(IMAGE)
        source = self.make(tmp_path, "a/1.png", "a/\u20ac.png")
        rows = list(source.part(0, 3).rows(0, 3))
        assert [row.sample_id for row in rows] == ["a/1.png", "a/\\xff.png", "a/\u20ac.png"]
        assert [row.error for row in rows] == [None, "its name is not UTF-8", None]
        self.make(tmp_path, "a/\\xff (1).png")
        with pytest.raises(SourceError, match=r"two files are called a/\\xff.png, one of them by bytes that are not"):
            self.make(tmp_path, "a/\\xff.png")

    def test_a_folder_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
        (tmp_path / os.fsdecode(b"caf\xe9/1.png")).write_bytes(IMAGE)
        with pytest.raises(SourceError, match=r"the name of the class folder caf\\xe9 is not UTF-8; rename it"):
            self.make(tmp_path, "a/1.png")
        with pytest.raises(SourceError, match=r"caf\\xe9: its name is not UTF-8; rename it"):
            open_source(str(tmp_path / os.fsdecode(b"caf\xe9")))

    @pytest.mark.timeout(20)
    def test_what_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").mkdir()
        os.mkfifo(tmp_path / "a.png" / "fifo.png")
        (tmp_path / "a.png" / "loop.png").symlink_to("loop.png")
        (tmp_path / "a.png" / "nothing.png").symlink_to("nowhere.png")
        source = self.make(tmp_path, "a.png/1.png")
        assert {row.sample_id: row.error for row in source.rows(0, 4)} == {
            "a.png/1.png": None,
            "a.png/fifo.png": "the file cannot be read (not a regular file)",
            "a.png/loop.png": "the file cannot be read (Too many levels of symbolic links)",
            "a.png/nothing.png": "the file cannot be read (No such file or directory)",
        }

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no Parquet file and no image in this folder"):
            open_source(str(tmp_path))


def test_builtin() -> None:
    source = open_source("builtin:fashion-mnist-12k")
    assert isinstance(source, ParquetSource)
    assert len(source) == 10_000
    assert len(open_source("builtin:fashion-mnist-12k/test")) == 2_000
    assert source.classes is not None
    assert source.classes[0] == "T-shirt/top"
    assert len(source.classes) == 10
    with pytest.raises(SourceError, match="unknown built-in source; known: builtin:fashion-mnist-12k"):
        open_source("builtin:nothing")


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such source"):
        open_source(str(tmp_path / "missing"))


def test_a_column_that_was_named_and_is_not_there(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a.parquet", 8, seed=0)
    with pytest.raises(
        SourceError, match="no column 'patientt' for group_id; it has sample_id, image, label, class_name"
    ):
        open_source(str(path), Columns(group_id="patientt"))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class TestTorchvision:
    """Small datasets in the format of the real ones. Only their addresses and checksums stand in for the real ones."""

    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        return tmp_path / "torch" / "datasets" / "vision"

    @pytest.fixture
    def cifar10(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, np.ndarray]]:
        """70 images to train on, 20 to test on, served as CIFAR-10 is; gives the pixels as they stand in the files."""
        rng = np.random.default_rng(0)
        kind = datasets.CIFAR10
        folder = tmp_path / "www" / kind.base_folder
        folder.mkdir(parents=True)
        written = {}
        for files, n in ((kind.train_list, 14), (kind.test_list, 20)):
            for name, _ in files:
                written[name] = rng.integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8)
                batch = {"data": written[name], "labels": rng.integers(0, 10, n).tolist()}
                (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
        with tarfile.open(tmp_path / "www" / kind.filename, "w:gz") as archive:
            archive.add(folder, kind.base_folder)
        for part in ("train_list", "test_list"):
            monkeypatch.setattr(kind, part, [[name, md5(folder / name)] for name, _ in getattr(kind, part)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "batches.meta")})
        monkeypatch.setattr(kind, "tgz_md5", md5(tmp_path / "www" / kind.filename))

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www"))) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{kind.filename}")
            yield written
            server.shutdown()

    def test_a_pool_of_it_is_what_torchvision_reads(
        self, cifar10: dict[str, np.ndarray], root: Path, cluster: str, tmp_path: Path
    ) -> None:
        for location, train, n in (("torchvision:CIFAR10", True, 70), ("torchvision:CIFAR10/test", False, 20)):
            pool = build(location, tmp_path / f"pool-{n}")
            theirs = datasets.CIFAR10(root, train=train)
            assert pool.classes == tuple(theirs.classes)
            assert (pool.source, pool.n_samples, pool.image_shape) == (location, n, (3, 32, 32))
            samples = pool.samples(0, n, ["sample_id", "uri", "label"]).to_pydict()
            part = "train" if train else "test"
            assert samples["sample_id"] == [f"{part}-{i:05d}" for i in range(n)]
            assert samples["uri"][3] == f"{location}#3"
            assert samples["label"] == [label for _, label in theirs]
            images = pool.take(np.arange(n))
            assert np.array_equal(images, [np.moveaxis(np.asarray(image), -1, 0) for image, _ in theirs])
            files = [pixels for name, pixels in cifar10.items() if name.startswith("data") == train]
            assert np.array_equal(images.reshape(n, -1), np.concatenate(files))

    def test_it_is_downloaded_once(
        self, cifar10: dict[str, np.ndarray], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        """Also when several begin at once, and when the test part follows. Nothing goes to stdout."""
        downloads = []
        monkeypatch.setattr(
            datasets.cifar,
            "download_and_extract_archive",
            lambda *args, original=datasets.cifar.download_and_extract_archive, **more: (
                downloads.append(args),
                original(*args, **more),
            ),
        )
        with ThreadPoolExecutor(3) as threads:
            sources = list(threads.map(open_source, ["torchvision:CIFAR10"] * 3))
        assert [len(source) for source in sources] == [70] * 3
        assert len(open_source("torchvision:CIFAR10/test")) == 20
        assert len(downloads) == 1
        assert capsys.readouterr().out == ""
        # Without a network, what is there is enough, also where it cannot be written.
        monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/")
        assert len(open_source("torchvision:CIFAR10")) == 70
        (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"half")
        (root / datasets.CIFAR10.filename).unlink()
        with pytest.raises(
            SourceError, match=r"can neither read it in .*/datasets/vision nor download it there \(<url"
        ):
            open_source("torchvision:CIFAR10")

    def test_it_can_be_sent_to_a_task(self, cifar10: dict[str, np.ndarray], root: Path) -> None:
        """Where it arrives there may be no such files."""
        source = open_source("torchvision:CIFAR10/test")
        rows = list(source.rows(0, 20))
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.rows(0, 20)) == rows
        assert list(copy.rows(18, 30)) == rows[18:]
        part = pickle.loads(pickle.dumps(source.part(5, 9)))
        assert list(part.rows(5, 9)) == rows[5:9]
        assert part.images.shape == (4, 32, 32, 3)
        assert copy.classes == source.classes

    def test_grey_images(self, root: Path) -> None:
        """The format of MNIST, whose files have no checksum of their own."""
        rng = np.random.default_rng(1)
        images, labels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), rng.integers(0, 10, 30, dtype=np.uint8)
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            header = np.array([0x803, 30, 28, 28], ">i4").tobytes()
            (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 30], ">i4").tobytes() + labels.tobytes())
        source = open_source("torchvision:FashionMNIST")
        rows = list(source.rows(0, 30))
        assert [row.label for row in rows] == labels.tolist()
        assert [row.data for row in rows[:2]] != [None, None]
        decoded = [decode(row.data) for row in rows if row.data]
        assert {image.mode for image in decoded} == {"L"}
        assert np.array_equal(np.stack(decoded), images)
        assert source.classes == open_source("builtin:fashion-mnist-12k").classes

    def test_one_that_has_no_class_names(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """SVHN writes 10 for the digit 0, and its images last."""
        images = np.random.default_rng(2).integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
        root.mkdir(parents=True)
        scipy.io.savemat(root / "test_32x32.mat", {"X": images, "y": np.arange(12)[:, None] % 10 + 1})
        part = [*datasets.SVHN.split_list["test"][:2], md5(root / "test_32x32.mat")]
        monkeypatch.setitem(datasets.SVHN.split_list, "test", part)
        source = open_source("torchvision:SVHN/test")
        rows = list(source.rows(0, 12))
        assert source.classes == tuple("0123456789")
        assert [row.label for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
        assert np.array_equal(np.stack([decode(row.data) for row in rows if row.data]), np.moveaxis(images, -1, 0))

    def test_without_a_network(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it has read the environment before
        for name in ("CIFAR100", "MNIST"):
            with pytest.raises(SourceError, match="once with a network, or copy its files there") as caught:
                open_source(f"torchvision:{name}")
            assert "Connection refused" in str(caught.value)
            assert str(root) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert caught.value.exit_code == 2

    @pytest.mark.parametrize("name", ["ImageNet", "CIFAR10/train", "CIFAR10/", "cifar10", ""])
    def test_unknown_ones_list_those_there_are(self, name: str) -> None:
        with pytest.raises(SourceError, match="unknown dataset; known: torchvision:MNIST, .*; and each with /test"):
            open_source(f"torchvision:{name}")
