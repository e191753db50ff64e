"""The array that distal exists for: the class predicted for every sample at every checkpoint.

::

    assignments.zarr/
      assignments   (T, n_samples) uint8 | uint16 | uint32, chunks (1, block_size)
      eligible      (n_samples,) bool, chunks (block_size,): which samples are scored in this cycle
      margin, ...   (T, n_samples) float16, chunks (1, block_size): recorded beside the assignments

Row t is the checkpoint with `checkpoint_index` t; column i is the sample with `sample_index` i. The fill
value of `assignments` is the largest value of its dtype and is no class: UNASSIGNED. A block's recorded
chunks are written first and its `assignments` chunk last, so the existence of that chunk is the commit: the
array is its own journal. Chunks are only ever written whole, by one actor at a time, so no lock is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from distal.errors import ConfigError, Damage
from distal.records import Block, JsonObject, split_blocks
from distal.storage import disk_errors, names_in

ARRAY, ELIGIBLE = "assignments", "eligible"

LabelArray = NDArray[np.unsignedinteger[Any]]


def dtype_for(n_classes: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds every class and one value more, for UNASSIGNED.

    Raises:
        ConfigError: more classes than uint32 holds.
    """
    for dtype in (np.uint8, np.uint16, np.uint32):
        if n_classes <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ConfigError(f"{n_classes} classes; at most {np.iinfo(np.uint32).max} can be told apart in uint32")


def unassigned(dtype: np.dtype[Any]) -> int:
    """UNASSIGNED: the largest value of `dtype`, which no class has."""
    return int(np.iinfo(dtype).max)


@dataclass(frozen=True)
class Assignments:
    """A handle on one cycle's assignments.

    Attributes:
        path: the `assignments.zarr` folder.
        n_rows: T, the number of checkpoints that the cycle will have.
        n_samples, block_size: columns, and columns per chunk.
        n_classes: classes are 0 .. n_classes - 1.
        recorded: names of the float16 arrays.
        attributes: what was kept with the group, such as the fingerprint of the machine that scores it.
    """

    path: Path
    n_rows: int
    n_samples: int
    block_size: int
    n_classes: int
    recorded: tuple[str, ...]
    attributes: JsonObject
    _arrays: Mapping[str, zarr.Array[Any]]

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        n_rows: int,
        n_samples: int,
        block_size: int,
        n_classes: int,
        eligible: Iterable[NDArray[np.bool_]],
        recorded: Sequence[str] = (),
        attributes: JsonObject | None = None,
    ) -> Self:
        """Lay out the arrays; no assignment exists yet.

        Args:
            eligible: for each block in order, which of its samples are to be scored: (len(block),) bool.
            attributes: kept with the group.
        """
        dtype = dtype_for(n_classes)
        shape, chunks = (n_rows, n_samples), (1, block_size)
        with disk_errors(path):
            group = zarr.create_group(path, overwrite=True)
            for name in recorded:
                _create(group, name, shape, chunks, np.dtype(np.float16), float("nan"), ("checkpoint", "sample"))
            flags = _create(group, ELIGIBLE, (n_samples,), (block_size,), np.dtype(bool), False, ("sample",))
            for block, flag in zip(split_blocks(n_samples, block_size), eligible, strict=True):
                flags[block.start : block.stop] = flag
            _create(group, ARRAY, shape, chunks, dtype, unassigned(dtype), ("checkpoint", "sample"))
            # Written last: a group without them was cut off while it was laid out.
            group.attrs.update({**(attributes or {}), "n_classes": n_classes, "recorded": list(recorded)})
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading and for writing blocks.

        Raises:
            FileNotFoundError: there are no assignments, or laying them out was cut off.
        """
        try:
            group = zarr.open_group(path, mode="r+")
            attributes: JsonObject = group.attrs.asdict()
            recorded = tuple(attributes["recorded"])
            arrays = {name: _writable(group[name]) for name in (ARRAY, ELIGIBLE, *recorded)}
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(f"{path}: no assignments") from error
        return cls(
            path=path,
            n_rows=arrays[ARRAY].shape[0],
            n_samples=arrays[ARRAY].shape[1],
            block_size=arrays[ARRAY].chunks[1],
            n_classes=attributes["n_classes"],
            recorded=recorded,
            attributes=attributes,
            _arrays=arrays,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the assignments."""
        return np.dtype(self._arrays[ARRAY].dtype)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the pool, in order."""
        return split_blocks(self.n_samples, self.block_size)

    def write(
        self,
        row: int,
        block: Block,
        labels: LabelArray,
        recorded: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    ) -> None:
        """Commit one block of one row. Writing it again with the same values changes no byte.

        Args:
            labels: (len(block),) in the dtype of the assignments; UNASSIGNED where not eligible.
            recorded: arrays of the same length to store as float16.

        Raises:
            ValueError: `labels` has another length or dtype, or a value that is no class.
            DiskFull: no space left; the block stays uncommitted.
        """
        if labels.shape != (len(block),) or labels.dtype != self.dtype:
            raise ValueError(
                f"labels must be ({len(block)},) {self.dtype} for block {block.index}, "
                f"got {labels.shape} {labels.dtype}"
            )
        if np.any((labels >= self.n_classes) & (labels != unassigned(self.dtype))):
            raise ValueError(f"labels must be below {self.n_classes} or UNASSIGNED, got {labels.max()}")
        with disk_errors(self.path):
            for name, values in (recorded or {}).items():
                self._arrays[name][row, block.start : block.stop] = values.astype(np.float16)
            self._arrays[ARRAY][row, block.start : block.stop] = labels

    def has(self, row: int, block: Block) -> bool:
        """Whether this block of this row is committed."""
        return self._chunk(ARRAY, row, block).exists()

    def committed(self, row: int) -> set[int]:
        """Indices of the blocks of `row` that are committed."""
        return {int(name) for name in names_in(self.path / ARRAY / "c" / str(row)) if name.isdigit()}

    def read(self, start: int, stop: int, rows: slice = slice(None)) -> LabelArray:
        """Columns [start, stop) of the given rows: (n_rows, stop - start); UNASSIGNED where not scored.

        Raises:
            Damage: a chunk does not decode; the message names array, row and block.
        """
        return self._read(ARRAY, start, stop, rows)

    def read_recorded(self, name: str, row: int, start: int, stop: int) -> NDArray[np.float16]:
        """Columns [start, stop) of one row of a recorded array; NaN where not recorded. Raises like `read`."""
        return self._read(name, start, stop, slice(row, row + 1))[0]

    def eligible(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the samples [start, stop) are scored in this cycle. Raises like `read`."""
        try:
            return np.asarray(self._arrays[ELIGIBLE][start:stop], dtype=bool)
        except Exception as error:
            raise Damage(f"{self.path}: {ELIGIBLE}, samples [{start}, {stop}): {error}") from error

    def adopt_fingerprint(self, fingerprint: dict[str, str]) -> dict[str, str]:
        """Keep the first fingerprint that is offered; returns the one that is kept. For the driver alone."""
        if "fingerprint" not in self.attributes:
            zarr.open_group(self.path, mode="r+").attrs["fingerprint"] = fingerprint
            self.attributes["fingerprint"] = fingerprint
        kept: dict[str, str] = self.attributes["fingerprint"]
        return kept

    def remove_damaged(self, row: int) -> list[str]:
        """Delete every committed block of `row` that does not decode, so that it is scored again.

        Returns:
            The names of the chunks that were bad.
        """
        bad = []
        for block in self.blocks:
            if not self.has(row, block):
                continue
            for name in (*self.recorded, ARRAY):
                if self._chunk(name, row, block).exists():
                    try:
                        self._read(name, block.start, block.stop, slice(row, row + 1))
                    except Damage as damage:
                        bad.append(str(damage))
                        # The commit goes first: a block without its recorded values is not committed.
                        for other in (ARRAY, *self.recorded):
                            self._chunk(other, row, block).unlink(missing_ok=True)
                        break
        return bad

    def _chunk(self, name: str, row: int, block: Block) -> Path:
        return self.path / name / "c" / str(row) / str(block.index)

    def _read(self, name: str, start: int, stop: int, rows: slice) -> NDArray[Any]:
        array = self._arrays[name]
        try:
            return np.asarray(array[rows, start:stop])
        except Exception as error:
            raise Damage(self._locate(name, start, stop, rows, error)) from error

    def _locate(self, name: str, start: int, stop: int, rows: slice, error: Exception) -> str:
        """Find the chunk that does not decode."""
        array = self._arrays[name]
        for row in range(*rows.indices(self.n_rows)):
            for block in self.blocks[start // self.block_size : -(-stop // self.block_size)]:
                try:
                    array[row, block.start : block.stop]
                except Exception as reason:
                    return f"{self.path}: array {name}, row {row}, block {block.index}: {reason}"
        return f"{self.path}: array {name}: {error}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path; a handle is opened where it is used."""
        return (type(self).open, (self.path,))


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    fill_value: object,
    dimension_names: Sequence[str],
) -> zarr.Array[Any]:
    """Create one array with a checksum on every chunk: without it most flipped bits decode silently."""
    created = group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill_value,
        compressors=[ZstdCodec(level=0), Crc32cCodec()],
        dimension_names=dimension_names,
    )
    return _writable(created)


def _writable(array: Any) -> zarr.Array[Any]:
    """The one way to a handle that writes: a chunk equal to the fill value must exist too.

    By default Zarr deletes such a chunk, and a block without an eligible sample is one. The setting is not
    persisted, so every handle sets it anew.
    """
    return array.with_config({"write_empty_chunks": True})
