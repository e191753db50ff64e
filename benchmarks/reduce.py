"""How fast assignments become dispersion: the kernel alone, and from Zarr on disk.

    python benchmarks/reduce.py --samples 10_000_000 --checkpoints 20 --out reduce.json

kernel: labels in RAM to dispersion on one core, against chunked numpy and scikit-activeml's `variation_ratios`.
disk: what `distal reduce` does, scores written, against a bare read of the same array with zarr-python. The files were
just written, so they come from the page cache in both. Labels are random, a class of the sample's own 70% of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from common import peak_rss_bytes, report

from distal.artifacts.assignments import Assignments, dtype_for
from distal.kernels import mode_counts
from distal.records import split_blocks

BLOCK = 65_536


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median of several, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def labels(n_rows: int, n_samples: int, n_classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    own = rng.integers(0, n_classes, n_samples)
    other = rng.integers(0, n_classes, (n_rows, n_samples))
    return np.where(rng.random((n_rows, n_samples)) < 0.7, own, other).astype(dtype_for(n_classes))


def with_numpy(votes: np.ndarray, n_classes: int) -> np.ndarray:
    """One comparison of the block per class, a few thousand samples at a time."""
    out = np.empty(votes.shape[1])
    for start in range(0, votes.shape[1], 8192):
        part = votes[:, start : start + 8192]
        largest = np.zeros(part.shape[1], np.int64)
        for c in range(n_classes):
            np.maximum(largest, np.count_nonzero(part == c, axis=0), out=largest)
        out[start : start + 8192] = 1 - largest / len(votes)
    return out


def kernel(n_rows: int) -> list[dict[str, Any]]:
    from skactiveml.pool._query_by_committee import variation_ratios

    rows = []
    for n_classes in (10, 100, 1000):
        votes = labels(n_rows, 1_000_000, n_classes)
        rates = {"distal": votes.size / seconds(lambda: mode_counts(votes, n_classes)) / 1e6}  # noqa: B023
        few = votes[:, : 1_000_000 if n_classes <= 10 else 50_000]
        rates["numpy"] = few.size / seconds(lambda: with_numpy(few, n_classes), 1) / 1e6  # noqa: B023
        part = votes[:, :50_000].T.astype(int)
        rates["scikit-activeml"] = part.size / seconds(lambda: variation_ratios(part), 1) / 1e6  # noqa: B023
        expected = variation_ratios(part)
        found = 1 - mode_counts(votes[:, :50_000], n_classes)[0] / n_rows
        assert np.array_equal(found, expected)
        rows.append({"classes": n_classes} | {f"{name}, M labels/s": rate for name, rate in rates.items()})
        rows[-1]["/ numpy"] = rates["distal"] / rates["numpy"]
        rows[-1]["/ scikit-activeml"] = rates["distal"] / rates["scikit-activeml"]
    return rows


def disk(folder: Path, n_rows: int, n_samples: int, n_classes: int, repeats: int) -> list[dict[str, Any]]:
    path = folder / "assignments.zarr"
    blocks = split_blocks(n_samples, BLOCK)
    assignments = Assignments.create(
        path,
        n_rows=n_rows,
        n_samples=n_samples,
        block_size=BLOCK,
        n_classes=n_classes,
        eligible=(np.ones(len(block), bool) for block in blocks),
    )
    for block in blocks:
        votes = labels(n_rows, len(block), n_classes, seed=block.index)
        for row in range(n_rows):
            assignments.write(row, block, votes[row])
    array = zarr.open_array(path / "assignments")
    bare, ours = [], []
    for _ in range(repeats):  # in turn, so that both see the same machine
        started = time.perf_counter()
        array[:]
        bare.append(time.perf_counter() - started)
        ours.append(json.loads(_reduce(folder)))
    n_labels = n_rows * n_samples
    rates = {
        "bare read with zarr-python": n_labels / statistics.median(bare) / 1e6,
        "distal reduce": n_labels / statistics.median(each["seconds"] for each in ours) / 1e6,
    }
    return [
        {
            "variant": name,
            "M labels/s": rate,
            "/ bare read": rate / rates["bare read with zarr-python"],
            "peak MiB": max(each["peak"] for each in ours) / 2**20 if name == "distal reduce" else "",
        }
        for name, rate in rates.items()
    ]


def _reduce(folder: Path) -> str:
    """In a process of its own, for its peak memory; imports are not timed."""
    command = [sys.executable, __file__, "--child", str(folder)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def child(folder: Path) -> None:
    from distal.pool import Pool
    from distal.reduce.stream import Reduction, reduce

    assignments = Assignments.open(folder / "assignments.zarr")
    pool = Pool(folder, "", assignments.n_samples, (1, 1, 1), None, (0.0,), (1.0,), "", (), 0)
    mode_counts(np.zeros((2, 2), assignments.dtype), assignments.n_classes)  # compiled, or loaded, before it is timed
    started = time.perf_counter()
    reduction = Reduction(assignments, pool, ("dispersion",), range(assignments.n_rows))
    reduce(reduction, folder / "scores.zarr")
    took = time.perf_counter() - started
    print(json.dumps({"seconds": took, "peak": peak_rss_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    rows = kernel(options.checkpoints)
    report("Kernel: labels in RAM to dispersion, one core", rows, _beside(options.out, "kernel"), T=options.checkpoints)
    with tempfile.TemporaryDirectory() as folder:
        rows = disk(Path(folder), options.checkpoints, options.samples, options.classes, options.repeats)
    facts = {"N": options.samples, "T": options.checkpoints, "classes": options.classes, "median_of": options.repeats}
    report("From Zarr on disk to dispersion on disk", rows, _beside(options.out, "disk"), **facts)


def _beside(out: Path | None, what: str) -> Path | None:
    return out and out.with_stem(f"{out.stem}-{what}")


if __name__ == "__main__":
    main()
