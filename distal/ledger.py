"""What is labelled: a view on immutable files, never a file of its own.

The ledger of a cycle is the union of `initial.parquet` and the `labels*.parquet` of all earlier cycles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distal.errors import Damage
from distal.storage import names_in, read_table, write_table

SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Ledger:
    """The labelled samples, in the order of `sample_index`.

    Attributes:
        indices: (n_labeled,) int64, ascending, unique.
        labels: (n_labeled,) int64, class of each.
    """

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def read(cls, files: Iterable[Path]) -> Self:
        """The union of label files.

        Raises:
            Damage: a file is missing, or two answer for the same sample.
        """
        tables = [read_table(file, ["sample_index", "sample_id", "label"]) for file in files]
        table = pa.concat_tables(tables).sort_by("sample_index")
        indices = table["sample_index"].to_numpy()
        twice = np.flatnonzero(np.diff(indices) == 0)
        if len(twice):
            raise Damage(f"sample {table['sample_id'][int(twice[0])].as_py()} is labelled in more than one file")
        return cls(indices, table["label"].to_numpy().astype(np.int64))

    @property
    def sha256(self) -> str:
        """Of all indices and labels (hex)."""
        return hashlib.sha256(np.stack([self.indices, self.labels]).astype("<i8").tobytes()).hexdigest()

    def labeled(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the samples [start, stop) are labelled: (stop - start,) bool."""
        low, high = np.searchsorted(self.indices, [start, stop])
        flags = np.zeros(stop - start, dtype=bool)
        flags[self.indices[low:high] - start] = True
        return flags


def write_labels(
    path: Path, indices: NDArray[np.int64], sample_ids: list[str], labels: NDArray[np.integer], annotator: str
) -> None:
    """Write an immutable file of labels."""
    n = len(indices)
    columns = [indices, sample_ids, np.asarray(labels, dtype=np.int32), [annotator] * n]
    write_table(path, pa.table(columns, schema=SCHEMA))


def label_files(folder: Path) -> list[Path]:
    """The `labels*.parquet` files in the folder of a cycle, in order."""
    return [folder / name for name in names_in(folder) if name.startswith("labels") and name.endswith(".parquet")]
