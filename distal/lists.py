"""Files that people bring, in which samples go by their `sample_id`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from distal.errors import SourceError, one_line
from distal.hashing import sample_keys
from distal.pool import Pool
from distal.records import STRIPE_SAMPLES, split_blocks
from distal.storage import read_table


def read_ids(path: Path, key: str) -> list[str]:
    """The ids of a text file with one per line, or of the column `sample_id` of a CSV or Parquet file.

    Args:
        key: what names the file, for errors.

    Raises:
        SourceError: no such file, no such column, or no id in it.
    """
    if path.suffix.lower() in (".csv", ".parquet"):
        ids = _columns(path, key, "sample_id")["sample_id"].cast(pa.string()).to_pylist()
    else:
        ids = [line.strip() for line in _text(path, key).splitlines()]
    ids = [sample_id for sample_id in ids if sample_id]
    if not ids:
        raise SourceError(f"{key}: {path} names no sample")
    return list(dict.fromkeys(ids))


def read_labels(path: Path, key: str, classes: Sequence[str] | None, n_classes: int) -> tuple[list[str], list[int]]:
    """Ids and labels of a CSV or Parquet file with columns `sample_id` and `label`.

    A label is a class index, or a name of `classes`.

    Raises:
        SourceError: as for `read_ids`, or a label is no class.
    """
    table = _columns(path, key, "sample_id", "label")
    ids = table["sample_id"].cast(pa.string()).to_pylist()
    labels = []
    for sample_id, label in zip(ids, table["label"].to_pylist(), strict=True):
        if classes is not None and label in classes:
            label = classes.index(label)
        index = int(label) if str(label).isdigit() else -1
        if not 0 <= index < n_classes:
            raise SourceError(f"{key}: {path}: label {label!r} of {sample_id} is none of the {n_classes} classes")
        labels.append(index)
    if not ids:
        raise SourceError(f"{key}: {path} names no sample")
    return ids, labels


def find(pool: Pool, ids: Sequence[str]) -> NDArray[np.int64]:
    """`sample_index` of each id: (n,) int64, -1 where the pool has no such sample."""
    wanted = sample_keys(ids)
    order = np.argsort(wanted)
    found = np.full(len(ids), -1, np.int64)
    for stripe in split_blocks(pool.n_samples, STRIPE_SAMPLES):
        (keys,) = pool.columns(stripe.start, stripe.stop, "sample_key")
        at = np.searchsorted(wanted[order], keys).clip(max=len(ids) - 1)
        hits = np.flatnonzero(wanted[order][at] == keys)
        found[order[at[hits]]] = stripe.start + hits
    return found


def _columns(path: Path, key: str, *names: str) -> pa.Table:
    if not path.is_file():
        raise SourceError(f"{key}: {path}: no such file")
    try:
        table = read_table(path) if path.suffix.lower() == ".parquet" else pyarrow.csv.read_csv(path)
    except Exception as error:
        raise SourceError(f"{key}: {path} cannot be read ({one_line(error)})") from error
    for name in names:
        if name not in table.column_names:
            raise SourceError(f"{key}: {path} has no column {name!r}; it has {', '.join(table.column_names)}")
    return table


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise SourceError(f"{key}: {path}: no such file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{key}: {path} is not text; give a sample_id per line, or a .csv or .parquet file") from None
