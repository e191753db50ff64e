"""What one driver process holds: the lease on the run, the event log, and the scoring actors it borrows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts.assignments import Assignments
from distal.artifacts.lease import Lease
from distal.artifacts.runs import Run
from distal.cluster import Slots, metrics
from distal.cluster.metrics import Meter
from distal.config import Root
from distal.pool import Pool
from distal.progress import Display
from distal.records import CheckpointRef, Progress
from distal.score.fleet import Fleet
from distal.score.job import ActorJob, Elimination, Owner, Producer, Scored, ScoringJob
from distal.score.loop import score

_SCORER_THREADS = 1


def acquire_lease(directory: Run, display: Display) -> Lease:
    """The right to drive the run, as a context; raises RunConflict when the folder is no run's."""
    directory.require_own_folder()
    return Lease(directory.path, directory.attempt, display.say)


def _start_fleet(config: Root, slots: Slots, name: str) -> Fleet:
    """The scoring actors, none of which starts before there is work.

    Where nodes only score, as many actors are started as `score.actors` says: an autoscaler brings nodes
    for the waiting actors. On nodes that also train, extra actors would take the slots of the ranks.

    Args:
        name: unique in the cluster.
    """
    asked = None if config.score.actors == "auto" else config.score.actors
    present = partial(cluster.scoring_slots, slots)

    def hoped_for(avoided: Collection[str]) -> int:
        return asked if asked is not None and present(avoided) else 0

    gpu = {"num_gpus": 1} if slots.device == "cuda" else {}
    return Fleet(
        name,
        {"num_cpus": _SCORER_THREADS, **gpu, "label_selector": slots.selectors["score"]},
        asked=asked,
        slots=present if asked is None or slots.shared else hoped_for,
        cache_bytes=int(config.score.cache_gb * 2**30),
        threads=_SCORER_THREADS,
        stuck_after=config.score.stuck_after,
    )


@contextmanager
def open_session(config: Root, pool: Pool, directory: Run, lease: Lease, display: Display) -> Iterator[Session]:
    """A session on the connected cluster; its scoring actors end with the block.

    Args:
        config: as `resolve.with_recorded` returns it.
        lease: is held.
    """
    with Meter(directory.path.name) as meter:
        meter.set(metrics.QUARANTINED, pool.n_unreadable)
        slots = cluster.find_slots(config.device)
        fleet = _start_fleet(config, slots, f"scorer-{directory.attempt}")
        try:
            mixed = config.score.mixed_hardware == "allow"
            yield Session(directory, lease, display, meter, slots, fleet, mixed)
        finally:
            fleet.shrink(0)


@dataclass(frozen=True)
class Session:
    """One driver process at work on a run, whichever command drives it.

    Attributes:
        slots: how the cluster is shared between training and scoring.
        fleet: the scoring actors.
        mixed_hardware: whether actors of different kinds may score the same assignments.
    """

    directory: Run
    lease: Lease
    display: Display
    meter: Meter
    slots: Slots
    fleet: Fleet
    mixed_hardware: bool

    def owner(self, **values: Any) -> Owner:
        """What the fleet asks and reports to while it works for this run.

        Args:
            values: added to every event.
        """
        return Owner(self.lease.check, partial(self.event, **values))

    def score(
        self,
        job: ActorJob,
        assignments: Assignments,
        producer: Producer,
        progress: Progress,
        *,
        elimination: Elimination | None = None,
        n_expected: int | None = None,
        metered: bool = False,
        **event: Any,
    ) -> Scored:
        """Score what is missing in some assignments; see `score.loop.score`.

        Args:
            metered: whether the run's metrics follow this scoring.
            event: values that are added to every event.
        """
        whole = ScoringJob(
            job,
            assignments,
            producer,
            progress,
            partial(self.progress, metered=metered),
            self.owner(**event),
            elimination=elimination,
            n_expected=n_expected,
            mixed_hardware=self.mixed_hardware,
        )
        return score(whole, self.fleet)

    def outputs(
        self,
        job: ActorJob,
        assignments: Assignments,
        indices: NDArray[np.int64],
        ref: CheckpointRef,
        names: Collection[str],
    ) -> dict[str, NDArray[np.float32]]:
        """Probabilities or embeddings of some samples at a checkpoint, by actors that may score there."""
        begun = None if self.mixed_hardware else assignments.fingerprint
        return self.fleet.outputs(job, indices, ref, names, begun, self.owner())

    def progress(self, progress: Progress, *, metered: bool = False) -> None:
        """Show how far the run is. Raises Superseded when another driver has taken over."""
        self.lease.check()
        self.meter.follow(progress)
        if metered:
            self.meter.progress(progress)
        self.display.progress(progress)

    def event(self, name: str, **values: Any) -> None:
        """Log an event, and show it."""
        self.display.event(self.directory.event(name, **values))
