"""How fast a pool is scored, against what one would write without distal.

    python benchmarks/checkpoints.py POOL CHECKPOINTS --epochs 8
    python benchmarks/score.py POOL CHECKPOINTS --out score.json

Every variant runs in processes of its own, on the same images, the same checkpoints and the same cores:

limit       the bare loop: bf16, channels-last, images resident as tensors, one process per core; nothing is stored
plain       a DataLoader loop as one writes it first: fp32, torch's default threads, decoded images in memory
ray-data    Ray Data: map_batches with a pool of actors, one per core, fp32; weights as for `plain`
fp32, bf16  `distal score`: images read from the pool, assignments written to Zarr
one-actor   `distal score` in bf16 with a single actor
eliminate   `distal score` in bf16 with exact elimination at a budget of 1%

A rate is images x checkpoints over seconds, from the first hand-out to the last commit; starting processes and
importing torch is left out of every variant. `--few` checkpoints are enough to time the variants that store nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STORED = ("fp32", "bf16", "one-actor", "eliminate")
BATCH = 128


def natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def build(options: argparse.Namespace) -> tuple[Any, Any, np.ndarray]:
    """Network, preprocessing and images, the same for every variant."""
    from distal.config import ModelSection
    from distal.model.spec import ModelSpec
    from distal.pool import Pool

    pool = Pool.open(options.pool)
    spec = ModelSpec.of(ModelSection(name=options.model), pool)
    return spec.build(pretrained=False).eval(), spec.preprocess(), pool.read(0, pool.n_samples)


def limit(options: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    start, done = multiprocessing.Barrier(options.cores), multiprocessing.Queue()
    arguments = [(options, files, core, start, done) for core in range(options.cores)]
    processes = [multiprocessing.Process(target=_limit, args=each) for each in arguments]
    for process in processes:
        process.start()
    spans = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return {"images": sum(n for n, _, _ in spans), "seconds": max(b for _, _, b in spans) - min(a for _, a, _ in spans)}


def _limit(options: argparse.Namespace, files: list[Path], core: int, start: Any, done: Any) -> None:
    import torch

    torch.set_num_threads(1)
    net, preprocess, images = build(options)
    own = torch.from_numpy(images[core :: options.cores].copy())
    own = own.to(memory_format=torch.channels_last)
    net.load_state_dict(torch.load(files[-1], weights_only=True))
    net = net.to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(preprocess(own[:BATCH]))
        start.wait()
        began = time.time()
        for _ in files:
            for batch in own.split(BATCH):
                net(preprocess(batch)).argmax(dim=1)
    done.put((len(own) * len(files), began, time.time()))


def plain(options: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    net, preprocess, images = build(options)
    net = net.to(memory_format=torch.contiguous_format)
    loader = DataLoader(TensorDataset(torch.from_numpy(images).contiguous()), batch_size=BATCH)
    labels = []
    with torch.inference_mode():
        net(preprocess(next(iter(loader))[0]))
        began = time.time()
        for file in files:
            net.load_state_dict(torch.load(file, weights_only=True))
            labels.append(torch.cat([net(preprocess(batch)).argmax(dim=1) for (batch,) in loader]))
        seconds = time.time() - began
    np.save(options.labels, torch.stack(labels).numpy())
    return {"images": len(images) * len(files), "seconds": seconds}


def ray_data(options: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    import ray
    import torch

    class Classify:
        def __init__(self) -> None:
            self.net, self.preprocess, _ = build(options)
            self.file = None

        def __call__(self, batch: dict[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                if file != self.file:
                    self.net.load_state_dict(torch.load(file, weights_only=True))
                    self.file = file
                images = torch.from_numpy(batch["image"].copy()).permute(0, 3, 1, 2)
                labels = self.net(self.preprocess(images)).argmax(dim=1)
            return {"index": batch["index"], "label": labels.numpy()}

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=options.cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    _, _, images = build(options)
    table = {"image": images.transpose(0, 2, 3, 1), "index": np.arange(len(images))}
    pool = ray.data.from_numpy(np.array_split(table["image"], 2 * options.cores)).materialize()

    def one(file: Path) -> int:
        def tagged(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"image": batch["data"], "index": np.arange(len(batch["data"]))}

        scored = pool.map_batches(tagged, batch_size=BATCH).map_batches(
            Classify,
            fn_kwargs={"file": str(file)},
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=options.cores),
            num_cpus=1,
        )
        return sum(len(batch["label"]) for batch in scored.iter_batches(batch_size=None))

    began = time.time()
    n = sum(one(file) for file in files)
    seconds = time.time() - began
    ray.shutdown()
    return {"images": n, "seconds": seconds}


def stored(options: argparse.Namespace, files: list[Path], variant: str) -> dict[str, Any]:
    """`distal score` in a directory of its own."""
    from distal.pool import Pool

    run = Path(options.work) / variant
    folder = Path(options.work) / f"{variant}-checkpoints"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    budget = max(1, Pool.open(options.pool).n_samples // 100)
    keys = {
        "run": run,
        "pool.path": options.pool.resolve(),
        "model.name": options.model,
        "model.normalize": "pool",
        "model.num_classes": 10,
        "checkpoints.path": folder,
        "score.precision": "fp32" if variant == "fp32" else "bf16",
        "score.eliminate": "exact" if variant == "eliminate" else "none",
        "score.actors": 1 if variant == "one-actor" else "auto",
        "score.budget": budget,
    }
    config = Path(__file__).parents[1] / "configs" / "score.yaml"
    overrides = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "distal", "score", str(config), *overrides, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    told = json.loads(result.stdout)
    return {
        # Passes that were left out count as done: the selection is the same.
        "images": told["images_scored"] + told["images_left_out"],
        "scored": told["images_scored"],
        "seconds": told["seconds"],
        "bookkeeping ms": 1000 * told["bookkeeping_seconds"] / told["hand_outs"],
        "actor MiB": told["peak_rss_bytes"]["actor"] / 2**20,
        "batch size": told["batch_size"],
        "selection": told["selection_sha256"][:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--few", type=int, default=2, help="checkpoints for the variants that store nothing")
    parser.add_argument("--variants", default="limit,plain,ray-data,fp32,bf16,limit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--labels", help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = sorted((path for path in options.checkpoints.iterdir() if path.suffix == ".pt"), key=natural)
    if options.variant:  # one of the processes that the loop below starts
        bare = {"limit": limit, "plain": plain, "ray-data": ray_data}
        if options.variant in bare:
            print(json.dumps(bare[options.variant](options, files[-options.few :])))
        else:
            print(json.dumps(stored(options, files, options.variant)))
        return

    from common import report

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        labels = str(Path(work) / "plain.npy")
        for variant in options.variants.split(","):
            command = [sys.executable, __file__, str(options.pool), str(options.checkpoints), f"--variant={variant}"]
            command += [f"--work={work}", f"--labels={labels}", f"--model={options.model}", f"--cores={options.cores}"]
            result = subprocess.run([*command, f"--few={options.few}"], stdout=subprocess.PIPE, text=True, check=True)
            told = json.loads(result.stdout.strip().splitlines()[-1])
            rows.append({"variant": variant, "images/s": told["images"] / told["seconds"], **told})
            print(rows[-1], file=sys.stderr, flush=True)
            if variant in STORED and Path(labels).exists():
                rows[-1]["same as plain"] = agreement(Path(work) / variant, np.load(labels), len(files))
    rates: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["variant"], []).append(row["images/s"])
    for row in rows:
        for other in ("limit", "plain", "ray-data"):
            if other in rates:
                row[f"/ {other}"] = row["images/s"] / float(np.mean(rates[other]))
    report(
        f"Scoring with {options.model}",
        rows,
        options.out,
        pool=options.pool.name,
        checkpoints=len(files),
        checkpoints_for_baselines=options.few,
    )


def agreement(run: Path, labels: np.ndarray, n_rows: int) -> float:
    """Share of the labels that are those of the plain loop, at the checkpoints that it scored."""
    from distal.artifacts.assignments import Assignments

    assignments = Assignments.open(run / "cycles/000/assignments.zarr")
    rows = range(n_rows - len(labels), n_rows)
    mine = assignments.read(0, assignments.n_samples, rows)
    there = mine < assignments.n_classes
    return float((mine == labels)[there].mean())


if __name__ == "__main__":
    main()
