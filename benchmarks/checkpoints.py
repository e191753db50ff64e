"""Train a CIFAR ResNet-18 with plain torch and keep a state_dict per epoch: what the scoring benchmarks score.

    python benchmarks/checkpoints.py POOL OUT --epochs 40 --labelled 1000

POOL is a packed pool with labels; the first `--labelled` samples are trained on. One thread, bf16 autocast.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from distal.config import ModelSection
from distal.model.augment import crop_flip
from distal.model.spec import ModelSpec
from distal.pool import Pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pool = Pool.open(options.pool)
    spec = ModelSpec.of(ModelSection(name=options.model), pool)
    net, preprocess = spec.build().train(), spec.preprocess()
    images = torch.from_numpy(pool.read(0, options.labelled))
    labels = torch.from_numpy(pool.columns(0, options.labelled, "label")[0].astype(np.int64))
    optimizer = torch.optim.SGD(net.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = options.epochs * -(-options.labelled // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(0)
    options.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for batch in torch.randperm(options.labelled).split(options.batch_size):
            inputs = preprocess(crop_flip(images[batch], rng.integers(0, 2**63, len(batch)).astype(np.uint64)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = cross_entropy(net(inputs).float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        torch.save(net.state_dict(), options.out / f"epoch{epoch}.pt")
        print(f"epoch {epoch}: loss {total / options.labelled:.4f}", flush=True)


if __name__ == "__main__":
    main()
