"""A training script as a user has one, for `train.command`: from the beginning each time, and to the same weights."""

from __future__ import annotations

import argparse
import time

import pyarrow.parquet as pq
import torch

import distal
from distal.config import ModelSection
from distal.model.spec import ModelSpec, seeded_build


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("pool", "labels", "out"):
        parser.add_argument(f"--{name}")
    for name in ("epochs", "seed", "cycle"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pool = distal.Pool.open(options.pool)
    table = pq.read_table(options.labels)
    spec = ModelSpec(ModelSection(), len(pool.classes), pool.image_shape, pool.mean, pool.std)
    net, preprocess = seeded_build(spec, options.seed, options.cycle), spec.preprocess()
    images = preprocess(torch.from_numpy(pool.take(table["sample_index"].to_numpy())))
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(options.epochs):
        time.sleep(0.5)  # as long as an epoch takes that is worth disturbing
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distal.publish_checkpoint(options.out, net.state_dict(), epoch, metrics={"train_loss": loss.item()})


if __name__ == "__main__":
    main()
