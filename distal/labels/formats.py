"""Files to and from annotators: CSV, Parquet, and the JSON of Label Studio."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from distal.artifacts.ledger import LABELED, SKIPPED, UNSURE
from distal.errors import ConfigError, SourceError, one_line, shown
from distal.pool.sample_files import csv_text, read_any_table
from distal.storage import write_bytes

Format = Literal["csv", "parquet", "label-studio"]
CANNOT_TELL = "cannot tell"
CONTROL = "choice"  # the name of our control in the labelling configuration
LABEL_COLUMNS = ("label", CONTROL, "class", "class_name")
ASKED = ("sample_id", "image", "uri")
BROKEN = "half-written, or not what annotators send"
MOST_BYTES, MOST_ROWS = 2**26, 2_000_000  # 64 MiB of JSON can be 1.5 GB of objects

_TIME = TypeAdapter(datetime)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """One answer of a file: a label by name (or index, as text), or none.

    Attributes:
        annotator: None where the file does not tell.
        time: microseconds since 1970 (UTC); None where the file does not tell.
        row: place in the file, from 1.
    """

    sample_id: str
    label: str | None
    status: str
    annotator: str | None
    time: int | None
    row: int


class _Foreign(BaseModel):
    """A part of an export of Label Studio; keys that are not named are ignored."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


_Part = TypeVar("_Part", bound=_Foreign)


class _Choices(_Foreign):
    choices: list[str]


class _Result(_Foreign):
    from_name: str | None = None
    value: Any = None


class _Person(_Foreign):
    id: str | None = None
    email: str | None = None


class _Annotation(_Foreign):
    result: list[_Result] = []
    was_cancelled: bool = False
    completed_by: str | _Person | None = None
    updated_at: datetime | None = None


class _Data(_Foreign):
    sample_id: str


class _Task(_Foreign):
    """A task: with annotations in JSON, and flat in JSON-MIN, one for each annotation."""

    annotations: list[_Annotation] | None = None
    data: _Data | None = None
    sample_id: str | None = None
    choice: str | _Choices | None = None  # named like CONTROL
    annotator: str | _Person | None = None
    updated_at: datetime | None = None


def unsure_word(classes: Sequence[str]) -> str:
    """What annotators write or choose when they cannot tell; another word when that is the name of a class."""
    word, names = CANNOT_TELL, {name.strip().casefold() for name in classes}
    while word in names:
        word += " (unsure)"
    return word


def read_annotations(path: Path, unsure: str = CANNOT_TELL) -> list[AnnotationRow]:
    """Read a file of annotators, in its order.

    CSV and Parquet have a column `sample_id`, one of `LABEL_COLUMNS`, and if need be `annotator`, `status` (labeled,
    skipped, unsure) and `updated_at` (a time, UTC unless it says otherwise). An empty label is skipped. JSON is an
    export of Label Studio, JSON or JSON-MIN, in which the control `CONTROL` counts.

    Args:
        unsure: see `unsure_word`.

    Raises:
        SourceError: no such file, empty, too large, half-written, of another form, or with several columns for the
            label.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    size = path.stat().st_size
    if not size:
        raise SourceError(f"{path}: empty")
    if size > MOST_BYTES:
        raise SourceError(f"{path}: {size:,} bytes are more than {MOST_BYTES:,}; split it into parts")
    try:
        rows = list(_of_label_studio(path, unsure) if path.suffix.lower() == ".json" else _of_table(path, unsure))
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: {BROKEN} ({shown(one_line(error), 200)}); nothing was imported") from error
    if not rows:
        raise SourceError(f"{path}: says nothing of any sample")
    return rows


def _of_table(path: Path, unsure: str) -> Iterable[AnnotationRow]:
    known = ("sample_id", *LABEL_COLUMNS, "annotator", "status", "updated_at")
    names, table = read_any_table(path, known, MOST_ROWS)
    there = [name for name in LABEL_COLUMNS if name in names]
    if "sample_id" not in names or not there:
        lacking = " and ".join(
            [*(["sample_id"] if "sample_id" not in names else []), *(["label"] if not there else [])]
        )
        other = "; save it with commas between columns" if len(names) == 1 and re.search(r"[;\t|]", names[0]) else ""
        raise SourceError(f"{path}: has no column {lacking}; it has {shown(', '.join(names), 200)}{other}")
    if len(there) > 1:
        raise SourceError(f"{path}: {' and '.join(there)} could each be the label; keep one of them")
    rows = (row for batch in table.to_batches(max_chunksize=10_000) for row in batch.to_pylist())
    for place, row in enumerate(rows, start=1):
        if row["sample_id"] in (None, ""):
            raise SourceError(f"{path}: row {place} has no sample_id")
        label = None if row[there[0]] is None else str(row[there[0]])
        who, time = row.get("annotator"), row.get("updated_at")
        yield _annotation_row(str(row["sample_id"]), label, row.get("status"), who, time, place, unsure)


def _of_label_studio(path: Path, unsure: str) -> Iterable[AnnotationRow]:
    tasks = json.loads(path.read_bytes())
    if not isinstance(tasks, list):
        raise ValueError("a list of tasks was expected")
    controls, place = set[str](), 0
    for number, each in enumerate(tasks, start=1):
        task = _valid(_Task, each, number)
        controls |= _controls(task)
        for sample_id, choices, status, annotator, time in _answers_of(task, number):
            place += 1
            yield _annotation_row(sample_id, _only(choices, sample_id), status, annotator, time, place, unsure)
    if controls and CONTROL not in controls:
        raise SourceError(
            f"{path}: no answer of the control {CONTROL!r}, which the exported labelling configuration defines; keep "
            "its name"
        )


def _valid(model: type[_Part], value: object, number: int) -> _Part:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"task {number}: {where}{': ' if where else ''}{first['msg']}") from None


def _answers_of(task: _Task, number: int) -> Iterator[tuple[str, list[str], str | None, str | None, datetime | None]]:
    """Of each annotation: sample_id, choices, status, annotator, time."""
    if task.annotations is None:  # JSON-MIN
        if task.sample_id is None:
            raise ValueError(f"task {number} has neither annotations nor sample_id")
        choices = [task.choice] if isinstance(task.choice, str) else task.choice.choices if task.choice else []
        yield task.sample_id, choices, None, _name(task.annotator), task.updated_at
    for annotation in task.annotations or ():
        if task.data is None:
            raise ValueError(f"task {number} has no data")
        ours = [_valid(_Choices, each.value, number) for each in annotation.result if each.from_name == CONTROL]
        choices = [choice for each in ours for choice in each.choices]
        status = SKIPPED if annotation.was_cancelled else None
        yield task.data.sample_id, choices, status, _name(annotation.completed_by), annotation.updated_at


def _controls(task: _Task) -> set[str]:
    """Names of the controls that answered; in JSON-MIN they cannot be told from data, except for ours."""
    if task.annotations is None:
        return {CONTROL if task.choice is not None else "another"}
    return {str(result.from_name) for annotation in task.annotations for result in annotation.result}


def _only(choices: Sequence[str], sample_id: str) -> str | None:
    if len(choices) > 1:
        raise ValueError(f"{len(choices)} choices of {shown(sample_id)}; a sample has one class")
    return choices[0] if choices else None


def _name(person: str | _Person | None) -> str | None:
    return person.email or person.id if isinstance(person, _Person) else person


def _annotation_row(
    sample_id: str, label: str | None, status: object, annotator: object, time: object, row: int, unsure: str
) -> AnnotationRow:
    name = (label or "").strip() or None
    if name is not None and name.casefold() == unsure:
        name, status = None, UNSURE
    if status not in (None, "", LABELED, SKIPPED, UNSURE):
        raise ValueError(f"status {shown(status)} of {shown(sample_id)}; known: {LABELED}, {SKIPPED}, {UNSURE}")
    chosen = str(status or (LABELED if name is not None else SKIPPED))
    if chosen != LABELED:
        name = None
    elif name is None:
        chosen = SKIPPED
    who = None if annotator is None else str(annotator).strip() or None
    "".join((sample_id, name or "", who or "")).encode()  # JSON can hold half of a character; no sample is called so
    return AnnotationRow(
        sample_id, name, chosen, who, None if time in (None, "") else _microseconds(time, sample_id), row
    )


def _microseconds(time: object, sample_id: str) -> int:
    try:
        found = _TIME.validate_python(time)
    except ValidationError:
        raise ValueError(f"updated_at {shown(time)} of {shown(sample_id)} is no time; take the column out") from None
    return (found.replace(tzinfo=found.tzinfo or UTC) - _EPOCH) // timedelta(microseconds=1)


def write_batch(path: Path, fmt: Format, rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[Path]:
    """Write what annotators are asked.

    Args:
        rows: `sample_id`, `image` (a URL or a path), and what else is to be shown, in the order of asking; with a key
            `prediction`, the class that the model would say, which Label Studio then pre-selects.

    Returns:
        The files: for Label Studio also the labelling configuration, beside the tasks.

    Raises:
        ConfigError: for Label Studio: the name of a class cannot be written in XML.
    """
    if fmt == "label-studio":
        return _write_label_studio(path, rows, classes)
    if fmt == "csv":
        rows = [{name: csv_text(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    table = pa.Table.from_pylist(rows) if rows else pa.table({name: pa.nulls(0, pa.string()) for name in ASKED})
    table = table.append_column("label", pa.nulls(len(rows), pa.string()))
    sink = pa.BufferOutputStream()
    if fmt == "csv":
        pyarrow.csv.write_csv(table, sink)
    else:
        pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())
    return [path]


def _write_label_studio(path: Path, rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[Path]:
    tasks = []
    for row in rows:
        prediction = row.get("prediction")
        task: dict[str, Any] = {"data": {name: value for name, value in row.items() if name != "prediction"}}
        if prediction is not None:
            result = {"from_name": CONTROL, "to_name": "image", "type": "choices", "value": {"choices": [prediction]}}
            task["predictions"] = [{"model_version": "distal", "result": [result]}]
        tasks.append(task)
    config, xml = path.with_suffix(".xml"), labelling_xml(classes)
    write_bytes(path, (json.dumps(tasks, indent=1) + "\n").encode())
    write_bytes(config, xml)
    return [path, config]


def labelling_xml(classes: Sequence[str]) -> bytes:
    """The labelling configuration of Label Studio. Raises ConfigError for a name that XML cannot hold."""
    names = [*classes, unsure_word(classes)]
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in names)
    xml = (
        "<View>\n"
        '  <Image name="image" value="$image"/>\n'
        f'  <Choices name="{CONTROL}" toName="image" choice="single" showInline="true">\n'
        f"{choices}\n"
        "  </Choices>\n"
        "</View>\n"
    )
    try:
        data = xml.encode()
        found = [choice.get("value") for choice in ElementTree.fromstring(data).iter("Choice")]
    except (ElementTree.ParseError, UnicodeEncodeError):
        found = []
    if found != names:
        strange = next((name for name in names if not name.isprintable()), names[0])
        raise ConfigError(
            f"pool.classes: {strange!r} has a character that XML, the labelling configuration of Label Studio, cannot "
            "hold; export with --format csv or parquet"
        )
    return data
