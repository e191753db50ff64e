"""Files to and from annotators: CSV, Parquet, and the JSON of Label Studio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from distal.errors import SourceError, one_line
from distal.ledger import LABELED, SKIPPED, UNSURE
from distal.lists import read_any_table
from distal.storage import write_bytes

Format = Literal["csv", "parquet", "label-studio"]
CANNOT_TELL = "cannot tell"
LABEL_COLUMNS = ("label", "choice", "class", "class_name")
NOBODY = "file"


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a file: a label by name (or index, as text), or none."""

    sample_id: str
    label: str | None
    status: str
    annotator: str


def read_said(path: Path) -> list[Said]:
    """What a file of annotators says, in its order.

    CSV and Parquet have a column `sample_id`, one of `LABEL_COLUMNS`, and if need be `annotator` and `status`
    (labeled, skipped, unsure). An empty label is skipped. JSON is an export of Label Studio, JSON or JSON-MIN.

    Raises:
        SourceError: no such file, empty, half-written, of another form, or with several columns for the label.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not path.stat().st_size:
        raise SourceError(f"{path}: empty")
    try:
        if path.suffix.lower() == ".json":
            said = list(_of_label_studio(json.loads(path.read_text())))
        else:
            said = list(_of_table(path))
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: half-written, or not what annotators send ({one_line(error)})") from error
    if not said:
        raise SourceError(f"{path}: says nothing of any sample")
    return said


def _of_table(path: Path) -> Iterable[Said]:
    names, table = read_any_table(path, ("sample_id", *LABEL_COLUMNS, "annotator", "status"))
    there = [name for name in LABEL_COLUMNS if name in names]
    if "sample_id" not in names or not there:
        raise SourceError(f"{path}: has no columns sample_id and label; it has {', '.join(names)}")
    if len(there) > 1:
        raise SourceError(f"{path}: {' and '.join(there)} could each be the label; keep one of them")
    wanted = [name for name in table.column_names if name in ("sample_id", there[0], "annotator", "status")]
    for row in table.select(wanted).to_pylist():
        yield _said(str(row["sample_id"]), row[there[0]], row.get("annotator"), row.get("status"))


def _of_label_studio(tasks: Any) -> Iterable[Said]:
    if not isinstance(tasks, list):
        raise ValueError("a list of tasks was expected")
    for task in tasks:
        if "annotations" not in task:  # JSON-MIN
            choice = next((task[name] for name in LABEL_COLUMNS if name in task), None)
            yield _said(str(task["sample_id"]), choice, task.get("annotator"), None)
            continue
        for annotation in task["annotations"]:
            choices = [c for result in annotation["result"] for c in result.get("value", {}).get("choices", ())]
            status = SKIPPED if annotation.get("was_cancelled") else None
            by = annotation.get("completed_by")
            name = by.get("email") or by.get("id") if isinstance(by, dict) else by
            yield _said(str(task["data"]["sample_id"]), choices[0] if choices else None, name, status)


def _said(sample_id: str, label: object, annotator: object, status: object) -> Said:
    name = None if label is None or str(label).strip() == "" else str(label).strip()
    if name is not None and name.lower() == CANNOT_TELL:
        name, status = None, UNSURE
    if status not in (None, "", LABELED, SKIPPED, UNSURE):
        raise ValueError(f"status {status!r} of {sample_id}; known: {LABELED}, {SKIPPED}, {UNSURE}")
    chosen = str(status or (LABELED if name is not None else SKIPPED))
    if chosen != LABELED:
        name = None
    elif name is None:
        chosen = SKIPPED
    return Said(sample_id, name, chosen, NOBODY if annotator is None else str(annotator))


def write_batch(path: Path, fmt: Format, rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[Path]:
    """Write what annotators are asked.

    Args:
        rows: `sample_id`, `image` (a URL or a path), and what else is to be shown, in the order of asking; with a key
            `prediction`, the class that the model would say, which Label Studio then pre-selects.

    Returns:
        The files: for Label Studio also the labelling configuration, beside the tasks.
    """
    if fmt == "label-studio":
        return _write_label_studio(path, rows, classes)
    table = pa.Table.from_pylist([{**row, "label": None} for row in rows])
    table = table.set_column(table.column_names.index("label"), "label", pa.nulls(len(table), pa.string()))
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
            result = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [prediction]}}
            task["predictions"] = [{"model_version": "distal", "result": [result]}]
        tasks.append(task)
    write_bytes(path, (json.dumps(tasks, indent=1) + "\n").encode())
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in (*classes, CANNOT_TELL))
    config = path.with_suffix(".xml")
    xml = (
        "<View>\n"
        '  <Image name="image" value="$image"/>\n'
        '  <Choices name="choice" toName="image" choice="single" showInline="true">\n'
        f"{choices}\n"
        "  </Choices>\n"
        "</View>\n"
    )
    write_bytes(config, xml.encode())
    return [path, config]
