"""Scores on disk: `scores.zarr`, one (n_samples,) float32 array per measure, NaN where undefined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distal.arrays import Array, create_array, create_group, get_attributes, set_attributes
from distal.errors import Damage
from distal.records import Block


@dataclass(frozen=True)
class Scores:
    """A handle on the scores of one cycle."""

    path: Path
    _arrays: Mapping[str, Array]

    @classmethod
    def create(cls, path: Path, measures: Sequence[str], n_samples: int, block_size: int) -> Self:
        """Lay out empty arrays, replacing older ones."""
        create_group(path)
        for name in measures:
            create_array(path / name, (n_samples,), (block_size,), "float32", float("nan"), ("sample",))
        set_attributes(path, {"measures": list(measures)})
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading and writing; raises Damage when there are no scores or their metadata is not valid."""
        attributes = get_attributes(path)
        if "measures" not in attributes:
            raise Damage(f"{path}: no scores here")
        return cls(path, {name: Array(path / name) for name in attributes["measures"]})

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._arrays)

    def write(self, block: Block, scores: Mapping[str, NDArray[np.floating[Any]]]) -> None:
        """Store the scores of one block, or of several that follow each other, under every measure."""
        for name, values in scores.items():
            self._arrays[name].write((slice(block.start, block.stop),), values.astype(np.float32))

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Scores of the samples [start, stop): (stop - start,) float32.

        Raises:
            KeyError: no such measure.
            Damage: a chunk is missing or does not decode.
        """
        return self._arrays[name].read((slice(start, stop),))
