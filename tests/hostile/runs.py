"""Run directories that want to do harm, made from a small finished one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
from numcodecs import zstd

from distal.artifacts.arrays import content_size
from distal.storage import read_json, read_yaml, write_bytes, write_json, write_table, write_yaml

CYCLE = "cycles/000"
Harm = Callable[[Path], None]


def _seal(path: Path, **values: Any) -> None:
    """Values of a record replaced, and sealed as if distal had written it."""
    if path.suffix == ".yaml":
        write_yaml(path, {**read_yaml(path), **values})
    else:
        write_json(path, {**read_json(path), **values})


def _within(path: Path, section: str, **values: Any) -> None:
    record = read_yaml(path)
    write_yaml(path, {**record, section: {**record[section], **values}})


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    """Something else where there was a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse


def _folder(path: Path) -> None:
    path.mkdir()


def _bomb(path: Path) -> None:
    frame = zstd.compress(bytes(10**8))
    assert content_size(frame) == 10**8
    path.write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))


KINDS = {"fifo": _fifo, "zero": _zero, "loop": _loop, "endless": _endless, "folder": _folder}

FILES = (
    "run.yaml", "summary.json", "waiting.json", "initial.parquet", "initial-selection.parquet", "answers",
    "answers/000000-000000000000.parquet", f"{CYCLE}/cycle.yaml", f"{CYCLE}/train.json", f"{CYCLE}/score.json",
    f"{CYCLE}/select.json", f"{CYCLE}/expected.json", f"{CYCLE}/selection.parquet", f"{CYCLE}/labels.parquet",
    f"{CYCLE}/train/state.pt", f"{CYCLE}/checkpoints/0001/manifest.json", f"{CYCLE}/assignments.zarr.json",
    f"{CYCLE}/assignments.zarr.begun/00000.json", f"{CYCLE}/assignments.zarr/assignments/zarr.json",
    f"{CYCLE}/assignments.zarr/assignments/c/1/0", f"{CYCLE}/assignments.zarr/eligible/c/0",
    f"{CYCLE}/scores.zarr/zarr.json", f"{CYCLE}/scores.zarr/margin/c/1", f"{CYCLE}/test.zarr.json",
    f"{CYCLE}/assignments.zarr.elimination", f"{CYCLE}/assignments.zarr.elimination/00002.json", "cycles",
)  # fmt: skip

TEXTS = {
    "deep": b"[" * 100_000,
    "digits": b'{"format": 3, "n": ' + b"9" * 5000 + b"}",
    "nul": b'{"format": 3, "a": "\\u0000"}\0',
    "surrogate": b'{"format": 3, "a": "\\ud800"}',
    "list": b"[]",
    "text": b"\xff\xfe\x00",
    "laughs": b"format: 3\na: &a [x, x, x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (i, i, i - 1, i - 1) for i in range(98, 123)),
    "code": b"!!python/object/apply:os.abort []",
}

SHAPES: tuple[object, ...] = (None, True, -1, 10**30, 1.5, "x", "../../..", [], {}, [[]], {"a": None})
KEYS = {
    f"{CYCLE}/score.json": ("n_rows", "inputs", "n_eligible"),
    f"{CYCLE}/train.json": ("inputs", "answers"),
    f"{CYCLE}/select.json": ("selection_sha256", "inputs"),
    f"{CYCLE}/label.json": ("inputs",),
    f"{CYCLE}/test.json": ("inputs",),
    f"{CYCLE}/checkpoints/0001/manifest.json": ("file", "sha256", "index"),
    f"{CYCLE}/assignments.zarr.json": ("n_rows", "n_samples", "block_size", "n_classes", "recorded"),
    f"{CYCLE}/assignments.zarr.begun/00000.json": ("weights",),
    "run.yaml": ("fixed", "constants"),
    f"{CYCLE}/cycle.yaml": ("train", "score", "select", "pool", "label", "loop", "device", "run"),
}


def _metadata(key: str, value: object) -> Harm:
    def harm(run: Path) -> None:
        path = run / CYCLE / "assignments.zarr/assignments/zarr.json"
        write_bytes(path, json.dumps({**json.loads(path.read_text()), key: value}).encode())

    return harm


def cases() -> Iterator[tuple[str, Harm]]:
    """A name for each, and what does it to a copy of the run. Each can be done after all others, too."""
    for name in FILES:
        for kind, make in KINDS.items():
            yield f"{kind} {name}", lambda run, name=name, make=make: _put(run / name, make)
    for name in FILES:
        if name.endswith((".json", ".yaml")):
            for kind, text in TEXTS.items():
                yield (
                    f"{kind} {name}",
                    lambda run, name=name, text=text: _put(run / name, lambda p: p.write_bytes(text)),
                )
    for name, keys in KEYS.items():
        for shape in SHAPES:
            values = dict.fromkeys(keys, shape)
            yield f"{shape!r} {name}", lambda run, name=name, values=values: _seal(run / name, **values)
    for key in KEYS[f"{CYCLE}/assignments.zarr.json"]:
        for shape in (0, -1, 10**12, 10**30):
            yield (
                f"{key}={shape} assignments.zarr.json",
                lambda run, key=key, shape=shape: _seal(run / CYCLE / "assignments.zarr.json", **{key: shape}),
            )
    yield "rows", lambda run: _seal(run / CYCLE / "score.json", n_rows=10**30)
    yield "plugins", plugins
    yield "bomb", lambda run: _put(run / CYCLE / "assignments.zarr/assignments/c/2/1", _bomb)
    yield "many epochs", lambda run: _within(run / CYCLE / "cycle.yaml", "train", epochs=10**12)
    yield (
        "a weights file that is a device",
        lambda run: _seal(run / CYCLE / "checkpoints/0000/manifest.json", file="/dev/zero"),
    )
    yield (
        "a weights file elsewhere",
        lambda run: _seal(run / CYCLE / "checkpoints/0000/manifest.json", file="../../../../../../../../etc/passwd"),
    )
    for key, value in (("shape", [10**12, 10**12]), ("codecs", []), ("data_type", "int128"), ("fill_value", "x")):
        yield f"metadata {key}", _metadata(key, value)
    yield "other columns", lambda run: write_table(run / CYCLE / "selection.parquet", pa.table({"a": [1]}))
    yield (
        "no rows",
        lambda run: write_table(run / CYCLE / "labels.parquet", pa.table({"sample_index": pa.array([], pa.int64())})),
    )
    yield "names", names


def _put(path: Path, make: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _instead(path, make)


def plugins(run: Path) -> None:
    """Whatever of these is imported leaves a mark, or ends the process."""
    (run / "mine.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Thing: ...\n"
    )
    for cycle, thing in ((CYCLE, "mine:Thing"), ("cycles/001", "os:abort")):
        path = run / cycle / "cycle.yaml"
        _within(path, "select", batch=thing)
        _within(path, "model", name=thing, normalize=thing, output=thing)


def names(run: Path) -> None:
    """Names that are no UTF-8, no number, or numbers of another script."""
    for folder in (
        "answers",
        "cycles",
        "driver",
        f"{CYCLE}/analyses",
        f"{CYCLE}/assignments.zarr.elimination",
        f"{CYCLE}/checkpoints",
    ):
        (run / folder).mkdir(exist_ok=True)
        for name in (b"\xff\xfe", "²".encode(), "٣٣٣".encode(), b"-001", b"9" * 100, b"a\nb", b" "):
            Path(os.fsdecode(os.fsencode(run / folder) + b"/" + name)).mkdir(exist_ok=True)
    write_bytes(run / "answers/000007-0123456789ab.parquet", b"{}")
    path = run / CYCLE / "analyses" / "select" / "select-99999999999999999999.json"
    write_json(path, {"inputs": {}, "inputs_sha256": "", "seconds": 0})
