"""Parquet files with encoded images, also of Hugging Face."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distal.errors import SourceError, one_line
from distal.hashing import sample_key, sample_keys
from distal.pool.rows import Row, is_below, is_utf8, read_file, readable
from distal.records import Block

_READ_ROWS = 128  # of a file at a time, or fewer when they are large
_READ_BYTES = 16 * 2**20
_MAX_RANGE_WASTE = 16  # of so many rows, one may be decoded twice


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns in a Parquet source. Only an image column is required.

    Attributes:
        image: encoded bytes, or Hugging Face's struct of `bytes` and `path`.
        sample_id: the stable name of a sample; when the file has none, `<file name>#<row>`.
        label: integers, or strings that are the class names themselves.
        class_name: the names of integer labels.
        group_id: samples that belong together.
    """

    image: str = "image"
    sample_id: str = "sample_id"
    label: str = "label"
    class_name: str = "class_name"
    group_id: str = "group_id"

    def check(self, path: Path, names: list[str]) -> None:
        """Refuse a file without a column that is required or was named on purpose, or with two of one name."""
        known = ", ".join(names)
        if self.image not in names:
            raise SourceError(
                f"{path}: no column {self.image!r}; it has {known}; name the image column with --image-column"
            )
        if self.sample_id not in names and self.sample_id != Columns().sample_id:
            raise SourceError(f"{path}: no column {self.sample_id!r}; it has {known}")
        for kind in ("label", "class_name", "group_id"):
            name = getattr(self, kind)
            if name not in names and name != getattr(Columns(), kind):
                raise SourceError(f"{path}: no column {name!r} for {kind}; it has {known}")
        for name in asdict(self).values():
            if names.count(name) > 1:
                raise SourceError(f"{path}: {names.count(name)} columns are called {name!r}; rename all but one")

    def check_types(self, path: Path, schema: pa.Schema) -> None:
        """Refuse lists and structs where a name or a number is expected."""
        for kind in ("sample_id", "label", "class_name", "group_id"):
            name = getattr(self, kind)
            if name in schema.names and pa.types.is_nested(schema.field(name).type):
                raise SourceError(
                    f"{path}: column {name!r} is a {schema.field(name).type}; as {kind} it must hold texts or integers"
                )


_GROUP = np.dtype([("file", "i4"), ("group", "i4"), ("row", "i8"), ("start", "i8"), ("stop", "i8")])


@dataclass
class ParquetSource:
    """Parquet files with encoded images, read in the order of their names and rows.

    Attributes:
        names: of the columns that are there.
        groups: for each row group its place in `files` and in that file, its first row there, and its samples
            [start, stop).
        labels: label as it stands in the file -> its place in `classes`.
    """

    files: list[Path]
    columns: Columns
    names: tuple[str, ...]
    groups: NDArray[Any]
    classes: tuple[str, ...] | None = None
    labels: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(cls, files: list[Path], columns: Columns) -> Self:
        """Open files, and read what they say of their samples but not the images.

        Raises:
            SourceError: one cannot be read, or they contradict themselves or each other.
        """
        for path in files:
            if not is_utf8(str(path)):
                raise SourceError(f"{readable(path)}: its name is not UTF-8; rename it")
        groups: list[tuple[int, int, int, int, int]] = []
        metadata: dict[bytes, bytes] = {}
        names: list[str] = []
        for number, path in enumerate(files):
            with _parquet_errors(f"{path}: not a readable Parquet file"), closing(_open_parquet(path)) as file:
                schema = file.schema_arrow
                if number == 0:
                    names, metadata = schema.names, schema.metadata or {}
                    columns.check(path, names)
                elif schema.names != names:
                    raise SourceError(f"{path}: its columns differ from those of {files[0]}")
                columns.check_types(path, schema)
                begin = groups[-1][-1] if groups else 0
                row = 0
                for group in range(file.num_row_groups):
                    n_rows = file.metadata.row_group(group).num_rows
                    groups.append((number, group, row, begin + row, begin + row + n_rows))
                    row += n_rows
        source = cls(files, columns, tuple(names), np.array(groups, _GROUP))
        if not len(source):
            raise SourceError(f"{files[0]}: no rows")
        with _parquet_errors(f"{files[0]}: its ids, labels or class names cannot be read"):
            source._check_ids()
            source.labels, source.classes = source._classes(metadata)
        return source

    def __len__(self) -> int:
        return int(self.groups["stop"][-1] - self.groups["start"][0]) if len(self.groups) else 0

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order. Only the row groups that hold them are read, a few rows at a time."""
        others = [name for name in self._names() if name != self.columns.image]
        for group in self._overlapping(start, stop):
            path = self.files[group["file"]]
            images = self._images(group, start, stop)
            for first, table in self._tables(group, start, stop, others):
                labels = self._labels(table)
                known = repeat(None) if labels is None else labels.to_pylist()
                for i, (sample_id, label, group_id) in enumerate(
                    zip(self._ids(path, first, table), known, self._group_ids(path, table), strict=False)
                ):
                    data, error = next(images)
                    yield Row(
                        sample_id,
                        f"{path}#row={first + i}",
                        data,
                        self.labels.get(label),
                        group_id=group_id,
                        error=error,
                    )

    def part(self, start: int, stop: int) -> Self:
        """The files and row groups that hold [start, stop)."""
        groups = self._overlapping(start, stop).copy()
        files, groups["file"] = np.unique(groups["file"], return_inverse=True)
        return replace(self, files=[self.files[i] for i in files], groups=groups)

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Cut between row groups, or where little is decoded twice: a row group can only be read from its start."""
        found: list[list[Block]] = [[]]
        for block in blocks:
            found[-1].append(block)
            if self._decoded_twice(block.stop) * _MAX_RANGE_WASTE <= block.stop - found[-1][0].start:
                found.append([])
        return [each for each in found if each]

    def _decoded_twice(self, border: int) -> int:
        """Rows that two tasks decode when one ends here and the next one begins."""
        for group in self._overlapping(border, border + 1):
            if group["start"] < border:
                return int(border - group["start"] + min(_READ_ROWS, group["stop"] - border))
        return 0

    def _overlapping(self, start: int, stop: int) -> NDArray[Any]:
        """The row groups that hold some of [start, stop)."""
        low = np.searchsorted(self.groups["stop"], start, side="right")
        return self.groups[low : max(low, np.searchsorted(self.groups["start"], stop, side="left"))]

    def _names(self) -> list[str]:
        return [
            getattr(self.columns, kind)
            for kind in ("image", "sample_id", "label", "class_name", "group_id")
            if self._has(kind)
        ]

    def _has(self, kind: str) -> bool:
        return getattr(self.columns, kind) in self.names

    def _file(self, number: int) -> pq.ParquetFile:
        """An open file, the last one that was asked for."""
        if self._open[0] != number:
            self._open = (number, _open_parquet(self.files[number]))
        return self._open[1]

    _open: tuple[int, Any] = field(default=(-1, None), init=False, repr=False, compare=False)

    def _batches(self, group: Any, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """A row group from its start, a few rows at a time, each with its first `sample_index`."""
        file = self._file(int(group["file"]))
        index = int(group["start"])
        n_rows = _batch_rows(file.metadata.row_group(int(group["group"])), names, self.columns.image)
        for batch in file.iter_batches(n_rows, row_groups=[int(group["group"])], columns=names, use_threads=False):
            yield index, batch
            index += len(batch)

    def _images(self, group: Any, start: int, stop: int) -> Iterator[tuple[bytes | None, str | None]]:
        """Encoded bytes, or the reason why there are none, for the samples of a row group that are in [start, stop).

        From a damaged page on the rest of the row group cannot be read: those rows are unreadable, others are not.
        """
        path = self.files[group["file"]]
        try:
            for index, batch in self._batches(group, [self.columns.image]):
                images = batch.column(0)
                for i in range(max(0, start - index), min(len(batch), stop - index)):
                    yield self._data(path, images[i].as_py())
                if index + len(batch) >= stop:
                    return
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk, not the bytes
                raise _unreadable_group(path, group, error) from error
            yield from repeat((None, f"row group {group['group']} of its file is damaged ({one_line(error)[:80]})"))

    def _tables(self, group: Any, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """(row in the file, rows) of the samples of a row group that are in [start, stop)."""
        path = self.files[group["file"]]
        if not names:
            low, high = max(start, int(group["start"])), min(stop, int(group["stop"]))
            yield low - int(group["start"] - group["row"]), pa.table({"nothing": pa.nulls(high - low)})
            return
        try:
            for index, batch in self._batches(group, names):
                low, high = max(start, index), min(stop, index + len(batch))
                if low < high:
                    table = pa.Table.from_batches([batch.slice(low - index, high - low)])
                    yield low - int(group["start"] - group["row"]), table
                if index + len(batch) >= stop:
                    return
        except (OSError, pa.ArrowException) as error:
            raise _unreadable_group(path, group, error) from error

    def _all_tables(self, names: list[str]) -> Iterator[tuple[Path, int, pa.Table]]:
        """(file, row in the file, rows) of all samples."""
        for group in self.groups:
            for first, table in self._tables(group, 0, int(self.groups["stop"][-1]), names):
                yield self.files[group["file"]], first, table

    def _ids(self, path: Path, first: int, table: pa.Table) -> list[str]:
        if self._has("sample_id"):
            return _texts(path, table, self.columns.sample_id)
        return [f"{path.name}#{first + i}" for i in range(len(table))]

    def _group_ids(self, path: Path, table: pa.Table) -> list[str | None]:
        return _texts(path, table, self.columns.group_id) if self._has("group_id") else [None] * len(table)

    def _data(self, path: Path, image: Any) -> tuple[bytes | None, str | None]:
        """Encoded bytes, or the reason why there are none."""
        if isinstance(image, dict):  # Hugging Face: bytes, or a path beside the file
            if image.get("bytes") is None and image.get("path"):
                return _read_beside(path, image["path"])
            image = image.get("bytes")
        return (image, None) if isinstance(image, bytes) else (None, "no bytes")

    def _labels(self, table: pa.Table) -> pa.ChunkedArray | None:
        """The column that tells the class, dictionaries decoded; None when there is none."""
        for kind in ("label", "class_name"):
            if self._has(kind):
                column = table[getattr(self.columns, kind)]
                return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        return None

    def _check_ids(self) -> None:
        """Ids must be there and differ: they are what annotators and later runs name a sample by."""
        if not self._has("sample_id"):
            if len({path.name for path in self.files}) < len(self.files):
                raise SourceError(
                    f"{self.files[0]}: no column {self.columns.sample_id!r}, and file names that repeat cannot "
                    "stand in for it; name the column with --id-column"
                )
            return
        keys = np.empty(len(self), np.uint64)
        filled = 0
        for path, first, table in self._all_tables([self.columns.sample_id]):
            ids: list[Any] = self._ids(path, first, table)
            if None in ids:
                raise SourceError(f"{path}: row {first + ids.index(None)} has no {self.columns.sample_id}")
            keys[filled : filled + len(ids)] = sample_keys(ids)
            filled += len(ids)
        keys.sort()  # in place, and then compared in pieces: 8 bytes a sample are all that the driver has
        for begin in range(0, len(keys), 2**20):
            some = keys[begin : begin + 2**20 + 1]
            if (twice := some[1:][some[1:] == some[:-1]]).size:
                raise SourceError(self._repeated(int(twice[0])))

    def _repeated(self, key: int) -> str:
        """What is wrong with two ids that have one key."""
        found = [
            sample_id
            for path, first, table in self._all_tables([self.columns.sample_id])
            for sample_id in self._ids(path, first, table)
            if sample_key(sample_id) == key
        ]
        if len(set(found)) > 1:
            return f"{self.columns.sample_id} {found[0]!r} and {found[1]!r} have the same 64-bit key; rename one"
        return f"{self.columns.sample_id} {found[0]!r} stands in more than one row; each sample needs its own"

    def _classes(self, metadata: dict[bytes, bytes]) -> tuple[dict[Any, int], tuple[str, ...] | None]:
        """Label as it stands -> class index, and the class names, in the order of the labels."""
        names = self._label_names()
        known = self._huggingface_names(metadata)
        if known is not None and not self._has("class_name"):
            outside = [v for v in names if v != -1 and v not in range(len(known))]  # -1: unlabelled there
            if outside:
                raise SourceError(f"{self.columns.label} {outside[0]} is none of the {len(known)} named classes")
            return {index: index for index in range(len(known))}, tuple(known)
        if not names:
            return {}, None
        negative = [label for label in names if isinstance(label, int) and label < 0]
        if negative:
            raise SourceError(
                f"{self.columns.label} {negative[0]} is negative; leave the {self.columns.label} of images that have "
                "none empty"
            )
        if None in names.values():
            label = next(label for label, name in names.items() if name is None)
            raise SourceError(f"{self.columns.label} {label} has no {self.columns.class_name}; give it one")
        if len(set(names.values())) < len(names):
            raise SourceError(f"{self.columns.class_name}: two labels share one name; give each its own")
        order = sorted(names)
        return {label: index for index, label in enumerate(order)}, tuple(str(names[label]) for label in order)

    def _label_names(self) -> dict[Any, Any]:
        """Every label in the files with its name, which is the label itself where no name stands beside it."""
        columns = [getattr(self.columns, kind) for kind in ("label", "class_name") if self._has(kind)]
        names: dict[Any, Any] = {}
        for _, _, table in self._all_tables(columns) if columns else ():
            labels = self._labels(table)
            others = table[columns[1]].cast(pa.string()) if len(columns) == 2 else labels
            pairs = pa.table({"label": labels, "name": others}).group_by(["label", "name"]).aggregate([])
            for pair in pairs.to_pylist():
                label, name = pair["label"], pair["name"]
                if label is not None and names.setdefault(label, name) != name:
                    raise SourceError(
                        f"{self.columns.label} {label} is called both {names[label]!r} and {name!r}; "
                        f"give each label one {self.columns.class_name}"
                    )
        return names

    def _huggingface_names(self, metadata: dict[bytes, bytes]) -> list[str] | None:
        """Class names that Hugging Face's `datasets` keeps in the file's metadata."""
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            names = list(features[self.columns.label]["names"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        wrong = [repr(name) for name in names if not isinstance(name, str)]
        wrong += [] if wrong else [f"{name!r} twice" for name, n in Counter(names).items() if n > 1]
        if wrong:
            raise SourceError(
                f"{self.files[0]}: the class names in its Hugging Face metadata hold {wrong[0]}; they must be texts "
                "that differ: mend them, or name the classes in a column (--class-column)"
            )
        return names

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open files."""
        return {k: v for k, v in self.__dict__.items() if k != "_open"}


def _open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file to be read from its start, in pieces. Neither mapped nor read ahead: both keep all of a row group."""
    if not path.is_file():
        raise SourceError(f"{path}: not a regular file")
    return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)


def _batch_rows(group: Any, names: list[str], image: str) -> int:
    """Rows to read at a time, of some columns of a row group: few if they are large."""
    if image not in names:
        return 64 * 1024
    largest = 1
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == image or column.path_in_schema.startswith(f"{image}."):
            mean = column.total_uncompressed_size // max(1, group.num_rows)
            # Rows that share an image are as large as it, and one image is as large as a dictionary may be.
            shared = min(column.total_uncompressed_size, 2**20) if column.has_dictionary_page else 0
            largest = max(largest, mean, shared)
    return max(1, min(_READ_ROWS, _READ_BYTES // largest))


def _texts(path: Path, table: pa.Table, name: str) -> list[Any]:
    with _parquet_errors(f"{path}: column {name!r} cannot be read as texts"):
        return table[name].cast(pa.string()).to_pylist()


def _unreadable_group(path: Path, group: Any, error: Exception) -> SourceError:
    return SourceError(f"{path}: row group {group['group']} cannot be read ({one_line(error)}); write the file again")


def _read_beside(path: Path, given: object) -> tuple[bytes | None, str | None]:
    """The bytes of a file that a Parquet file names, or the reason why there are none."""
    if not isinstance(given, str):
        return None, "its path is not text"
    folder = os.path.realpath(path.parent)
    try:
        beside = os.path.realpath(Path(folder, given), strict=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return None, f"the file cannot be read ({reason})"
    if not is_below(beside, folder):  # a data file does not choose what is read
        return None, "its path leads out of the folder of the Parquet file"
    return read_file(Path(beside))


@contextmanager
def _parquet_errors(what: str) -> Iterator[None]:
    """Turn what pyarrow raises for bytes or types that it does not know into one line."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, pa.ArrowException, ValueError, TypeError, MemoryError) as error:
        raise SourceError(f"{what} ({one_line(error)})") from error
