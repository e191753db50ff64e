"""What the scoring loop is given, what a scoring actor gets of it, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import Assignments
from distal.model.spec import ModelSpec
from distal.records import CheckpointRef, Progress
from distal.score.predict import Precision


@dataclass(frozen=True)
class ActorJob:
    """The part of a job that every scoring actor gets: these images, by this network, into these assignments.

    Attributes:
        pool, assignments: folders to read images from and to write to.
        pool_sha256: content hash of the pool.
        run: name of the run directory, a tag of the actor's metrics.
        first_index: the checkpoint of row 0.
        recorded_from: first row whose recorded arrays are kept. A block without them there is scored again.
        augment: seed and cycle of the random changes that images get as in training; None: no change.
    """

    pool: Path
    pool_sha256: str
    assignments: Path
    model: ModelSpec
    precision: Precision
    batch_size: int
    device: str
    run: str = ""
    first_index: int = 0
    recorded_from: int = 0
    augment: tuple[int, int] | None = None


@dataclass(frozen=True)
class Elimination:
    """Leave out samples that can no longer be selected; see `eliminate`.

    Attributes:
        record: the folder `assignments.zarr.elimination` with the decisions.
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
        """Whether `published` is complete from now on; raises what stopped the producer."""
        ...

    def slots_held(self) -> int:
        """Slots that the producer takes from scoring now."""
        ...


@dataclass(frozen=True)
class AllPublished:
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
class Owner:
    """The run that the actors work for.

    Attributes:
        still_ours: raises when another driver has taken the run over.
        on_event: called with the name and the values of an event.
    """

    still_ours: Callable[[], None] = lambda: None
    on_event: Callable[..., None] = lambda name, **values: None


@dataclass(frozen=True)
class ScoringJob:
    """One array of assignments to fill, at checkpoints that exist or are still to come.

    Attributes:
        for_actors: the part that the actors get.
        assignments: the driver's handle on `for_actors.assignments`.
        producer: publishes the checkpoints; the slots it holds are left to it.
        progress: the known part of the progress; `on_progress` is called with it, brought up to date. It may raise.
        owner: the run.
        elimination: None: every eligible sample is scored at every checkpoint.
        n_expected: how many checkpoints there will be, for display; None: unknown.
        mixed_hardware: whether actors with another fingerprint than the first may join; else they are sent away.
    """

    for_actors: ActorJob
    assignments: Assignments
    producer: Producer
    progress: Progress
    on_progress: Callable[[Progress], None]
    owner: Owner = Owner()
    elimination: Elimination | None = None
    n_expected: int | None = None
    mixed_hardware: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What an actor returns of a task: images predicted, the mode counts before a barrier if the task asked for them,
    and the actor's peak memory."""

    n_predicted: int
    histogram: NDArray[np.int64] | None
    peak_rss_bytes: int


@dataclass(frozen=True)
class Scored:
    """The figures of a pass.

    Attributes:
        images: predictions in the array: samples x rows, less those left out.
        n_rows: checkpoints scored.
        left_out: predictions that elimination saved.
        images_predicted: by this driver process.
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
        """The figures of this pass and a later one over the same array."""
        return replace(
            other,
            images_predicted=self.images_predicted + other.images_predicted,
            startup_s=self.startup_s,
            seconds=self.seconds + other.seconds,
            driver_s=self.driver_s + other.driver_s,
            hand_outs=self.hand_outs + other.hand_outs,
            actor_rss_bytes=max(self.actor_rss_bytes, other.actor_rss_bytes),
        )
