"""Pack a source into a pool: read and decode once, in parallel, in Ray tasks.

The order of samples is the order of the source, whatever the number of tasks. `pool.json` is written last,
so a build that was interrupted leaves no pool behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts.arrays import Array
from distal.errors import Damage, DiskFull, DistalError, PoolError, SourceError, one_line
from distal.pool.images import (
    BUILDING,
    IMAGES,
    MANIFEST,
    SAMPLES,
    SCHEMA,
    Pool,
    begin_content,
    parts,
)
from distal.pool.pack import ImageLayout, Part, create_images, learn_layout, pack
from distal.pool.parquet_source import Columns
from distal.pool.rows import Source
from distal.pool.sources import open_source
from distal.processes import ProcessIdentity, this_process
from distal.records import Block
from distal.storage import (
    create_json,
    parquet_writer,
    read_json,
    remove_tree,
    temporary_folder,
    write_bytes,
    write_json,
)

_STALE_S = 300  # seconds without a new chunk after which a build on another host counts as interrupted


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
        dest: a folder that does not exist, is empty, or holds an interrupted build, which starts over.
        columns: names of the columns in Parquet.
        size: (H, W) to resize to. None: all images must have one size.
        channels: grey or rgb, to which every image is turned. auto: grey when the first images are, else rgb.
        follow_symlinks: follow links that lead out of the source's folder as well.
        on_progress: called with (samples done, samples).

    Raises:
        SourceError: no such source, or it contradicts itself, has no readable image, or has images of several sizes
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
    """Make `dest` an empty folder, or refuse it. Only the files of an unfinished build are removed."""
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
    """Refuse a build that another process is working on now."""
    builder = _builder(dest)
    lives = builder.lives()
    if lives is None:
        last_sign = max(path.stat().st_mtime for path in (dest / BUILDING, *dest.glob(f"{IMAGES}/c")))
        lives = time.time() - last_sign <= _STALE_S
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
    """Remove the files of a build, and the folder if that leaves it empty."""
    if not (dest / BUILDING).exists():
        return
    remove_tree(dest / IMAGES)
    for path in [dest / SAMPLES, *dest.glob(f".{SAMPLES}.*"), dest / BUILDING]:  # the sign of a build goes last
        path.unlink(missing_ok=True)
    with suppress(OSError):
        dest.rmdir()


def pack_again(path: Path) -> list[str]:
    """Pack the images of a pool that do not decode again, from the source that it was built from.

    They are packed beside the pool first. The damaged chunks are replaced only if the whole then has the content hash
    of the pool.

    Returns:
        The damage of each part; empty when the source has changed: then the pool is left as it is.

    Raises:
        SourceError: no such source.
    """
    pool = Pool.open(path)
    record = read_json(path / MANIFEST, required=("columns", "layout"))
    layout = ImageLayout(**{**record["layout"], "size": tuple(record["layout"]["size"])})
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
                    create_images(beside / IMAGES, pool.n_samples, layout)
                damaged.append((part, str(damage)))
                (packed,) = pack(source, [part], beside, layout)
                content.update(packed.sha256)
        if content.hexdigest() != pool.content_sha256:
            return []
        for part, _ in damaged:
            _replace_damaged(Array(path / IMAGES), Array(beside / IMAGES), part)
    return [damage for _, damage in damaged]


def _replace_damaged(images: Array, again: Array, part: Block) -> None:
    for start in range(part.start, part.stop, images.chunks[0]):
        try:
            images.read((slice(start, min(start + images.chunks[0], part.stop)),))
        except Damage:
            chunk = (start // images.chunks[0], 0, 0, 0)
            write_bytes(images.chunk_path(*chunk), again.chunk_path(*chunk).read_bytes())


def _build(
    source: Source,
    made_from: Mapping[str, object],
    dest: Path,
    layout: ImageLayout,
    on_progress: Callable[[int, int], None],
) -> Pool:
    n_samples = len(source)
    create_images(dest / IMAGES, n_samples, layout)
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


class _Packing:
    """The tasks of a build: each packs consecutive blocks, so that the source is read once."""

    def __init__(self, source: Source, dest: Path, layout: ImageLayout) -> None:
        self._source, self._dest, self._layout = source, dest, layout
        self._task = ray.remote(num_returns="streaming", max_retries=2)(pack)
        self._running: deque[Any] = deque()

    def in_order(self, blocks: list[Block]) -> Generator[tuple[Block, Part], None, None]:
        """Run a bounded number of tasks at a time, and yield the result of each block, in order."""
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

    def _results(self, blocks: list[Block]) -> Iterator[tuple[Block, Part]]:
        """The results of the first task; if its process dies repeatedly, of a task that runs alone."""
        done = 0
        try:
            for block in blocks:
                yield block, ray.get(next(self._running[0]))
                done += 1
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:  # such as no memory
            self._wait_for(islice(self._running, 1, None))
            self._running[0] = self._submit(blocks[done:], threads=1)
            yield from self._last_results(blocks[done:])

    def _last_results(self, blocks: list[Block]) -> Iterator[tuple[Block, Part]]:
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
        ends = [results.completed() for results in tasks]
        ray.wait(ends, num_returns=len(ends)) if ends else None


def _statistics(histogram: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, scaled to [0, 1], from exact counts of the 256 values."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    # A constant channel carries nothing; dividing by 1 leaves it at zero.
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()
