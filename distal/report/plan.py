"""`distal plan`: the cost of a run, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distal.artifacts.assignments import dtype_for
from distal.config import TORCHVISION, CompareConfig, Config, Root, ScoreConfig
from distal.config.needs import scored_epochs
from distal.errors import PoolError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.images import MANIFEST
from distal.pool.pack import MAX_CHUNK_BYTES, learn_layout
from distal.pool.sample_files import read_ids
from distal.pool.sources import open_source
from distal.pool.torchvision_source import find_download
from distal.records import Result, auto_block_size
from distal.reduce.measures import measures_of
from distal.reduce.stream import n_threads, stripe_bytes, stripe_samples
from distal.score.eliminate import barrier_rows
from distal.score.plan import MAX_ROWS
from distal.train.command import check_command
from distal.train.folder import matching

_MANY_OBJECTS = 100_000
PROCESS_BYTES = 500 * 2**20  # of a Python process with torch and Ray, before it holds anything
_ELIMINATION_KEEPS = 0.74  # of the passes, at a budget of 1%: measured on two runs of 40 checkpoints


@dataclass(frozen=True)
class Alternative(Result):
    """A cheaper way.

    Attributes:
        how: the key to set.
        forwards: that it leaves.
        saves: share of the forwards.
    """

    what: str
    how: str
    forwards: int
    saves: float


@dataclass(frozen=True)
class PlanResult(Result):
    """The cost of the first cycle, which is the largest.

    Attributes:
        candidates: eligible samples.
        forwards: images x checkpoints.
        objects, disk_bytes: by kind, with a `total`.
        memory_bytes: of one process of each role. The reducer has the threads that it would have
            on this machine; where its process may use more, it takes more.
    """

    samples: int
    candidates: int
    checkpoints: int
    cycles: int
    blocks: int
    block_size: int
    forwards: int
    objects: dict[str, int]
    disk_bytes: dict[str, int]
    memory_bytes: dict[str, int]
    alternatives: list[Alternative]
    warnings: list[str]


@dataclass(frozen=True)
class _Cycle:
    """The first cycle, counted.

    Attributes:
        n_rows: checkpoints that are scored.
        n_published: weights files that it writes.
        recorded: bytes of each recorded array, per sample and row.
        n_kept: rows that are recorded.
        weights: bytes of one checkpoint.
    """

    config: Config | ScoreConfig
    n_samples: int
    n_eligible: int
    n_labelled: int
    image_bytes: int
    block_size: int
    n_rows: int
    n_measures: int
    n_published: int
    itemsize: int
    recorded: list[int]
    n_kept: int
    weights: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_samples // self.block_size)

    @classmethod
    def of(cls, config: Config | ScoreConfig) -> Self:
        n_samples, n_readable, shape, n_classes = _pool(config)
        if isinstance(config, Config):
            n_rows, n_measures = len(scored_epochs(config)), len(measures_of(config))
        else:
            n_classes = config.model.num_classes
            n_rows, n_measures = _n_checkpoints(config), 1
        limit, size = config.pool.limit, config.pool.block_size
        n_labelled = _n_labelled(config)
        n_candidates = n_readable if limit is None else min(limit, n_readable)
        row_bytes = {"probabilities": 4 * n_classes}
        return cls(
            config=config,
            n_samples=n_samples,
            n_eligible=max(0, n_candidates - n_labelled),
            n_labelled=n_labelled if config.trains else 0,
            image_bytes=shape[0] * shape[1] * shape[2],
            block_size=auto_block_size(n_samples) if size == "auto" else size,
            n_rows=n_rows,
            n_measures=n_measures,
            n_published=(config.n_checkpoints or 0) if config.trains else 0,
            itemsize=dtype_for(n_classes).itemsize,
            recorded=[row_bytes.get(name, 2) for name in config.score.record],
            n_kept=n_rows if config.score.record_rows == "all" else 1,
            weights=_weights_bytes(config, shape, n_classes),
        )


def plan(config: Config | ScoreConfig) -> PlanResult:
    """Passes, objects, disk and memory of the first cycle.

    Raises:
        UserError: the pool can be neither opened nor counted.
    """
    if config.train_command is not None:
        check_command(config.train_command)
    cycle = _Cycle.of(config)
    objects = _objects(cycle)
    return PlanResult(
        samples=cycle.n_samples,
        candidates=cycle.n_eligible,
        checkpoints=cycle.n_rows,
        cycles=config.n_cycles,
        blocks=cycle.n_blocks,
        block_size=cycle.block_size,
        forwards=_forwards(cycle),
        objects=objects,
        disk_bytes=_disk(cycle),
        memory_bytes=_memory(cycle),
        alternatives=_alternatives(cycle),
        warnings=_warnings(cycle, objects["total"]),
    )


def _objects(cycle: _Cycle) -> dict[str, int]:
    n_blocks = cycle.n_blocks
    objects = {
        "assignments": cycle.n_rows * n_blocks,
        "recorded": len(cycle.recorded) * cycle.n_kept * n_blocks,
        "eligible": n_blocks,
        "scores": cycle.n_measures * n_blocks,
        "checkpoints": 2 * cycle.n_published,
    }
    return {**objects, "total": sum(objects.values())}


def _disk(cycle: _Cycle) -> dict[str, int]:
    n_samples = cycle.n_samples
    disk = {
        "assignments": cycle.n_rows * n_samples * cycle.itemsize,
        "recorded": sum(cycle.recorded) * cycle.n_kept * n_samples,
        "eligible": n_samples,
        "scores": cycle.n_measures * n_samples * 4,
        "checkpoints": cycle.n_published * cycle.weights,
    }
    return {**disk, "total": sum(disk.values())}


def _memory(cycle: _Cycle) -> dict[str, int]:
    score, n_samples, n_rows = cycle.config.score, cycle.n_samples, cycle.n_rows
    n_in_block = min(cycle.block_size, n_samples)
    read_bytes = 4 * min(MAX_CHUNK_BYTES, n_in_block * cycle.image_bytes)  # the next piece is read ahead
    # The rows of a task until its block is committed; of one row three copies more: joined, in
    # the layout of the chunk, encoded.
    n_held = 3 + (min(MAX_ROWS, n_rows) if score.record_rows == "all" else 1)
    held_bytes = (n_held * sum(cycle.recorded) + MAX_ROWS * 8) * n_in_block
    n_in_stripe = min(n_samples, stripe_samples(n_rows, cycle.itemsize, cycle.block_size))
    stripe = stripe_bytes(n_rows, cycle.itemsize, n_in_stripe)
    actor = int(score.cache_gb * 2**30) + (MAX_ROWS + 1) * cycle.weights + read_bytes + held_bytes
    memory = {
        "driver": PROCESS_BYTES + 8 * n_samples,
        "scoring actor": PROCESS_BYTES + actor,
        "reducer": PROCESS_BYTES // 2 + n_threads(stripe) * stripe,
    }
    if cycle.config.trains:
        images = cycle.n_labelled * cycle.image_bytes
        memory["training rank"] = PROCESS_BYTES + 4 * cycle.weights + images
    return memory


def _warnings(cycle: _Cycle, n_objects: int) -> list[str]:
    config, warnings = cycle.config, []
    if isinstance(config, CompareConfig):
        n_seeds, n_strategies = config.compare.seeds, len(config.compare.strategies)
        warnings.append(
            f"these are the figures of one run that scores every checkpoint; a comparison makes {n_seeds} x "
            f"{n_strategies}: strategies share the first cycle of a seed, and some need fewer checkpoints"
        )
    if n_objects > _MANY_OBJECTS:
        warnings.append(
            f"{n_objects:,} objects a cycle: more than {_MANY_OBJECTS:,} are slow to list and copy; raise "
            "pool.block_size, or keep fewer checkpoints"
        )
    if config.budget > cycle.n_eligible:
        warnings.append(f"the budget of {config.budget:,} is more than the {cycle.n_eligible:,} candidates")
    return warnings


def _forwards(cycle: _Cycle) -> int:
    if cycle.config.score.eliminate == "exact":
        return _with_elimination(cycle.n_rows, cycle.n_eligible, cycle.config.budget)
    return cycle.n_rows * cycle.n_eligible


def _alternatives(cycle: _Cycle) -> list[Alternative]:
    """Cheaper ways; none where nothing can be selected anyway."""
    config, n_rows, n_eligible = cycle.config, cycle.n_rows, cycle.n_eligible
    budget, forwards = config.budget, n_rows * n_eligible
    if n_eligible < budget:
        return []
    every = "train.checkpoint_every=2" if config.trains else "half of the checkpoints (checkpoints.pattern)"
    half = max(budget, n_eligible // 2)
    ways = [
        ("every second checkpoint", every, -(-n_rows // 2) * n_eligible),
        ("a random half of the pool", f"pool.limit={half + cycle.n_labelled}", n_rows * half),
    ]
    eliminates = config.score.eliminate == "exact"
    if config.select.measure == "dispersion" and not eliminates and barrier_rows(n_rows):
        what = "leave out what can no longer be selected, with the same selection"
        ways.append((what, "score.eliminate=exact", _with_elimination(n_rows, n_eligible, budget)))
    return [Alternative(what, how, n, 1 - n / forwards) for what, how, n in ways if n < forwards]


def _with_elimination(n_rows: int, n_eligible: int, budget: int) -> int:
    """Measured: it saves a quarter of all passes, at most all but the budget from the first barrier on."""
    first = next(iter(barrier_rows(n_rows)), n_rows)
    floor = first * n_eligible + (n_rows - first) * budget
    return min(n_rows * n_eligible, max(int(n_rows * n_eligible * _ELIMINATION_KEEPS), floor))


def _n_labelled(config: Root) -> int:
    """Samples that the first cycle does not score, because they have labels."""
    labelled, key = config.labelled, "loop.initial" if config.trains else "pool.exclude"
    return labelled if isinstance(labelled, int) else len(read_ids(Path(labelled), key))


def _pool(config: Config | ScoreConfig) -> tuple[int, int, tuple[int, int, int], int]:
    """Samples, readable ones, image shape and classes, of the pool or of its source."""
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
