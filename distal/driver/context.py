"""What the stages of a run share: session, configuration, pools, and who may be selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.config import Config
from distal.driver.resolve import actor_job
from distal.driver.session import Session
from distal.labels.waiting import Waiting
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.records import Result, Stage
from distal.score.job import ActorJob


@dataclass(frozen=True)
class RunContext:
    """What all stages of all cycles share.

    Attributes:
        config: resolved. A cycle that has begun keeps the configuration it began with.
        pool: with the classes of the run.
        held_out: the pools to evaluate on, `test` and `val`, as far as there are any.
        unlabeled: the samples of the pool that are readable and within `pool.limit`.
    """

    session: Session
    config: Config
    pool: Pool
    held_out: Mapping[str, Pool]
    unlabeled: Eligibility

    @property
    def directory(self) -> Run:
        """The run directory."""
        return self.session.directory

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        assert self.pool.classes is not None
        return self.pool.classes

    def stage(
        self,
        cycle: Cycle,
        stage: Stage,
        made_from: Callable[[], dict[str, str]],
        work: Callable[[], Result],
    ) -> None:
        """Run a stage of a cycle unless it is complete, and log its completion; see `Staged.run_stage`."""

        def inputs() -> dict[str, str]:
            names = made_from()
            self.session.lease.require()  # right before the marker is written: a successor's may be there
            return names

        self.session.lease.require()
        complete = cycle.is_complete(stage)
        marker = cycle.run_stage(stage, inputs, work)
        self.session.meter.progressed()
        if not complete:
            self.session.event("stage", cycle=cycle.index, stage=stage, seconds=marker.seconds)

    def eligible(self, cycle: Cycle) -> Eligibility:
        """The samples that a cycle may select."""
        eligible = self.unlabeled.without(self.directory.ledger(before=cycle.index))
        subpool = (cycle.config if cycle.begun else self.config).select.subpool
        return eligible if subpool is None else eligible.within(subpool, cycle.index)

    def assignments(
        self,
        cycle: Cycle,
        path: Path,
        pool: Pool,
        block_size: int,
        n_rows: int,
        eligible: Callable[[int, int], NDArray[np.bool_]],
        recorded: tuple[str, ...],
    ) -> Assignments:
        """Assignments of a cycle, laid out unless they are; damaged chunks are removed."""
        return Assignments.take_up(
            path,
            n_rows=n_rows,
            n_samples=pool.n_samples,
            block_size=block_size,
            n_classes=len(self.classes),
            eligible=eligible,
            recorded=recorded,
            on_damage=lambda damage: self.session.event(
                "damaged_block", cycle=cycle.index, reason=f"{damage}; it will be scored again"
            ),
        )

    def actor_job(self, cycle: Cycle, images: Pool, assignments: Path) -> ActorJob:
        """What scoring actors get to score some images for a cycle."""
        job = actor_job(begun_config(cycle), self.pool, images, assignments, self.directory.path.name)
        # The fleet was started for the present device, which a cycle that is repaired may not have begun with.
        return replace(job, device=self.session.slots.device)

    def ask(self, cycle: int, selection: Path) -> Waiting:
        """The request to people to label a batch; `cycle` is -1 for the first set."""
        return asked_of_people(self.config, self.pool, cycle, selection)


def asked_of_people(config: Config, pool: Pool, cycle: int, selection: Path) -> Waiting:
    """The request to people to label a batch; `cycle` is -1 for the first set."""
    assert pool.classes is not None
    n_asked = len(Selection.read(selection))
    needed = n_asked if config.label.min_labels is None else min(config.label.min_labels, n_asked)
    workers = config.train.workers if cycle < 0 else 0
    policy = config.label.conflict
    return Waiting(cycle, selection, pool.classes, needed, workers, policy, pool.path, pool.content_sha256)


def begun_config(cycle: Cycle) -> Config:
    """The configuration that a cycle of a run began with."""
    assert isinstance(cycle.config, Config)
    return cycle.config
