"""A pool in which every image is there five times: how many different ones does a batch have?

    python benchmarks/duplicates.py [--images 2000] [--copies 5] [--seeds 3]

Fashion-MNIST, small_cnn, 15 checkpoints on 200 labelled images; a batch of 200 by dispersion, by top-k, by power
sampling and by k-center greedy of the 2,000 most dispersed.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import conditions
from distal import Pool, Run, build, cluster, run
from distal.config import parse

BUDGET = 200


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--copies", type=int, default=5)
    options.add_argument("--seeds", type=int, default=3)
    given = options.parse_args()
    cluster.secure("local")
    print(conditions())
    with tempfile.TemporaryDirectory() as folder, cluster.connect("local"):
        pool = duplicated(Path(folder), given.images, given.copies)
        print(f"{pool.n_samples:,} samples, {given.images:,} images; distinct images in a batch of {BUDGET}:")
        print("| batch | " + " | ".join(f"seed {seed}" for seed in range(given.seeds)) + " |")
        print("|---" * (given.seeds + 1) + "|")
        for batch in ("top_k", "power", "k_center"):
            distinct = []
            for seed in range(given.seeds):
                tree = {
                    "run": f"{folder}/{batch}-{seed}",
                    "seed": seed,
                    "pool": {"path": str(pool.path)},
                    "loop": {"cycles": 1, "initial": 200, "budget": BUDGET},
                    "select": {"measure": "dispersion", "batch": batch},
                }
                run(parse(tree))
                chosen = Run.open(f"{folder}/{batch}-{seed}").cycle(0).chosen().indices
                distinct.append(len(np.unique(chosen // given.copies)))
            print(f"| {batch} | " + " | ".join(map(str, distinct)) + " |", flush=True)


def duplicated(folder: Path, n: int, copies: int) -> Pool:
    """`n` images of the built-in Fashion-MNIST, each `copies` times in a row."""
    single = build("builtin:fashion-mnist-12k", folder / "single")
    labels = single.samples(0, n, ["label"])["label"].to_pylist()
    encoded = [png(image) for image in single.take(np.arange(n))[:, 0]]
    table = {
        "sample_id": [f"{i}-{copy}" for i in range(n) for copy in range(copies)],
        "image": [image for image in encoded for _ in range(copies)],
        "label": [label for label in labels for _ in range(copies)],
    }
    pq.write_table(pa.table(table), folder / "duplicated.parquet")
    return build(str(folder / "duplicated.parquet"), folder / "pool")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
