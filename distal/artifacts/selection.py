"""`selection.parquet`: the samples that a cycle asks labels for, in rank order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distal.storage import read_table, write_table


def short_of(budget: int, n_selected: int, max_per_group: int | None) -> str:
    """What to say of a batch that the cap on groups has made smaller than was asked for."""
    return (
        f"{n_selected} selected of a budget of {budget}: select.max_per_group: {max_per_group} leaves no more; raise it"
    )


@dataclass(frozen=True)
class Selection:
    """The chosen samples.

    Attributes:
        table: rank, sample_index, sample_id, uri, one column per score, measure, and decided_by: what put the sample
            into the batch, the score alone ("score"), a tie-break ("margin", "hash"), distances ("k_center"), a file
            ("file") or the user's own strategy ("strategy").
    """

    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def write(cls, path: Path, table: pa.Table) -> Self:
        """Write the file and return what it holds."""
        write_table(path, table)
        return cls(table)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a selection; raises Damage when there is none."""
        return cls(read_table(path))

    @property
    def indices(self) -> NDArray[np.int64]:
        """sample_index in rank order: (k,) int64."""
        return self.table["sample_index"].to_numpy()

    @property
    def sample_ids(self) -> list[str]:
        """sample_id in rank order."""
        return self.table["sample_id"].to_pylist()

    @property
    def sha256(self) -> str:
        """Of `<sample_index> <sample_id>` in rank order, one per line (hex): equal batches have equal hashes."""
        lines = (f"{i} {sample_id}\n" for i, sample_id in zip(self.indices, self.sample_ids, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def tie_share(self) -> float:
        """The share of the batch that a tie-break decided, in [0, 1]."""
        ties = sum(decided in ("margin", "hash") for decided in self.table["decided_by"].to_pylist())
        return ties / max(1, len(self))
