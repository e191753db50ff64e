from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.errors import SourceError
from distal.pool.sources import Columns, FolderSource, ParquetSource, open_source
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

    def test_not_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("x")
        with pytest.raises(SourceError, match="not a readable Parquet file"):
            open_source(str(tmp_path / "a.parquet"))


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
