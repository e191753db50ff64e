"""A packed pool on disk, opened for reading.

::

    POOL/
      pool.json         written last: without it the pool does not exist
      samples.parquet   one row per sample, in the order of `sample_index`
      images.zarr       (n_samples, H, W, C) uint8
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distal.artifacts.arrays import Array
from distal.errors import Damage, PoolError
from distal.records import (
    OPTIONAL,
    STRIPE_SAMPLES,
    Block,
    Result,
    auto_block_size,
    split_blocks,
)
from distal.storage import names_in, open_parquet, parquet_errors, read_json, write_bytes

MANIFEST, SAMPLES, IMAGES = "pool.json", "samples.parquet", "images.zarr"
BUILDING = "building.json"  # written first and removed last: a folder that has it holds an unfinished build

MAX_PART_SAMPLES = 8192
SHOWN = 5

OK = "ok"
UNREADABLE = "unreadable: "

_READING = threading.Lock()  # threads share a pool, and two must not read from one ParquetFile at a time

SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("sample_key", pa.uint64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("group_id", pa.string()),
    ]
)


@dataclass(frozen=True)
class PoolInfo(Result):
    """The description of a pool.

    Attributes:
        unreadable: the first unreadable samples, each with the reason.
        image_shape: (C, H, W).
        classes: readable samples with each label, by class name.
        bytes_decoded: of all images as uint8.
    """

    path: Path
    source: str
    n_samples: int
    n_labeled: int
    n_unreadable: int
    unreadable: list[str] | None = field(metadata=OPTIONAL)
    image_shape: tuple[int, int, int]
    classes: dict[str, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bytes_decoded: int
    samples_per_chunk: int
    content_sha256: str


@dataclass(frozen=True)
class Pool:
    """All images, read-only.

    Attributes:
        path: folder of the pool.
        source: what it was built from.
        n_samples: samples, readable or not.
        image_shape: (C, H, W).
        classes: class names in the order of their labels; None when the pool has no labels.
        mean, std: per channel, of the readable pixels scaled to [0, 1].
        content_sha256: of all pixels, ids, labels and statuses; equal pools have equal hashes.
        class_counts: readable samples with each label.
        n_unreadable: samples in quarantine.
    """

    path: Path
    source: str
    n_samples: int
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content_sha256: str
    class_counts: tuple[int, ...]
    n_unreadable: int

    @property
    def n_readable(self) -> int:
        """Samples that can be shown to a network."""
        return self.n_samples - self.n_unreadable

    @property
    def n_labeled(self) -> int:
        """Readable samples that carry a label."""
        return sum(self.class_counts)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a packed pool.

        Raises:
            PoolError: there is no pool, or its build was interrupted.
            Damage: its record is not valid.
        """
        path = Path(path)
        try:
            record = read_json(path / MANIFEST, required=("n_samples", "classes", "content_sha256"))
            return cls(
                path=path,
                source=record["source"],
                n_samples=record["n_samples"],
                image_shape=(record["channels"], record["height"], record["width"]),
                classes=None if record["classes"] is None else tuple(record["classes"]),
                class_counts=tuple(record["class_counts"]),
                mean=tuple(record["mean"]),
                std=tuple(record["std"]),
                content_sha256=record["content_sha256"],
                n_unreadable=record["n_unreadable"],
            )
        except (FileNotFoundError, NotADirectoryError):
            raise PoolError(_missing(path)) from None
        except (KeyError, TypeError) as error:
            raise Damage(f"{path / MANIFEST}: not the record of a pool ({error})") from error

    @property
    def chunk_size(self) -> int:
        """Samples in a chunk of images: at most 16 MiB of pixels, the unit that is read."""
        return self._images.chunks[0]

    def require(self, content_sha256: str) -> Self:
        """This pool, if it holds what it should: on a cluster a path can name another pool on another node.

        Raises:
            PoolError: its content is another.
        """
        if self.content_sha256 != content_sha256:
            raise PoolError(
                f"{self.path}: not the pool of this run (its content hash is {self.content_sha256[:12]}, not "
                f"{content_sha256[:12]}); every node must see the same files"
            )
        return self

    def describe(self) -> PoolInfo:
        """The result of `distal pool info`."""
        classes = self.classes
        channels, height, width = self.image_shape
        return PoolInfo(
            path=self.path,
            source=self.source,
            n_samples=self.n_samples,
            n_labeled=self.n_labeled,
            n_unreadable=self.n_unreadable,
            unreadable=self._some_unreadable() if self.n_unreadable else None,
            image_shape=self.image_shape,
            classes=dict(zip(classes, self.class_counts, strict=True)) if classes is not None else None,
            mean=self.mean,
            std=self.std,
            bytes_decoded=self.n_samples * channels * height * width,
            samples_per_chunk=self.chunk_size,
            content_sha256=self.content_sha256,
        )

    def _some_unreadable(self) -> list[str]:
        """The first unreadable samples, each with the reason."""
        found: list[str] = []
        for block in split_blocks(self.n_samples, STRIPE_SAMPLES):
            rows = self.samples(block.start, block.stop, ["sample_id", "status"])
            bad = rows.filter(pc.not_equal(rows["status"], OK)).to_pylist()
            found += [f"{row['sample_id']} ({row['status'].removeprefix(UNREADABLE)})" for row in bad]
            if len(found) >= SHOWN:
                break
        return found[:SHOWN]

    @cached_property
    def has_groups(self) -> bool:
        """Whether any sample has a `group_id`."""
        metadata, column = self._samples.metadata, SCHEMA.get_field_index("group_id")
        groups = (metadata.row_group(i).column(column) for i in range(metadata.num_row_groups))
        return any(each.statistics.null_count < each.num_values for each in groups)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images of the samples [start, stop): (n, C, H, W) uint8; unreadable ones are zero.

        The memory behind the view is (n, H, W, C), which torch takes as channels-last without a copy.

        Raises:
            IndexError: the range is not inside [0, n_samples].
            Damage: a chunk is missing or fails its checksum.
        """
        if not 0 <= start <= stop <= self.n_samples:
            raise IndexError(f"samples [{start}, {stop}) are not inside [0, {self.n_samples})")
        return self._images.read((slice(start, stop),)).transpose(0, 3, 1, 2)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of the given samples, in the given order: (n, C, H, W) uint8, channels-last in memory.

        Each chunk is read once, whatever the order of `indices`.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        channels, height, width = self.image_shape
        images = np.empty((len(wanted), height, width, channels), dtype=np.uint8)
        for positions, start, stop in _grouped(wanted, self.chunk_size, self.n_samples):
            images[positions] = self.read(start, stop).transpose(0, 2, 3, 1)[wanted[positions] - start]
        return images.transpose(0, 3, 1, 2)

    def part_sha256(self, part: Block) -> bytes:
        """The hash of one of `parts`, from what is stored; raises Damage like `read`."""
        rows = self.samples(part.start, part.stop, ["sample_id", "label", "group_id", "status"]).to_pylist()
        pixels = hashlib.sha256()
        for start in range(part.start, part.stop, self.chunk_size):
            images = self.read(start, min(start + self.chunk_size, part.stop))
            pixels.update(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).data)
        return close_part(pixels, [(r["sample_id"], r["label"], r["group_id"], r["status"]) for r in rows])

    def samples(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows [start, stop) of samples.parquet."""
        first = int(np.searchsorted(self._row_group_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._row_group_starts, stop, side="left"))
        offset = start - int(self._row_group_starts[first])
        with parquet_errors(self.path / SAMPLES), _READING:
            table = self._samples.read_row_groups(range(first, last), columns=columns)
        return table.slice(offset, stop - start)

    def take_samples(self, indices: Sequence[int] | NDArray[np.int64], columns: list[str] | None = None) -> pa.Table:
        """Rows of samples.parquet for the given samples, in the given order."""
        wanted = np.asarray(indices, dtype=np.int64)
        order, tables = [], []
        for row_group in np.unique(np.searchsorted(self._row_group_starts, wanted, side="right") - 1):
            start, stop = self._row_group_starts[row_group], self._row_group_starts[row_group + 1]
            positions = np.flatnonzero((wanted >= start) & (wanted < stop))
            with parquet_errors(self.path / SAMPLES), _READING:
                table = self._samples.read_row_group(int(row_group), columns=columns)
            tables.append(table.take(pa.array(wanted[positions] - start)))
            order.append(positions)
        if not tables:
            return self.samples(0, 0, columns)
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(order))))

    def columns(self, start: int, stop: int, *names: str) -> list[NDArray[Any]]:
        """Columns of samples.parquet as arrays; a null label is -1."""
        table = self.samples(start, stop, list(names))
        return [table[n].fill_null(-1).to_numpy() if n == "label" else table[n].to_numpy() for n in names]

    @cached_property
    def _images(self) -> Array:
        return Array(self.path / IMAGES)

    @cached_property
    def _samples(self) -> pq.ParquetFile:
        return open_parquet(self.path / SAMPLES)

    @cached_property
    def _row_group_starts(self) -> NDArray[np.int64]:
        metadata = self._samples.metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return np.cumsum([0, *rows])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open handles."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}


def write_png(pool: Pool, index: int, path: Path) -> None:
    """Write one image of a pool as a file."""
    from PIL import Image

    pixels = np.ascontiguousarray(pool.take([index])[0].transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def begin_content(n_samples: int, image_shape: tuple[int, int, int], classes: Sequence[str] | None) -> hashlib._Hash:
    """The content hash of a pool, before the hashes of its parts, in order, are added to it."""
    channels, height, width = image_shape
    named = None if classes is None else tuple(classes)
    return hashlib.sha256(repr((n_samples, (height, width, channels), named)).encode())


def parts(n_samples: int) -> list[Block]:
    """The pieces in which a pool is packed and hashed."""
    return split_blocks(n_samples, min(auto_block_size(n_samples), MAX_PART_SAMPLES))


def close_part(pixels: hashlib._Hash, rows: Iterable[tuple[str, int | None, str | None, str]]) -> bytes:
    """The hash of a part of a pool.

    Args:
        pixels: a sha256 of its images, (n, H, W, C) uint8.
        rows: `sample_id`, `label`, `group_id` and `status` of each sample.
    """
    pixels.update(repr(list(rows)).encode())
    return pixels.digest()


def _grouped(wanted: NDArray[np.int64], chunk: int, n_samples: int) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Positions in `wanted` that fall in one chunk, with the chunk's range, chunk by chunk."""
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < n_samples):
        raise IndexError(f"sample indices must be inside [0, {n_samples}), got {wanted.min()}..{wanted.max()}")
    order = np.argsort(wanted, kind="stable")
    borders = np.flatnonzero(np.diff(wanted[order] // chunk)) + 1
    for positions in np.split(order, borders):
        if len(positions):
            start = int(wanted[positions[0]] // chunk * chunk)
            yield positions, start, min(start + chunk, n_samples)


def _missing(path: Path) -> str:
    if BUILDING in names_in(path):
        return f"{path}: the build of this pool was interrupted; run `distal pool build SOURCE {path}` again"
    return f"{path}: no such pool; make it with `distal pool build SOURCE {path}`"
