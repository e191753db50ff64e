"""Exact top-k of many scores: time and memory of one pass.

    python benchmarks/selection.py --samples 100_000_000 --budget 10_000 --out selection.json

Scores are dispersions of 40 checkpoints, so ties are the rule; they stream by in blocks as from disk. Against a full
argsort of the same keys, and numpy's argpartition, which decides no tie.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import peak_rss_bytes, report

from distal.acquire.topk import Candidates, TopK
from distal.hashing import mix64

STRIPE = 2**20


def stripe(start: int, stop: int) -> Candidates:
    """Some candidates; the same on every call."""
    index = np.arange(start, stop)
    draws = mix64("benchmark", 0, index)
    score = ((draws % np.uint64(37)).astype(np.float32) / 40).astype(np.float32)
    margin = ((draws >> np.uint64(32)) % np.uint64(1000)).astype(np.float16)
    return Candidates(index, score, margin, draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--compare", type=int, default=10_000_000, help="samples for the variants that hold them all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    top, seconds = TopK(options.budget), 0.0
    for start in range(0, options.samples, STRIPE):
        candidates = stripe(start, min(start + STRIPE, options.samples))
        began = time.perf_counter()
        top.add(candidates)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    chosen, _ = top.result()
    seconds += time.perf_counter() - began
    peak = peak_rss_bytes() / 2**20
    rows = [{"variant": "distal, streaming", "samples": options.samples, "seconds": seconds, "peak MiB": peak}]

    whole = stripe(0, options.compare)
    began = time.perf_counter()
    everything = np.lexsort((whole.index, whole.hash, whole.margin, -whole.score))[: options.budget]
    rows.append({"variant": "full sort", "samples": options.compare, "seconds": time.perf_counter() - began})
    began = time.perf_counter()
    np.argpartition(-whole.score, options.budget)[: options.budget]
    rows.append({"variant": "argpartition", "samples": options.compare, "seconds": time.perf_counter() - began})
    if options.compare == options.samples:
        assert np.array_equal(chosen.index, everything)
    else:
        small = TopK(options.budget)
        for start in range(0, options.compare, STRIPE):
            small.add(stripe(start, min(start + STRIPE, options.compare)))
        assert np.array_equal(small.result()[0].index, everything)
    for row in rows:
        row["M samples/s"] = row["samples"] / row["seconds"] / 1e6
    report("Selecting the most dispersed", rows, options.out, budget=options.budget)


if __name__ == "__main__":
    main()
