"""Scoring actors, and the loop that obeys the plan.

An actor keeps its blocks decoded, loads the weights of a checkpoint, predicts, and writes its own chunks.
The driver only ever sees numbers: images scored, seconds.
"""

from __future__ import annotations

import itertools
import resource
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from distal import checkpoints, cluster, metrics
from distal.assignments import Assignments, unassigned
from distal.augment import crop_flip
from distal.errors import DistalError, Diverged, ModelError, RunConflict, one_line
from distal.hashing import mix64
from distal.models import ModelSpec, be_deterministic
from distal.pool import Pool
from distal.records import Block, CheckpointRef, Progress
from distal.score.eliminate import Barrier, barrier_rows, decide, histogram, survivors
from distal.score.plan import MAX_ROWS, Plan, Work, actors_allowed
from distal.score.predict import (
    NotFinite,
    Precision,
    Prediction,
    Predictor,
    best_precision,
    fingerprint,
    quickest_batch_size,
)
from distal.storage import read_json, require_writable, write_json

POLL_S = 0.2
RATE_WINDOW_S = 5.0
WATCH_S = 5.0
STUCK_S = 600.0
WAITS_S = 60.0
HAND_OUT_S = 120.0
MAX_FAILED_STARTS = 3
OUTPUT_BATCHES = 8

WATCH = "watch"  # a thread of an actor beside the one that scores


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
        record: `elimination.json`, what has been decided.
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
class _Done:
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


@dataclass(frozen=True)
class _Piece:
    """Some eligible images of a block, decoded.

    Attributes:
        positions: (n,) their places in the block.
        images: (n, C, H, W) uint8.
    """

    positions: NDArray[np.int64]
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, flags: NDArray[np.bool_]) -> _Piece:
        """Those that are flagged; `flags` are for the whole block."""
        kept = flags[self.positions]
        return self if kept.all() else self._take(kept)

    def then(self, other: _Piece) -> _Piece:
        """These images and those of another piece."""
        images = [each.images.transpose(0, 2, 3, 1) for each in (self, other)]
        return _Piece(np.concatenate([self.positions, other.positions]), np.concatenate(images).transpose(0, 3, 1, 2))

    def split(self, n: int) -> tuple[_Piece, _Piece]:
        """The first `n`, and the others."""
        return self._take(slice(n)), self._take(slice(n, None))

    def _take(self, which: slice | NDArray[np.bool_]) -> _Piece:
        return _Piece(self.positions[which], self.images.transpose(0, 2, 3, 1)[which].transpose(0, 3, 1, 2))


class Scorer:
    """One scoring actor. It runs with one CPU thread, or on one GPU.

    Args:
        name: shown in the dashboard and in logs.
        cache_bytes: decoded images to keep.
        threads: torch threads.
        run, shard: what its metrics are tagged with.
    """

    def __init__(self, name: str, cache_bytes: int, threads: int, run: str = "", shard: int = 0) -> None:
        self._name = name
        self._meter = metrics.Meter(run, shard)
        self._idle_since: float | None = None
        self._threads = threads
        torch.set_num_threads(threads)
        self._cache_bytes = cache_bytes
        self._job: Job | None = None
        self._pool: Pool
        self._assignments: Assignments
        self._is_open = False  # the assignments of the job
        self._template: Predictor
        self._pieces: dict[int, list[_Piece]] = {}
        self._room = cache_bytes
        self._predictors: OrderedDict[str, Predictor] = OrderedDict()
        self._ever: tuple[Predictor, ...] = ()  # the same, for a thread that may look while they change places

    def __repr__(self) -> str:
        return f"Scorer({self._name})"

    def ready(self, job: Job) -> dict[str, str]:
        """Be ready to score a job: what it needs is opened, and written beside.

        Returns:
            What this actor's predictions depend on besides weights and images.

        Raises:
            Exception: pool, network or assignments cannot be used on this node; a network raises what its code does.
        """
        self._take_up(job)
        self._open_assignments(job)
        require_writable(job.assignments.parent)
        return fingerprint(torch.device(job.device), job.precision, job.batch_size)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def process(self) -> cluster.Process:
        """Which process this is; answered as soon as the actor has found room."""
        return cluster.this_process()

    def choose(self, job: Job, precision: str, batch_size: int | str, n_images: int) -> tuple[Precision, int]:
        """What `auto` comes to on this actor: the precision, and the batch size for blocks of `n_images`."""
        device = torch.device(job.device)
        chosen: Precision = "fp32" if precision == "fp32" else "bf16" if precision == "bf16" else best_precision(device)
        if isinstance(batch_size, int):
            return chosen, batch_size
        predictor = Predictor(
            job.model.build(pretrained=False), job.model.preprocess(), batch_size=1, precision=chosen, device=device
        )
        return chosen, quickest_batch_size(predictor, job.model.image_shape, n_images)

    def predict(self, job: Job, indices: Sequence[int], ref: CheckpointRef) -> NDArray[np.int64]:
        """The class of some samples at a checkpoint, without writing it anywhere: (n,) int64."""
        self._take_up(job)
        return self._predicted(ref, indices, self._pool.take(indices)).labels

    def outputs(
        self, job: Job, indices: Sequence[int], ref: CheckpointRef, names: Collection[str]
    ) -> dict[str, NDArray[np.float32]]:
        """What a checkpoint gives for some samples: "probabilities", (n, C), and "embeddings", (n, d)."""
        self._take_up(job)
        images = self._pool.take(indices)
        found = {}
        if "probabilities" in names:
            found["probabilities"] = self._predicted(ref, indices, images).probabilities()
        if "embeddings" in names:
            found["embeddings"] = self._load(ref).embeddings(images)
        return found

    def _predicted(self, ref: CheckpointRef, indices: Sequence[int], images: NDArray[np.uint8]) -> Prediction:
        try:
            return self._load(ref)(images)
        except NotFinite as error:
            raise Diverged(self._not_finite(ref, int(indices[error.args[0]]))) from error

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def sign_of_life(self) -> int:
        """A number that changes with every batch; answered also while a block is scored."""
        return sum(predictor.n_batches for predictor in self._ever)

    def score(self, job: Job, order: Order) -> _Done:
        """Score one block at some checkpoints and commit each.

        A block that is committed already is left alone, so a retry does only what is missing.

        Raises:
            Diverged: a logit is not finite.
            Damage: images or weights are not what was written.
        """
        if self._idle_since is not None:
            self._meter.add(metrics.IDLE_SECONDS, time.perf_counter() - self._idle_since)
        self._take_up(job)
        self._open_assignments(job)
        block = order.block
        todo = [ref for ref in order.refs if not self._is_done(ref.index - job.first_index, block)]
        eligible = self._assignments.eligible(block.start, block.stop)
        scored = eligible
        if order.barrier is not None and todo:
            votes = self._assignments.read(block.start, block.stop, range(order.barrier), complete=True)
            scored = survivors(votes, eligible, self._assignments.n_classes, order.theta)
        sums = self._assignments.sums(block) if self._assignments.sums_up and todo else None
        names = ("labels", *self._assignments.recorded)
        found: dict[int, dict[str, list[NDArray[Any]]]] = {ref.index: {name: [] for name in names} for ref in todo}
        for piece in _batched(self._images_of(block, eligible), scored, job.batch_size) if todo else ():
            started = time.perf_counter()
            for ref in todo:
                images = self._augmented(piece, block, ref) if job.augment else piece.images
                try:
                    prediction = self._load(ref)(images)
                except NotFinite as error:
                    sample_index = block.start + int(piece.positions[error.args[0]])
                    raise Diverged(self._not_finite(ref, sample_index)) from error
                found[ref.index]["labels"].append(prediction.labels)
                row = ref.index - job.first_index
                for name in self._recorded(row):
                    found[ref.index][name].append(getattr(prediction, name)())
                if sums is not None:
                    sums.add(row, piece.positions, prediction.probabilities(), prediction.entropy())
            self._meter.add(metrics.FORWARD_SECONDS, time.perf_counter() - started)
            self._meter.add(metrics.IMAGES_SCORED, len(todo) * len(piece))
            self._meter.tell()
        started = time.perf_counter()
        if sums is not None:
            sums.end(todo[-1].index - job.first_index)
            self._assignments.write_sums(block, sums)
        for ref in todo:
            self._commit(ref.index - job.first_index, block, scored, found[ref.index])
        self._meter.add(metrics.WRITE_SECONDS, time.perf_counter() - started)
        n_predicted = len(todo) * int(scored.sum())
        self._meter.add(metrics.LABELS_WRITTEN, n_predicted)
        counts = None
        if order.count is not None:
            votes = self._assignments.read(block.start, block.stop, range(order.count), complete=True)
            counts = histogram(votes, eligible, self._assignments.n_classes, self._assignments.n_rows)
        self._meter.tell(now=True)
        self._idle_since = time.perf_counter()
        return _Done(n_predicted, counts, peak_rss_bytes())

    def _augmented(self, piece: _Piece, block: Block, ref: CheckpointRef) -> NDArray[np.uint8]:
        """The images as training could show them: a function of seed, cycle, checkpoint and sample."""
        assert self._job is not None
        assert self._job.augment is not None
        draws = mix64("augment pool", *self._job.augment, ref.index, block.start + piece.positions)
        return crop_flip(torch.from_numpy(piece.images), draws).numpy()

    def _is_done(self, row: int, block: Block) -> bool:
        return self._assignments.has(row, block, recorded=bool(self._recorded(row)))

    def _recorded(self, row: int) -> tuple[str, ...]:
        """The arrays that are kept at a row."""
        assert self._job is not None
        return self._assignments.recorded if row >= self._job.recorded_from else ()

    def _commit(self, row: int, block: Block, scored: NDArray[np.bool_], found: dict[str, list[Any]]) -> None:
        """Write one block of one row: what was predicted where scored, UNASSIGNED and NaN elsewhere."""
        labels = np.full(len(block), unassigned(self._assignments.dtype), self._assignments.dtype)
        if found["labels"]:
            labels[scored] = np.concatenate(found["labels"])
        recorded = {}
        for name in self._recorded(row):
            recorded[name] = self._assignments.blank(name, block)
            if found[name]:
                recorded[name][scored] = np.concatenate(found[name])
        self._assignments.write(row, block, labels, recorded)
        n_bytes = labels.nbytes + sum(values.nbytes for values in recorded.values())
        self._meter.add(metrics.WRITTEN_BYTES, n_bytes)

    def _take_up(self, job: Job) -> None:
        """Be ready for a job, which may be the one before."""
        torch.set_num_threads(self._threads)  # a setting of the thread, and Ray may use another one
        if job != self._job:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        self._job = None  # until everything below has worked
        self._is_open = False
        self._pieces.clear()
        self._room = self._cache_bytes
        self._predictors.clear()
        self._ever = ()
        self._pool = Pool.open(job.pool).require(job.pool_sha256)
        be_deterministic(torch.device(job.device))
        self._template = Predictor(
            job.model.build(pretrained=False),
            job.model.preprocess(),
            batch_size=job.batch_size,
            precision=job.precision,
            device=job.device,
        )
        self._job = job

    def _open_assignments(self, job: Job) -> None:
        if not self._is_open:
            self._assignments = Assignments.open(job.assignments)
            self._is_open = True

    def _images_of(self, block: Block, eligible: NDArray[np.bool_]) -> Iterator[_Piece]:
        """The eligible images of a block, in pieces, each read while the one before it is predicted."""
        kept = block.index in self._pieces
        self._meter.add(metrics.CACHE_HITS if kept else metrics.CACHE_MISSES, 1)
        for piece, read_s, wait_s in _ahead(self._pieces_of(block, eligible)):
            self._meter.add(metrics.WAIT_SECONDS, wait_s)
            if not kept:
                self._meter.add(metrics.READ_SECONDS, read_s)
                self._meter.add(metrics.READ_BYTES, piece.images.nbytes)
            yield piece

    def _pieces_of(self, block: Block, eligible: NDArray[np.bool_]) -> Iterator[_Piece]:
        """The eligible images of a block, in index order, in pieces of a chunk.

        They are kept decoded while the budget lasts. When it is spent nothing is thrown out: blocks come round in
        turns, so the one used longest ago is the one needed next. Then a piece at a time is in memory.
        """
        assert self._job is not None
        if block.index in self._pieces:
            yield from self._pieces[block.index]
            return
        _, height, width = self._pool.image_shape
        n_bytes = int(eligible.sum()) * self._pool.image_shape[0] * height * width
        keep = n_bytes <= self._room
        kept = []
        for piece in _pieces(self._pool, block, eligible):
            if keep:
                kept.append(piece)
            yield piece
        if keep:
            self._pieces[block.index] = kept
            self._room -= n_bytes

    def _load(self, ref: CheckpointRef) -> Predictor:
        """A predictor with the weights of a checkpoint; the last few are kept."""
        predictor = self._predictors.pop(ref.sha256, None)
        if predictor is None:
            full = len(self._predictors) == MAX_ROWS
            predictor = self._predictors.popitem(last=False)[1] if full else deepcopy(self._template)
            self._ever = self._ever if full else (*self._ever, predictor)
            try:
                predictor.load(checkpoints.load(ref))
            except RuntimeError as error:
                raise ModelError(f"{ref.path}: does not fit model.name ({one_line(error)[:200]})") from error
        self._predictors[ref.sha256] = predictor
        return predictor

    def _not_finite(self, ref: CheckpointRef, sample_index: int) -> str:
        sample_id = self._pool.take_samples([sample_index], ["sample_id"])["sample_id"][0].as_py()
        return (
            f"checkpoint {ref.index} ({ref.path.name}) gives a logit that is not finite for sample {sample_id}: "
            "training diverged; train again with a lower learning rate"
        )


def _batched(pieces: Iterator[_Piece], scored: NDArray[np.bool_], batch_size: int) -> Iterator[_Piece]:
    """The images of a block that are scored, in pieces of whole batches but for the last.

    What an image is predicted to be then depends on which images of its block are scored, not on how it was read.
    """
    rest: _Piece | None = None
    for piece in pieces:
        piece = piece.of(scored)
        if rest is not None and len(rest):
            piece = rest.then(piece)
        whole, rest = piece.split(len(piece) // batch_size * batch_size)
        if len(whole):
            yield whole
    if rest is not None and len(rest):
        yield rest


def _ahead(pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, float, float]]:
    """The same pieces, each read and decoded in a thread while the one before it is predicted.

    With each come the seconds that reading it took, and those that were waited for it.
    """

    def read() -> tuple[_Piece | None, float]:
        started = time.perf_counter()
        return next(pieces, None), time.perf_counter() - started

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read)
        while True:
            started = time.perf_counter()
            piece, read_s = coming.result()
            if piece is None:
                return
            wait_s = time.perf_counter() - started
            coming = thread.submit(read)
            yield piece, read_s, wait_s


def peak_rss_bytes() -> int:
    """The most memory this process has had."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux, where getrusage would also count the process that started this one
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pieces(pool: Pool, block: Block, eligible: NDArray[np.bool_]) -> Iterator[_Piece]:
    """The eligible images of a block, chunk by chunk."""
    for start in range(block.start, block.stop, pool.chunk_size):
        stop = min(start + pool.chunk_size, block.stop)
        flags = eligible[start - block.start : stop - block.start]
        if flags.any():
            images = pool.read(start, stop).transpose(0, 2, 3, 1)[flags]  # a copy: the others are let go
            yield _Piece(start - block.start + np.flatnonzero(flags), images.transpose(0, 3, 1, 2))


class Scorers:
    """The scoring actors of a run. They live from cycle to cycle; their number follows the free slots.

    Args:
        prefix: makes the actors' names unique to this attempt.
        options: Ray options of an actor, such as the resources it takes.
        asked: `score.actors`, None for auto.
        slots: counts the CPU slots, or GPUs, that there are or may come to be. When nodes are lost the actors that
            they had wait for others to come.
        cache_bytes, threads, run: see `Scorer`.
    """

    def __init__(
        self,
        prefix: str,
        options: dict[str, Any],
        *,
        asked: int | None,
        slots: Callable[[], int],
        cache_bytes: int,
        threads: int,
        run: str = "",
    ) -> None:
        self._prefix = prefix
        self._options = options
        self._arguments = (cache_bytes, threads, run)
        self._next = 0
        self._shards: dict[int, int] = {}
        self._find_slots = slots
        self.asked = asked
        self.slots = slots()
        self.actors: dict[int, Any] = {}
        self.processes: dict[int, cluster.Process] = {}
        self._placing: dict[Any, int] = {}

    @property
    def n_started(self) -> int:
        """Actors started so far."""
        return self._next

    def __str__(self) -> str:
        needs = {name: value for name, value in self._options.items() if name.startswith(("num_", "label")) and value}
        return f"a scoring actor, which needs {needs}"

    def look_around(self) -> None:
        """Count the slots again, and learn which actors have found room."""
        self.slots = max(self.slots, self._find_slots())
        for ref in _ready(self._placing):
            with suppress(RayError):  # it died: what else it is asked says so
                self._placed(ref)

    def _placed(self, ref: Any) -> None:
        """An actor has found room; raises RayError when it died meanwhile."""
        self.processes[self._placing[ref]] = ray.get(ref)
        del self._placing[ref]

    def shrink(self, n: int) -> None:
        """Stop actors until there are at most `n`."""
        while len(self.actors) > n:
            self.drop(next(reversed(self.actors)))

    def grow(self, n: int) -> list[int]:
        """Start actors until there are at least `n`; returns the new ones, which are not ready yet."""
        started = []
        while len(self.actors) < n:
            name = f"{self._prefix}-{self._next}"
            actor = ray.remote(concurrency_groups={WATCH: 1})(Scorer).options(
                name=name, namespace="distal", **self._options
            )
            # The number of one that has gone is used again: series that are never written to are kept all the same.
            self._shards[self._next] = next(n for n in itertools.count() if n not in self._shards.values())
            self.actors[self._next] = actor.remote(name, *self._arguments, self._shards[self._next])
            self._placing[self.actors[self._next].process.remote()] = self._next
            started.append(self._next)
            self._next += 1
        return started

    def choose(self, job: Job, precision: str, batch_size: int | str, n_images: int) -> tuple[Precision, int]:
        """What `auto` comes to on an actor; see `Scorer.choose`."""
        chosen: tuple[Precision, int] = self._ask("choose", job, precision, batch_size, n_images)
        return chosen

    def predict(self, job: Job, indices: Sequence[int], ref: CheckpointRef) -> NDArray[np.int64]:
        """The class of some samples at a checkpoint; see `Scorer.predict`."""
        labels: NDArray[np.int64] = self._ask("predict", job, list(indices), ref)
        return labels

    def outputs(
        self, job: Job, indices: NDArray[np.int64], ref: CheckpointRef, names: Collection[str]
    ) -> dict[str, NDArray[np.float32]]:
        """What a checkpoint gives for some samples, by all actors; see `Scorer.outputs`.

        Args:
            indices: (n,), ascending. They are cut into pieces of whole batches, however many actors there are.
        """
        size = OUTPUT_BATCHES * job.batch_size
        pieces = [indices[start : start + size].tolist() for start in range(0, len(indices), size)]
        found = self._ask_all("outputs", [(job, piece, ref, names) for piece in pieces])
        return {name: np.concatenate([each[name] for each in found]) for name in names}

    def _ask(self, method: str, *arguments: object) -> Any:
        """Have any actor do something; another one when it dies."""
        return self._ask_all(method, [arguments])[0]

    def _ask_all(self, method: str, calls: Sequence[tuple[object, ...]]) -> list[Any]:
        """Have the actors do something with each of some arguments; what one had in hand that died is done again.

        Only those are asked that have found room: one that stands for a lost node may wait for ever.
        """
        answers: dict[int, Any] = {}
        waiting = deque(range(len(calls)))
        working: dict[Any, tuple[int, int]] = {}
        n_died = 0
        while len(answers) < len(calls):
            self.grow(max(1, min(actors_allowed(self.asked, self.slots, 0), len(waiting) + len(working))))
            busy = {actor for actor, _ in working.values()}
            for index in [index for index in self.processes if index not in busy][: len(waiting)]:
                call = waiting.popleft()
                working[getattr(self.actors[index], method).remote(*calls[call])] = index, call
            for ref in ray.wait([*working, *self._placing], num_returns=1)[0]:
                index = working[ref][0] if ref in working else self._placing[ref]
                try:
                    if ref in working:
                        answers[working[ref][1]] = ray.get(ref)
                        del working[ref]
                        n_died = 0
                    else:
                        self._placed(ref)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    if ref in working:
                        waiting.appendleft(working.pop(ref)[1])
                    self.drop(index)
                    n_died += 1
                    if n_died == MAX_FAILED_STARTS:
                        raise DistalError(f"{n_died} scoring actors in a row died: {one_line(error)}") from None
        return [answers[call] for call in range(len(calls))]

    def drop(self, actor: int) -> None:
        """Stop one actor, and free its slot, also when it does not listen to Ray any more."""
        ray.kill(self.actors.pop(actor))
        del self._shards[actor]
        self._placing = {ref: placed for ref, placed in self._placing.items() if placed != actor}
        if actor in self.processes:
            cluster.kill(self.processes.pop(actor))


def _ready(refs: dict[Any, int]) -> list[Any]:
    """Those of some object references whose values are there."""
    return ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []


def score(
    job: Job,
    assignments: Assignments,
    scorers: Scorers,
    producer: Producer,
    *,
    elimination: Elimination | None = None,
    n_expected: int | None = None,
    mixed_hardware: bool = False,
    stuck_after: float = STUCK_S,
    progress: Progress,
    on_progress: Callable[[Progress], None],
    on_event: Callable[..., None] = lambda name, **values: None,
) -> Scored:
    """Score all eligible samples at all checkpoints, those still to come included.

    Blocks that are committed already are not touched. When the producer has finished with fewer checkpoints than the
    array has rows, the others are no rows.

    Args:
        producer: publishes the checkpoints; its slots are left to it.
        elimination: None: every eligible sample is scored at every checkpoint.
        n_expected: how many checkpoints there will be, for people; None: unknown.
        mixed_hardware: whether actors with another fingerprint than the first may join; else they are sent away.
        stuck_after: seconds without a finished batch after which an actor that has work is replaced.
        progress: what is known of the cycle; `on_progress` is called with it, brought up to date.
        on_event: called with the name and the values of what happened.

    Raises:
        BlockFailed, DistalError: a block, or every new actor, failed again and again.
        RunConflict: no actor has the fingerprint that the assignments were begun with.
        Damage: a checkpoint has other weights than its row was begun with.
    """
    return _Pass(
        job,
        assignments,
        scorers,
        producer,
        elimination,
        n_expected,
        mixed_hardware,
        stuck_after,
        progress,
        on_progress,
        on_event,
    ).run()


class _Pass:
    """One run of the scoring loop."""

    def __init__(
        self,
        job: Job,
        assignments: Assignments,
        scorers: Scorers,
        producer: Producer,
        elimination: Elimination | None,
        n_expected: int | None,
        mixed_hardware: bool,
        stuck_after: float,
        progress: Progress,
        on_progress: Callable[[Progress], None],
        on_event: Callable[..., None],
    ) -> None:
        self.job = job
        self.assignments = assignments
        self.scorers = scorers
        self.producer = producer
        self.elimination = elimination
        self.n_expected = n_expected
        self.mixed_hardware = mixed_hardware
        self.stuck_after = stuck_after
        self.progress = progress
        self.on_progress = on_progress
        self.on_event = on_event
        self.blocks = assignments.blocks
        self.eligible = [int(assignments.eligible(b.start, b.stop).sum()) for b in self.blocks]
        self.barriers = read_barriers(elimination.record) if elimination else []
        self.totals = [sum(self.eligible), *(sum(barrier.remaining) for barrier in self.barriers)]
        done = [
            (row, b)
            for row in range(assignments.n_rows)
            for b in assignments.committed(row, recorded=row >= job.recorded_from)
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
        self.working: dict[Any, Work] = {}
        self.asked: dict[Any, int] = {}  # signs of life asked for
        self.heard: dict[int, tuple[int, float]] = {}  # the last new one of each actor that is busy, and when
        self.without_actors_since: float | None = None
        self.starting_since: dict[int, float] = {}
        self.failed_starts = 0
        self.started_before_failure = 0
        self.refused = 0
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
        # Training takes its slots first; it has not got them while actors of the cycle before sit there.
        self.scorers.shrink(self._allowed())
        for actor in self.scorers.actors:
            self._greet(actor)
        polled = watched = -np.inf
        self._look_for_checkpoints()  # also when nothing is left to score: the figures are of all checkpoints
        while not self.plan.finished:
            if time.monotonic() - polled >= POLL_S:
                polled = time.monotonic()
                self._look_for_checkpoints()
                if polled - watched >= min(WATCH_S, self.stuck_after / 4):
                    watched = polled
                    self.scorers.look_around()
                    self._watch()
                self._shrink()
                for actor in self.scorers.grow(min(self._allowed(), self.plan.n_unfinished_blocks)):
                    self._greet(actor)
                self._report()
            if self.plan.at_barrier:
                self._decide()
            for work in self.plan.next_work():
                self._hand_out(work)
            self._wait()
        self._report()
        return self._scored()

    def _hand_out(self, work: Work) -> None:
        if self.first_hand_out is None:
            self.first_hand_out = time.monotonic()
            self.idle_s = 0.0
        theta = next((barrier.theta for barrier in self.barriers if barrier.row == work.barrier), 0)
        refs = tuple(self.refs[row] for row in work.rows)
        order = Order(self.blocks[work.block], refs, work.barrier, theta, work.count)
        self.working[self.scorers.actors[work.actor].score.remote(self.job, order)] = work
        self.hand_outs += len(work.rows)

    def _decide(self) -> None:
        """Every block has counted its votes: leave out what can no longer be selected, and go on."""
        assert self.elimination is not None
        row = self.plan.next_barrier
        assert row is not None
        histograms = [self.histograms[block] for block in range(len(self.blocks))]
        self.barriers.append(decide(row, histograms, self.elimination.budget))
        self.totals.append(sum(self.barriers[-1].remaining))
        # On disk before anything is handed out that depends on it.
        write_json(self.elimination.record, {"barriers": [barrier.to_record() for barrier in self.barriers]})
        self.histograms.clear()
        self.plan.pass_barrier()

    def _n_scored(self, row: int, block: int | None = None) -> int:
        """Samples of a block, or of all blocks, that are scored at a row."""
        passed = bisect_right([barrier.row for barrier in self.barriers], row)
        if block is None:
            return self.totals[passed]
        return self.barriers[passed - 1].remaining[block] if passed else self.eligible[block]

    def _n_images(self) -> int:
        """Predictions in the whole array, as far as is decided now."""
        rows = range(max(len(self.refs), self.n_expected or 0))
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
        """Actors that there may be now. One that was refused is not started again: it would land on the same node."""
        held = self.producer.slots_held()
        return max(0, actors_allowed(self.scorers.asked, self.scorers.slots, held) - self.refused)

    def _look_for_checkpoints(self) -> None:
        if self.all_published:
            return  # one that comes later belongs to another pass
        finished = self.producer.finished()  # asked first: what is missing afterwards will never come
        for ref in self.producer.published():
            row = ref.index - self.job.first_index
            if 0 <= row < self.assignments.n_rows and row not in self.refs:
                self.assignments.adopt_weights(row, ref.sha256)
                self.refs[row] = ref
                self.plan.published(row)
        if finished:
            self.all_published = True
            self.plan.no_more()

    def _greet(self, actor: int) -> None:
        self.joining[self.scorers.actors[actor].ready.remote(self.job)] = actor

    def _wait(self) -> None:
        pending = [*self.joining, *self.working]
        started = time.monotonic()
        if not pending:
            time.sleep(POLL_S)
            self.idle_s += time.monotonic() - started
            return
        ready, _ = ray.wait(pending, timeout=POLL_S)
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
                self._join(ref, result) if ref in self.joining else self._commit(ref, result)

    def _join(self, ref: Any, found: dict[str, str]) -> None:
        actor = self.joining.pop(ref)
        begun = self.assignments.adopt_fingerprint(found)
        if found != begun and not self.mixed_hardware:
            name = next(name for name in begun if begun[name] != found.get(name))
            reason = f"begun with {name} {begun[name]!r}, this actor has {found.get(name)!r}"
            advice = "which can change the answer; use the same kind of machine, or set score.mixed_hardware=allow"
            self._refuse(actor, RunConflict(f"{self.job.assignments}: {reason}, {advice}"))
            return
        self.failed_starts = 0
        self.plan.actor_joined(actor)
        self.on_event("actor_joined", actor=actor)

    def _refuse(self, actor: int, error: Exception) -> None:
        """Send an actor away that cannot score on its node, or whose predictions could differ in their last bits."""
        self.on_event("actor_refused", actor=actor, reason=one_line(error))
        self.scorers.drop(actor)
        self.refused += 1
        if not self.scorers.actors:
            raise error from None

    def _commit(self, ref: Any, done: _Done) -> None:
        work = self.working.pop(ref)
        if done.histogram is not None:
            self.histograms[work.block] = done.histogram
        self.plan.done(work)
        self.last_commit = time.monotonic()
        self.images += sum(self._n_scored(row, work.block) for row in work.rows)
        self.images_predicted += done.n_predicted
        self._limit_hand_outs()
        self.actor_rss_bytes = max(self.actor_rss_bytes, done.peak_rss_bytes)
        self.recent.append((self.last_commit, done.n_predicted))

    def _limit_hand_outs(self) -> None:
        """What an actor has in hand is lost with it: no more than about `HAND_OUT_S` seconds of work."""
        assert self.first_hand_out is not None
        busy_s = max(time.monotonic() - self.first_hand_out, POLL_S) * max(
            1, len(self.scorers.actors) - len(self.joining)
        )
        per_block = self.totals[-1] / len(self.blocks)
        if self.images_predicted and per_block:
            self.plan.max_rows = max(1, int(HAND_OUT_S * self.images_predicted / busy_s / per_block))

    def _watch(self) -> None:
        """Replace actors that have something to do and give no sign of life; say when none finds room."""
        now = time.monotonic()
        for ref in _ready(self.asked):
            actor = self.asked.pop(ref)
            try:
                sign = ray.get(ref)
            except RayError:
                continue  # it died: so did what it had in hand, and that says so
            if actor in self.heard and sign != self.heard[actor][0]:
                self.heard[actor] = sign, now
        if self.scorers.actors and not self.scorers.processes:
            self.without_actors_since = self.without_actors_since or now
            if now - self.without_actors_since > WAITS_S:
                self.without_actors_since = now
                self.on_event("scoring_waits", reason=f"no room on the cluster for {self.scorers}")
        else:
            self.without_actors_since = None
        joining = set(self.joining.values())
        self.starting_since = {
            actor: self.starting_since.get(actor, now) for actor in joining - self.scorers.processes.keys()
        }
        for actor, since in self.starting_since.items():
            if now - since > max(self.stuck_after, WAITS_S):  # it waits for room, or hangs before it could say a word
                reason = f"a scoring actor has not answered for {now - since:.0f} s: no room, or it hangs"
                self.on_event("actor_asked_for_again", actor=actor, reason=reason)
                self._forget(actor)
        busy = {work.actor for work in self.working.values()} | (joining & self.scorers.processes.keys())
        self.heard = {actor: self.heard.get(actor, (-1, now)) for actor in busy}
        for actor, (_, since) in list(self.heard.items()):
            if now - since > self.stuck_after:
                self._lost(actor, f"no sign of life for {now - since:.0f} s; it is replaced")
            elif actor not in self.asked.values():
                self.asked[self.scorers.actors[actor].sign_of_life.remote()] = actor

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
        self.asked = {ref: a for ref, a in self.asked.items() if a != actor}
        self.scorers.drop(actor)
        return joined

    def _lost(self, actor: int, reason: str) -> None:
        """An actor died, or is stuck; what it had in hand is done again."""
        in_hand = sum(len(work.rows) for work in self.working.values() if work.actor == actor)
        self.retried += in_hand
        self.on_event("actor_lost", actor=actor, reason=reason, blocks_in_hand=in_hand)
        if self._forget(actor):
            self.plan.actor_lost(actor)
            return
        if actor < self.started_before_failure:
            return  # it went with others, such as those of its node
        self.started_before_failure = self.scorers.n_started
        self.failed_starts += 1
        if self.failed_starts == MAX_FAILED_STARTS:
            raise DistalError(f"{MAX_FAILED_STARTS} scoring actors in a row died while starting: {reason}")

    def _failed(self, ref: Any, error: RayTaskError) -> None:
        if ref in self.joining:
            self._refuse(self.joining.pop(ref), error.cause)
            return
        if isinstance(error.cause, DistalError):
            raise error.cause from None
        work = self.working.pop(ref)
        self.retried += len(work.rows)
        reason = f"{type(error.cause).__name__}: {error.cause}"
        self.on_event("block_failed", block=work.block, rows=list(work.rows), reason=reason)
        self.plan.failed(work, reason)

    def _report(self) -> None:
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - RATE_WINDOW_S:
            self.recent.popleft()
        # What the oldest commit brought was predicted before the window began.
        since, n_before = self.recent[0] if self.recent else (now, 0)
        rate = (sum(n for _, n in self.recent) - n_before) / max(now - since, POLL_S)
        newest = self.refs[max(self.refs)] if self.refs else None
        self.on_progress(
            replace(
                self.progress,
                epoch=max((checkpoint.epoch for checkpoint in self.refs.values()), default=0),
                published=len(self.refs),
                rows_scored=self.plan.n_rows_done,
                images_scored=self.images,
                images=self._n_images(),
                images_per_s=rate,
                actors=len(self.scorers.actors) - len(self.joining),
                actors_starting=len(self.joining),
                blocks_done=self.plan.n_blocks_done,
                blocks_pending=self.plan.n_blocks_pending,
                blocks_retried=self.retried,
                eliminated=self.totals[0] - self.totals[-1],
                train_loss=newest.metrics.get("train_loss") if newest else None,
            )
        )


def read_barriers(record: Path) -> list[Barrier]:
    """What has been decided so far; empty when nothing was."""
    try:
        return [Barrier.from_record(barrier) for barrier in read_json(record, required=("barriers",))["barriers"]]
    except FileNotFoundError:
        return []
