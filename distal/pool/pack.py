"""Decode the images of a source and write them as blocks of a pool. Packing twice writes the same bytes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distal.artifacts.arrays import Array, create_array
from distal.errors import SourceError
from distal.hashing import sample_keys
from distal.pool.decode import Channels, Unreadable, decode, is_grey, pixels, quiet
from distal.pool.images import IMAGES, MAX_PART_SAMPLES, OK, SCHEMA, UNREADABLE, close_part
from distal.pool.rows import Row, Source
from distal.records import Block, auto_block_size

MAX_CHUNK_BYTES = 16 * 2**20
_MAX_SAMPLED = 128  # images decoded to learn the size and the channels


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The format of every image of a pool.

    Attributes:
        size: (H, W) in pixels.
        channels: one or three.
        resize, recolour: whether the user asked for this size, and for these channels. If not, they come from the
            first images, and an image that differs stops the build: to change it unasked would be silent damage.
    """

    size: tuple[int, int]
    channels: Channels
    resize: bool
    recolour: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.size, 1 if self.channels == "grey" else 3)


_Packed = tuple[Row, str, NDArray[np.uint8] | None]


@dataclass(frozen=True)
class Part:
    """The result of one block; its images are in the array already."""

    table: pa.Table
    histogram: NDArray[np.int64]  # (C, 256): how often each value occurs in the readable images
    class_counts: NDArray[np.int64]  # (n_classes,): readable images with each label
    n_unreadable: int
    sha256: bytes


def learn_layout(
    source: Source,
    name: str,
    size: tuple[int, int] | None = None,
    channels: Literal["auto", "grey", "rgb"] = "auto",
) -> ImageLayout:
    """Learn the shape from the first readable images."""
    asked = channels != "auto"
    grey = True
    first: tuple[int, int] | None = None
    looked = 0
    with quiet():
        for row in source.rows(0, len(source)):
            try:
                image = decode(_data(row))
            except Unreadable:
                continue
            first = first or (image.height, image.width)
            grey = grey and is_grey(image)
            looked += 1
            if looked == _MAX_SAMPLED or not grey or asked:
                break
    if first is None:
        raise SourceError(f"{name}: none of its {len(source)} images can be decoded")
    if channels == "auto":
        channels = "grey" if grey else "rgb"
    return ImageLayout(size or first, channels, resize=size is not None, recolour=asked)


def create_images(path: Path, n_samples: int, layout: ImageLayout) -> None:
    """Create the empty array of the images."""
    chunk = _chunk_size(n_samples, layout)
    dimensions = ("sample", "height", "width", "channel")
    create_array(path, (n_samples, *layout.shape), (chunk, *layout.shape), "uint8", 0, dimensions)


def _chunk_size(n_samples: int, layout: ImageLayout) -> int:
    """Samples in an image chunk: the block size, halved until a chunk is at most 16 MiB and inside of one part."""
    height, width, channels = layout.shape
    chunk = min(auto_block_size(n_samples), MAX_PART_SAMPLES)  # so that no two tasks write to one chunk
    while chunk > 1 and chunk * height * width * channels > MAX_CHUNK_BYTES:
        chunk //= 2
    return chunk


def pack(source: Source, blocks: list[Block], dest: Path, layout: ImageLayout, threads: int = 1) -> Iterator[Part]:
    """Decode consecutive blocks and write their chunks; a retry writes the same bytes."""
    rows = source.rows(blocks[0].start, blocks[-1].stop)
    with quiet(), ThreadPoolExecutor(threads) as executor:
        packed = _in_threads(executor, threads, partial(_packed, layout=layout), rows)
        for block in blocks:
            yield _pack_block(packed, block, dest, layout, len(source.classes or ()))


def _in_threads(
    executor: ThreadPoolExecutor, threads: int, work: Callable[[Row], _Packed], rows: Iterable[Row]
) -> Iterator[_Packed]:
    """`work` of each row, in order, for a bounded number of rows at a time."""
    if threads == 1:
        yield from map(work, rows)
        return
    running: deque[Future[_Packed]] = deque()
    for row in rows:
        running.append(executor.submit(work, row))
        if len(running) == 2 * threads:
            yield running.popleft().result()
    yield from (each.result() for each in running)


def _packed(row: Row, layout: ImageLayout) -> _Packed:
    """A row without its encoded bytes, its status, and its pixels if they can be decoded."""
    try:
        return replace(row, data=None), OK, _pixels(row, layout)
    except Unreadable as error:
        return replace(row, data=None), UNREADABLE + str(error), None


def _pack_block(packed: Iterator[_Packed], block: Block, dest: Path, layout: ImageLayout, n_classes: int) -> Part:
    array = Array(dest / IMAGES)
    rows: list[Row] = []
    statuses: list[str] = []
    histogram = np.zeros((layout.shape[2], 256), dtype=np.int64)
    digest = hashlib.sha256()
    for start in range(block.start, block.stop, array.chunks[0]):
        images = np.zeros((min(array.chunks[0], block.stop - start), *layout.shape), dtype=np.uint8)
        for image, (row, status, decoded) in zip(images, packed, strict=False):
            rows.append(row)
            statuses.append(status)
            if decoded is not None:
                image[:] = decoded
                histogram += [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(image, -1, 0)]
        array.write((slice(start, start + len(images)),), images)
        digest.update(images.data)
    labels = [row.label for row, status in zip(rows, statuses, strict=True) if status == OK and row.label is not None]
    return Part(
        table=pa.table(
            {
                "sample_index": np.arange(block.start, block.stop),
                "sample_id": [row.sample_id for row in rows],
                "sample_key": sample_keys(row.sample_id for row in rows),
                "uri": [row.uri for row in rows],
                "status": statuses,
                "label": [row.label for row in rows],
                "group_id": [row.group_id for row in rows],
            },
            schema=SCHEMA,
        ),
        histogram=histogram,
        class_counts=np.bincount(np.array(labels, dtype=np.int64), minlength=n_classes),
        n_unreadable=len(statuses) - statuses.count(OK),
        sha256=close_part(
            digest, [(r.sample_id, r.label, r.group_id, status) for r, status in zip(rows, statuses, strict=True)]
        ),
    )


def _pixels(row: Row, layout: ImageLayout) -> NDArray[np.uint8]:
    """One image for the pool, (H, W, C) uint8. Raises Unreadable, or SourceError when it does not fit."""
    image = decode(_data(row))
    if not layout.resize and (image.height, image.width) != layout.size:
        (height, width), (h, w) = layout.size, (image.height, image.width)
        raise SourceError(
            f"{row.sample_id} is {w}x{h} pixels and the first image {width}x{height}; "
            f"say what to resize to: distal pool build --size {width}x{height}"
        )
    if not layout.recolour and layout.channels == "grey" and not is_grey(image):
        raise SourceError(
            f"{row.sample_id} is in colour and the first images are grey; "
            "say what to turn them to: distal pool build --channels rgb (or grey)"
        )
    return pixels(image, layout.channels, layout.size)


def _data(row: Row) -> bytes:
    if row.data is None:
        raise Unreadable(row.error or "no bytes")
    return row.data
