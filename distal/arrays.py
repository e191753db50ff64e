"""How distal keeps arrays in Zarr: a checksum on every chunk, every chunk written, and no lost chunk read as data.

Three habits of Zarr would pass damage off as numbers, and are turned off here: without a checksum most flipped bits
decode; a chunk that equals the fill value is deleted; a chunk that is not there reads as the fill value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from distal.errors import Damage, one_line
from distal.records import JsonObject
from distal.storage import disk_errors


def create_array(
    path: Path,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any] | str,
    fill_value: object,
    dimension_names: Sequence[str],
) -> Array:
    """Lay out an array; an older one is replaced. The group around it must exist already, if there is one."""
    with disk_errors(path):
        zarr.create_array(
            path,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            fill_value=fill_value,
            compressors=[ZstdCodec(level=0), Crc32cCodec()],
            dimension_names=dimension_names,
            overwrite=True,
        )
    return Array(path)


def create_group(path: Path) -> None:
    """Make an empty group; an older one is replaced."""
    with disk_errors(path):
        zarr.create_group(path, overwrite=True)


def set_attributes(path: Path, attributes: JsonObject) -> None:
    """Set attributes of a group; the others stay. Only the driver does that: the last writer wins."""
    with disk_errors(path):
        zarr.open_group(path, mode="r+").attrs.update(attributes)


def get_attributes(path: Path) -> JsonObject:
    """The attributes of a group; empty when there is no group.

    Raises:
        Damage: the metadata is not valid.
    """
    with _decoding(lambda: f"{path}: cannot be opened"):
        try:
            return zarr.open_group(path, mode="r").attrs.asdict()
        except FileNotFoundError:
            return {}


class Array:
    """A handle on one array, for reading and for writing whole chunks.

    Raises:
        Damage: the metadata is missing or not valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _decoding(lambda: f"{path}: cannot be opened"):
            # Written also when equal to the fill value: the existence of a chunk means something. The setting is not
            # persisted, so every handle sets it anew.
            self._array: zarr.Array[Any] = zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True})
        self.shape: tuple[int, ...] = self._array.shape
        self.chunks: tuple[int, ...] = self._array.chunks
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype)

    def write(self, where: tuple[int | slice, ...], values: NDArray[Any]) -> None:
        """Write a region made of whole chunks; each appears at once or not at all. Raises DiskFull."""
        with disk_errors(self.path):
            self._array[where] = values

    def read(self, where: tuple[slice, ...], *, complete: bool = True) -> NDArray[Any]:
        """Read a region.

        Args:
            complete: whether all of its chunks must be there; else a missing one reads as the fill value.

        Raises:
            Damage: naming the first chunk that is missing or does not decode.
        """
        if complete:
            for chunk in self._chunks(where):
                if not self.chunk_path(*chunk).exists():
                    raise Damage(f"{self.path}: {self._name(chunk)} is missing")
        with _decoding(lambda: f"{self.path}: {self._culprit(where)} does not decode"):
            return np.asarray(self._array[where])

    def chunk_path(self, *index: int) -> Path:
        """The file of one chunk."""
        return self.path.joinpath("c", *map(str, index))

    def _chunks(self, where: tuple[slice, ...]) -> list[tuple[int, ...]]:
        """Indices of the chunks that a region touches."""
        ranges = []
        for axis, (length, size) in enumerate(zip(self.shape, self.chunks, strict=True)):
            start, stop, _ = (where[axis] if axis < len(where) else slice(None)).indices(length)
            ranges.append(range(start // size, -(-stop // size) if stop > start else start // size))
        return list(itertools.product(*ranges))

    def _culprit(self, where: tuple[slice, ...]) -> str:
        """Find the chunk that does not decode."""
        for chunk in self._chunks(where):
            region = tuple(slice(i * size, (i + 1) * size) for i, size in zip(chunk, self.chunks, strict=True))
            try:
                self._array[region]
            except Exception:
                return self._name(chunk)
        return "a block"

    def _name(self, chunk: tuple[int, ...]) -> str:
        return f"row {chunk[0]}, block {chunk[1]}" if len(chunk) == 2 else f"block {chunk[0]}"


@contextmanager
def _decoding(what: Callable[[], str]) -> Iterator[None]:
    """Turn what Zarr raises for bytes that are not what was written into Damage.

    A disk that cannot be read just now is not damage: other OSErrors pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise Damage(f"{what()} ({one_line(error)})") from error
