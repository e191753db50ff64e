"""One attempt at a run, whichever command drives it: the right to, the scoring actors, and who is told."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts.assignments import Assignments
from distal.artifacts.lease import Lease
from distal.artifacts.runs import Run
from distal.cluster import metrics
from distal.cluster.metrics import Meter
from distal.config import Config, ScoreConfig
from distal.driver import checks
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.progress import Display
from distal.records import CheckpointRef, JsonObject, Progress
from distal.score.fleet import Scorers
from distal.score.job import Elimination, Job, Producer, Scored
from distal.score.loop import score

SCORER_THREADS = 1

AnyConfig = TypeVar("AnyConfig", Config, ScoreConfig)


def begin(directory: Run, display: Display) -> Lease:
    """The right to drive the run."""
    directory.require_own_folder()
    return Lease(directory.path, directory.attempt, display.say)


class Attempt:
    """What drives the scoring of a run, and keeps its log.

    Attributes:
        constants: what each `auto` came to, when the run began or, at first, in this attempt.
        slots: how the cluster is shared; from `settle` on.
        scorers: the scoring actors; from `hire` on.
    """

    slots: cluster.Slots
    scorers: Scorers

    def __init__(self, directory: Run, pool: Pool, display: Display, lease: Lease) -> None:
        self.directory, self.display, self.lease = directory, display, lease
        self.meter = Meter(directory.path.name)  # a context, which is entered when there is a cluster
        self.meter.set(metrics.QUARANTINED, pool.n_unreadable)
        self.constants: JsonObject = directory.identity["constants"] if directory.identity else {}
        self._begun = bool(self.constants)
        self._pool = pool

    def settle(self, config: AnyConfig) -> AnyConfig:
        """Put a value in place of each `auto` that the cluster decides.

        What it came to when the run began holds, also on a cluster where it would come to something else.
        """
        kept = self.constants.get("device", config.device)
        self.slots = cluster.find_slots(kept if config.device == "auto" else config.device)
        self.constants = self.constants or checks.constants(config, self._pool, self.slots)
        return checks.resolved(config, self.constants)

    def hire(self, config: AnyConfig, n_labeled: int) -> AnyConfig:
        """Have scoring actors, which start when there is work, and put a value in place of each `auto` that one of
        them has to try: precision and batch size.

        Where nodes only score, as many actors are started as `score.actors` says: an autoscaler brings nodes for those
        that find no room. On nodes that also train they would take the room of the ranks.

        Args:
            config: what `settle` returned.
            n_labeled: samples of the pool that need no score.
        """
        gpu = {"num_gpus": 1} if self.slots.device == "cuda" else {}
        self._mixed = config.score.mixed_hardware == "allow"
        asked = None if config.score.actors == "auto" else config.score.actors
        present = partial(cluster.scoring_slots, self.slots)

        def hoped(avoided: Collection[str]) -> int:
            return asked if asked is not None and present(avoided) else 0

        self.scorers = Scorers(
            f"scorer-{self.directory.attempt}",
            {"num_cpus": SCORER_THREADS, **gpu, "label_selector": self.slots.selectors["score"]},
            asked=asked,
            slots=present if asked is None or self.slots.shared else hoped,
            cache_bytes=int(config.score.cache_gb * 2**30),
            threads=SCORER_THREADS,
            run=self.directory.path.name,
            stuck_after=config.score.stuck_after,
            still_ours=self.lease.check,
            on_event=self.event,
        )
        if not self._begun:
            self.constants |= self._tried(config, n_labeled)
        return checks.resolved(config, self.constants)

    def _tried(self, config: Config | ScoreConfig, n_labeled: int) -> JsonObject:
        precision, batch_size = config.score.precision, config.score.batch_size
        if precision == "auto" or batch_size == "auto":
            tried = config.with_values({"score.precision": "fp32", "score.batch_size": 1})
            job = self.job(tried, self._pool, self.directory.path)
            per_block = checks.eligible_per_block(config, self._pool, n_labeled)
            precision, batch_size = self.scorers.choose(job, precision, batch_size, per_block)
        return {"score.precision": precision, "score.batch_size": batch_size}

    def job(self, config: Config | ScoreConfig, pool: Pool, assignments: Path) -> Job:
        """What scoring actors are told: these images, by the network of the configuration, into these assignments."""
        assert config.score.precision != "auto"
        return Job(
            pool=pool.path,
            pool_sha256=pool.content_sha256,
            assignments=assignments,
            model=ModelSpec.of(config.model, self._pool),
            precision=config.score.precision,
            batch_size=int(config.score.batch_size),
            device=self.slots.device,
        )

    def fill(
        self,
        job: Job,
        assignments: Assignments,
        producer: Producer,
        progress: Progress,
        *,
        elimination: Elimination | None = None,
        n_expected: int | None = None,
        metered: bool = False,
        **event: Any,
    ) -> Scored:
        """Score what is missing in some assignments; see `score`.

        Args:
            metered: whether this is the scoring that metrics tell of.
            event: values that every event gets.
        """
        return score(
            job,
            assignments,
            self.scorers,
            producer,
            elimination=elimination,
            n_expected=n_expected,
            mixed_hardware=self._mixed,
            progress=progress,
            on_progress=partial(self.progress, metered=metered),
            on_event=partial(self.event, **event),
        )

    def outputs(
        self, job: Job, assignments: Assignments, indices: NDArray[np.int64], ref: CheckpointRef, names: Collection[str]
    ) -> dict[str, NDArray[np.float32]]:
        """What a checkpoint gives for some samples, by actors that may score there; see `Scorers.outputs`."""
        begun = None if self._mixed else assignments.fingerprint
        return self.scorers.outputs(job, indices, ref, names, begun)

    def progress(self, progress: Progress, *, metered: bool = False) -> None:
        """Show how far the run is. Raises RunConflict when it is not ours any more."""
        self.lease.check()
        self.meter.follow(progress)
        if metered:
            self.meter.progress(progress)
        self.display.progress(progress)

    def event(self, name: str, **values: Any) -> None:
        """Log what happened, and show it."""
        self.display.event(self.directory.event(name, **values))
