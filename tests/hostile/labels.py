"""Label files that nobody should have sent: each with the one line that it must end in, or the answers that it has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BROKEN = "half-written, or not what annotators send"
HUGE = 2**26 + 1


def write_corpus(folder: Path, ids: list[str], unreadable: str) -> dict[str, str | int]:
    """Write every file into `folder`.

    Args:
        ids: three samples that were asked for, in a pool with the classes circle, cross, dot, line.
        unreadable: one whose image is unreadable.

    Returns:
        By name: a regular expression for the line, or the number of answers of a file that is sound.
    """
    expected: dict[str, str | int] = {}
    texts = {**_csv(*ids, unreadable), **_json(*ids)}
    for name, (content, expectation) in texts.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        expected[name] = expectation
    for name, (table, expectation) in _parquet(*ids).items():
        pq.write_table(table, folder / name)
        expected[name] = expectation
    for name, make in _places(ids[0]).items():
        expected[name] = make(folder / name)
    return expected


def _csv(a: str, b: str, c: str, unreadable: str) -> dict[str, tuple[str | bytes, str | int]]:
    head = "sample_id,label\n"
    sound = f"{head}{a},circle\n{b},dot\n"

    def label(text: str) -> str:
        return f"{head}{a},{text}\n"

    return {
        "empty.csv": ("", "empty"),
        "header.csv": (head, "says nothing of any sample"),
        "spaces.csv": ("   \n  \n", "has no column sample_id and label"),
        "only-bom.csv": (b"\xef\xbb\xbf", "half-written|has no columns"),
        "nuls.csv": (b"\0" * 1000, "half-written|has no columns"),
        "noise.csv": (bytes(range(256)) * 20, "half-written|has no columns"),
        "semicolons.csv": (
            sound.replace(",", ";"),
            "has no column sample_id and label; it has sample_id;label; save it with commas between columns",
        ),
        "tabs.csv": (sound.replace(",", "\t"), "save it with commas between columns"),
        "utf-16.csv": (sound.encode("utf-16"), "half-written|has no columns"),
        "utf-16-le.csv": (sound.encode("utf-16-le"), "half-written|has no columns"),
        "latin-1.csv": (f"{head}{a},caf\xe9\n".encode("latin-1"), BROKEN),
        "bom.csv": (b"\xef\xbb\xbf" + sound.encode(), 2),
        "carriage-returns.csv": (sound.replace("\n", "\r\n"), 2),
        "no-last-line-end.csv": (sound.rstrip(), 2),
        "spaces-around.csv": (label("  circle "), 1),
        "index.csv": (label("3"), 1),
        "capital.csv": (label("Cannot Tell"), 1),
        "two-label-columns.csv": (f"sample_id,label,choice\n{a},dot,dot\n", "could each be the label"),
        "label-twice.csv": (f"sample_id,label,label\n{a},dot,dot\n", "2 columns are called label"),
        "id-twice.csv": (f"sample_id,sample_id,label\n{a},{a},dot\n", "2 columns are called sample_id"),
        "no-label.csv": (f"sample_id,answer\n{a},dot\n", "has no column label; it has sample_id, answer"),
        "space-in-header.csv": (f"sample_id, label\n{a},dot\n", "has no column label; it has sample_id"),
        "no-id.csv": (f"{head},dot\n", "row 1 has no sample_id"),
        "ragged.csv": (f"{head}{a},dot,ann\n", BROKEN),
        "open-quote.csv": (f'{head}"{a},dot\n', BROKEN),
        "long-cell.csv": (label("x" * 3_000_000), f"{BROKEN}|is no class"),
        "long-header.csv": ("x" * 3_000_000 + "\n1\n", f"{BROKEN} .its first line"),
        "many-columns.csv": ("," * 20_000 + "\n", "has no column"),
        "many-rows.csv": (head + "x,\n" * 2_000_001, "2000001 rows are more than 2000000; split it into parts"),
        "unknown-class.csv": (label("square"), "label square is no class; the classes are circle"),
        "digits.csv": (label("1" * 5000), r"label 1+\.\.\. is no class"),
        "index-too-large.csv": (label("4"), "label 4 is no class"),
        "leading-zero.csv": (label("01"), "label 01 is no class"),
        "negative.csv": (label("-1"), "label -1 is no class"),
        "float.csv": (label("1.0"), "label 1.0 is no class"),
        "superscript.csv": (label("²"), "label ² is no class"),
        "arabic-digit.csv": (label("\u0661"), "is no class"),
        "escape.csv": (label("\x1b[2J"), r"label \\x1b\[2J is no class"),
        "nul-in-label.csv": (label("dot\0"), r"label dot\\x00 is no class"),
        "unknown-sample.csv": (f"{head}nobody,dot\n", "sample nobody is not in the pool"),
        "nul-in-id.csv": (f"{head}{a}\0,dot\n", "is not in the pool"),
        "formula.csv": (f"{head}'=1+1,dot\n", "sample =1[+]1 is not in the pool"),
        "long-id.csv": (f"{head}{'x' * 100_000},dot\n", r"sample x+\.\.\. is not in the pool"),
        "unreadable.csv": (f"{head}{unreadable},dot\n", "is unreadable; leave it out"),
        "contradiction.csv": (f"{head}{a},dot\n{b},dot\n{a},line\n", "rows 1 and 3 answer sample .* differently"),
        "blank-annotator.csv": (f"sample_id,label,annotator\n{a},dot, \n{a},line,\n", "differently, and no annotator"),
        "two-annotators.csv": (f"sample_id,label,annotator\n{a},dot,x\n{a},line,y\n", 2),
        "status.csv": (f"sample_id,label,status\n{a},dot,done\n", "status done of .*; known: labeled, skipped, unsure"),
        "time.csv": (f"sample_id,label,updated_at\n{a},dot,yesterday\n", "updated_at yesterday of .* is no time"),
        "far-time.csv": (f"sample_id,label,updated_at\n{a},dot,{'9' * 400}\n", r"updated_at 9+\.\.\. of .* is no time"),
        "label-studio.csv": (
            f"annotation_id,annotator,choice,sample_id,updated_at\n1,1,dot,{c},2026-01-01T10:00:00.5Z\n",
            1,
        ),
    }


def _json(a: str, b: str, c: str) -> dict[str, tuple[str | bytes, str | int]]:
    def ours(*choices: Any, **changes: Any) -> dict[str, Any]:
        return {"from_name": "choice", "type": "choices", "value": {"choices": [*choices]}, **changes}

    def tasks(*results: Any, **changes: Any) -> str:
        annotation = {"result": list(results), "completed_by": 1, **changes}
        return json.dumps([{"data": {"sample_id": a}, "annotations": [annotation]}])

    def task(**keys: Any) -> str:
        return json.dumps([{"data": {"sample_id": a}, "annotations": [], **keys}])

    def flat(**keys: Any) -> str:
        return json.dumps([{"sample_id": a, "choice": "dot", "annotator": 1, **keys}])

    rating = {"from_name": "quality", "type": "choices", "value": {"choices": ["line"]}}
    deep = 100_000
    sound = tasks(ours("dot"))
    return {
        "empty.json": ("", "empty"),
        "nothing.json": ("[]", "says nothing of any sample"),
        "deep-lists.json": ("[" * deep + "]" * deep, BROKEN),
        "deep-objects.json": ('{"a":' * deep + "1" + "}" * deep, BROKEN),
        "deep-value.json": (tasks(ours("dot")).replace('["dot"]', "[" * deep + "]" * deep), BROKEN),
        "many-lists.json": ("[" + "[]," * 1_000_000 + "[]]", BROKEN),
        "many-objects.json": ("[" + "{}," * 200_000 + "{}]", BROKEN),
        "half.json": (sound[: len(sound) // 2], BROKEN),
        "utf-16.json": (sound.encode("utf-16"), 1),
        "bom.json": (b"\xef\xbb\xbf" + sound.encode(), 1),
        "object.json": ("{}", BROKEN),
        "null.json": ("null", BROKEN),
        "number.json": ("1", BROKEN),
        "nan.json": ("[NaN]", BROKEN),
        "list-of-numbers.json": ("[1]", BROKEN),
        "list-of-nulls.json": ("[null]", BROKEN),
        "empty-task.json": ("[{}]", f"{BROKEN}|no answer of the control 'choice'"),
        "data-null.json": (tasks(ours("dot")).replace('{"sample_id": "' + a + '"}', "null"), BROKEN),
        "data-list.json": (task(data=[]), BROKEN),
        "id-null.json": (task(data={"sample_id": None}), BROKEN),
        "id-list.json": (task(data={"sample_id": [a]}), BROKEN),
        "id-number.json": (tasks(ours("dot")).replace(f'"{a}"', "7"), "sample 7 is not in the pool"),
        "id-digits.json": (tasks(ours("dot")).replace(f'"{a}"', "7" * 5000), f"{BROKEN}|is not in the pool"),
        "annotations-string.json": (task(annotations="x"), BROKEN),
        "annotations-numbers.json": (task(annotations=[1]), BROKEN),
        "result-null.json": (tasks().replace('"result": []', '"result": null'), BROKEN),
        "result-string.json": (tasks("x"), BROKEN),
        "value-list.json": (tasks(ours(value=[1])), BROKEN),
        "value-null.json": (tasks(ours(value=None)), BROKEN),
        "choices-string.json": (tasks(ours(value={"choices": "dot"})), BROKEN),
        "choices-objects.json": (tasks(ours({})), BROKEN),
        "choices-number.json": (tasks(ours(2)), 1),  # an index
        "choices-digits.json": (tasks(ours("9" * 5000)), r"label 9+\.\.\. is no class"),
        "choices-big-number.json": (tasks(ours("BIG")).replace('"BIG"', "9" * 5000), f"{BROKEN}|is no class"),
        "two-choices.json": (tasks(ours("dot", "line")), f"{BROKEN} .2 choices of .*; a sample has one class"),
        "two-results.json": (tasks(ours("dot"), ours("line")), "2 choices of .*; a sample has one class"),
        "two-people.json": (
            json.dumps(
                [
                    {
                        "data": {"sample_id": b},
                        "annotations": [
                            {"result": [ours("dot")], "completed_by": {"id": 1, "email": "a@example.com"}},
                            {"result": [ours("line")], "completed_by": 2},
                        ],
                    }
                ]
            ),
            2,
        ),
        "two-answers-of-nobody.json": (
            json.dumps(
                [
                    {
                        "data": {"sample_id": b},
                        "annotations": [{"result": [ours("dot")]}, {"result": [ours("line")]}],
                    }
                ]
            ),
            "rows 1 and 2 answer sample .* differently",
        ),
        "other-control.json": (tasks(rating), "no answer of the control 'choice'"),
        "two-controls.json": (tasks(rating, ours("dot")), 1),
        "other-value.json": (tasks({"from_name": "box", "value": [1]}, ours("dot")), 1),
        "completed-by-list.json": (tasks(ours("dot"), completed_by=[1]), BROKEN),
        "cancelled-list.json": (tasks(ours("dot"), was_cancelled=[]), BROKEN),
        "time.json": (tasks(ours("dot"), updated_at="never"), BROKEN),
        "far-time.json": (tasks(ours("dot"), updated_at=1e300), BROKEN),
        "surrogate.json": (flat(sample_id="\ud800"), BROKEN),
        "surrogate-label.json": (flat(choice="\ud800"), BROKEN),
        "flat.json": (flat(), 1),
        "flat-two-choices.json": (flat(choice={"choices": ["dot", "line"]}), "2 choices of .*; a sample has one class"),
        "flat-list.json": (flat(choice=["dot"]), BROKEN),
        "flat-other-control.json": (
            json.dumps([{"sample_id": c, "label": "dot"}]),
            "no answer of the control 'choice'",
        ),
        "flat-no-id.json": (json.dumps([{"choice": "dot"}]), BROKEN),
    }


def _parquet(a: str, b: str, c: str) -> dict[str, tuple[pa.Table, str | int]]:
    def labels(values: Any, kind: pa.DataType | None = None) -> pa.Table:
        return pa.table({"sample_id": [a, b, c][: len(values)], "label": pa.array(values, kind)})

    one = pa.array([a])
    not_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff")])
    many = 2_000_001
    return {
        "sound.parquet": (labels(["circle", "dot", None]), 3),
        "dictionary.parquet": (labels(["circle", "dot"], pa.dictionary(pa.int8(), pa.string())), 2),
        "indices.parquet": (labels([0, 3]), 2),
        "rows.parquet": (labels([], pa.string()), "says nothing of any sample"),
        "bomb.parquet": (
            pa.table({"sample_id": pa.nulls(many, pa.string()), "label": pa.nulls(many, pa.string())}),
            "2000001 rows are more than 2000000; split it into parts",
        ),
        "floats.parquet": (labels([1.0]), "label 1.0 is no class"),
        "bools.parquet": (labels([True]), "label True is no class"),
        "bytes.parquet": (labels([b"dot"]), "is no class"),
        "lists.parquet": (labels([["dot"]]), "is no class"),
        "structs.parquet": (labels([{"x": "dot"}]), "is no class"),
        "times.parquet": (labels([datetime(2026, 1, 1)]), "is no class"),
        "null-id.parquet": (
            pa.table({"sample_id": pa.nulls(1, pa.string()), "label": ["dot"]}),
            "row 1 has no sample_id",
        ),
        "list-id.parquet": (pa.table({"sample_id": [[a]], "label": ["dot"]}), "is not in the pool"),
        "not-text.parquet": (pa.table({"sample_id": one, "label": not_text}), BROKEN),
        "twice.parquet": (
            pa.table([one, one, one], names=["sample_id", "label", "label"]),
            "2 columns are called label",
        ),
        "status.parquet": (pa.table({"sample_id": one, "label": ["dot"], "status": [1]}), "status 1 of"),
        "annotators.parquet": (pa.table({"sample_id": one, "label": ["dot"], "annotator": [7]}), 1),
        "updated.parquet": (
            pa.table({"sample_id": one, "label": ["dot"], "updated_at": [datetime(2026, 1, 1)]}),
            1,
        ),
        "strange-time.parquet": (
            pa.table({"sample_id": one, "label": ["dot"], "updated_at": [[1]]}),
            "updated_at .* is no time",
        ),
    }


def _places(a: str) -> dict[str, Callable[[Path], str | int]]:
    """What is no ordinary file."""

    def folder(path: Path) -> str:
        path.mkdir()
        return "no such file"

    def pipe(path: Path) -> str:
        os.mkfifo(path)
        return "no such file"

    def nowhere(path: Path) -> str:
        path.symlink_to("nothing")
        return "no such file"

    def large(path: Path) -> str:
        with path.open("wb") as out:
            out.truncate(HUGE)  # sparse
        return "67,108,865 bytes are more than 67,108,864; split it into parts"

    def text(path: Path) -> str:
        path.write_text(f"sample_id,label\n{a},dot\n")
        return BROKEN

    def cut(path: Path) -> str:
        pq.write_table(pa.table({"sample_id": [a], "label": ["dot"]}), path)
        path.write_bytes(path.read_bytes()[:-20])
        return BROKEN

    def any_suffix(path: Path) -> int:
        path.write_text(f"sample_id,label\n{a},dot\n")
        return 1

    return {
        "folder.csv": folder,
        "pipe.json": pipe,
        "nowhere.csv": nowhere,
        "large.csv": large,
        "large.json": large,
        "text.parquet": text,
        "cut.parquet": cut,
        "labels.txt": any_suffix,
    }
