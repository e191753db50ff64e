"""Scoring actors, and the loop that obeys the plan.

An actor keeps its blocks decoded, loads the weights of a checkpoint, predicts, and writes its own chunks.
The driver only ever sees numbers: images scored, seconds.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from distal import checkpoints
from distal.assignments import Assignments, unassigned
from distal.errors import Damage, DistalError, Diverged, RunConflict, one_line
from distal.models import ModelSpec, be_deterministic
from distal.pool import Pool
from distal.records import Block, CheckpointRef, Progress
from distal.score.plan import MAX_ROWS, Plan, Work, actors_allowed
from distal.score.predict import NotFinite, Precision, Predictor, fingerprint

POLL_S = 0.2
RATE_WINDOW_S = 5.0
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Job:
    """One array of assignments to fill: these images, at these checkpoints, by this network.

    Attributes:
        pool, assignments: folders to read images from and to write to.
        pool_sha256: content hash of the pool.
        checkpoints: the folder where checkpoints appear.
        first_index: the checkpoint that row 0 belongs to.
        recorded_from: first row whose recorded arrays are kept.
    """

    pool: Path
    pool_sha256: str
    assignments: Path
    checkpoints: Path
    model: ModelSpec
    precision: Precision
    batch_size: int
    device: str
    first_index: int = 0
    recorded_from: int = 0

    def recording_from(self, row: int) -> Job:
        """The same job, with recorded arrays kept from this row on."""
        return replace(self, recorded_from=row)

    def beginning_at(self, checkpoint_index: int) -> Job:
        """The same job for an array whose row 0 belongs to this checkpoint."""
        return replace(self, first_index=checkpoint_index)


class Producer(Protocol):
    """What publishes checkpoints while they are scored."""

    def finished(self) -> bool:
        """Whether all checkpoints are published; raises what went wrong with it."""
        ...

    def slots_held(self) -> int:
        """Slots that it takes from scoring now."""
        ...


@dataclass(frozen=True)
class _Piece:
    """Some eligible images of a block, decoded.

    Attributes:
        positions: (n,) their places in the block.
        images: (n, C, H, W) uint8.
    """

    positions: NDArray[np.int64]
    images: NDArray[np.uint8]


class Scorer:
    """One scoring actor. It runs with one CPU thread, or on one GPU.

    Args:
        name: shown in the dashboard and in logs.
        cache_bytes: decoded images to keep.
        threads: torch threads.
    """

    def __init__(self, name: str, cache_bytes: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._name = name
        self._cache_bytes = cache_bytes
        self._job: Job | None = None
        self._pool: Pool
        self._assignments: Assignments
        self._template: Predictor
        self._pieces: dict[int, list[_Piece]] = {}
        self._room = cache_bytes
        self._predictors: OrderedDict[str, Predictor] = OrderedDict()

    def __repr__(self) -> str:
        return f"Scorer({self._name})"

    def fingerprint(self, job: Job) -> dict[str, str]:
        """What this actor's predictions depend on besides weights and images."""
        return fingerprint(torch.device(job.device), job.precision, job.batch_size)

    def score(self, job: Job, block: Block, refs: Sequence[CheckpointRef]) -> int:
        """Score one block at some checkpoints and commit each; returns the number of images predicted.

        A block that is committed already is left alone, so a retry does only what is missing.

        Raises:
            Diverged: a logit is not finite.
            Damage: images or weights are not what was written.
        """
        self._begin(job)
        todo = [ref for ref in refs if not self._assignments.has(ref.index - job.first_index, block)]
        eligible = self._assignments.eligible(block.start, block.stop)
        names = ("labels", *self._assignments.recorded)
        found: dict[int, dict[str, list[NDArray[Any]]]] = {ref.index: {name: [] for name in names} for ref in todo}
        for piece in self._pieces_of(block, eligible) if todo else ():
            for ref in todo:
                try:
                    prediction = self._load(ref)(piece.images)
                except NotFinite as error:
                    sample_index = block.start + int(piece.positions[error.args[0]])
                    raise Diverged(self._not_finite(ref, sample_index)) from error
                for name in names:
                    found[ref.index][name].append(getattr(prediction, name))
        for ref in todo:
            self._commit(ref.index - job.first_index, block, eligible, found[ref.index])
        return len(todo) * int(eligible.sum())

    def _commit(self, row: int, block: Block, eligible: NDArray[np.bool_], found: dict[str, list[Any]]) -> None:
        """Write one block of one row: what was predicted where eligible, UNASSIGNED and NaN elsewhere."""
        assert self._job is not None
        labels = np.full(len(block), unassigned(self._assignments.dtype), self._assignments.dtype)
        if found["labels"]:
            labels[eligible] = np.concatenate(found["labels"])
        recorded = {}
        for name in self._assignments.recorded if row >= self._job.recorded_from else ():
            recorded[name] = np.full(len(block), np.nan, np.float32)
            if found[name]:
                recorded[name][eligible] = np.concatenate(found[name])
        self._assignments.write(row, block, labels, recorded)

    def _begin(self, job: Job) -> None:
        if job == self._job:
            return
        self._job = None  # until everything below has worked
        self._pieces.clear()
        self._room = self._cache_bytes
        self._predictors.clear()
        self._pool = Pool.open(job.pool).require(job.pool_sha256)
        self._assignments = Assignments.open(job.assignments)
        be_deterministic(torch.device(job.device))
        self._template = Predictor(
            job.model.build(pretrained=False),
            job.model.preprocess(),
            batch_size=job.batch_size,
            precision=job.precision,
            device=job.device,
        )
        self._job = job

    def _pieces_of(self, block: Block, eligible: NDArray[np.bool_]) -> Iterator[_Piece]:
        """The eligible images of a block, in index order, in pieces of whole batches (but for the last).

        They are kept decoded while the budget lasts. When it is spent nothing is thrown out: blocks come round in
        turns, so the one used longest ago is the one needed next. Then a piece at a time is in memory.
        """
        assert self._job is not None
        if block.index in self._pieces:
            yield from self._pieces[block.index]
            return
        _, height, width = self._pool.image_shape
        keep = int(eligible.sum()) * self._pool.image_shape[0] * height * width <= self._room
        kept = []
        for piece in _pieces(self._pool, block, eligible, self._job.batch_size):
            if keep:
                piece = replace(piece, images=piece.images.copy(order="K"))  # a slice would keep all it was cut from
                kept.append(piece)
                self._room -= piece.images.nbytes
            yield piece
        if keep:
            self._pieces[block.index] = kept

    def _load(self, ref: CheckpointRef) -> Predictor:
        """A predictor with the weights of a checkpoint; the last few are kept."""
        predictor = self._predictors.pop(ref.sha256, None)
        if predictor is None:
            full = len(self._predictors) == MAX_ROWS
            predictor = self._predictors.popitem(last=False)[1] if full else deepcopy(self._template)
            predictor.net.load_state_dict(checkpoints.load(ref))
        self._predictors[ref.sha256] = predictor
        return predictor

    def _not_finite(self, ref: CheckpointRef, sample_index: int) -> str:
        sample_id = self._pool.take_samples([sample_index], ["sample_id"])["sample_id"][0].as_py()
        return (
            f"checkpoint {ref.index} gives a logit that is not finite for sample {sample_id}: training diverged; "
            f"remove {ref.path.parents[2]} to do the cycle again, with a lower train.lr"
        )


def _pieces(pool: Pool, block: Block, eligible: NDArray[np.bool_], batch_size: int) -> Iterator[_Piece]:
    """Read a block chunk by chunk, and cut its eligible images into pieces of whole batches, but for the last."""
    positions: NDArray[np.int64] = np.empty(0, np.int64)
    images: NDArray[np.uint8] = np.empty((0, *pool.image_shape[1:], pool.image_shape[0]), np.uint8)
    for start in range(block.start, block.stop, pool.chunk_size):
        stop = min(start + pool.chunk_size, block.stop)
        flags = eligible[start - block.start : stop - block.start]
        if not flags.any():
            continue
        positions = np.concatenate([positions, start - block.start + np.flatnonzero(flags)])
        images = np.concatenate([images, pool.read(start, stop).transpose(0, 2, 3, 1)[flags]])
        whole = len(images) // batch_size * batch_size
        if whole:
            yield _Piece(positions[:whole], images[:whole].transpose(0, 3, 1, 2))
            positions, images = positions[whole:], images[whole:]
    if len(images):
        yield _Piece(positions, images.transpose(0, 3, 1, 2))


class Scorers:
    """The scoring actors of a run. They live from cycle to cycle; their number follows the free slots.

    Args:
        prefix: makes the actors' names unique to this attempt.
        options: Ray options of an actor, such as the resources it takes.
        asked: `score.actors`, None for auto.
        slots: CPU slots, or GPUs, of the cluster.
        cache_bytes, threads: see `Scorer`.
    """

    def __init__(
        self,
        prefix: str,
        options: dict[str, Any],
        *,
        asked: int | None,
        slots: int,
        cache_bytes: int,
        threads: int,
    ) -> None:
        self._prefix = prefix
        self._options = options
        self._arguments = (cache_bytes, threads)
        self._next = 0
        self.asked = asked
        self.slots = slots
        self.actors: dict[int, Any] = {}

    def shrink(self, n: int) -> None:
        """Stop actors until there are at most `n`."""
        while len(self.actors) > n:
            self.drop(next(reversed(self.actors)))

    def grow(self, n: int) -> list[int]:
        """Start actors until there are at least `n`; returns the new ones, which are not ready yet."""
        started = []
        while len(self.actors) < n:
            name = f"{self._prefix}-{self._next}"
            actor = ray.remote(Scorer).options(name=name, namespace="distal", **self._options)
            self.actors[self._next] = actor.remote(name, *self._arguments)
            started.append(self._next)
            self._next += 1
        return started

    def drop(self, actor: int) -> None:
        """Stop one actor, and free its slot."""
        ray.kill(self.actors.pop(actor))


def score(
    job: Job,
    assignments: Assignments,
    scorers: Scorers,
    producer: Producer,
    *,
    mixed_hardware: bool = False,
    progress: Progress,
    on_progress: Callable[[Progress], None],
    on_event: Callable[..., None] = lambda name, **values: None,
) -> int:
    """Score all eligible samples at all checkpoints, those still to come included.

    Blocks that are committed already are not touched.

    Args:
        producer: publishes the checkpoints; its slots are left to it.
        mixed_hardware: whether actors with another fingerprint than the first may join; else they are sent away.
        progress: what is known of the cycle; `on_progress` is called with it, brought up to date.
        on_event: called with the name and the values of what happened.

    Returns:
        Predictions in the array: eligible samples x rows.

    Raises:
        BlockFailed, DistalError: a block, or every new actor, failed again and again.
        RunConflict: no actor has the fingerprint that the assignments were begun with.
        Damage: a checkpoint is missing though training is done, or has other weights than a row was begun with.
    """
    return _Pass(job, assignments, scorers, producer, mixed_hardware, progress, on_progress, on_event).run()


class _Pass:
    """One run of the scoring loop."""

    def __init__(
        self,
        job: Job,
        assignments: Assignments,
        scorers: Scorers,
        producer: Producer,
        mixed_hardware: bool,
        progress: Progress,
        on_progress: Callable[[Progress], None],
        on_event: Callable[..., None],
    ) -> None:
        self.job = job
        self.assignments = assignments
        self.scorers = scorers
        self.producer = producer
        self.mixed_hardware = mixed_hardware
        self.progress = progress
        self.on_progress = on_progress
        self.on_event = on_event
        self.blocks = assignments.blocks
        self.eligible = [int(assignments.eligible(b.start, b.stop).sum()) for b in self.blocks]
        done = [(row, b) for row in range(assignments.n_rows) for b in assignments.committed(row)]
        self.images = sum(self.eligible[block] for _, block in done)
        self.plan = Plan(assignments.n_rows, len(self.blocks), done)
        self.refs: dict[int, CheckpointRef] = {}
        self.joining: dict[Any, int] = {}
        self.working: dict[Any, Work] = {}
        self.failed_starts = 0
        self.refused = 0
        self.missed_since: float | None = None
        self.recent: deque[tuple[float, int]] = deque()

    def run(self) -> int:
        # Training takes its slots first; it has not got them while actors of the cycle before sit there.
        self.scorers.shrink(self._allowed())
        for actor in self.scorers.actors:
            self._greet(actor)
        polled = -POLL_S
        while not self.plan.finished:
            if time.monotonic() - polled >= POLL_S:
                polled = time.monotonic()
                self._look_for_checkpoints()
                self._shrink()
                for actor in self.scorers.grow(min(self._allowed(), self.plan.n_unfinished_blocks)):
                    self._greet(actor)
                self._report()
            for work in self.plan.next_work():
                handle = self.scorers.actors[work.actor]
                refs = [self.refs[row] for row in work.rows]
                self.working[handle.score.remote(self.job, self.blocks[work.block], refs)] = work
            self._wait()
        self._report()
        return self.images

    def _allowed(self) -> int:
        """Actors that there may be now. One that was refused is not started again: it would land on the same node."""
        held = self.producer.slots_held()
        return max(0, actors_allowed(self.scorers.asked, self.scorers.slots, held) - self.refused)

    def _look_for_checkpoints(self) -> None:
        finished = self.producer.finished()  # asked first: what is missing afterwards will never come
        for index in checkpoints.committed(self.job.checkpoints):
            row = index - self.job.first_index
            if 0 <= row < self.assignments.n_rows and row not in self.refs:
                ref = checkpoints.read(self.job.checkpoints, index)
                self.assignments.adopt_weights(row, ref.sha256)
                self.refs[row] = ref
                self.plan.published(row)
        lacking = [row for row in range(self.assignments.n_rows) if row not in self.refs]
        if not finished or not lacking:
            self.missed_since = None
            return
        self.missed_since = self.missed_since or time.monotonic()
        if time.monotonic() - self.missed_since > checkpoints.VISIBLE_S:
            raise Damage(
                f"{self.job.checkpoints}: training is complete, and checkpoint {lacking[0] + self.job.first_index} is "
                "not here; every node must see the same files; put it back, or start another run directory"
            )

    def _greet(self, actor: int) -> None:
        self.joining[self.scorers.actors[actor].fingerprint.remote(self.job)] = actor

    def _wait(self) -> None:
        pending = [*self.joining, *self.working]
        if not pending:
            time.sleep(POLL_S)
            return
        ready, _ = ray.wait(pending, timeout=POLL_S)
        for ref in ready:
            if ref not in self.joining and ref not in self.working:
                continue  # of an actor that was lost just now
            actor = self.joining[ref] if ref in self.joining else self.working[ref].actor
            try:
                result = ray.get(ref)
            except RayTaskError as error:  # the code in the actor raised
                self._failed(ref, error)
            except RayError as error:  # the actor is gone: it died, its node did, or it had no memory left
                self._lost(actor, error)
            else:
                self._join(ref, result) if ref in self.joining else self._commit(ref, result)

    def _join(self, ref: Any, found: dict[str, str]) -> None:
        actor = self.joining.pop(ref)
        begun = self.assignments.adopt_fingerprint(found)
        if found != begun and not self.mixed_hardware:
            self._refuse(actor, begun, found)
            return
        self.failed_starts = 0
        self.plan.actor_joined(actor)
        self.on_event("actor_joined", actor=actor)

    def _refuse(self, actor: int, begun: dict[str, str], found: dict[str, str]) -> None:
        """Send an actor away whose predictions could differ in their last bits."""
        name = next(name for name in begun if begun[name] != found.get(name))
        reason = f"begun with {name} {begun[name]!r}, this actor has {found.get(name)!r}"
        self.on_event("actor_refused", actor=actor, reason=reason)
        self.scorers.drop(actor)
        self.refused += 1
        if not self.scorers.actors:
            raise RunConflict(
                f"{self.job.assignments}: {reason}, which can change the answer; use the same kind of machine, "
                "or set score.mixed_hardware=allow"
            )

    def _commit(self, ref: Any, n_predicted: int) -> None:
        work = self.working.pop(ref)
        self.plan.done(work)
        self.images += self.eligible[work.block] * len(work.rows)
        self.recent.append((time.monotonic(), n_predicted))

    def _shrink(self) -> None:
        """Give slots back that are needed elsewhere; the youngest actors go, and what they had in hand waits again."""
        for actor in list(self.scorers.actors)[self._allowed() :]:
            if self._forget(actor):
                self.plan.actor_left(actor)

    def _forget(self, actor: int) -> bool:
        """Stop an actor; returns whether it had joined the plan."""
        joined = actor not in self.joining.values()
        self.joining = {ref: a for ref, a in self.joining.items() if a != actor}
        self.working = {ref: work for ref, work in self.working.items() if work.actor != actor}
        self.scorers.drop(actor)
        return joined

    def _lost(self, actor: int, error: RayError) -> None:
        self.on_event("actor_lost", actor=actor, reason=one_line(error)[:300])
        if self._forget(actor):
            self.plan.actor_lost(actor)
            return
        self.failed_starts += 1
        if self.failed_starts == MAX_FAILED_STARTS:
            raise DistalError(f"{MAX_FAILED_STARTS} scoring actors in a row died while starting: {error}")

    def _failed(self, ref: Any, error: RayTaskError) -> None:
        if isinstance(error.cause, DistalError) or ref in self.joining:
            raise error.cause from None
        work = self.working.pop(ref)
        reason = f"{type(error.cause).__name__}: {error.cause}"
        self.on_event("block_failed", block=work.block, rows=list(work.rows), reason=reason)
        self.plan.failed(work, reason)

    def _report(self) -> None:
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - RATE_WINDOW_S:
            self.recent.popleft()
        window = max(now - self.recent[0][0], POLL_S) if self.recent else 1.0
        rate = sum(n for _, n in self.recent) / window
        self.on_progress(
            replace(
                self.progress,
                epoch=max((checkpoint.epoch for checkpoint in self.refs.values()), default=0),
                published=len(self.refs),
                rows_scored=self.plan.n_rows_done,
                images_scored=self.images,
                images=sum(self.eligible) * self.assignments.n_rows,
                images_per_s=rate,
                actors=len(self.scorers.actors) - len(self.joining),
                actors_starting=len(self.joining),
            )
        )
