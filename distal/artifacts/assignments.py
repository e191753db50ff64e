"""The central array: the class predicted for every sample at every checkpoint.

::

    assignments.zarr/
      assignments   (T, n_samples) uint8 | uint16 | uint32, chunks (1, block_size)
      eligible      (n_samples,) bool, chunks (block_size,): which samples are scored in this cycle
      margin, ...   (T, n_samples) float16, chunks (1, block_size): recorded beside the assignments
      probabilities (T, n_samples, C) float32, chunks (1, block_size, C): recorded likewise
    assignments.zarr.json   layout and classes; sealed
    assignments.zarr.begun/ fingerprint.json, and <row>.json: the machine, and the weights of each row
    assignments.zarr.elimination/  <row>.json: the decision before a row, see `score.eliminate`

Rows are the scored checkpoints in order: row t is the checkpoint with `checkpoint_index` t + `first_index` of the
scoring job, which is 0 when all are scored; with the last one alone (a measure such as `margin`, or a test set) it is
row 0. Column i is the sample with `sample_index` i. The fill value of `assignments` is the largest value of its dtype
and is no class: UNASSIGNED. A block's recorded chunks are written first and its `assignments` chunk last, so the
existence of that chunk is the commit: the array is its own journal. Chunks are only ever written whole, and two actors
that score the same block write the same bytes, so no lock is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.arrays import METADATA, Array, create_array, create_group
from distal.errors import ConfigError, Damage
from distal.records import Block, split_blocks
from distal.storage import Numbered, create_folder, create_json, link, read_json, temporary_folder, write_bytes

_ARRAY, ELIGIBLE = "assignments", "eligible"
PROBABILITIES = "probabilities"
_FINGERPRINT = "fingerprint.json"
_READERS = 8  # threads that check chunks

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
        n_classes: classes are 0 .. n_classes - 1.
        recorded: names of the arrays that have a row per checkpoint beside the assignments.
        attributes: the layout, as recorded beside it.
    """

    path: Path
    n_classes: int
    recorded: tuple[str, ...]
    attributes: Mapping[str, Any]
    _arrays: Mapping[str, Array]

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
    ) -> Self:
        """Lay out the arrays, without any assignment; arrays that another driver has laid out meanwhile stay.

        The record comes first and decides: an earlier driver, or a faster one, may have recorded other numbers.

        Args:
            n_rows: T, the number of checkpoints that the cycle will have.
            eligible: for each block in order, which of its samples are to be scored: (len(block),) bool.
        """
        layout = {"n_rows": n_rows, "n_samples": n_samples, "block_size": block_size}
        create_json(record_path(path), {**layout, "n_classes": n_classes, "recorded": list(recorded)})
        kept = read_json(record_path(path), required=_LAYOUT)
        with temporary_folder(path) as beside:  # so that they appear whole, and replace no others
            flags = _lay_out(beside, *(kept[key] for key in _LAYOUT))[ELIGIBLE]
            for block, flag in zip(split_blocks(n_samples, block_size), eligible, strict=True):
                flags.write((slice(block.start, block.stop),), flag)
            create_folder(beside, path)
        return cls.open(path)

    @classmethod
    def begun(cls, path: Path) -> bool:
        """Whether the arrays are laid out; False also if that was interrupted: then nothing can have been scored."""
        return record_path(path).exists() and path.exists()

    @classmethod
    def take_up(
        cls,
        path: Path,
        *,
        n_rows: int,
        n_samples: int,
        block_size: int,
        n_classes: int,
        eligible: Callable[[int, int], NDArray[np.bool_]],
        recorded: Sequence[str] = (),
        on_damage: Callable[[str], None],
    ) -> Self:
        """Lay out the arrays, or resume those of an earlier driver, without their damaged chunks.

        Args:
            eligible: for [start, stop), which samples are to be scored.
            on_damage: called with the damage of each deleted chunk.
        """
        if not cls.begun(path):
            flags = (eligible(block.start, block.stop) for block in split_blocks(n_samples, block_size))
            return cls.create(
                path,
                n_rows=n_rows,
                n_samples=n_samples,
                block_size=block_size,
                n_classes=n_classes,
                eligible=flags,
                recorded=recorded,
            )
        assignments = cls.open(path)
        for block, damage in list(assignments.damaged_eligible()):
            on_damage(str(damage))
            assignments._arrays[ELIGIBLE].write((slice(block.start, block.stop),), eligible(block.start, block.stop))
        with ThreadPoolExecutor(_READERS) as threads:  # on a network file system most of reading is waiting
            found = threads.map(assignments.remove_damaged, range(assignments.n_rows))
            for damage_text in itertools.chain.from_iterable(found):
                on_damage(damage_text)
        return assignments

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading and for writing blocks.

        Raises:
            Damage: there are no assignments, or their metadata is not valid.
        """
        try:
            attributes = read_json(record_path(path), required=_LAYOUT)
        except FileNotFoundError:
            raise Damage(f"{path}: no assignments here") from None
        arrays = {}
        for name, layout in _layouts(*(attributes[key] for key in _LAYOUT)).items():
            arrays[name] = array = Array(path / name)
            fill_value = None if np.isnan(array.fill_value) else array.fill_value
            if (array.shape, array.chunks, array.dtype, fill_value) != layout[:4]:
                raise Damage(f"{path / name}: its metadata has changed (shape, chunks, dtype or fill value)")
        return cls(path, attributes["n_classes"], tuple(attributes["recorded"]), attributes, arrays)

    @property
    def n_rows(self) -> int:
        """T, the number of checkpoints."""
        return self._arrays[_ARRAY].shape[0]

    @property
    def n_samples(self) -> int:
        """Columns: the samples of the pool, eligible or not."""
        return self._arrays[_ARRAY].shape[1]

    @property
    def block_size(self) -> int:
        """Columns of a chunk."""
        return self._arrays[_ARRAY].chunks[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the assignments."""
        return self._arrays[_ARRAY].dtype

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
            recorded: arrays of the same length to store, (len(block),); of probabilities (len(block), C).

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
        where = (row, slice(block.start, block.stop))
        for name, values in (recorded or {}).items():
            self._arrays[name].write(where, values.astype(self._arrays[name].dtype, copy=False))
        self._arrays[_ARRAY].write(where, labels)

    def blank(self, name: str, block: Block) -> NDArray[np.floating[Any]]:
        """The values of a recorded array for a block without scored samples: NaN, in its shape and dtype."""
        array = self._arrays[name]
        return np.full((len(block), *array.shape[2:]), np.nan, array.dtype)

    def has(self, row: int, block: Block, *, recorded: bool = False) -> bool:
        """Whether this block of this row is committed; `recorded`: and has its recorded values."""
        names = (_ARRAY, *(self.recorded if recorded else ()))
        return all(self.chunk(name, row, block).exists() for name in names)

    def committed(self, row: int, *, recorded: bool = False) -> set[int]:
        """Indices of the blocks of `row` that are committed; `recorded`: and have their recorded values."""
        names = (_ARRAY, *(self.recorded if recorded else ()))
        return set.intersection(*(self._arrays[name].stored(row) for name in names))

    def read(self, start: int, stop: int, rows: Sequence[int] | None = None, *, complete: bool = False) -> LabelArray:
        """Columns [start, stop) of some rows, by default all: (n_rows, stop - start); UNASSIGNED where not scored.

        Args:
            complete: whether a block that is not committed is an error.

        Raises:
            Damage: a chunk does not decode, or is missing; the message names array, row and block.
        """
        array, columns = self._arrays[_ARRAY], slice(start, stop)
        if rows is None:
            return array.read((slice(None), columns), complete=complete)
        return np.concatenate([array.read((slice(row, row + 1), columns), complete=complete) for row in rows])

    def read_recorded(self, name: str, row: int, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Columns [start, stop) of one row of a recorded array, NaN where not eligible.

        Returns:
            (stop - start,) float16; of probabilities, (stop - start, C) float32.

        Raises:
            Damage: a chunk is missing or does not decode; the message names array, row and block.
        """
        return self._arrays[name].read((slice(row, row + 1), slice(start, stop)))[0]

    def eligible(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the samples [start, stop) are scored in this cycle. Raises like `read_recorded`."""
        return self._arrays[ELIGIBLE].read((slice(start, stop),))

    def adopt_fingerprint(self, fingerprint: dict[str, str]) -> dict[str, str]:
        """Record the first fingerprint offered; returns the recorded one. For the driver alone."""
        kept = self.fingerprint
        if kept is None:
            create_json(begun_path(self.path) / _FINGERPRINT, fingerprint)
            kept = read_json(begun_path(self.path) / _FINGERPRINT)
        return kept

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """The fingerprint shared by all machines that score; None before the first one joined."""
        with suppress(FileNotFoundError):
            return read_json(begun_path(self.path) / _FINGERPRINT)
        return None

    @property
    def weights(self) -> dict[int, str]:
        """The sha256 of the weights of each row that has begun."""
        rows = _rows(self.path)
        return {row: read_json(rows.path(row), required=("weights",))["weights"] for row in rows.numbers()}

    def adopt_weights(self, row: int, sha256: str) -> None:
        """Record the weights of a row. For the driver alone, before it hands the row out.

        Raises:
            Damage: the row was begun with other weights.
        """
        path = _rows(self.path).path(row)
        if create_json(path, {"weights": sha256}):
            return
        kept = read_json(path, required=("weights",))["weights"]
        if kept != sha256:
            raise Damage(
                f"{self.path}: row {row} was begun with weights {kept[:12]}, and row {row} now has "
                f"{sha256[:12]}; put the old checkpoint back, or remove {self.path}* to score all rows again"
            )

    def take_over(self, other: Assignments, row: int) -> None:
        """Commit the blocks that other assignments have of a row with the same weights. For the driver alone, before
        it hands the row out. Blocks scored by another kind of machine are not taken.

        A chunk never changes, so a link is a copy. As always, the chunk of the assignments comes last.
        """
        fingerprint = other.fingerprint
        if fingerprint is None or self.adopt_fingerprint(fingerprint) != fingerprint:
            return
        for block in self.blocks:
            for name in (*self.recorded, _ARRAY):
                link(other.chunk(name, row, block), self.chunk(name, row, block))

    def damaged(self, row: int) -> Iterator[tuple[str, Block, Damage]]:
        """Every stored chunk of `row` that does not decode: array, block and damage."""
        for name in (*self.recorded, _ARRAY):
            array = self._arrays[name]
            stored = array.stored(row)
            for block in self.blocks if stored else ():
                if block.index not in stored:
                    continue
                try:
                    array.read((slice(row, row + 1), slice(block.start, block.stop)))
                except Damage as damage:
                    yield name, block, damage

    def damaged_eligible(self) -> Iterator[tuple[Block, Damage]]:
        """Every block whose `eligible` flags are missing or do not decode."""
        for block in self.blocks:
            try:
                self.eligible(block.start, block.stop)
            except Damage as damage:
                yield block, damage

    def remove_damaged(self, row: int) -> list[str]:
        """Delete every chunk of `row` that does not decode, so that its block is scored again.

        Returns:
            The damage of each.
        """
        found = []
        for name, block, damage in self.damaged(row):
            found.append(str(damage))
            self.chunk(name, row, block).unlink(missing_ok=True)
        return found

    def chunk(self, name: str, row: int | None, block: Block) -> Path:
        """The file of one chunk of an array; `row` is None where the array has no rows."""
        array = self._arrays[name]
        where = (*(() if row is None else (row,)), block.index)
        return array.chunk_path(*where, *[0] * (len(array.shape) - len(where)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path; a handle is opened where it is used."""
        return (type(self).open, (self.path,))


def restore_metadata(path: Path) -> None:
    """Write the metadata of the arrays again, from the record; no chunk is touched."""
    record = read_json(record_path(path))
    layout = [record[name] for name in _LAYOUT]
    with temporary_folder(path) as beside:
        for name in ("", *_lay_out(beside, *layout)):
            write_bytes(path / name / METADATA, (beside / name / METADATA).read_bytes())


def record_path(path: Path) -> Path:
    """The sealed record beside the arrays, because Zarr's own metadata has no checksum."""
    return path.with_name(f"{path.name}.json")


def begun_path(path: Path) -> Path:
    """The folder beside the arrays with the fingerprint and the weights of rows, each file created exclusively."""
    return path.with_name(f"{path.name}.begun")


def _rows(path: Path) -> Numbered:
    return Numbered(begun_path(path), digits=5, suffix=".json")


_LAYOUT = ("n_rows", "n_samples", "block_size", "n_classes", "recorded")


def _layouts(
    n_rows: int, n_samples: int, block_size: int, n_classes: int, recorded: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype[Any], object, tuple[str, ...]]]:
    """Shape, chunks, dtype, fill value (None: NaN) and names of the axes of every array."""
    dtype = dtype_for(n_classes)
    shape, chunks, names = (n_rows, n_samples), (1, block_size), ("checkpoint", "sample")
    special = {
        PROBABILITIES: ((*shape, n_classes), (*chunks, n_classes), np.dtype(np.float32), None, (*names, "class"))
    }
    usual = (shape, chunks, np.dtype(np.float16), None, names)
    return {
        _ARRAY: (shape, chunks, dtype, unassigned(dtype), names),
        ELIGIBLE: (shape[1:], chunks[1:], np.dtype(bool), False, names[1:]),
        **{name: special.get(name, usual) for name in recorded},
    }


def _lay_out(
    path: Path, n_rows: int, n_samples: int, block_size: int, n_classes: int, recorded: Sequence[str]
) -> dict[str, Array]:
    """Create empty arrays; existing ones are replaced."""
    create_group(path, {"n_classes": n_classes})
    layouts = _layouts(n_rows, n_samples, block_size, n_classes, recorded)
    return {
        name: create_array(path / name, shape, chunks, dtype, float("nan") if fill is None else fill, names)
        for name, (shape, chunks, dtype, fill, names) in layouts.items()
    }
