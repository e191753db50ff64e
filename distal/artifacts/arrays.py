"""How distal keeps arrays in Zarr: a checksum on every chunk, every chunk written, and no lost chunk read as data.

Three habits of Zarr would pass damage off as numbers, and are turned off here: without a checksum most flipped bits
decode; a chunk that equals the fill value is deleted; a chunk that is not there reads as the fill value.

What is written is plain Zarr. Chunks are read here and not through `zarr.Array`, which spends 0.2 to 0.4 ms on each
before it decodes anything: seven times as long as decoding 65,536 labels takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from distal.errors import Damage, one_line
from distal.records import JsonObject
from distal.storage import FORMAT, disk_errors, flush, is_durable, names_in, read_bytes, require_format

METADATA = "zarr.json"
_MAX_METADATA_BYTES = 2**20


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
        flush(path / METADATA, path.parent)
    return Array(path)


def create_group(path: Path, attributes: JsonObject | None = None) -> None:
    """Make an empty group; an older one is replaced."""
    with disk_errors(path):
        zarr.create_group(path, overwrite=True, attributes={"format": FORMAT, **(attributes or {})})
        flush(path / METADATA, path.parent)


def set_attributes(path: Path, attributes: JsonObject) -> None:
    """Set attributes of a group; the others stay. Only the driver does that: the last writer wins."""
    with disk_errors(path):
        zarr.open_group(path, mode="r+").attrs.update(attributes)
        flush(path / METADATA, path)


def get_attributes(path: Path) -> JsonObject:
    """The attributes of a group; empty when there is no group.

    Raises:
        Damage: the metadata is not valid.
        UnknownFormat: it was written by a version with another format.
    """
    with _decoding(lambda: f"{path}: cannot be opened"):
        try:
            _check_metadata(path)
            attributes = zarr.open_group(path, mode="r", zarr_format=3).attrs.asdict()
        except FileNotFoundError:
            return {}
    require_format(path, attributes.pop("format", None))
    return attributes


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
            _check_metadata(path)
            array = zarr.open_array(path, mode="r+", zarr_format=3)
            self._array: zarr.Array[Any] = array.with_config({"write_empty_chunks": True})
            codecs = [type(codec) for codec in self._array.compressors]
        if codecs != [ZstdCodec, Crc32cCodec]:
            raise Damage(f"{path}: not laid out by distal (its chunks are not zstd with CRC-32C)")
        self.shape: tuple[int, ...] = self._array.shape
        self.chunks: tuple[int, ...] = self._array.chunks
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        self.fill_value: Any = self._array.fill_value
        self._chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        self._max_bytes = self._chunk_bytes + self._chunk_bytes // 128 + 1024  # of bytes that do not compress, and CRC
        self._axes: tuple[str, ...] = getattr(self._array.metadata, "dimension_names", None) or ()

    def write(self, where: tuple[int | slice, ...], values: NDArray[Any]) -> None:
        """Write a region made of whole chunks; each appears at once or not at all. Raises DiskFull."""
        with disk_errors(self.path):
            self._array[where] = values
            for index in self._touched(self._spans(where)) if is_durable() else ():
                flush(self.chunk_path(*index), self.path)

    def read(self, where: tuple[slice, ...], *, complete: bool = True) -> NDArray[Any]:
        """Read a region; trailing axes may be left out.

        Args:
            complete: whether all of its chunks must be there; else a missing one reads as the fill value.

        Raises:
            Damage: naming the first chunk that is missing or does not decode.
        """
        spans = self._spans(where)
        region = np.empty([max(0, stop - start) for start, stop in spans], self.dtype)
        if not region.size:
            return region
        for index in self._touched(spans):
            begins = [i * n for i, n in zip(index, self.chunks, strict=True)]
            shared = [
                (max(start, begin), min(stop, begin + n))
                for (start, stop), begin, n in zip(spans, begins, self.chunks, strict=True)
            ]
            target = tuple(
                slice(low - start, high - start) for (low, high), (start, _) in zip(shared, spans, strict=True)
            )
            try:
                chunk = self._decode(index)
            except FileNotFoundError:
                if complete:
                    raise Damage(f"{self.path}: {self._name(index)} is missing") from None
                region[target] = self.fill_value
            else:
                region[target] = chunk[
                    tuple(slice(low - b, high - b) for (low, high), b in zip(shared, begins, strict=True))
                ]
        return region

    def _spans(self, where: tuple[int | slice, ...]) -> list[tuple[int, int]]:
        """[start, stop) of a region along each axis."""
        spans = []
        for axis, n in enumerate(self.shape):
            part = where[axis] if axis < len(where) else slice(None)
            start, stop, _ = (part if isinstance(part, slice) else slice(part, part + 1)).indices(n)
            spans.append((start, stop))
        return spans

    def _touched(self, spans: list[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
        """Indices of the chunks that hold a part of a region."""
        return itertools.product(
            *(range(start // n, -(-stop // n)) for (start, stop), n in zip(spans, self.chunks, strict=True))
        )

    def _decode(self, index: tuple[int, ...]) -> NDArray[Any]:
        """One whole chunk. At the end of an axis it reaches beyond the array, as Zarr stores it."""
        data = memoryview(read_bytes(self.chunk_path(*index), self._max_bytes))
        if len(data) < 4 or google_crc32c.value(bytes(data[:-4])) != int.from_bytes(data[-4:], "little"):
            raise Damage(f"{self.path}: {self._name(index)} does not decode (its bytes have changed)")
        with _decoding(lambda: f"{self.path}: {self._name(index)} does not decode"):
            if content_size(data) != self._chunk_bytes:  # before any memory is taken: 28 KB can decode to a gigabyte
                raise ValueError(f"it does not hold the {self._chunk_bytes:,} bytes of a chunk")
            return np.frombuffer(zstd.decompress(data[:-4]), self.dtype.newbyteorder("<")).reshape(self.chunks)

    def stored(self, row: int) -> set[int]:
        """Second indices of the chunks of a row that are there; further axes are not cut."""
        indices = {int(name) for name in names_in(self.chunk_path(row)) if name.isdigit()}
        further = (0,) * (len(self.shape) - 2)  # then a name is that of a folder, which outlives its chunk
        return {i for i in indices if self.chunk_path(row, i, *further).exists()} if further else indices

    def chunk_path(self, *index: int) -> Path:
        """The file of one chunk."""
        return self.path.joinpath("c", *map(str, index))

    def _name(self, index: tuple[int, ...]) -> str:
        """A chunk in words. Arrays are cut along checkpoints and samples, and no other axis."""
        words = {"checkpoint": "row", "sample": "block"}
        return ", ".join(f"{words[axis]} {i}" for axis, i in zip(self._axes, index, strict=True) if axis in words)


def content_size(frame: bytes | memoryview) -> int | None:
    """Bytes that a zstd frame says it decodes to (RFC 8878, section 3.1.1.1); None when it says nothing.

    The decoder holds it to that: a frame that goes on beyond it is an error.
    """
    if len(frame) < 5 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    n_bytes = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(frame[start : start + n_bytes], "little") + 256 * (n_bytes == 2) if n_bytes else None


def _check_metadata(path: Path) -> None:
    """Raise Damage or FileNotFoundError before Zarr opens what is no file, or looks for an older format of its own."""
    read_bytes(path / METADATA, _MAX_METADATA_BYTES)


@contextmanager
def _decoding(what: Callable[[], str]) -> Iterator[None]:
    """Turn what Zarr raises for bytes that are not what was written into Damage.

    A disk that cannot be read just now is not damage, nor is too little memory: other OSErrors and MemoryError pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | MemoryError) and not isinstance(error, FileNotFoundError):
            raise
        raise Damage(f"{what()} ({one_line(error)})") from error
