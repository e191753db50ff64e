"""Runs a `Plan` on the scoring actors: hands out tasks, collects results, replaces lost actors."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from distal.errors import DistalError, Unfit, one_line
from distal.records import CheckpointRef
from distal.score.eliminate import Barrier, barrier_rows, decide
from distal.score.fleet import MAX_FAILED, Fleet
from distal.score.job import Scored, ScoringJob, TaskResult
from distal.score.plan import Plan, Task
from distal.score.predict import difference
from distal.storage import create_json, read_json

_POLL_S = 0.2  # between two looks at the checkpoints, and at most for a result
RATE_WINDOW_S = 5.0
HAND_OUT_S = 120.0
_BARRIER = ("row", "theta", "remaining")


def score(job: ScoringJob, fleet: Fleet) -> Scored:
    """Score all eligible samples at all checkpoints, those still to come included.

    Committed blocks are not touched. When the producer has finished with fewer checkpoints than the array has rows, the
    remaining rows are ignored.

    Raises:
        BlockFailed, DistalError: a block, or every new actor, failed again and again.
        RunConflict: no actor has the fingerprint that the assignments were begun with.
        Damage: a checkpoint has other weights than its row was begun with.
    """
    return ScoringPass(job, fleet).run()


class ScoringPass:
    """One run of the scoring loop.

    `joining` and `working` map a pending Ray call to its actor, and to its task.
    """

    def __init__(self, job: ScoringJob, fleet: Fleet) -> None:
        self.job, self.fleet = job, fleet
        self.assignments, self.elimination = assignments, elimination = job.assignments, job.elimination
        self.blocks = assignments.blocks
        self.eligible = [int(assignments.eligible(b.start, b.stop).sum()) for b in self.blocks]
        self.barriers = read_barriers(elimination.record, barrier_rows(assignments.n_rows)) if elimination else []
        self.totals = [sum(self.eligible), *(sum(barrier.remaining) for barrier in self.barriers)]
        done = [
            (row, b)
            for row in range(assignments.n_rows)
            for b in assignments.committed(row, recorded=row >= job.for_actors.recorded_from)
        ]
        self.images = sum(self._n_scored(row, block) for row, block in done)
        self.plan = Plan(
            assignments.n_rows,
            len(self.blocks),
            done,
            barriers=barrier_rows(assignments.n_rows) if elimination else (),
            passed=len(self.barriers),
        )
        self.histograms: dict[int, NDArray[np.int64]] = {}
        self.refs: dict[int, CheckpointRef] = {}
        self.joining: dict[Any, int] = {}
        self.working: dict[Any, Task] = {}
        self.failed_starts = 0
        self.started_before_failure = 0
        self.all_published = False
        self.recent: deque[tuple[float, int]] = deque()
        self.images_predicted = 0
        self.hand_outs = 0
        self.retried = 0
        self.idle_s = 0.0
        self.actor_rss_bytes = 0
        self.began = time.monotonic()
        self.first_hand_out: float | None = None
        self.last_commit = self.began

    def run(self) -> Scored:
        """Score until every block is committed at every row."""
        # Training takes its slots first: actors of the cycle before may still hold them.
        self.fleet.shrink(self._allowed())
        for actor in self.fleet.actors:
            self._ask_ready(actor)
        polled = watched = -np.inf
        self._look_for_checkpoints()  # even when nothing is left to score: the figures are of all checkpoints
        while not self.plan.finished:
            if time.monotonic() - polled >= _POLL_S:
                polled = time.monotonic()
                self._look_for_checkpoints()
                if polled - watched >= self.fleet.watch_s:
                    watched = polled
                    self.fleet.look_around()
                    self._watch()
                self._shrink()
                for actor in self.fleet.grow(min(self._allowed(), self.plan.n_unfinished_blocks)):
                    self._ask_ready(actor)
                self._report()
            if self.plan.at_barrier:
                self._decide()
            for task in self.plan.next_tasks():
                self._hand_out(task)
            self._wait()
        self._report()
        return self._scored()

    def _hand_out(self, task: Task) -> None:
        if self.first_hand_out is None:
            self.first_hand_out = time.monotonic()
            self.idle_s = 0.0
        theta = next((barrier.theta for barrier in self.barriers if barrier.row == task.barrier), 0)
        refs = tuple(self.refs[row] for row in task.rows)
        answer = self.fleet.actors[task.actor].score.remote(self.job.for_actors, task, refs, theta)
        self.working[answer] = task
        self.hand_outs += len(task.rows)

    def _decide(self) -> None:
        """Every block has counted its votes: leave out samples that can no longer be selected, and go on."""
        assert self.elimination is not None
        row = self.plan.next_barrier
        assert row is not None
        histograms = [self.histograms[block] for block in range(len(self.blocks))]
        decided = decide(row, histograms, self.elimination.budget)
        # On disk before any task that depends on it is handed out. The decision of an earlier driver stays: it is
        # the same, made from the same assignments.
        path = barrier_path(self.elimination.record, row)
        create_json(path, decided.to_record())
        self.barriers.append(Barrier.from_record(read_json(path, required=_BARRIER)))
        self.totals.append(sum(self.barriers[-1].remaining))
        self.histograms.clear()
        self.plan.pass_barrier()

    def _n_scored(self, row: int, block: int | None = None) -> int:
        """Samples of a block, or of all blocks, that are scored at a row."""
        passed = bisect_right([barrier.row for barrier in self.barriers], row)
        if block is None:
            return self.totals[passed]
        return self.barriers[passed - 1].remaining[block] if passed else self.eligible[block]

    def _n_images(self) -> int:
        """Predictions in the whole array, after the decisions so far."""
        rows = range(max(len(self.refs), self.job.n_expected or 0))
        return sum(self._n_scored(row) for row in rows)

    def _scored(self) -> Scored:
        n_rows = len(self.refs)
        seconds = self.last_commit - self.first_hand_out if self.first_hand_out else 0.0
        images = sum(self._n_scored(row) for row in range(n_rows))
        return Scored(
            images=images,
            n_rows=n_rows,
            left_out=self.totals[0] * n_rows - images,
            images_predicted=self.images_predicted,
            startup_s=(self.first_hand_out or time.monotonic()) - self.began,
            seconds=seconds,
            driver_s=max(0.0, seconds - self.idle_s),
            hand_outs=self.hand_outs,
            actor_rss_bytes=self.actor_rss_bytes,
        )

    def _allowed(self) -> int:
        """The largest number of actors at present."""
        return self.fleet.allowed(self.job.producer.slots_held())

    def _look_for_checkpoints(self) -> None:
        if self.all_published:
            return  # one that comes later belongs to another pass
        finished = self.job.producer.finished()  # first: a checkpoint that is missing after it will never come
        for ref in self.job.producer.published():
            row = ref.index - self.job.for_actors.first_index
            if 0 <= row < self.assignments.n_rows and row not in self.refs:
                self.assignments.adopt_weights(row, ref.sha256)
                self.refs[row] = ref
                self.plan.published(row)
        if finished:
            self.all_published = True
            self.plan.no_more()

    def _ask_ready(self, actor: int) -> None:
        self.joining[self.fleet.actors[actor].ready.remote(self.job.for_actors)] = actor

    def _wait(self) -> None:
        pending = [*self.joining, *self.working]
        started = time.monotonic()
        if not pending:
            time.sleep(_POLL_S)
            self.idle_s += time.monotonic() - started
            return
        ready, _ = ray.wait(pending, timeout=_POLL_S)
        self.idle_s += time.monotonic() - started
        for ref in ready:
            if ref not in self.joining and ref not in self.working:
                continue  # of an actor that was lost just now
            actor = self.joining[ref] if ref in self.joining else self.working[ref].actor
            try:
                result = ray.get(ref)
            except RayTaskError as error:  # the code in the actor raised
                self._failed(ref, error)
            except RayError as error:  # the actor is gone: it died, its node did, or it had no memory left
                self._lost(actor, one_line(error)[:300])
            else:
                if ref in self.joining:
                    self._join(ref, result)
                else:
                    self._task_done(ref, result)

    def _join(self, ref: Any, found: dict[str, str]) -> None:
        actor = self.joining.pop(ref)
        begun = self.assignments.adopt_fingerprint(found)
        if found != begun and not self.job.mixed_hardware:
            self._refuse(actor, Unfit(f"{self.assignments.path}: {difference(begun, found)}"))
            return
        self.failed_starts = 0
        self.plan.actor_joined(actor)
        self.job.owner.on_event("actor_joined", actor=actor)

    def _refuse(self, actor: int, error: Exception) -> None:
        """Send an actor away that cannot score on its node, or whose predictions could differ in their last bits."""
        self.job.owner.on_event("actor_refused", actor=actor, reason=one_line(error))
        self.fleet.send_away(actor)
        # Those that wait for room asked for it before this node was to be avoided: they could be placed on it.
        for waiting in self.fleet.unplaced:
            if self._stop(waiting):
                self.plan.actor_left(waiting)
        if not self.fleet.slots:
            raise error from None

    def _task_done(self, ref: Any, result: TaskResult) -> None:
        task = self.working.pop(ref)
        self.fleet.heard(task.actor)
        if result.histogram is not None:
            self.histograms[task.block] = result.histogram
        self.plan.done(task)
        self.last_commit = time.monotonic()
        self.images += sum(self._n_scored(row, task.block) for row in task.rows)
        self.images_predicted += result.n_predicted
        self._limit_hand_outs()
        self.actor_rss_bytes = max(self.actor_rss_bytes, result.peak_rss_bytes)
        self.recent.append((self.last_commit, result.n_predicted))

    def _limit_hand_outs(self) -> None:
        """Limit what is lost with an actor to about `HAND_OUT_S` seconds of work."""
        assert self.first_hand_out is not None
        busy_s = max(time.monotonic() - self.first_hand_out, _POLL_S) * max(
            1, len(self.fleet.actors) - len(self.joining)
        )
        per_block = self.totals[-1] / len(self.blocks)
        if self.images_predicted and per_block:
            self.plan.max_rows = max(1, int(HAND_OUT_S * self.images_predicted / busy_s / per_block))

    def _watch(self) -> None:
        """Replace actors that have something to do and give no sign of life; say when none finds room."""
        if reason := self.fleet.without_room():
            self.job.owner.on_event("scoring_waits", reason=reason)
        for actor, reason in self.fleet.without_a_word().items():
            self.job.owner.on_event("actor_asked_for_again", actor=actor, reason=reason)
            self._stop(actor)
        busy = {*self.joining.values(), *(task.actor for task in self.working.values())}
        for actor, reason in self.fleet.hanging(busy).items():
            self._lost(actor, reason)

    def _shrink(self) -> None:
        """Give back slots that are needed elsewhere: the youngest actors stop, and their tasks wait again."""
        for actor in self.fleet.youngest_beyond(self._allowed()):
            if self._stop(actor):
                self.plan.actor_left(actor)

    def _stop(self, actor: int) -> bool:
        """Stop an actor; returns whether it had joined the plan."""
        joined = actor not in self.joining.values()
        self.joining = {ref: a for ref, a in self.joining.items() if a != actor}
        self.working = {ref: task for ref, task in self.working.items() if task.actor != actor}
        self.fleet.drop(actor)
        return joined

    def _lost(self, actor: int, reason: str) -> None:
        """Replace an actor that died or is stuck; its tasks are done again."""
        in_hand = sum(len(task.rows) for task in self.working.values() if task.actor == actor)
        self.retried += in_hand
        self.job.owner.on_event("actor_lost", actor=actor, reason=reason, blocks_in_hand=in_hand)
        if self._stop(actor):
            self.plan.actor_lost(actor)
            return
        if actor < self.started_before_failure:
            return  # lost together with others, such as those of its node
        self.started_before_failure = self.fleet.n_started
        self.failed_starts += 1
        if self.failed_starts == MAX_FAILED:
            raise DistalError(f"{MAX_FAILED} scoring actors in a row died while starting: {reason}")

    def _failed(self, ref: Any, error: RayTaskError) -> None:
        if ref in self.joining:
            self._refuse(self.joining.pop(ref), error.cause)
            return
        if isinstance(error.cause, DistalError):
            raise error.cause from None
        task = self.working.pop(ref)
        self.retried += len(task.rows)
        reason = f"{type(error.cause).__name__}: {error.cause}"
        self.job.owner.on_event("block_failed", block=task.block, rows=list(task.rows), reason=reason)
        self.plan.failed(task, reason)

    def _report(self) -> None:
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - RATE_WINDOW_S:
            self.recent.popleft()
        # The images of the oldest commit were predicted before the window began.
        since, n_before = self.recent[0] if self.recent else (now, 0)
        rate = (sum(n for _, n in self.recent) - n_before) / max(now - since, _POLL_S)
        newest = self.refs[max(self.refs)] if self.refs else None
        self.job.on_progress(
            replace(
                self.job.progress,
                epoch=max((checkpoint.epoch for checkpoint in self.refs.values()), default=0),
                published=len(self.refs),
                rows_scored=self.plan.n_rows_done,
                images_scored=self.images,
                images=self._n_images(),
                images_per_s=rate,
                actors=len(self.fleet.actors) - len(self.joining),
                actors_starting=len(self.joining),
                blocks_done=self.plan.n_blocks_done,
                blocks_pending=self.plan.n_blocks_pending,
                blocks_retried=self.retried,
                eliminated=self.totals[0] - self.totals[-1],
                train_loss=newest.metrics.get("train_loss") if newest else None,
            )
        )


def read_barriers(record: Path, rows: Sequence[int]) -> list[Barrier]:
    """The decisions at some rows, in order, up to the first row without one."""
    barriers = []
    with suppress(FileNotFoundError):
        for row in rows:
            barriers.append(Barrier.from_record(read_json(barrier_path(record, row), required=_BARRIER)))
    return barriers


def barrier_path(record: Path, row: int) -> Path:
    """The file with the decision before a row, which is created exclusively."""
    return record / f"{row:05d}.json"
