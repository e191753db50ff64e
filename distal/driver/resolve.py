"""Put a value in the place of every `auto`.

A value that can change a bit of the answer is resolved once, when the run begins, and recorded in
`run.yaml`. From then on the recorded value wins, even on a different cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from distal.artifacts.runs import Run
from distal.cluster import Slots
from distal.config import Config, Root, ScoreConfig
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.records import JsonObject, auto_block_size
from distal.score.fleet import Fleet
from distal.score.job import ActorJob, Owner

_AnyConfig = TypeVar("_AnyConfig", Config, ScoreConfig)

_TRIED = {"score.precision": "fp32", "score.batch_size": 1}  # stands in while the two are tried


def with_recorded(config: _AnyConfig, directory: Run) -> _AnyConfig:
    """The configuration with the values that were recorded when the run began, if it has begun."""
    return _with(config, directory.identity.constants if directory.identity else {})


def resolve(config: _AnyConfig, pool: Pool, slots: Slots, fleet: Fleet, owner: Owner, n_labeled: int) -> _AnyConfig:
    """The configuration with a value in the place of every `auto` that can change a bit of the answer.

    Device, block size and threads follow from the cluster and the pool; precision and batch size are
    tried on a scoring actor.

    Args:
        config: as `with_recorded` returns it: nothing is left to resolve in a run that has begun.
        n_labeled: samples of the pool that need no score.

    Raises:
        ModelError: the memory of an actor does not hold the network and one image.
    """
    config = _with(config, _of_cluster(config, pool, slots))
    precision, batch_size = config.score.precision, config.score.batch_size
    if "auto" in (precision, batch_size):
        job = actor_job(config.with_values(_TRIED), pool, pool, Path(config.run))
        n_images = _eligible_per_block(config, pool, n_labeled)
        precision, batch_size = fleet.choose(job, precision, batch_size, n_images, owner)
    return _with(config, {"score.precision": precision, "score.batch_size": batch_size})


def resolved_autos(config: Root) -> JsonObject:
    """The keys that may say `auto`, with the values they have now; recorded in `run.yaml`."""
    keys = ["device", "pool.block_size", "train.threads", "score.precision", "score.batch_size"]
    leaves = config.leaves()
    return {key: leaves[key] for key in keys if key in leaves}


def actor_job(config: Config | ScoreConfig, pool: Pool, images: Pool, assignments: Path, run: str = "") -> ActorJob:
    """What scoring actors get: some images, by the network of the configuration, into some assignments.

    Args:
        config: resolved.
        pool: the pool of the run, which decides the shape of the network; `images` may be others.
        run: the name of the run, for metrics.
    """
    assert config.score.precision != "auto"
    return ActorJob(
        pool=images.path,
        pool_sha256=images.content_sha256,
        assignments=assignments,
        model=ModelSpec.of(config.model, pool),
        precision=config.score.precision,
        batch_size=int(config.score.batch_size),
        device=config.device,
        run=run,
    )


def _with(config: _AnyConfig, values: JsonObject) -> _AnyConfig:
    return config.with_values({key: values[key] for key in config.autos() if key in values})


def _of_cluster(config: Root, pool: Pool, slots: Slots) -> JsonObject:
    values: JsonObject = {"device": slots.device, "pool.block_size": auto_block_size(pool.n_samples)}
    if config.trains:
        values["train.threads"] = slots.train_threads(config.leaves()["train.workers"])
    return values


def _eligible_per_block(config: Root, pool: Pool, n_labeled: int) -> int:
    """About how many samples of a block will be scored while `n_labeled` are labelled."""
    n_scored = min(config.pool.limit or pool.n_readable, pool.n_readable) - n_labeled
    return max(1, min(int(config.pool.block_size), pool.n_samples) * n_scored // pool.n_samples)
