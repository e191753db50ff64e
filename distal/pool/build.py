"""Pack a source into a pool: read and decode once, in parallel, in Ray tasks.

The order of samples is the order of the source, whatever the number of tasks. `pool.json` is written last,
so a build that was interrupted leaves no pool behind.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts.arrays import Array, create_array
from distal.errors import Damage, DiskFull, DistalError, PoolError, SourceError, one_line
from distal.hashing import sample_keys
from distal.pool.decode import Channels, Unreadable, decode, is_grey, pixels, quiet
from distal.pool.images import (
    BUILDING,
    IMAGES,
    MANIFEST,
    MAX_PART_SAMPLES,
    OK,
    SAMPLES,
    SCHEMA,
    UNREADABLE,
    Pool,
    begin_content,
    close_part,
    parts,
)
from distal.pool.parquet_source import Columns
from distal.pool.rows import Row, Source
from distal.pool.sources import open_source
from distal.processes import ProcessIdentity, this_process
from distal.records import Block, JsonObject, auto_block_size
from distal.storage import (
    create_json,
    parquet_writer,
    read_json,
    remove_tree,
    temporary_folder,
    write_bytes,
    write_json,
)

MAX_CHUNK_BYTES = 16 * 2**20
STALE_S = 300  # seconds without a new chunk after which a build on another host counts as interrupted
_MAX_SAMPLED = 128  # images looked at to learn the size and the channels


@dataclass(frozen=True, slots=True)
class Layout:
    """What every image of a pool becomes.

    Attributes:
        size: (H, W) in pixels.
        channels: one or three.
        resize, recolour: whether the user asked for this size, and for these channels. If not they were learnt from
            the first images, and an image that differs stops the build: changing it unasked would be silent damage.
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
class _Part:
    """What a build task returns for one block; its images are in the array already."""

    table: pa.Table
    histogram: NDArray[np.int64]  # (C, 256): how often each value occurs in the readable images
    class_counts: NDArray[np.int64]  # (n_classes,): readable images with each label
    n_unreadable: int
    sha256: bytes


def build(
    source: str,
    dest: Path,
    *,
    columns: Columns | None = None,
    size: tuple[int, int] | None = None,
    channels: Literal["auto", "grey", "rgb"] = "auto",
    follow_symlinks: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pool:
    """Pack `source` into a pool at `dest`. Ray must be running.

    Args:
        source: a Parquet file or a folder of them, an image folder, `builtin:...`, or `torchvision:...`.
        dest: a folder that does not exist, is empty, or holds an interrupted build, which is started over.
        columns: names of the columns in Parquet.
        size: (H, W) to resize to. None: all images must have one size.
        channels: grey or rgb, to which every image is turned. auto: grey when all images are, else rgb.
        follow_symlinks: also pack what links that lead out of a source's folder lead to.
        on_progress: called with (samples done, samples).

    Raises:
        SourceError: the source is not there, contradicts itself, has no readable image, or has images of several sizes
            or colours and none was asked for.
        PoolError: `dest` holds something else.
        DiskFull: no space left. Like after every other error, nothing is left in `dest`.
    """
    opened = open_source(source, columns, follow_symlinks=follow_symlinks)
    layout = learn_layout(opened, source, size, channels)
    _make_room(dest)
    made_from = {
        "source": source,
        "columns": asdict(columns or Columns()),
        "follow_symlinks": follow_symlinks,
        "layout": asdict(layout),
    }
    try:
        return _build(opened, made_from, dest, layout, on_progress)
    except DiskFull as error:
        raise DiskFull(f"{dest}: no space left on device; nothing was kept; free some space and build again") from error
    finally:
        if not (dest / MANIFEST).exists():
            _discard(dest)


def _make_room(dest: Path) -> None:
    """Make sure that `dest` is a folder with nothing in it. Only what an unfinished build left there is removed."""
    if dest.exists() and not dest.is_dir():
        raise PoolError(f"{dest}: a file; the pool needs a folder of its own")
    found = {path.name for path in dest.iterdir()} if dest.exists() else set()
    if MANIFEST in found:
        raise PoolError(f"{dest}: there is a pool already; remove it first or choose another folder")
    ours = {name for name in found if name in (BUILDING, IMAGES, SAMPLES) or name.startswith(f".{SAMPLES}.")}
    if found and (BUILDING not in found or found - ours):
        other = min(found - ours, default=min(found))
        raise PoolError(f"{dest}: not an empty folder (it holds {other}); choose another")
    if BUILDING in found:
        _check_interrupted(dest)
    _discard(dest)
    if not create_json(dest / BUILDING, asdict(this_process())):
        _check_interrupted(dest)


def _check_interrupted(dest: Path) -> None:
    """Make sure that an unfinished build is not another process's, at work now."""
    builder = _builder(dest)
    lives = builder.lives()
    if lives is None:
        last_sign = max(path.stat().st_mtime for path in (dest / BUILDING, *dest.glob(f"{IMAGES}/c")))
        lives = time.time() - last_sign <= STALE_S
    if lives:
        raise PoolError(
            f"{dest}: {builder} is packing this pool; wait until it is done, or remove the folder if it is not"
        )


def _builder(dest: Path) -> ProcessIdentity:
    try:
        return ProcessIdentity(**read_json(dest / BUILDING))
    except (Damage, TypeError):  # such as a file that a power loss left empty
        return ProcessIdentity("an unknown host", "", 0, 0.0)


def _discard(dest: Path) -> None:
    """Remove what a build makes, and nothing else; the folder too if that leaves it empty."""
    if not (dest / BUILDING).exists():
        return
    remove_tree(dest / IMAGES)
    for path in [dest / SAMPLES, *dest.glob(f".{SAMPLES}.*"), dest / BUILDING]:  # the sign goes last
        path.unlink(missing_ok=True)
    with suppress(OSError):
        dest.rmdir()


def learn_layout(
    source: Source,
    name: str,
    size: tuple[int, int] | None = None,
    channels: Literal["auto", "grey", "rgb"] = "auto",
) -> Layout:
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
    return Layout(size or first, channels, resize=size is not None, recolour=asked)


def pack_again(path: Path) -> list[str]:
    """Pack the images of a pool that do not decode again, from the source that it was built from.

    They are packed beside the pool first. Only when everything that is sound comes out the same, and the whole has the
    content hash of the pool, the damaged chunks are replaced.

    Returns:
        What was wrong with each part; empty when the source is not what it was, and nothing was changed.

    Raises:
        SourceError: the source is not there.
    """
    pool = Pool.open(path)
    record = read_json(path / MANIFEST, required=("columns", "layout"))
    layout = Layout(**{**record["layout"], "size": tuple(record["layout"]["size"])})
    content = begin_content(pool.n_samples, pool.image_shape, pool.classes)
    damaged: list[tuple[Block, str]] = []
    with temporary_folder(path / IMAGES) as beside:
        for part in parts(pool.n_samples):
            try:
                content.update(pool.part_sha256(part))
            except Damage as damage:
                if not damaged:
                    follow = record.get("follow_symlinks", False)
                    source = open_source(pool.source, Columns(**record["columns"]), follow_symlinks=follow)
                    _create_images(beside / IMAGES, pool.n_samples, layout)
                damaged.append((part, str(damage)))
                (packed,) = _pack(source, [part], beside, layout)
                content.update(packed.sha256)
        if content.hexdigest() != pool.content_sha256:
            return []
        for part, _ in damaged:
            _replace_damaged(Array(path / IMAGES), Array(beside / IMAGES), part)
    return [what for _, what in damaged]


def _replace_damaged(images: Array, again: Array, part: Block) -> None:
    for start in range(part.start, part.stop, images.chunks[0]):
        try:
            images.read((slice(start, min(start + images.chunks[0], part.stop)),))
        except Damage:
            chunk = (start // images.chunks[0], 0, 0, 0)
            write_bytes(images.chunk_path(*chunk), again.chunk_path(*chunk).read_bytes())


def _build(
    source: Source, made_from: JsonObject, dest: Path, layout: Layout, on_progress: Callable[[int, int], None]
) -> Pool:
    n_samples = len(source)
    _create_images(dest / IMAGES, n_samples, layout)
    histogram = np.zeros((layout.shape[2], 256), dtype=np.int64)
    class_counts = np.zeros(len(source.classes or ()), dtype=np.int64)
    n_unreadable = 0
    height, width, channels = layout.shape
    content = begin_content(n_samples, (channels, height, width), source.classes)
    packing = _Packing(source, dest, layout).in_order(parts(n_samples))
    with closing(packing), parquet_writer(dest / SAMPLES, SCHEMA) as writer:
        for block, part in packing:
            histogram += part.histogram
            class_counts += part.class_counts
            n_unreadable += part.n_unreadable
            content.update(part.sha256)
            writer.write_table(part.table)
            on_progress(block.stop, n_samples)
    if n_unreadable == n_samples:
        raise SourceError(f"{made_from['source']}: none of its {n_samples} images can be decoded")

    mean, std = _statistics(histogram)
    write_json(
        dest / MANIFEST,
        {
            **made_from,
            "n_samples": n_samples,
            "n_unreadable": n_unreadable,
            "channels": layout.shape[2],
            "height": layout.size[0],
            "width": layout.size[1],
            "classes": None if source.classes is None else list(source.classes),
            "class_counts": class_counts.tolist(),
            "mean": mean,
            "std": std,
            "content_sha256": content.hexdigest(),
        },
    )
    (dest / BUILDING).unlink()
    return Pool.open(dest)


def _create_images(path: Path, n_samples: int, layout: Layout) -> None:
    chunk = _chunk_size(n_samples, layout)
    dimensions = ("sample", "height", "width", "channel")
    create_array(path, (n_samples, *layout.shape), (chunk, *layout.shape), "uint8", 0, dimensions)


def _chunk_size(n_samples: int, layout: Layout) -> int:
    """Samples in an image chunk: the block size, halved until a chunk is at most 16 MiB and inside of one part."""
    height, width, channels = layout.shape
    chunk = min(auto_block_size(n_samples), MAX_PART_SAMPLES)  # two tasks must not write to one chunk
    while chunk > 1 and chunk * height * width * channels > MAX_CHUNK_BYTES:
        chunk //= 2
    return chunk


class _Packing:
    """The tasks of a build: each packs consecutive blocks, so that what it reads is read once."""

    def __init__(self, source: Source, dest: Path, layout: Layout) -> None:
        self._source, self._dest, self._layout = source, dest, layout
        self._task = ray.remote(num_returns="streaming", max_retries=2)(_pack)
        self._running: deque[Any] = deque()

    def in_order(self, blocks: list[Block]) -> Generator[tuple[Block, _Part], None, None]:
        """Run a bounded number of tasks at a time, and yield what comes of each block, in their order."""
        ranges = self._source.ranges(blocks)
        threads = cluster.cpus_for(len(ranges))
        submitted = 0
        try:
            for i, some in enumerate(ranges):
                window = min(i + 4 * cluster.n_cpus(), len(ranges))
                while submitted < window:
                    self._running.append(self._submit(ranges[submitted], threads))
                    submitted += 1
                yield from self._results(some)
                self._running.popleft()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            # Nothing may write into the folder of a failed build after it has been removed.
            for results in self._running:
                ray.cancel(results)
            self._wait_for(self._running)

    def _submit(self, blocks: list[Block], threads: int) -> Any:
        part = self._source.part(blocks[0].start, blocks[-1].stop)
        return self._task.options(num_cpus=threads).remote(part, blocks, self._dest, self._layout, threads)

    def _results(self, blocks: list[Block]) -> Iterator[tuple[Block, _Part]]:
        """What comes of the blocks of the first task; when its process dies again and again, of one that runs alone."""
        done = 0
        try:
            for block in blocks:
                yield block, ray.get(next(self._running[0]))
                done += 1
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:  # such as no memory left
            self._wait_for(islice(self._running, 1, None))
            self._running[0] = self._submit(blocks[done:], threads=1)
            yield from self._last_results(blocks[done:])

    def _last_results(self, blocks: list[Block]) -> Iterator[tuple[Block, _Part]]:
        for block in blocks:
            try:
                part = ray.get(next(self._running[0]))
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                raise DistalError(
                    f"{self._dest}: the process that packs samples [{block.start}, {block.stop}) of the source died "
                    f"again and again, even alone ({one_line(error)}); give it more memory, or take out the image"
                ) from error
            yield block, part

    def _wait_for(self, tasks: Iterable[Any]) -> None:
        ended = [results.completed() for results in tasks]
        ray.wait(ended, num_returns=len(ended)) if ended else None


def _pack(source: Source, blocks: list[Block], dest: Path, layout: Layout, threads: int = 1) -> Iterator[_Part]:
    """Decode consecutive blocks and write their chunks. Doing it twice writes the same bytes, so a retry is safe."""
    rows = source.rows(blocks[0].start, blocks[-1].stop)
    with quiet(), ThreadPoolExecutor(threads) as executor:
        packed = _in_threads(executor, threads, partial(_packed, layout=layout), rows)
        for block in blocks:
            yield _pack_block(packed, block, dest, layout, len(source.classes or ()))


def _in_threads(
    executor: ThreadPoolExecutor, threads: int, work: Callable[[Row], _Packed], rows: Iterable[Row]
) -> Iterator[_Packed]:
    """`work` of each row, in order; few of them are in hand at a time."""
    if threads == 1:
        yield from map(work, rows)
        return
    running: deque[Future[_Packed]] = deque()
    for row in rows:
        running.append(executor.submit(work, row))
        if len(running) == 2 * threads:
            yield running.popleft().result()
    yield from (each.result() for each in running)


def _packed(row: Row, layout: Layout) -> _Packed:
    """A row without its bytes, which are not needed any more, its status, and its pixels if it has any."""
    try:
        return replace(row, data=None), OK, _pixels(row, layout)
    except Unreadable as error:
        return replace(row, data=None), UNREADABLE + str(error), None


def _pack_block(packed: Iterator[_Packed], block: Block, dest: Path, layout: Layout, n_classes: int) -> _Part:
    array = Array(dest / IMAGES)
    rows: list[Row] = []
    statuses: list[str] = []
    histogram = np.zeros((layout.shape[2], 256), dtype=np.int64)
    digest = hashlib.sha256()
    for start in range(block.start, block.stop, array.chunks[0]):
        images = np.zeros((min(array.chunks[0], block.stop - start), *layout.shape), dtype=np.uint8)
        for image, (row, status, its_pixels) in zip(images, packed, strict=False):
            rows.append(row)
            statuses.append(status)
            if its_pixels is not None:
                image[:] = its_pixels
                histogram += [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(image, -1, 0)]
        array.write((slice(start, start + len(images)),), images)
        digest.update(images.data)
    labels = [row.label for row, status in zip(rows, statuses, strict=True) if status == OK and row.label is not None]
    return _Part(
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


def _pixels(row: Row, layout: Layout) -> NDArray[np.uint8]:
    """One image as it goes into the pool: (H, W, C) uint8. Raises Unreadable, or SourceError when it does not fit."""
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


def _statistics(histogram: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, scaled to [0, 1], from exact counts of the 256 values."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    # A constant channel carries nothing; dividing by 1 leaves it at zero.
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()
