"""What tests make their inputs with."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from typer.testing import CliRunner

from distal.cli import app as app_module
from distal.config import Config, ModelSection, ScoreConfig, parse
from distal.model.spec import ModelSpec, seeded_build
from distal.pool import Pool

CLASSES = ("circle", "cross", "dot", "line")
SIDE = 12


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def draw_images(labels: np.ndarray, seed: int) -> list[bytes]:
    """PNG images that can be told apart: a bright quarter for each of four classes, and noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (len(labels), SIDE, SIDE)).astype(np.uint8)
    half = SIDE // 2
    for image, label in zip(images, labels, strict=True):
        y, x = divmod(int(label) % 4, 2)
        image[y * half : (y + 1) * half, x * half : (x + 1) * half] += 60
    return [png(image) for image in images]


def write_source(path: Path, n: int, seed: int, n_classes: int = 4, **columns: list[object]) -> Path:
    """A Parquet source of `n` images; `columns` replace or add columns."""
    labels = np.random.default_rng(seed).integers(0, n_classes, n)
    table = {
        "sample_id": [f"s{seed}-{i:05d}" for i in range(n)],
        "image": draw_images(labels, seed),
        "label": labels.tolist(),
        "class_name": [CLASSES[label] for label in labels],
        **columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=100)
    return path


SMALL_RUN = {
    "device": "cpu",
    "pool": {"block_size": 64},
    "loop": {"cycles": 2, "initial": 24, "budget": 16},
    "train": {"epochs": 3, "batch_size": 16, "threads": 1},
    "score": {"batch_size": 32, "precision": "fp32", "actors": 1},  # one process less to start, or two
}


def small_config(run: Path, pool: Pool, test: Pool | None, *overrides: str) -> Config:
    """Two cycles of three checkpoints, in seconds."""
    tree = {**SMALL_RUN, "run": str(run), "pool": {**SMALL_RUN["pool"], "path": str(pool.path)}}
    paths = [f"eval.test={test.path}"] if test else []
    return parse(tree, [*paths, *overrides])


def small_overrides(run: Path, pool: Pool, test: Pool | None) -> list[str]:
    """The same as command-line overrides of the shipped quickstart."""
    test_path = "null" if test is None else str(test.path)
    sections = {section: keys for section, keys in SMALL_RUN.items() if isinstance(keys, dict)}
    keys = [f"{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    return [f"run={run}", "device=cpu", f"pool.path={pool.path}", "pool.source=null", f"eval.test={test_path}", *keys]


def descendants(title: str) -> list[int]:
    """Ids of the processes below this one whose command line contains `title`, youngest last."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "status").read_text()
                titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(folder.name)] = int(status.split("PPid:")[1].split()[0])
    mine = {os.getpid()}
    for _ in range(4):
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    return sorted(pid for pid in mine if title in titles.get(pid, ""))


def write_checkpoints(folder: Path, pool: Pool, rows: Sequence[int]) -> None:
    """state_dicts of `small_cnn` that agree on some images and not on others, as a training run leaves them."""
    spec = ModelSpec(ModelSection(), 4, pool.image_shape, pool.mean, pool.std)
    folder.mkdir(parents=True, exist_ok=True)
    settled = seeded_build(spec, seed=0, cycle=0).state_dict()
    for row in rows:
        other = seeded_build(spec, seed=row + 1, cycle=0).state_dict()
        state = {
            name: value.lerp(other[name], 0.3) if value.is_floating_point() else value
            for name, value in settled.items()
        }
        path = folder / f"epoch{row + 1}.pt"
        torch.save(state, path)
        long_ago = time.time() - 3600
        os.utime(path, (long_ago, long_ago))


def foreign_config(run: Path, pool: Pool, checkpoints: Path, *overrides: str) -> ScoreConfig:
    """Scoring the small pool at some checkpoints of `small_cnn`."""
    tree = {
        "run": str(run),
        "device": "cpu",
        "pool": {"path": str(pool.path), "block_size": 64},
        "model": {"num_classes": 4, "normalize": "pool"},
        "checkpoints": {"path": str(checkpoints)},
        "score": {"precision": "fp32", "batch_size": 32, "budget": 20, "actors": 1},
    }
    return parse(tree, overrides, ScoreConfig)


def flip(path: Path, where: float = 0.5) -> None:
    """One bit of the byte at a share of the file."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def content(run: Path) -> dict[str, object]:
    """Every array, table and weights file of a run, decoded where it decodes: what must be the same however it ran."""
    told: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".pt" and path.name != "state.pt":
            told[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".parquet":
            with suppress(pa.ArrowInvalid, OSError):
                told[name] = pq.read_table(path, page_checksum_verification=True).to_pylist()
        elif path.name == "zarr.json":
            with suppress(Exception):
                array = zarr.open_array(path.parent, mode="r")
                told[name] = (array.shape, array[...].tobytes())
    return told


def distal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process, where its text and its exit code are the subject: no start of a process.

    Signals, and what only a real process shows, are for tests that start one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "_stop_on_signals", lambda *_: None)
        done = CliRunner().invoke(app_module.app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@contextmanager
def ray_head(environment: dict[str, str], *options: str) -> Iterator[None]:
    """`ray start --head` with a folder of its own; all that it started is ended by its ids."""
    ray = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        log = Path(folder, "head.log")
        fixed = [f"--temp-dir={folder}", "--object-store-memory=100000000", "--disable-usage-stats"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [ray, "start", "--head", "--block", *fixed, *options],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text())
            assert process.poll() is None, log.read_text()
            yield
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            for child in psutil.wait_procs(started, timeout=10)[1]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def free_ports(n: int) -> list[int]:
    """Ports of this machine at which nobody listens."""
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition: Callable[[], object], timeout_s: float = 400) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
