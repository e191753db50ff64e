"""What a pool can be built from. A source lists its samples first and gives encoded images on demand.

A source is picklable: the driver opens it once, and every build task reads its own range from it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from distal.config import BUILTIN, TORCHVISION
from distal.errors import SourceError, one_line
from distal.hashing import sample_keys
from distal.records import JsonObject

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
READ_ROWS = 1024
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


def open_source(location: str, columns: Columns | None = None) -> Source:
    """Open `builtin:...`, `torchvision:...`, a Parquet file, a folder of Parquet files, or a folder of images.

    Raises:
        SourceError: nothing there, not a known kind, or contents that contradict themselves.
    """
    columns = columns or Columns()
    if location.startswith(BUILTIN):
        return ParquetSource([_builtin(location)], columns)
    if location.startswith(TORCHVISION):
        return TorchvisionSource.open(location)
    path = Path(location)
    if path.is_file():
        return ParquetSource([path], columns)
    if not path.is_dir():
        names = "; ".join([*_BUILTINS, f"{TORCHVISION}CIFAR10"])
        raise SourceError(f"{location}: no such source; give a Parquet file, a folder or {names}")
    files = sorted(path.rglob("*.parquet"))
    return ParquetSource(files, columns) if files else FolderSource(path)


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
    def arguments(self) -> JsonObject:
        """What its class takes to give this part."""
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
    """

    location: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None

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
        for index in range(start, min(stop, len(self))):
            encoded = io.BytesIO()
            Image.fromarray(self.images[index]).save(encoded, "PNG", compress_level=1)
            uri = f"{self.location}#{index}"
            yield Row(f"{part}-{index:05d}", uri, encoded.getvalue(), int(self.labels[index]))


@dataclass
class FolderSource:
    """An image folder: class sub-folders, or flat and then without labels.

    Samples are ordered by their path, which is also their `sample_id`. Class names are the sub-folders, in
    sorted order. Files that do not have the suffix of an image are not looked at.
    """

    root: Path
    classes: tuple[str, ...] | None = None
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = sorted(
            os.path.relpath(Path(folder, name), self.root).replace(os.sep, "/")
            for folder, _, names in os.walk(self.root)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
        self.files = [name for name in self.files if not any(part.startswith(".") for part in name.split("/"))]
        if not self.files:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise SourceError(f"{self.root}: no Parquet file and no image in this folder (looked for {suffixes})")
        flat = [name for name in self.files if "/" not in name]
        if flat and len(flat) < len(self.files):
            raise SourceError(
                f"{self.root}: images both at the top ({flat[0]}) and in sub-folders "
                f"({next(n for n in self.files if '/' in n)}); put all of them in class sub-folders, or none"
            )
        if not flat:
            self.classes = tuple(sorted({name.partition("/")[0] for name in self.files}))

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order; a file that cannot be read has no data."""
        labels = {name: label for label, name in enumerate(self.classes or ())}
        for name in self.files[start:stop]:
            data, error = _read_file(self.root / name)
            yield Row(name, str(self.root / name), data, labels.get(name.partition("/")[0]), error=error)


def _read_file(path: Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or the reason why there are none."""
    try:
        return path.read_bytes(), None
    except OSError as error:
        return None, f"the file cannot be read ({error.strerror})"


@dataclass
class ParquetSource:
    """Parquet files with encoded images, read in the order of their names and rows."""

    files: list[Path]
    columns: Columns
    classes: tuple[str, ...] | None = None
    labels: dict[Any, int] = field(default_factory=dict)
    """Label as it stands in the file -> its place in `classes`."""

    def __post_init__(self) -> None:
        names = self._files[0].schema_arrow.names
        if self.columns.image not in names:
            raise SourceError(
                f"{self.files[0]}: no column {self.columns.image!r}; it has {', '.join(names)}; "
                "name the image column with --image-column"
            )
        if self.columns.sample_id not in names and self.columns.sample_id != Columns().sample_id:
            raise SourceError(f"{self.files[0]}: no column {self.columns.sample_id!r}; it has {', '.join(names)}")
        for path, file in zip(self.files, self._files, strict=True):
            if file.schema_arrow.names != names:
                raise SourceError(f"{path}: its columns differ from those of {self.files[0]}")
        if not len(self):
            raise SourceError(f"{self.files[0]}: no rows")
        try:
            self._check_names()
            self._check_ids()
            self.labels, self.classes = self._classes()
        except (pa.ArrowException, TypeError) as error:  # lists for ids, texts beside integers for labels, ...
            reason = str(error).splitlines()[0]
            raise SourceError(f"{self.files[0]}: its ids, labels or class names cannot be read ({reason})") from error

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order. Only the row groups that hold them are read."""
        for path, first, table in self._tables(start, stop, self._names()):
            ids = self._ids(path, first, table)
            images = table[self.columns.image]
            labels = self._labels(table)
            groups = table[self.columns.group_id].cast(pa.string()) if self._has("group_id") else None
            for i, sample_id in enumerate(ids):
                data, error = self._data(path, images[i].as_py())
                yield Row(
                    sample_id=sample_id,
                    uri=f"{path}#row={first + i}",
                    data=data,
                    label=None if labels is None else self.labels.get(labels[i].as_py()),
                    group_id=None if groups is None else groups[i].as_py(),
                    error=error,
                )

    def _names(self) -> list[str]:
        return [
            getattr(self.columns, kind)
            for kind in ("image", "sample_id", "label", "class_name", "group_id")
            if self._has(kind)
        ]

    def _has(self, kind: str) -> bool:
        return getattr(self.columns, kind) in self._files[0].schema_arrow.names

    @cached_property
    def _files(self) -> list[pq.ParquetFile]:
        files = []
        for path in self.files:
            try:
                files.append(pq.ParquetFile(path, memory_map=True))
            except (OSError, pa.ArrowInvalid) as error:
                reason = str(error).splitlines()[0]
                raise SourceError(f"{path}: not a readable Parquet file ({reason})") from None
        return files

    @cached_property
    def _starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.cumsum([0, *(file.metadata.num_rows for file in self._files)])

    def _tables(self, start: int, stop: int, names: list[str]) -> Iterator[tuple[Path, int, pa.Table]]:
        """(file, row in the file, rows) for the samples [start, stop), at most `READ_ROWS` at a time."""
        for path, file, file_start in zip(self.files, self._files, self._starts, strict=False):
            row = int(file_start)
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if row < stop and start < end:
                    # In batches: a row group may be larger than memory.
                    for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=names):
                        low, high = max(start, row), min(stop, row + len(batch))
                        if low < high:
                            table = pa.Table.from_batches([batch.slice(low - row, high - low)])
                            yield path, low - int(file_start), table
                        row += len(batch)
                        if row >= stop:
                            break
                row = end

    def _ids(self, path: Path, first: int, table: pa.Table) -> list[str]:
        if self._has("sample_id"):
            ids: list[str] = table[self.columns.sample_id].cast(pa.string()).to_pylist()
            return ids
        return [f"{path.name}#{first + i}" for i in range(len(table))]

    def _data(self, path: Path, image: Any) -> tuple[bytes | None, str | None]:
        """Encoded bytes, or the reason why there are none."""
        if isinstance(image, dict):  # Hugging Face: bytes, or a path beside the file
            if image.get("bytes") is None and image.get("path"):
                beside = (path.parent / image["path"]).resolve()
                if not beside.is_relative_to(path.parent.resolve()):  # a data file does not choose what is read
                    return None, "its path leads out of the folder of the Parquet file"
                return _read_file(beside)
            image = image.get("bytes")
        return (image, None) if isinstance(image, bytes) else (None, "no bytes")

    def _labels(self, table: pa.Table) -> pa.ChunkedArray | None:
        """The column that tells the class, dictionaries decoded; None when there is none."""
        for kind in ("label", "class_name"):
            if self._has(kind):
                column = table[getattr(self.columns, kind)]
                return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        return None

    def _check_names(self) -> None:
        """A column that was named on purpose must be there."""
        for kind in ("label", "class_name", "group_id"):
            name = getattr(self.columns, kind)
            if name != getattr(Columns(), kind) and not self._has(kind):
                known = ", ".join(self._files[0].schema_arrow.names)
                raise SourceError(f"{self.files[0]}: no column {name!r} for {kind}; it has {known}")

    def _check_ids(self) -> None:
        """Ids must be there and differ: they are what annotators and later runs name a sample by."""
        if not self._has("sample_id"):
            if len({path.name for path in self.files}) < len(self.files):
                raise SourceError(
                    f"{self.files[0]}: no column {self.columns.sample_id!r}, and file names that repeat cannot "
                    "stand in for it; name the column with --id-column"
                )
            return
        parts = []
        for path, first, table in self._tables(0, len(self), [self.columns.sample_id]):
            ids = self._ids(path, first, table)
            nameless = [row for row, sample_id in enumerate(ids) if sample_id is None]
            if nameless:
                raise SourceError(f"{path}: row {first + nameless[0]} has no {self.columns.sample_id}")
            parts.append(sample_keys(ids))
        keys = np.concatenate(parts)
        values, counts = np.unique(keys, return_counts=True)
        if len(values) < len(keys):
            index = int(np.flatnonzero(keys == values[counts > 1][0])[0])
            twice = next(self.rows(index, index + 1)).sample_id
            raise SourceError(
                f"{self.columns.sample_id} {twice!r} stands in more than one row; each sample needs its own"
            )

    def _classes(self) -> tuple[dict[Any, int], tuple[str, ...] | None]:
        """Label as it stands -> class index, and the class names, in the order of the labels."""
        names = self._label_names()
        known = self._huggingface_names()
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
        if len(set(names.values())) < len(names):
            raise SourceError(f"{self.columns.class_name}: two labels share one name; give each its own")
        order = sorted(names)
        return {label: index for index, label in enumerate(order)}, tuple(str(names[label]) for label in order)

    def _label_names(self) -> dict[Any, Any]:
        """Every label in the files with its name, which is the label itself where no name stands beside it."""
        columns = [getattr(self.columns, kind) for kind in ("label", "class_name") if self._has(kind)]
        names: dict[Any, Any] = {}
        for _, _, table in self._tables(0, len(self), columns) if columns else ():
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

    def _huggingface_names(self) -> list[str] | None:
        """Class names that Hugging Face's `datasets` keeps in the file's metadata."""
        metadata = self._files[0].schema_arrow.metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return list(features[self.columns.label]["names"])
        except (KeyError, TypeError, ValueError):
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open files."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
