"""Files that people bring, in which samples go by their `sample_id`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distal.errors import SourceError, one_line, shown
from distal.hashing import sample_keys
from distal.pool import Pool
from distal.pool.images import OK
from distal.records import STRIPE_SAMPLES, split_blocks

_FORMULA = "'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # some spreadsheets take the full-width signs as well
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")  # digits of any script
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_MOST_HEADER_BYTES = 2**16


def csv_text(text: str) -> str:
    """A text for a cell of a CSV file that spreadsheets open: one that they would run as a formula gets a leading `'`.

    That is a text which begins with = + - @, a tab or a line break, also behind apostrophes. `read_any_table` undoes
    it exactly, for every text.
    """
    return f"'{text}" if re.match(_FORMULA, text) else text


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
    """Ids and labels of a CSV or Parquet file with columns `sample_id` and `label`; see `label_reader`.

    A column `class_name` beside `label` is a check: both must say the same class.

    Raises:
        SourceError: as for `read_ids`, or a label is no class, or a sample is there twice.
    """
    table = _columns(path, key, "sample_id", "label", optional=("class_name",))
    ids = table["sample_id"].to_pylist()
    if not ids:
        raise SourceError(f"{key}: {path} names no sample")
    if None in ids or "" in ids:
        line = next(line for line, sample_id in enumerate(ids, start=1) if not sample_id)
        raise SourceError(f"{key}: {path}: row {line} has no sample_id")
    _refuse_twice(path, key, ids)
    index_of = label_reader(classes, n_classes)
    names = table["class_name"].to_pylist() if "class_name" in table.column_names else [None] * len(ids)
    labels = []
    for sample_id, given, name in zip(ids, table["label"].to_pylist(), names, strict=True):
        label = index_of(given)
        if label is None:
            raise SourceError(
                f"{key}: {path}: label {shown(given)!r} of {shown(sample_id)} is none of the {n_classes} classes"
            )
        if classes is not None and name in classes and classes.index(name) != label:
            raise SourceError(
                f"{key}: {path}: label {shown(given)!r} of {shown(sample_id)} is class {shown(classes[label])}, and "
                f"its class_name is {shown(name)}; give class names as label, or take the column class_name out"
            )
        labels.append(label)
    return ids, labels


def _refuse_twice(path: Path, key: str, ids: Sequence[str]) -> None:
    twice = next((sample_id for sample_id, n in Counter(ids).items() if n > 1), None)
    if twice is not None:
        raise SourceError(f"{key}: {path}: sample {shown(twice)} is there more than once; keep one line of it")


def label_reader(classes: Sequence[str] | None, n_classes: int) -> Callable[[object], int | None]:
    """What a label from a file means: the one rule for every file format and every command.

    A label is the name of a class, white space around it aside. An integer, or a text of ASCII digits without leading
    zeros, that is no name is a class index, unless any class name is a number: then labels are names alone.

    Args:
        classes: names, in the order of their indices; None when they are not known.

    Returns:
        label -> class index in [0, n_classes), or None when it is no class.
    """
    named = {name.strip(): index for index, name in enumerate(classes or ())}
    has_numbers = any(_NUMBER.fullmatch(name) for name in named)

    def index_of(label: object) -> int | None:
        if isinstance(label, bool) or not isinstance(label, str | int):
            return None
        text = str(label).strip()
        index = named.get(text)
        if index is None and not has_numbers and _INDEX.fullmatch(text):
            index = int(text)
        return index if index is not None and index < n_classes else None

    return index_of


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


def _columns(path: Path, key: str, *names: str, optional: Sequence[str] = ()) -> pa.Table:
    if not path.is_file():
        raise SourceError(f"{key}: {path}: no such file")
    try:
        there, table = read_any_table(path, (*names, *optional))
        if "sample_id" in table.column_names:
            index = table.column_names.index("sample_id")
            table = table.set_column(index, "sample_id", table["sample_id"].cast(pa.string()))
    except Exception as error:
        raise SourceError(f"{key}: {path} cannot be read ({shown(one_line(error), 200)})") from error
    for name in names:
        if name not in table.column_names:
            raise SourceError(f"{key}: {path} has no column {name!r}; it has {shown(', '.join(there), 200)}")
    return table


def read_any_table(path: Path, names: Sequence[str], most_rows: int | None = None) -> tuple[list[str], pa.Table]:
    """The columns of a CSV or Parquet file of somebody else, and a table of those among `names` that it has.

    In CSV they are text: 007 is a name, not a number. What `csv_text` did is undone.

    Args:
        most_rows: how many there may be, as a small Parquet file can hold billions; None: any number.

    Raises:
        ValueError: a column is there twice, or too many rows; and whatever pyarrow raises.
    """
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            there = list(file.schema_arrow.names)
            wanted = _once(there, names)
            _refuse_more(file.metadata.num_rows, most_rows)
            return there, file.read(columns=wanted).select(wanted)
    with path.open("rb") as file:
        if len(file.readline(_MOST_HEADER_BYTES + 1)) > _MOST_HEADER_BYTES:
            raise ValueError(f"its first line, the names of the columns, has more than {_MOST_HEADER_BYTES} bytes")
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    _refuse_more(len(table), most_rows)
    wanted = _once(table.column_names, names)
    undo = partial(pc.replace_substring_regex, pattern=rf"\A'({_FORMULA})", replacement=r"\1", max_replacements=1)
    return table.column_names, pa.table([undo(table[name]) for name in wanted], names=wanted)


def _refuse_more(n_rows: int, most: int | None) -> None:
    if most is not None and n_rows > most:
        raise ValueError(f"{n_rows} rows are more than {most}; split it into parts")


def _once(there: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of `names` that are there. Raises ValueError when one is there twice."""
    twice = next((name for name in names if there.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{there.count(twice)} columns are called {twice}; keep one")
    return [name for name in there if name in names]


def read_text(path: Path, key: str) -> str:
    """A text file in UTF-8; `key` is what names it, for errors. Raises SourceError when there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SourceError(f"{key}: {path}: no such file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{key}: {path} is not text; give a sample_id per line, or a .csv or .parquet file") from None
