"""Files that people bring, in which samples go by their `sample_id`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distal.errors import SourceError, one_line
from distal.hashing import sample_keys
from distal.pool import Pool
from distal.pool.images import OK
from distal.records import STRIPE_SAMPLES, split_blocks


def read_ids(path: Path, key: str, *, once: bool = False) -> list[str]:
    """The ids of a text file with one per line, or of the column `sample_id` of a CSV or Parquet file, each once.

    Args:
        key: what names the file, for errors.
        once: whether an id that is there twice is an error.

    Raises:
        SourceError: no such file, no such column, or no id in it.
    """
    if path.suffix.lower() in (".csv", ".parquet"):
        ids = _columns(path, key, "sample_id")["sample_id"].to_pylist()
    else:
        ids = [line.strip() for line in read_text(path, key).splitlines()]
    ids = [sample_id for sample_id in ids if sample_id]
    if not ids:
        raise SourceError(f"{key}: {path} names no sample")
    if once:
        _refuse_twice(path, key, ids)
    return list(dict.fromkeys(ids))


def read_labels(path: Path, key: str, classes: Sequence[str] | None, n_classes: int) -> tuple[list[str], list[int]]:
    """Ids and labels of a CSV or Parquet file with columns `sample_id` and `label`.

    A label is a name of `classes`, or else a class index; an integer column of a Parquet file holds indices.

    Raises:
        SourceError: as for `read_ids`, or a label is no class, or a sample is there twice.
    """
    table = _columns(path, key, "sample_id", "label")
    ids = table["sample_id"].to_pylist()
    if not ids:
        raise SourceError(f"{key}: {path} names no sample")
    _refuse_twice(path, key, ids)
    named = {name: index for index, name in enumerate(classes or ())}
    labels = []
    for sample_id, given in zip(ids, table["label"].to_pylist(), strict=True):
        label = class_index(given, named, n_classes)
        if label is None:
            raise SourceError(f"{key}: {path}: label {given!r} of {sample_id} is none of the {n_classes} classes")
        labels.append(label)
    return ids, labels


def _refuse_twice(path: Path, key: str, ids: Sequence[str]) -> None:
    twice = next((sample_id for sample_id, n in Counter(ids).items() if n > 1), None)
    if twice is not None:
        raise SourceError(f"{key}: {path}: sample {twice} is there more than once; keep one line of it")


def class_index(given: Any, named: Mapping[Any, int], n_classes: int) -> int | None:
    """The class that a label says: by its name, or else as an index; None when it is no class."""
    label = named.get(given, int(given) if str(given).isdecimal() else -1)
    return label if 0 <= label < n_classes else None


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


def require_readable(pool: Pool, ids: Sequence[str], indices: NDArray[np.int64], key: str) -> None:
    """Raise SourceError when one of some samples is unreadable: of its image nothing is known.

    Args:
        indices: (n,) their `sample_index`.
        key: what names the file that they are from.
    """
    (status,) = pool.take_samples(indices, ["status"]).columns
    unreadable = [sample_id for sample_id, told in zip(ids, status.to_pylist(), strict=True) if told != OK]
    if unreadable:
        more = f" ({len(unreadable)} are)" if len(unreadable) > 1 else ""
        raise SourceError(f"{key}: sample {unreadable[0]} is unreadable; leave it out{more}")


def listed(pool: Pool, file: Path) -> tuple[list[str], NDArray[np.int64]]:
    """The ids of `select.from`, in order, and the `sample_index` of each.

    Raises:
        SourceError: the file cannot be read, names a sample twice, or one that is not in the pool.
    """
    ids = read_ids(file, "select.from", once=True)
    indices = find(pool, ids)
    unknown = [sample_id for sample_id, index in zip(ids, indices, strict=True) if index < 0]
    if unknown:
        raise SourceError(
            f"select.from: {file}: sample {unknown[0]} is not in the pool ({len(unknown)} of {len(ids)} are not)"
        )
    return ids, indices


def _columns(path: Path, key: str, *names: str) -> pa.Table:
    if not path.is_file():
        raise SourceError(f"{key}: {path}: no such file")
    try:
        table = read_any_table(path, names)
    except Exception as error:
        raise SourceError(f"{key}: {path} cannot be read ({one_line(error)})") from error
    for name in names:
        if name not in table.column_names:
            raise SourceError(f"{key}: {path} has no column {name!r}; it has {', '.join(table.column_names)}")
    index = table.column_names.index("sample_id")
    return table.set_column(index, "sample_id", table["sample_id"].cast(pa.string())).select(names)


def read_any_table(path: Path, names: Sequence[str]) -> pa.Table:
    """A CSV or Parquet file of somebody else. In CSV the columns `names` are text: 007 is a name, not a number."""
    if path.suffix.lower() == ".parquet":
        return pq.read_table(path, partitioning=None)
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pyarrow.csv.read_csv(path, convert_options=as_text)


def read_text(path: Path, key: str) -> str:
    """A text file; `key` is what names it, for errors. Raises SourceError when there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise SourceError(f"{key}: {path}: no such file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{key}: {path} is not text; give a sample_id per line, or a .csv or .parquet file") from None
