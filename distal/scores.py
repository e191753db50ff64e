"""Scores on disk: `scores.zarr`, one (n_samples,) float32 array per measure, NaN where undefined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from distal.errors import Damage
from distal.records import Block
from distal.storage import disk_errors


@dataclass(frozen=True)
class Scores:
    """A handle on the scores of one cycle.

    Attributes:
        measures: names of the arrays.
    """

    path: Path
    measures: tuple[str, ...]
    _arrays: dict[str, zarr.Array[Any]]

    @classmethod
    def create(cls, path: Path, measures: Sequence[str], n_samples: int, block_size: int) -> Self:
        """Lay out empty arrays, replacing older ones."""
        with disk_errors(path):
            group = zarr.create_group(path, overwrite=True)
            for name in measures:
                group.create_array(
                    name,
                    shape=(n_samples,),
                    chunks=(block_size,),
                    dtype="float32",
                    fill_value=float("nan"),
                    compressors=[ZstdCodec(level=0), Crc32cCodec()],
                    dimension_names=("sample",),
                )
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading and writing; raises FileNotFoundError when there are no scores."""
        group = zarr.open_group(path, mode="r+")
        # Every chunk exists, also one without a single defined score: a missing chunk is a lost one.
        arrays: dict[str, Any] = {
            name: array.with_config({"write_empty_chunks": True}) for name, array in group.arrays()
        }
        return cls(path, tuple(sorted(arrays)), arrays)

    def write(self, block: Block, scores: dict[str, NDArray[np.floating[Any]]]) -> None:
        """Store the scores of one block under every measure."""
        with disk_errors(self.path):
            for name, values in scores.items():
                self._arrays[name][block.start : block.stop] = values.astype(np.float32)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Scores of the samples [start, stop): (stop - start,) float32.

        Raises:
            KeyError: no such measure.
            Damage: a chunk does not decode.
        """
        array = self._arrays[name]
        try:
            return np.asarray(array[start:stop], dtype=np.float32)
        except Exception as error:
            raise Damage(f"{self.path}: array {name}, samples [{start}, {stop}): {error}") from error
