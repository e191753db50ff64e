"""Ten million samples through the real actors, store, reducer and selection.

    python benchmarks/scale.py --samples 1_000_000 10_000_000 --checkpoints 20 --out scale.json

A synthetic pool of 4x4 grey images, and a network so small (16 x 10 weights) that what is timed is everything else:
reading, hand-outs, writing, reducing, selecting. Checkpoints are random. Driver memory is told per pool size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import report
from torch import nn

from distal.artifacts.arrays import create_array
from distal.hashing import sample_keys
from distal.pool.images import IMAGES, MANIFEST, OK, SAMPLES, SCHEMA
from distal.records import auto_block_size, split_blocks
from distal.storage import parquet_writer, write_json

SIDE, CLASSES = 4, 10


def linear(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The trivial network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(image_shape)), num_classes))


def write_pool(folder: Path, n_samples: int) -> None:
    """A pool as `distal pool build` writes it, without decoding ten million files first."""
    block_size = auto_block_size(n_samples)
    shape = (SIDE, SIDE, 1)
    dimensions = ("sample", "height", "width", "channel")
    array = create_array(folder / IMAGES, (n_samples, *shape), (block_size, *shape), "uint8", 0, dimensions)
    rng = np.random.default_rng(0)
    with parquet_writer(folder / SAMPLES, SCHEMA) as writer:
        for block in split_blocks(n_samples, block_size):
            n = len(block)
            array.write((slice(block.start, block.stop),), rng.integers(0, 256, (n, *shape)).astype(np.uint8))
            ids = [f"s{i:09d}" for i in range(block.start, block.stop)]
            columns = [np.arange(block.start, block.stop), ids, sample_keys(ids), ids, [OK] * n]
            writer.write_table(pa.table([*columns, pa.nulls(n, pa.int32()), pa.nulls(n, pa.string())], schema=SCHEMA))
    record = {"source": "synthetic", "n_samples": n_samples, "n_unreadable": 0, "channels": 1, "height": SIDE}
    record |= {"width": SIDE, "classes": None, "class_counts": [], "mean": [0.5], "std": [0.29]}
    write_json(folder / MANIFEST, record | {"content_sha256": f"synthetic-{n_samples}"})


def measure(work: Path, n_samples: int, n_rows: int, batch_size: int) -> dict[str, Any]:
    folder = work / str(n_samples)
    write_pool(folder / "pool", n_samples)
    (folder / "checkpoints").mkdir()
    for row in range(n_rows):
        torch.manual_seed(row)
        torch.save(linear(CLASSES, (1, SIDE, SIDE)).state_dict(), folder / "checkpoints" / f"epoch{row + 1}.pt")
    keys = {
        "run": folder / "run",
        "pool.path": folder / "pool",
        "model.name": "scale:linear",
        "model.num_classes": CLASSES,
        "model.normalize": "pool",
        "checkpoints.path": folder / "checkpoints",
        "score.precision": "fp32",
        "score.batch_size": batch_size,
        "score.budget": n_samples // 1000,
    }
    config = Path(__file__).parents[1].resolve() / "configs" / "score.yaml"
    command = [sys.executable, "-m", "distal", "score", str(config), *(f"{key}={value}" for key, value in keys.items())]
    began = time.time()
    done = subprocess.run(
        [*command, "--json"], stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parent
    )
    wall = time.time() - began
    if done.returncode:
        raise SystemExit(done.stdout)
    told = json.loads(done.stdout)
    reduced = json.loads((Path(told["selection"]).parent / "reduce.json").read_text())
    selected = json.loads((Path(told["selection"]).parent / f"select-{n_samples // 1000}.json").read_text())
    return {
        "samples": n_samples,
        "forwards": told["images_scored"],
        "score s": told["seconds"],
        "M images/s": told["images_per_s"] / 1e6,
        "hand-outs": told["hand_outs"],
        "bookkeeping ms": 1000 * told["bookkeeping_seconds"] / told["hand_outs"],
        "bookkeeping share": told["bookkeeping_seconds"] / told["seconds"],
        "reduce s": reduced["seconds"],
        "select s": selected["seconds"],
        "wall s": wall,
        "driver MiB": told["peak_rss_bytes"]["driver"] / 2**20,
        "actor MiB": told["peak_rss_bytes"]["actor"] / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = []
        for n in options.samples:
            rows.append(measure(Path(work), n, options.checkpoints, options.batch_size))
            print(rows[-1], file=sys.stderr, flush=True)
    facts = {"T": options.checkpoints, "batch_size": options.batch_size}
    if len(rows) > 1:
        grown = (rows[-1]["driver MiB"] - rows[0]["driver MiB"]) * 2**20
        facts["driver_bytes_per_sample"] = round(grown / (rows[-1]["samples"] - rows[0]["samples"]), 2)
    report("Many samples, a trivial network", rows, options.out, **facts)


if __name__ == "__main__":
    main()
