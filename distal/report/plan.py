"""What a run will cost, told before anything starts: `distal plan`."""

from __future__ import annotations

from pathlib import Path

from distal.artifacts.assignments import dtype_for
from distal.config import TORCHVISION, CompareConfig, Config, Root, ScoreConfig
from distal.config.needs import scored_epochs
from distal.errors import PoolError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.build import MAX_CHUNK_BYTES, learn_layout
from distal.pool.images import MANIFEST
from distal.pool.sample_files import read_ids
from distal.pool.sources import open_source
from distal.pool.torchvision_source import find_download
from distal.records import JsonObject, auto_block_size
from distal.reduce.measures import measures_of
from distal.reduce.stream import n_threads, stripe_bytes, stripe_samples
from distal.score.eliminate import barrier_rows
from distal.score.plan import MAX_ROWS
from distal.train.command import check_command
from distal.train.folder import matching

MANY_OBJECTS = 100_000
PROCESS_BYTES = 500 * 2**20  # of a Python process with torch and Ray, before it holds anything
ELIMINATION_KEEPS = 0.74  # of the passes, at a budget of 1%: measured on two runs of 40 checkpoints


def forecast(config: Config | ScoreConfig) -> JsonObject:
    """Passes, objects, disk and memory of the first cycle, which is the largest.

    Returns:
        `forwards` (images x checkpoints), `objects` and `disk_bytes` by kind, `memory_bytes` per process of each
        role, `alternatives` (cheaper ways with the forwards they leave), and `warnings`. The reducer has the threads
        that it would have here: on a machine where this process may use more, it takes more.

    Raises:
        UserError: the pool can be neither opened nor counted.
    """
    if config.train_command is not None:
        check_command(config.train_command)
    n_samples, n_readable, shape, n_classes = _pool(config)
    limit = config.pool.limit
    n_eligible = n_readable if limit is None else min(limit, n_readable)
    n_eligible = max(0, n_eligible - _n_labelled(config))
    if isinstance(config, Config):
        n_rows, n_measures = len(scored_epochs(config)), len(measures_of(config))
    else:
        n_classes = config.model.num_classes
        n_rows, n_measures = _n_checkpoints(config), 1
    budget = config.budget
    size = config.pool.block_size
    block_size = auto_block_size(n_samples) if size == "auto" else size
    n_blocks = -(-n_samples // block_size)
    itemsize = dtype_for(n_classes).itemsize
    weights = _weights_bytes(config, shape, n_classes)
    row_bytes = {"probabilities": 4 * n_classes}
    recorded = [row_bytes.get(name, 2) for name in config.score.record]
    n_kept = n_rows if config.score.record_rows == "all" else 1
    n_published = (config.n_checkpoints or 0) if config.trains else 0
    eliminates = config.score.eliminate == "exact"
    objects = {
        "assignments": n_rows * n_blocks,
        "recorded": len(recorded) * n_kept * n_blocks,
        "eligible": n_blocks,
        "scores": n_measures * n_blocks,
        "checkpoints": 2 * n_published,
    }
    disk = {
        "assignments": n_rows * n_samples * itemsize,
        "recorded": sum(recorded) * n_kept * n_samples,
        "eligible": n_samples,
        "scores": n_measures * n_samples * 4,
        "checkpoints": n_published * weights,
    }
    image_bytes = shape[0] * shape[1] * shape[2]
    read_bytes = 4 * min(MAX_CHUNK_BYTES, min(block_size, n_samples) * image_bytes)  # the next piece is read ahead
    # The rows of a hand-out until its block is committed; of one row three times more: joined, laid out, encoded.
    n_held = 3 + (min(MAX_ROWS, n_rows) if config.score.record_rows == "all" else 1)
    held_bytes = (n_held * sum(recorded) + MAX_ROWS * 8) * min(block_size, n_samples)
    stripe = stripe_bytes(n_rows, itemsize, min(n_samples, stripe_samples(n_rows, itemsize, block_size)))
    memory = {
        "driver": PROCESS_BYTES + 8 * n_samples,
        "scoring actor": PROCESS_BYTES
        + int(config.score.cache_gb * 2**30)
        + (MAX_ROWS + 1) * weights
        + read_bytes
        + held_bytes,
        "reducer": PROCESS_BYTES // 2 + n_threads(stripe) * stripe,
    }
    if config.trains:
        memory["training rank"] = PROCESS_BYTES + 4 * weights + _n_labelled(config) * image_bytes
    forwards = _with_elimination(n_rows, n_eligible, budget) if eliminates else n_rows * n_eligible
    warnings = []
    if isinstance(config, CompareConfig):
        n_seeds, n_strategies = config.compare.seeds, len(config.compare.strategies)
        warnings.append(
            f"these are the figures of one run that scores every checkpoint; a comparison makes {n_seeds} x "
            f"{n_strategies}: strategies share the first cycle of a seed, and some need fewer checkpoints"
        )
    if sum(objects.values()) > MANY_OBJECTS:
        warnings.append(
            f"{sum(objects.values()):,} objects a cycle: more than {MANY_OBJECTS:,} are slow to list and copy; raise "
            "pool.block_size, or keep fewer checkpoints"
        )
    if budget > n_eligible:
        warnings.append(f"the budget of {budget:,} is more than the {n_eligible:,} candidates")
    return {
        "samples": n_samples,
        "candidates": n_eligible,
        "checkpoints": n_rows,
        "cycles": config.n_cycles,
        "blocks": n_blocks,
        "block_size": block_size,
        "forwards": forwards,
        "objects": {**objects, "total": sum(objects.values())},
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "memory_bytes": memory,
        "alternatives": _alternatives(config, n_rows, n_eligible, budget),
        "warnings": warnings,
    }


def _alternatives(config: Config | ScoreConfig, n_rows: int, n_eligible: int, budget: int) -> list[JsonObject]:
    """Cheaper ways, with the forwards that they leave; none where nothing can be selected anyway."""
    if n_eligible < budget:
        return []
    forwards = n_rows * n_eligible
    every = "train.checkpoint_every=2" if config.trains else "half of the checkpoints (checkpoints.pattern)"
    half = max(budget, n_eligible // 2)
    labelled = _n_labelled(config) if config.trains else 0
    ways: list[JsonObject] = [
        {"what": "every second checkpoint", "how": every, "forwards": -(-n_rows // 2) * n_eligible},
        {"what": "a random half of the pool", "how": f"pool.limit={half + labelled}", "forwards": n_rows * half},
    ]
    if config.select.measure == "dispersion" and config.score.eliminate == "none" and barrier_rows(n_rows):
        ways.append(
            {
                "what": "leave out what can no longer be selected, with the same selection",
                "how": "score.eliminate=exact",
                "forwards": _with_elimination(n_rows, n_eligible, budget),
            }
        )
    return [{**way, "saves": 1 - way["forwards"] / forwards} for way in ways if way["forwards"] < forwards]


def _with_elimination(n_rows: int, n_eligible: int, budget: int) -> int:
    """Measured: it saves a quarter of all passes. At most all but the budget are left out from the first barrier on."""
    first = next(iter(barrier_rows(n_rows)), n_rows)
    floor = first * n_eligible + (n_rows - first) * budget
    return min(n_rows * n_eligible, max(int(n_rows * n_eligible * ELIMINATION_KEEPS), floor))


def _n_labelled(config: Root) -> int:
    """Samples that the first cycle does not score, because they have labels."""
    labelled, key = config.labelled, "loop.initial" if config.trains else "pool.exclude"
    return labelled if isinstance(labelled, int) else len(read_ids(Path(labelled), key))


def _pool(config: Config | ScoreConfig) -> tuple[int, int, tuple[int, int, int], int]:
    """Samples, readable ones, image shape and classes, of the pool or of what it will be packed from."""
    folder, source = Path(config.pool.path), config.pool.source
    if (folder / MANIFEST).exists() or source is None:
        pool = Pool.open(folder)
        return pool.n_samples, pool.n_readable, pool.image_shape, len(pool.classes or ()) or 2
    if source.startswith(TORCHVISION):  # nothing is downloaded for a plan
        known = find_download(source)
        return known.n_samples, known.n_samples, known.image_shape, known.n_classes
    opened = open_source(source)
    height, width, channels = learn_layout(opened, source).shape
    return len(opened), len(opened), (channels, height, width), len(opened.classes or ()) or 2


def _n_checkpoints(config: ScoreConfig) -> int:
    if config.checkpoints.expect is not None:
        return config.checkpoints.expect
    folder = Path(config.checkpoints.path)
    there = len(matching(folder, config.checkpoints.pattern))
    if not there:
        raise PoolError(
            f"checkpoints.path: {folder} has no file {config.checkpoints.pattern} yet; set checkpoints.expect to plan"
        )
    return there


def _weights_bytes(config: Config | ScoreConfig, shape: tuple[int, int, int], n_classes: int) -> int:
    """Of one checkpoint."""
    spec = ModelSpec(config.model, n_classes, shape, (0.5,) * shape[0], (0.5,) * shape[0])
    return sum(tensor.nbytes for tensor in spec.build(pretrained=False).state_dict().values())
