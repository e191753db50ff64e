"""How far scoring scales: the real `Plan`, with actors and a driver that live in virtual time.

    python benchmarks/projection.py --out projection.json

Of its numbers some are measured (the seconds that `Plan` takes at this size, here and now), some are assumed (`Costs`),
and the others are simulated from these, or counted. docs/scaling.md says which is which.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from common import conditions, peak_rss_bytes, report

from distal.artifacts.assignments import Assignments
from distal.records import MAX_BLOCK_SIZE, auto_block_size, split_blocks
from distal.score.loop import HAND_OUT_S
from distal.score.plan import IN_FLIGHT, Plan, Task

IMAGE_BYTES = 32 * 32 * 3


@dataclass(frozen=True)
class Costs:
    """What the simulation is told.

    Attributes:
        images_per_s: of one actor, with reading, decoding, loading weights and writing. 184 is measured: half of what
            two CPU actors reach with a ResNet-18 on 32x32 images (docs/benchmarks.md).
        hand_out_s: of the driver for a hand-out, besides `Plan`: the call, the answer, its share of polling. Measured:
            .17 ms for each of 3,060 (checkpoint, block) pairs (docs/benchmarks.md, 10 M samples) that went out in 476
            hand-outs, as `simulate` finds for the same pass.
        pending_s: added to that for every call that is pending when `ray.wait` is asked. From Ray's own benchmark
            `single_client_wait_1k_refs`: 5.67 times a second 1,000 tasks are started and waited for one by one, 500 on
            average pending. If all of that were waiting it would be .35 us each.
    """

    images_per_s: float = 184.0
    hand_out_s: float = 1.1e-3
    pending_s: float = 0.35e-6


@dataclass(frozen=True)
class Simulated:
    """What a pass came to.

    Attributes:
        seconds: virtual, from the first hand-out to the last commit.
        hand_outs: calls of actors.
        pairs: (checkpoint, block) pairs committed.
        images: predictions.
        busy_s: of all actors together.
        driver_s: virtual, of the driver; `plan_s` of them were measured.
        lag_s: from the last publication to the last commit.
    """

    seconds: float
    hand_outs: int
    pairs: int
    images: int
    busy_s: float
    driver_s: float
    plan_s: float
    lag_s: float


def simulate(
    n_samples: int,
    block_size: int,
    n_rows: int,
    n_actors: int,
    costs: Costs,
    *,
    publish_every: float = 0.0,
    slow: float = 0.0,
    slowness: float = 4.0,
    timer: Callable[[], float] = time.thread_time,
    on_commit: Callable[[Task], None] = lambda task: None,
) -> Simulated:
    """One pass, as `distal.score.loop` drives it: one commit, then whatever can be handed out, and so on.

    Args:
        publish_every: virtual seconds between checkpoints; 0: all are there at the start.
        slow: share of the actors that take `slowness` times as long.
        timer: what the seconds of `Plan` are measured with; they pass for the driver.
    """
    blocks = split_blocks(n_samples, block_size)
    plan = Plan(n_rows, len(blocks))
    n_slow = round(slow * n_actors)
    speed = [costs.images_per_s / (slowness if actor < n_slow else 1) for actor in range(n_actors)]
    free_at = [0.0] * n_actors  # when an actor has finished all it has in hand
    coming: list[tuple[float, int, Task]] = []  # commits, by time
    clock = busy_s = driver_s = plan_s = 0.0
    hand_outs = images = n_published = 0
    for actor in range(n_actors):
        plan.actor_joined(actor)
    while not plan.finished:
        began = timer()
        while n_published < n_rows and n_published * publish_every <= clock:
            plan.published(n_published)
            n_published += 1
        handed_out = plan.next_tasks()
        spent = timer() - began
        plan_s += spent
        clock += spent
        driver_s += spent
        for task in handed_out:
            spent = costs.hand_out_s + costs.pending_s * len(coming)
            clock += spent
            driver_s += spent
            seconds = len(task.rows) * len(blocks[task.block]) / speed[task.actor]
            free_at[task.actor] = max(free_at[task.actor], clock) + seconds
            busy_s += seconds
            hand_outs += 1
            heappush(coming, (free_at[task.actor], hand_outs, task))
        next_published = n_published * publish_every if n_published < n_rows else float("inf")
        if not coming or next_published < coming[0][0]:
            clock = max(clock, next_published)
            continue
        at, _, task = heappop(coming)
        clock = max(clock, at)
        began = timer()
        plan.done(task)
        spent = timer() - began
        plan_s += spent
        clock += spent
        driver_s += spent
        images += len(task.rows) * len(blocks[task.block])
        # As `ScoringPass._limit_hand_outs`: an actor has no more than so many seconds of work in hand.
        plan.max_rows = max(1, int(HAND_OUT_S * images / (clock * n_actors) / (n_samples / len(blocks))))
        on_commit(task)
    lag_s = clock - (n_rows - 1) * publish_every
    return Simulated(clock, hand_outs, n_rows * len(blocks), images, busy_s, driver_s, plan_s, lag_s)


def row_of(
    n_samples: int, n_actors: int, n_rows: int, costs: Costs, block_size: int | None = None, **options: float
) -> dict[str, Any]:
    """A line of the tables. `publish_every` is told as a multiple of the time that the actors need for a checkpoint."""
    block_size = block_size or auto_block_size(n_samples)
    ideal = n_samples / costs.images_per_s / n_actors
    if "publish_every" in options:
        options["publish_every"] *= ideal
    found = simulate(n_samples, block_size, n_rows, n_actors, costs, **options)  # type: ignore[arg-type]
    row = {
        "samples": n_samples,
        "actors": n_actors,
        "block size": block_size,
        "blocks": -(-n_samples // block_size),
        "hours": found.seconds / 3600,
        "M images/s": found.images / found.seconds / 1e6,
        "actors busy": found.busy_s / found.seconds / n_actors,
        "rows a hand-out": found.pairs / found.hand_outs,
        "driver busy": found.driver_s / found.seconds,
        "Plan us": 1e6 * found.plan_s / found.hand_outs,
        "hand-outs/s at most": found.hand_outs / found.driver_s,
        "files/s": (found.pairs + found.pairs / n_rows) / found.seconds,  # margins of the last checkpoint
        "read GB/s": found.images * found.hand_outs / found.pairs * IMAGE_BYTES / found.seconds / 1e9,
        "lag, checkpoints": found.lag_s / ideal,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def storage_costs(n_blocks: int = 100, block_size: int = MAX_BLOCK_SIZE) -> dict[str, Any]:
    """Milliseconds of this process for one block of the files that it touches, and their bytes; on this disk."""
    rng = np.random.default_rng(0)
    labels = rng.choice(10, block_size, p=np.array([91, *[1] * 9]) / 100).astype(np.uint8)
    margins = rng.random(block_size).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        path, flags = Path(folder) / "assignments.zarr", np.ones(block_size, bool)
        spent = [time.thread_time()]

        def lap() -> float:
            spent.append(time.thread_time())
            return 1000 * (spent[-1] - spent[-2]) / n_blocks

        layout = {"n_rows": 2, "n_samples": n_blocks * block_size, "block_size": block_size, "n_classes": 10}
        made = Assignments.create(path, **layout, eligible=[flags] * n_blocks, recorded=["margin"])
        costs = {"lay out a block, ms": lap()}
        for block in made.blocks:
            made.eligible(block.start, block.stop)
        costs["read its eligible flags, ms"] = lap()
        for block in made.blocks:
            made.write(0, block, labels)
        costs["commit its labels, ms"] = lap()
        made.remove_damaged(0)
        costs["check its labels when a run is resumed, ms"] = lap()
        made.write(1, made.blocks[0], labels, {"margin": margins})
        sizes = [made.chunk(name, 1, made.blocks[0]).stat().st_size for name in ("assignments", "margin")]
    return costs | {"labels, KB": sizes[0] / 1e3, "margins, KB": sizes[1] / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3000.0, help="images/s of one actor: assumed, for a GPU")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    t, measured = options.checkpoints, Costs()
    assumed = replace(measured, images_per_s=options.rate)
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "Files of one block of 65,536": lambda: [storage_costs()],
        "All checkpoints are there, block size auto": lambda: [
            row_of(n, actors, t, assumed) for n in (10**7, 10**8, 10**9) for actors in (1, 10, 100, 1000)
        ],
        "The same, smaller blocks": lambda: [
            row_of(n, actors, t, assumed, block_size=size)
            for n, actors, size in ((10**7, 100, 8192), (10**7, 1000, 1024), (10**8, 1000, 8192))
        ],
        "The same, one actor of a hundred takes four times as long": lambda: [
            row_of(10**9, 1000, t, assumed, slow=0.01)
        ],
        "A checkpoint whenever the actors can have scored one more": lambda: [
            row_of(10**9, 1000, t, replace(measured, images_per_s=rate), publish_every=1.05)
            for rate in (options.rate, 10 * options.rate)
        ],
        "Ten billion": lambda: [row_of(10**10, 1000, t, assumed)],
    }
    results = {}
    for title, rows in tables.items():
        rows_of_table = rows()
        facts = {"checkpoints": t, "hand-outs in flight": IN_FLIGHT, "peak MiB": peak_rss_bytes() // 2**20}
        report(title, rows_of_table, None, **facts)
        results[title] = rows_of_table
    if options.out is not None:
        options.out.write_text(json.dumps({"conditions": conditions(), "tables": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
