"""Files that a stranger could leave in a directory of checkpoints, written by code, and what is to be said of each."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from distal.artifacts import checkpoints
from distal.storage import write_json

State = Mapping[str, torch.Tensor]
Write = Callable[[Path, State], object]

SOUND = ""  # what is expected of files that only look odd


class Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/distal-hostile",)


def _saved(change: Callable[[State, str, torch.Tensor], object], **options: bool) -> Write:
    """A state_dict whose first weights are changed; `change` returns what they become, or a whole other value."""

    def write(path: Path, state: State) -> None:
        key = next(iter(state))
        value = change(state, key, state[key])
        if isinstance(value, torch.Tensor):
            value = {**state, key: value}
        torch.save(value, path, **options)

    return write


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Write:
    return _saved(lambda state, key, value: change(value))


def _bytes(data: bytes) -> Write:
    return lambda path, state: path.write_bytes(data)


def _of_whole(change: Callable[[bytes], bytes], **options: bool) -> Write:
    def write(path: Path, state: State) -> None:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer, **options)
        path.write_bytes(change(buffer.getvalue()))

    return write


def _pickled(data: bytes) -> Write:
    """An archive as torch writes it, with another pickle in it."""

    def write(path: Path, state: State) -> None:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, data if name.endswith("data.pkl") else old.read(name))

    return write


def _deflated(path: Path, state: State) -> None:
    """Half a GB of zeros in half a MB."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            if name.endswith("data/0"):
                with new.open(name, "w", force_zip64=True) as entry:
                    for _ in range(512):
                        entry.write(bytes(2**20))
            else:
                new.writestr(name, old.read(name))


def _larger_inside(data: bytes) -> bytes:
    """Entries of which the directory says that they have three GB."""
    place, changed = 0, bytearray(data)
    while (place := data.find(b"PK\x01\x02", place)) >= 0:
        changed[place + 20 : place + 28] = struct.pack("<II", 3_000_000_000, 3_000_000_000)
        place += 4
    return bytes(changed)


def _itself(state: State) -> dict[str, Any]:
    mine: dict[str, Any] = {"epoch": 1}
    mine["mine"] = mine
    return mine


def _shared(depth: int) -> dict[str, Any]:
    """A mapping that holds another one three times, and so on: few bytes, and 3^depth ways through it."""
    inner: dict[str, Any] = {"epoch": 1}
    for _ in range(depth):
        inner = {"a": inner, "b": inner, "c": inner}
    return inner


def _nested(n: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * n + b"}" + b"s" * n + b"."


def _safetensors(header: object, n_bytes: int | None = None) -> Write:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _bytes(struct.pack("<Q", len(data) if n_bytes is None else n_bytes) + data + bytes(16))


def _manifest(**other: object) -> Write:
    """A published checkpoint whose manifest says something else."""

    def write(path: Path, state: State) -> None:
        ref = checkpoints.commit(path.parent, int(path.name), 1, dict(state))
        record = json.loads((path / "manifest.json").read_bytes())
        kept = {name: value for name, value in record.items() if name not in ("format", "record_sha256")}
        write_json(path / "manifest.json", {**kept, **other})
        (path.parent.parent / "outside.pt").write_bytes(ref.path.read_bytes())

    return write


def _manifest_bytes(data: bytes) -> Write:
    def write(path: Path, state: State) -> None:
        checkpoints.commit(path.parent, int(path.name), 1, dict(state))
        (path / "manifest.json").write_bytes(data)

    return write


def _link(target: str) -> Write:
    return lambda path, state: path.symlink_to(target)


def _socket(path: Path, state: State) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _sparse_file(path: Path, state: State) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)


def _key(name: str) -> Write:
    return _saved(lambda state, key, value: {**state, name: value})


def _ckpt(**more: object) -> Write:
    return _saved(lambda state, key, value: {"state_dict": dict(state), **more})


UNREADABLE = "truncated, or not a state_dict of plain tensors"
TENSOR = r"is a tensor of layout sparse_"
EXPANDED = "is an expanded view, which repeats its values"
MANIFEST = "its file is not beside it"

CASES: dict[str, tuple[Write, str]] = {
    # tensors
    "expanded-2e9.pt": (_tensor(lambda value: torch.zeros(1).expand(2_000_000_000)), EXPANDED),
    "expanded-1e13.pt": (_tensor(lambda value: torch.zeros(1).expand(10**13)), EXPANDED),
    "expanded-alike.pt": (_tensor(lambda value: torch.zeros(1).expand(value.shape)), EXPANDED),
    "overlapping.pt": (_tensor(lambda value: torch.zeros(20).as_strided(value.shape, [1] * value.ndim)), EXPANDED),
    "coo.pt": (_tensor(torch.Tensor.to_sparse), TENSOR),
    "csr.pt": (_tensor(lambda value: torch.eye(3).to_sparse_csr()), TENSOR),
    "nested.pt": (_tensor(lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "is a nested"),
    "meta.pt": (_tensor(lambda value: value.to("meta")), "is a tensor on the device meta"),
    "float8.pt": (_tensor(lambda value: value.to(torch.float8_e4m3fn)), "is float8_e4m3fn, and the network needs"),
    "complex.pt": (
        _tensor(lambda value: torch.complex(value, torch.full_like(value, float("nan")))),
        "is complex64, and the network needs float32",
    ),
    "int64.pt": (_tensor(lambda value: value.long()), "is int64, and the network needs float32"),
    "bool.pt": (_tensor(lambda value: value > 0), "is bool, and the network needs float32"),
    "nan.pt": (_tensor(lambda value: torch.full_like(value, float("nan"))), "has values that are not finite"),
    "inf.pt": (_tensor(lambda value: torch.full_like(value, -float("inf"))), "has values that are not finite"),
    "shape.pt": (_tensor(lambda value: torch.zeros(0, 5)), r"has shape \(0, 5\), the network needs"),
    "scalar.pt": (_tensor(lambda value: torch.zeros(())), r"has shape \(\), the network needs"),
    "half.pt": (_tensor(lambda value: value.half()), SOUND),
    "double.pt": (_tensor(lambda value: value.double()), SOUND),
    "turned.pt": (_tensor(lambda value: value.to(memory_format=torch.channels_last)), SOUND),
    "parameter.pt": (_tensor(lambda value: torch.nn.Parameter(value)), SOUND),
    # what is around them
    "integer-keys.pt": (_saved(lambda state, key, value: dict(enumerate(state.values()))), "its keys must be names"),
    "one-integer-key.pt": (_saved(lambda state, key, value: {**state, 7: value}), "its keys must be names, and 7 is a"),
    "none-key.pt": (_saved(lambda state, key, value: {**state, None: value}), "its keys must be names, and NoneType"),
    "itself.pt": (_saved(lambda state, key, value: _itself(state)), "not a state_dict of plain tensors"),
    "shared.pt": (_saved(lambda state, key, value: _shared(60)), "not a state_dict of plain tensors"),
    "deep.pt": (_pickled(_nested(100_000)), "not a state_dict of plain tensors"),
    "list.pt": (_saved(lambda state, key, value: list(state.values())), "not a state_dict of plain tensors"),
    "number.pt": (_saved(lambda state, key, value: 5), "not a state_dict of plain tensors"),
    "empty.pt": (_saved(lambda state, key, value: {}), "not a state_dict of plain tensors|do not fit"),
    "missing.pt": (_saved(lambda state, key, value: {key: value}), "its keys do not fit model.name: missing"),
    "key-lines.pt": (_key("a\n\x1b[31mred\n"), r"unexpected a\\n\\x1b\[31mred\\n"),
    "key-long.pt": (_key("k" * 10**6), r"unexpected k{97}\.\.\."),
    "step.ckpt": (_ckpt(global_step="12"), "global_step is a str"),
    "step-nan.ckpt": (_ckpt(global_step=float("nan")), "global_step is a float"),
    "step-none.ckpt": (_ckpt(global_step=None), SOUND),
    "state-list.ckpt": (_saved(lambda state, key, value: {"state_dict": [value]}), "not a state_dict of plain tensors"),
    # what would run code
    "code.pt": (_saved(lambda state, key, value: Code()), r"holds an object of posix.system"),
    "path.pt": (_saved(lambda state, key, value: {**state, "path": Path("x")}), r"holds an object of pathlib"),
    "array.pt": (_saved(lambda state, key, value: {**state, "a": np.zeros(2)}), r"holds an object of numpy"),
    "bare-pickle.pt": (_bytes(pickle.dumps(Code())), UNREADABLE),
    # archives and other bytes
    "deflated.pt": (_deflated, "a compressed archive, which torch.save does not write"),
    "larger-inside.pt": (_of_whole(_larger_inside), "claims to hold more bytes than it has"),
    "cut.pt": (_of_whole(lambda data: data[:-50]), UNREADABLE),
    "cut-early.pt": (_of_whole(lambda data: data[:100]), UNREADABLE),
    "cut-old.pt": (_of_whole(lambda data: data[:-50], _use_new_zipfile_serialization=False), UNREADABLE),
    "old.pt": (_of_whole(lambda data: data, _use_new_zipfile_serialization=False), SOUND),
    "nothing.pt": (_bytes(b""), UNREADABLE),
    "noise.pt": (_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8))), UNREADABLE),
    "text.pt": (_bytes(b"<!DOCTYPE html>\nnot found\n"), UNREADABLE),
    "zip.pt": (_bytes(b"PK\x03\x04" + bytes(100)), UNREADABLE),
    "bytearray.pt": (_pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."), "state_dict of plain"),
    "header-long.safetensors": (_safetensors({}, 2**62), UNREADABLE),
    "header-deep.safetensors": (_safetensors(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), UNREADABLE),
    "header-none.safetensors": (_safetensors(b"null"), UNREADABLE),
    "size.safetensors": (
        _safetensors({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]}}),
        UNREADABLE,
    ),
    "float8.safetensors": (
        lambda path, state: path.write_bytes(
            save_safetensors({key: value.contiguous().to(torch.float8_e5m2) for key, value in state.items()})
        ),
        "is float8_e5m2, and the network needs",
    ),
    "zip.safetensors": (_of_whole(lambda data: data), UNREADABLE),
    # kinds of files
    "fifo.pt": (lambda path, state: os.mkfifo(path), "not a regular file"),
    "socket.pt": (_socket, "not a regular file"),
    "zero.pt": (_link("/dev/zero"), "not a regular file"),
    "folder.pt": (lambda path, state: path.mkdir(), "a folder: a sharded checkpoint"),
    "sparse.pt": (_sparse_file, r"more than [\d,]+ bytes; a checkpoint of model.name is a regular file of at most"),
    # names
    "a1²3.pt": (_saved(lambda state, key, value: dict(state)), SOUND),
    "٣.pt": (_saved(lambda state, key, value: dict(state)), SOUND),
    "1" * 200 + ".pt": (_saved(lambda state, key, value: dict(state)), SOUND),
    "line\n\x1b[31mbreak1.pt": (_bytes(b""), UNREADABLE),
    os.fsdecode(b"not-utf8-\xff-1.pt"): (_saved(lambda state, key, value: dict(state)), SOUND),
    "-v1.pt": (_saved(lambda state, key, value: dict(state)), SOUND),
    # manifests; each is a folder of its own, with the name of an index
    "0000": (_manifest(file="/etc/hostname.pt"), MANIFEST),
    "0001": (_manifest(file="../../outside.pt"), MANIFEST),
    "0002": (_manifest(file=".."), MANIFEST),
    "0003": (_manifest(index=0), "not of checkpoint 3"),
    "0004": (_manifest(epoch="1"), "epoch is a str, not of type int"),
    "0005": (_manifest(file=["a.pt"]), "file is a list, not of type str"),
    "0006": (_manifest(metrics=None), "metrics is a NoneType, not of type dict"),
    "0007": (_manifest_bytes(b"{"), "not valid JSON"),
    "0008": (_manifest_bytes(b'{"a":' * 100_000), "not valid JSON"),
    "0009": (_manifest_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "0010": (_manifest(file="gone.pt"), SOUND),  # removed meanwhile, as far as can be told
}


LARGE = (
    *("expanded-2e9.pt", "expanded-1e13.pt", "shared.pt", "deep.pt", "key-long.pt", "deflated.pt", "larger-inside.pt"),
    *("bytearray.pt", "header-long.safetensors", "size.safetensors", "zero.pt", "sparse.pt"),
)
"""Those that are small, and would fill the memory if they were believed."""


def write(folder: Path, name: str, state: State) -> str:
    """Write a case, an hour ago; returns what is to be said of it, a regular expression, or `SOUND`."""
    folder.mkdir(parents=True, exist_ok=True)
    make, expected = CASES[name]
    path = folder / name
    with warnings.catch_warnings(action="ignore"):  # of torch, about kinds of tensors that are new to it
        make(path, state)
    long_ago = time.time() - 3600
    if path.exists() and not path.is_symlink():
        os.utime(path, (long_ago, long_ago))
    return expected
