"""What scoring actors are told, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distal.model.spec import ModelSpec
from distal.records import Block, CheckpointRef
from distal.score.predict import Precision


@dataclass(frozen=True)
class Job:
    """One array of assignments to fill: these images, at these checkpoints, by this network.

    Attributes:
        pool, assignments: folders to read images from and to write to.
        pool_sha256: content hash of the pool.
        first_index: the checkpoint that row 0 belongs to.
        recorded_from: first row whose recorded arrays are kept. A block that lacks them there is scored again.
        augment: seed and cycle of the random changes that images get as in training; None: they are as they are.
    """

    pool: Path
    pool_sha256: str
    assignments: Path
    model: ModelSpec
    precision: Precision
    batch_size: int
    device: str
    first_index: int = 0
    recorded_from: int = 0
    augment: tuple[int, int] | None = None


@dataclass(frozen=True)
class Elimination:
    """Leave out samples that can no longer be selected; see `eliminate`.

    Attributes:
        record: the folder `assignments.zarr.elimination`, what has been decided.
        budget: samples that will be selected.
    """

    record: Path
    budget: int


class Producer(Protocol):
    """What publishes checkpoints while they are scored."""

    def published(self) -> Sequence[CheckpointRef]:
        """The checkpoints that can be scored now."""
        ...

    def finished(self) -> bool:
        """Whether no more will come than `published` tells from now on; raises what went wrong with it."""
        ...

    def slots_held(self) -> int:
        """Slots that it takes from scoring now."""
        ...


@dataclass(frozen=True)
class Published:
    """A producer that has published everything and holds nothing."""

    refs: Sequence[CheckpointRef]

    def published(self) -> Sequence[CheckpointRef]:
        """See `Producer`."""
        return self.refs

    def finished(self) -> bool:
        """See `Producer`."""
        return True

    def slots_held(self) -> int:
        """See `Producer`."""
        return 0


@dataclass(frozen=True)
class Order:
    """A hand-out as an actor gets it; see `Work`.

    Attributes:
        barrier, theta: what was decided before the row `barrier` applies to these checkpoints; None: nothing.
    """

    block: Block
    refs: tuple[CheckpointRef, ...]
    barrier: int | None = None
    theta: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Done:
    """What an actor says of a hand-out: images predicted, the mode counts before a barrier if asked for, and the most
    memory it has had."""

    n_predicted: int
    histogram: NDArray[np.int64] | None
    peak_rss_bytes: int


@dataclass(frozen=True)
class Scored:
    """What a pass came to.

    Attributes:
        images: predictions in the array: samples x rows, without those that were left out.
        n_rows: checkpoints scored.
        left_out: predictions that elimination saved.
        images_predicted: by this attempt.
        startup_s: from the start of the pass to its first hand-out.
        seconds: from the first hand-out to the last commit.
        driver_s: of those, the seconds that the driver was busy.
        hand_outs: blocks x checkpoints handed out.
        actor_rss_bytes: the largest peak memory of an actor.
    """

    images: int
    n_rows: int
    left_out: int = 0
    images_predicted: int = 0
    startup_s: float = 0.0
    seconds: float = 0.0
    driver_s: float = 0.0
    hand_outs: int = 0
    actor_rss_bytes: int = 0

    def then(self, other: Scored) -> Scored:
        """What this pass and another one over the same array came to."""
        return replace(
            other,
            images_predicted=self.images_predicted + other.images_predicted,
            startup_s=self.startup_s,
            seconds=self.seconds + other.seconds,
            driver_s=self.driver_s + other.driver_s,
            hand_outs=self.hand_outs + other.hand_outs,
            actor_rss_bytes=max(self.actor_rss_bytes, other.actor_rss_bytes),
        )
