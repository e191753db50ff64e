"""What is labelled: a view on immutable files, never a file of its own.

The ledger of a cycle is the union of `initial.parquet` and the `labels*.parquet` of all earlier cycles. A sample is in
one of them, or in two: declined in an earlier one and labelled in a later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distal.errors import Damage
from distal.storage import create_bytes, names_in, read_table, table_bytes

SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)

LABELED, SKIPPED, UNSURE = "labeled", "skipped", "unsure"
"""What became of a sample that was asked: it has a label; the annotator passed over it; or could not tell."""

LABELS_PER_RANK, _LEAST_CLASSES = 2, 2
"""What training needs: batch normalisation has no variance of one sample, and one class is nothing to tell apart."""


@dataclass(frozen=True)
class Ledger:
    """The labelled samples, in the order of `sample_index`.

    Attributes:
        indices: (n_labeled,) int64, ascending, unique.
        labels: (n_labeled,) int64, class of each.
        declined: int64, ascending: samples that were asked, and have no label: they are not asked again.
    """

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    declined: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def empty(cls) -> Self:
        """Nothing is labelled yet."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def read(cls, files: Iterable[Path]) -> Self:
        """The union of label files; a label supersedes that its sample was declined in an earlier file.

        Args:
            files: in the order in which they were written.

        Raises:
            Damage: a file is missing, or two answer for the same sample in any other way.
        """
        tables = [read_table(file, ["sample_index", "sample_id", "label", "status"]) for file in files]
        written = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        order = np.lexsort((written, pa.concat_tables(tables)["sample_index"].to_numpy()))
        table, written = pa.concat_tables(tables).take(order), written[order]
        indices = table["sample_index"].to_numpy()
        labels = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        has_label = pc.equal(table["status"], LABELED).to_numpy()
        again = indices[1:] == indices[:-1]
        later = again & ~has_label[:-1] & has_label[1:] & (written[:-1] < written[1:])
        twice = np.flatnonzero(again & ~later)
        if len(twice):
            raise Damage(f"sample {table['sample_id'][int(twice[0])].as_py()} is labelled in more than one file")
        declined = ~has_label
        declined[:-1] &= ~later
        return cls(indices[has_label], labels[has_label], indices[declined])

    @property
    def sha256(self) -> str:
        """Of all indices, labels, and declined indices (hex)."""
        parts = [len(self)], self.indices, self.labels, self.declined  # the length tells where the parts end
        return hashlib.sha256(np.concatenate(parts).astype("<i8").tobytes()).hexdigest()

    def asked(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the samples [start, stop) are labelled or declined: (stop - start,) bool."""
        flags = np.zeros(stop - start, dtype=bool)
        for indices in (self.indices, self.declined):
            low, high = np.searchsorted(indices, [start, stop])
            flags[indices[low:high] - start] = True
        return flags


def too_few(labels: Collection[int], workers: int) -> str | None:
    """Why training cannot begin with some labels; None when it can.

    Args:
        labels: class of each labelled sample.
        workers: the ranks that share them.
    """
    n_classes = len(set(labels))
    if len(labels) >= LABELS_PER_RANK * workers and n_classes >= _LEAST_CLASSES:
        return None
    return (
        f"{len(labels)} labelled samples of {n_classes} classes; training needs at least {LABELS_PER_RANK * workers} "
        f"({LABELS_PER_RANK} per rank) of {_LEAST_CLASSES} classes"
    )


def write_labels(
    path: Path,
    indices: NDArray[np.int64],
    sample_ids: list[str],
    labels: NDArray[np.integer] | Sequence[int | None],
    annotator: str | Sequence[str],
    status: Sequence[str] | None = None,
) -> None:
    """Write an immutable file of labels; when it is there already, from another driver, that one stays.

    Args:
        labels: class of each sample; None where `status` is not LABELED.
        annotator: who answered, or one for each.
        status: LABELED, SKIPPED or UNSURE; None: all are labelled.
    """
    n = len(indices)
    annotators = [annotator] * n if isinstance(annotator, str) else list(annotator)
    columns = [indices, sample_ids, pa.array(labels, pa.int32()), annotators, list(status or [LABELED] * n)]
    create_bytes(path, bytes(table_bytes(pa.table(columns, schema=SCHEMA))))


def label_files(folder: Path) -> list[Path]:
    """The `labels*.parquet` files in the folder of a cycle, in order."""
    return [folder / name for name in names_in(folder) if name.startswith("labels") and name.endswith(".parquet")]
