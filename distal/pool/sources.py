"""What a pool can be built from. A source lists its samples first and gives encoded images on demand.

The driver opens a source once; every build task is sent the part of it that it packs. What a source holds comes from
strangers: an image that cannot be read is a row with the reason, and anything else that is wrong is one SourceError.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from distal.config import BUILTIN, TORCHVISION
from distal.errors import SourceError, one_line
from distal.hashing import sample_key, sample_keys
from distal.pool.decode import FORMATS, MAX_BYTES
from distal.records import Block
from distal.storage import read_regular

READ_ROWS = 128  # of a Parquet file at a time, or fewer when they are large
READ_BYTES = 16 * 2**20
MAX_RANGE_WASTE = 16  # of so many rows of Parquet one may be decoded twice
MAX_PATHS = 100  # over which links may lead to one folder
BUILTIN_FOLDER = Path(__file__).parent / "builtin"


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


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a source: `data` is None when there are no bytes to decode, and `error` then says why."""

    sample_id: str
    uri: str
    data: bytes | None
    label: int | None = None
    group_id: str | None = None
    error: str | None = None


class Source(Protocol):
    """Samples in a fixed order, with their class names if they have labels."""

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order."""
        ...

    def part(self, start: int, stop: int) -> Source:
        """What a task needs to read the samples [start, stop), by the same indices. It can be pickled."""
        ...

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Consecutive blocks, cut where one task should end and the next one begin."""
        ...


def open_source(location: str, columns: Columns | None = None, *, follow_symlinks: bool = False) -> Source:
    """Open `builtin:...`, `torchvision:...`, a Parquet file, a folder of Parquet files, or a folder of images.

    Args:
        follow_symlinks: also those links that lead out of the folder.

    Raises:
        SourceError: nothing there, not a known kind, or contents that contradict themselves.
    """
    columns = columns or Columns()
    if not _is_utf8(location):
        raise SourceError(f"{_readable(location)}: its name is not UTF-8; rename it")
    if location.startswith(BUILTIN):
        return ParquetSource.of([_builtin(location)], columns)
    if location.startswith(TORCHVISION):
        return TorchvisionSource.open(location)
    path = Path(location)
    if path.is_file():
        return ParquetSource.of([path], columns)
    if not path.is_dir():
        names = "; ".join([*_BUILTINS, f"{TORCHVISION}CIFAR10"])
        raise SourceError(f"{location}: no such source; give a Parquet file, a folder or {names}")
    found = find_files(path, {".parquet", *FORMATS}, follow_symlinks)
    tables = sorted(Path(path, name) for name in found if name.lower().endswith(".parquet"))
    return ParquetSource.of(tables, columns) if tables else FolderSource.of(path, found)


_BUILTINS = {
    "builtin:fashion-mnist-12k": "fashion-mnist-10k-train.parquet",
    "builtin:fashion-mnist-12k/test": "fashion-mnist-2k-test.parquet",
}


def _builtin(name: str) -> Path:
    try:
        return BUILTIN_FOLDER / _BUILTINS[name]
    except KeyError:
        raise SourceError(f"{name}: unknown built-in source; known: {', '.join(_BUILTINS)}") from None


@dataclass(frozen=True, slots=True)
class Download:
    """What is known of a part of a dataset that torchvision downloads, before it is there.

    Attributes:
        name: of torchvision's class.
        is_test: the part to test on, or the one to train on.
        image_shape: (C, H, W).
    """

    name: str
    is_test: bool
    n_samples: int
    image_shape: tuple[int, int, int]
    n_classes: int

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of its class that give this part."""
        return {"split": "test" if self.is_test else "train"} if self.name == "SVHN" else {"train": not self.is_test}


# Those with a part to test on, whose images have one size and fit in memory (240 MB at most).
_DOWNLOADS = {
    f"{TORCHVISION}{name}{'/test' if is_test else ''}": Download(name, is_test, sizes[is_test], shape, n_classes)
    for name, sizes, shape, n_classes in (
        ("MNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("FashionMNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("KMNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("CIFAR10", (50_000, 10_000), (3, 32, 32), 10),
        ("CIFAR100", (50_000, 10_000), (3, 32, 32), 100),
        ("SVHN", (73_257, 26_032), (3, 32, 32), 10),
    )
    for is_test in (False, True)
}


def find_download(location: str) -> Download:
    """What is known of `torchvision:NAME` or `torchvision:NAME/test`; nothing is downloaded.

    Raises:
        SourceError: not one of those that can be had.
    """
    try:
        return _DOWNLOADS[location]
    except KeyError:
        names = ", ".join(name for name, part in _DOWNLOADS.items() if not part.is_test)
        raise SourceError(f"{location}: unknown dataset; known: {names}; and each with /test") from None


@dataclass(eq=False)
class TorchvisionSource:
    """A dataset that torchvision downloads, whole in memory.

    The process that opens it is the only one that downloads and reads files: a task gets the arrays through Ray, on
    whatever node it runs.

    Attributes:
        location: `torchvision:NAME`, its part to train on, or `torchvision:NAME/test`.
        images: (n, H, W) or (n, H, W, 3) uint8, as torchvision gives them.
        labels: (n,) int64.
        first: `sample_index` of the first one.
    """

    location: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None
    first: int = 0

    @classmethod
    def open(cls, location: str) -> Self:
        """Read the dataset, downloaded first when it is not there yet.

        Its place is torchvision's own, `$TORCH_HOME/datasets/vision`, by default in `~/.cache/torch`.

        Raises:
            SourceError: no such dataset, no network, or files that are damaged.
        """
        part = find_download(location)
        import torch
        import torchvision

        root = Path(torch.hub.get_dir()).parent / "datasets" / "vision"
        dataset_class = getattr(torchvision.datasets, part.name)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Two runs that start together download once. What cannot be written needs no lock.
            lock = FileLock(root / f"{part.name}.lock") if os.access(root, os.W_OK) else nullcontext()
            with lock, redirect_stdout(sys.stderr):
                dataset = dataset_class(root, download=True, **part.arguments)
        except Exception as error:  # torchvision raises anything on files that are damaged, and each reason is told
            raise SourceError(
                f"{location}: torchvision can neither read it in {root} nor download it there ({one_line(error)}); run "
                "this once with a network, or copy its files there (TORCH_HOME moves the folder); remove damaged ones"
            ) from error
        images, labels = zip(*dataset, strict=True)
        classes = getattr(dataset, "classes", range(part.n_classes))  # SVHN: the digits
        return cls(location, np.stack(images), np.array(labels, np.int64), tuple(map(str, classes)))

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order, as PNG."""
        part = "test" if find_download(self.location).is_test else "train"
        for index in range(start, min(stop, self.first + len(self))):
            encoded = io.BytesIO()
            Image.fromarray(self.images[index - self.first]).save(encoded, "PNG", compress_level=1)
            uri = f"{self.location}#{index}"
            yield Row(f"{part}-{index:05d}", uri, encoded.getvalue(), int(self.labels[index - self.first]))

    def part(self, start: int, stop: int) -> Self:
        """The images and labels of [start, stop) alone."""
        here = slice(start - self.first, stop - self.first)
        return replace(self, images=self.images[here], labels=self.labels[here], first=start)

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """A task per block."""
        return [[block] for block in blocks]


def find_files(root: Path, suffixes: Collection[str], follow_symlinks: bool = False) -> list[str]:
    """Files below a folder by their suffix: relative paths with "/", in no order. Hidden ones are not looked at.

    Links are followed, but not a second time to a folder that they stand in. The bytes of a name that is not UTF-8 are
    kept as surrogates.

    Args:
        follow_symlinks: also those that lead out of `root`.

    Raises:
        SourceError: a folder cannot be listed, links lead out of `root`, or they multiply its folders.
    """
    inside = os.path.realpath(root)
    found: list[str] = []
    outside: list[str] = []
    paths: Counter[tuple[int, int]] = Counter()
    status = root.stat()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((status.st_dev, status.st_ino),))]
    while waiting:
        folder, above = waiting.pop()
        for entry, identity in _list_folder(Path(root, folder)):
            name = f"{folder}{entry.name}"
            if identity is None and Path(name).suffix.lower() not in suffixes:
                continue
            if entry.is_symlink() and not _is_below(os.path.realpath(entry.path), inside):
                outside.append(name)
                if not follow_symlinks:
                    continue
            if identity is None:
                found.append(name)
            elif identity not in above:
                paths[identity] += 1
                if paths[identity] > MAX_PATHS:
                    raise SourceError(
                        f"{_readable(Path(root, name))}: links lead to this folder over {MAX_PATHS} paths"
                    )
                waiting.append((f"{name}/", (*above, identity)))
    if outside and not follow_symlinks:
        first = min(outside)
        target = os.path.realpath(Path(root, first))
        raise SourceError(
            f"{_readable(root)}: {len(outside)} links lead out of this folder, such as {_readable(first)} to "
            f"{_readable(target)}; pack them as well with `distal pool build --follow-symlinks`, or remove them"
        )
    return found


def _list_folder(folder: Path) -> Iterator[tuple[os.DirEntry[str], tuple[int, int] | None]]:
    """What is in a folder; for a folder, or a link to one, with its device and inode."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    status = entry.stat() if _is_folder(entry) else None
                    yield entry, None if status is None else (status.st_dev, status.st_ino)
    except OSError as error:
        raise SourceError(f"{_readable(folder)}: this folder cannot be listed ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: as a file it is a row with the reason
        return False


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(path: str | Path) -> str:
    """A path as text that can be stored and printed: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


@dataclass
class FolderSource:
    """An image folder: class sub-folders, or flat and then without labels.

    Samples are ordered by their path, which is also their `sample_id`. Class names are the sub-folders, in
    sorted order. Files that do not have the suffix of an image are not looked at.

    Attributes:
        files: paths below `root`, sorted: 8 bytes each, and their letters.
        misnamed: those that are not UTF-8, as `files` has them; they are not read.
        first: `sample_index` of the first one.
    """

    root: Path
    files: pa.Array
    classes: tuple[str, ...] | None = None
    misnamed: frozenset[str] = frozenset()
    first: int = 0

    @classmethod
    def of(cls, root: Path, found: list[str]) -> Self:
        """The images among the files of a folder.

        Raises:
            SourceError: there is none, they stand both in class folders and beside them, or a name is not one.
        """
        misnamed = frozenset(_readable(name) for name in found if not _is_utf8(name))
        files = pa.array(map(_readable, found) if misnamed else found, pa.large_string())
        files = files.take(pc.sort_indices(files))  # by bytes, which for UTF-8 is by letters
        if not len(files):
            raise SourceError(
                f"{root}: no Parquet file and no image in this folder (looked for {' '.join(sorted(FORMATS))})"
            )
        for name in misnamed:
            if pc.sum(pc.equal(files, name)).as_py() > 1:
                raise SourceError(
                    f"{root}: two files are called {name}, one of them by bytes that are not UTF-8; rename it"
                )
        nested = pc.match_substring(files, "/")
        n_nested = pc.sum(nested).as_py()
        if 0 < n_nested < len(files):
            flat, deep = (files[pc.index(nested, value).as_py()].as_py() for value in (False, True))
            raise SourceError(
                f"{root}: images both at the top ({flat}) and in sub-folders ({deep}); put all of them in class "
                "sub-folders, or none"
            )
        if not n_nested:
            return cls(root, files, misnamed=misnamed)
        classes = tuple(sorted(pc.unique(pc.replace_substring_regex(files, "(?s)/.*", "")).to_pylist()))
        for name in found if misnamed else ():
            if not _is_utf8(name.partition("/")[0]):
                raise SourceError(
                    f"{root}: the name of the class folder {_readable(name.partition('/')[0])} is not UTF-8; rename it"
                )
        return cls(root, files, classes, misnamed)

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order; a file that cannot be read has no data."""
        labels = {name: label for label, name in enumerate(self.classes or ())}
        for name in self._names(start, stop):
            bad = name in self.misnamed
            data, error = (None, "its name is not UTF-8") if bad else _read_file(self.root / name)
            yield Row(name, str(self.root / name), data, labels.get(name.partition("/")[0]), error=error)

    def part(self, start: int, stop: int) -> Self:
        """The names of [start, stop) alone."""
        names = self._names(start, stop)  # made anew: a slice is pickled with all that it is a slice of
        return replace(
            self,
            files=pa.array(names, pa.large_string()),
            misnamed=self.misnamed.intersection(names),
            first=start,
        )

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """A task per block."""
        return [[block] for block in blocks]

    def _names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.files[start - self.first : max(0, stop - self.first)].to_pylist()
        return names


def _read_file(path: Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or the reason why there are none."""
    try:
        return read_regular(path, MAX_BYTES), None
    except OSError as error:
        return None, f"the file cannot be read ({error.strerror})"


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
            if not _is_utf8(str(path)):
                raise SourceError(f"{_readable(path)}: its name is not UTF-8; rename it")
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
            if self._decoded_twice(block.stop) * MAX_RANGE_WASTE <= block.stop - found[-1][0].start:
                found.append([])
        return [each for each in found if each]

    def _decoded_twice(self, border: int) -> int:
        """Rows that two tasks decode when one ends here and the next one begins."""
        for group in self._overlapping(border, border + 1):
            if group["start"] < border:
                return int(border - group["start"] + min(READ_ROWS, group["stop"] - border))
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
    return max(1, min(READ_ROWS, READ_BYTES // largest))


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
    if not _is_below(beside, folder):  # a data file does not choose what is read
        return None, "its path leads out of the folder of the Parquet file"
    return _read_file(Path(beside))


@contextmanager
def _parquet_errors(what: str) -> Iterator[None]:
    """Turn what pyarrow raises for bytes or types that it does not know into one line."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, pa.ArrowException, ValueError, TypeError, MemoryError) as error:
        raise SourceError(f"{what} ({one_line(error)})") from error
