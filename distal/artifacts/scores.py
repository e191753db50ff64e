"""Scores on disk: `scores.zarr`, one (n_samples,) float32 array per measure, NaN where undefined.

Beside them there can be annotations, (n_samples,) int32 classes, -1 where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from distal.artifacts.arrays import Array, create_array, create_group, get_attributes, set_attributes
from distal.errors import Damage
from distal.records import Block, split_blocks


@dataclass(frozen=True)
class Scores:
    """A handle on the scores of one cycle."""

    path: Path
    measures: tuple[str, ...]
    annotations: tuple[str, ...]
    _arrays: Mapping[str, Array]

    @classmethod
    def create(
        cls, path: Path, measures: Sequence[str], n_samples: int, block_size: int, annotations: Sequence[str] = ()
    ) -> Self:
        """Lay out empty arrays, replacing older ones."""
        create_group(path)
        for name in measures:
            create_array(path / name, (n_samples,), (block_size,), "float32", float("nan"), ("sample",))
        for name in annotations:
            create_array(path / name, (n_samples,), (block_size,), "int32", -1, ("sample",))
        set_attributes(path, {"measures": list(measures), "annotations": list(annotations)})
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading and writing; raises Damage when there are no scores or their metadata is not valid."""
        attributes = get_attributes(path)
        if "measures" not in attributes:
            raise Damage(f"{path}: no scores here")
        measures, annotations = tuple(attributes["measures"]), tuple(attributes["annotations"])
        return cls(path, measures, annotations, {name: Array(path / name) for name in (*measures, *annotations)})

    @property
    def n_samples(self) -> int:
        """Samples of the pool, with a score or without."""
        return next(iter(self._arrays.values())).shape[0]

    def write(self, block: Block, scores: Mapping[str, NDArray[Any]]) -> None:
        """Store what a block, or several that follow each other, have under each name."""
        for name, values in scores.items():
            array = self._arrays[name]
            array.write((slice(block.start, block.stop),), values.astype(array.dtype))

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Scores of the samples [start, stop): (stop - start,) float32; of an annotation, int32.

        Raises:
            KeyError: no such measure or annotation.
            Damage: a chunk is missing or does not decode.
        """
        return self._arrays[name].read((slice(start, stop),))

    def damaged(self) -> Iterator[Damage]:
        """What is wrong with each block that is missing or does not decode."""
        for name, array in self._arrays.items():
            for block in split_blocks(self.n_samples, array.chunks[0]):
                try:
                    self.read(name, block.start, block.stop)
                except Damage as damage:
                    yield damage

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path; a handle is opened where it is used."""
        return (type(self).open, (self.path,))
