"""One scoring actor: it keeps its blocks decoded, loads weights, predicts, and writes its own chunks."""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments, unassigned
from distal.cluster import metrics
from distal.errors import Diverged, ModelError, Unfit, one_line
from distal.hashing import mix64
from distal.model.augment import crop_flip
from distal.model.spec import be_deterministic
from distal.pool import Pool
from distal.records import Block, CheckpointRef
from distal.score.eliminate import histogram, survivors
from distal.score.job import ActorJob, TaskResult
from distal.score.plan import MAX_ROWS, Task
from distal.score.predict import (
    NotFinite,
    Precision,
    Prediction,
    Predictor,
    best_precision,
    difference,
    fingerprint,
    quickest_batch_size,
)
from distal.storage import require_writable

WATCH = "watch"  # a thread of an actor beside the one that scores


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
        """The flagged images; `flags` are for the whole block."""
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
        shard: its number among the actors at work, a tag of its metrics.
    """

    def __init__(self, name: str, cache_bytes: int, threads: int, shard: int = 0) -> None:
        self._name, self._shard = name, shard
        self._run = ""  # of the job
        self._meter = metrics.Meter(self._run, shard)
        self._idle_since: float | None = None
        self._threads = threads
        torch.set_num_threads(threads)
        self._cache_bytes = cache_bytes
        self._job: ActorJob | None = None
        self._pool: Pool
        self._assignments: Assignments
        self._blocks: list[Block]
        self._is_open = False  # the assignments of the job
        self._template: Predictor
        self._pieces: dict[int, list[_Piece]] = {}
        self._room = cache_bytes
        self._predictors: OrderedDict[str, Predictor] = OrderedDict()
        self._ever: tuple[Predictor, ...] = ()  # all of them, for the watching thread: the dictionary may change

    def __repr__(self) -> str:
        return f"Scorer({self._name})"

    def ready(self, job: ActorJob) -> dict[str, str]:
        """Open everything that a job needs, and try to write beside its assignments.

        Returns:
            The fingerprint: what this actor's predictions depend on besides weights and images.

        Raises:
            Exception: pool, network or assignments cannot be used on this node; a network raises what its code does.
        """
        self._take_up(job)
        self._open_assignments(job)
        require_writable(job.assignments.parent)
        return self._fingerprint(job)

    def _fingerprint(self, job: ActorJob) -> dict[str, str]:
        return fingerprint(torch.device(job.device), job.precision, job.batch_size)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def process(self) -> cluster.Process:
        """Which process this is; answered as soon as the actor has found room."""
        return cluster.this_process()

    def choose(self, job: ActorJob, precision: str, batch_size: int | str, n_images: int) -> tuple[Precision, int]:
        """Resolve an `auto` on this actor: the precision, and the batch size for blocks of `n_images`."""
        device = torch.device(job.device)
        chosen: Precision = "fp32" if precision == "fp32" else "bf16" if precision == "bf16" else best_precision(device)
        if isinstance(batch_size, int):
            return chosen, batch_size
        predictor = Predictor(
            job.model.build(pretrained=False), job.model.preprocess(), batch_size=1, precision=chosen, device=device
        )
        return chosen, quickest_batch_size(predictor, job.model.image_shape, n_images)

    def predict(self, job: ActorJob, indices: Sequence[int], ref: CheckpointRef) -> NDArray[np.int64]:
        """The class of some samples at a checkpoint, without writing it anywhere: (n,) int64."""
        self._take_up(job)
        return self._predicted(ref, indices, self._pool.take(indices)).labels

    def outputs(
        self,
        job: ActorJob,
        indices: Sequence[int],
        ref: CheckpointRef,
        names: Collection[str],
        begun: Mapping[str, str] | None,
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs of a checkpoint for some samples: "probabilities", (n, C), and "embeddings", (n, d).

        Raises:
            Unfit: this actor has another fingerprint than `begun`.
        """
        self._take_up(job)
        mine = self._fingerprint(job)
        if begun is not None and mine != begun:
            raise Unfit(f"{job.assignments}: {difference(begun, mine)}")
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

    def score(self, job: ActorJob, task: Task, refs: Sequence[CheckpointRef], theta: int = 0) -> TaskResult:
        """Score one block at some checkpoints and commit each.

        A committed block is left alone, so a retry does only what is missing.

        Args:
            refs: the checkpoints of `task.rows`.
            theta: what was decided at `task.barrier`.

        Raises:
            Diverged: a logit is not finite.
            Damage: images or weights are not what was written.
        """
        started = time.perf_counter()
        self._take_up(job)
        if self._idle_since is not None:
            self._meter.add(metrics.IDLE_SECONDS, started - self._idle_since)
        self._open_assignments(job)
        block = self._blocks[task.block]
        todo = [(row, ref) for row, ref in zip(task.rows, refs, strict=True) if not self._is_done(row, block)]
        eligible = self._assignments.eligible(block.start, block.stop)
        scored = eligible
        if task.barrier is not None and todo:
            votes = self._assignments.read(block.start, block.stop, range(task.barrier), complete=True)
            scored = survivors(votes, eligible, self._assignments.n_classes, theta)
        names = ("labels", *self._assignments.recorded)
        found: dict[int, dict[str, list[NDArray[Any]]]] = {row: {name: [] for name in names} for row, _ in todo}
        for piece in _batched(self._images_of(block, eligible), scored, job.batch_size) if todo else ():
            started = time.perf_counter()
            for row, ref in todo:
                images = self._augmented(piece, block, ref) if job.augment else piece.images
                try:
                    prediction = self._load(ref)(images)
                except NotFinite as error:
                    sample_index = block.start + int(piece.positions[error.args[0]])
                    raise Diverged(self._not_finite(ref, sample_index)) from error
                found[row]["labels"].append(prediction.labels)
                for name in self._recorded(row):
                    found[row][name].append(getattr(prediction, name)())
            self._meter.add(metrics.FORWARD_SECONDS, time.perf_counter() - started)
            self._meter.add(metrics.IMAGES_SCORED, len(todo) * len(piece))
            self._meter.tell()
        started = time.perf_counter()
        for row, _ in todo:
            self._commit(row, block, scored, found[row])
        self._meter.add(metrics.WRITE_SECONDS, time.perf_counter() - started)
        n_predicted = len(todo) * int(scored.sum())
        self._meter.add(metrics.LABELS_WRITTEN, n_predicted)
        counts = None
        if task.count is not None:
            votes = self._assignments.read(block.start, block.stop, range(task.count), complete=True)
            counts = histogram(votes, eligible, self._assignments.n_classes, self._assignments.n_rows)
        self._meter.tell(now=True)
        self._idle_since = time.perf_counter()
        return TaskResult(n_predicted, counts, peak_rss_bytes())

    def _augmented(self, piece: _Piece, block: Block, ref: CheckpointRef) -> NDArray[np.uint8]:
        """The images as training could show them: a function of seed, cycle, checkpoint and sample."""
        assert self._job is not None
        assert self._job.augment is not None
        draws = mix64("augment pool", *self._job.augment, ref.index, block.start + piece.positions)
        return crop_flip(torch.from_numpy(piece.images), draws).numpy()

    def _is_done(self, row: int, block: Block) -> bool:
        return self._assignments.has(row, block, recorded=bool(self._recorded(row)))

    def _recorded(self, row: int) -> tuple[str, ...]:
        """The names of the arrays that are recorded at a row."""
        assert self._job is not None
        return self._assignments.recorded if row >= self._job.recorded_from else ()

    def _commit(self, row: int, block: Block, scored: NDArray[np.bool_], found: dict[str, list[Any]]) -> None:
        """Write one block of one row: predictions where scored, UNASSIGNED and NaN elsewhere."""
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

    def _take_up(self, job: ActorJob) -> None:
        """Switch to a job, unless it is the one before."""
        torch.set_num_threads(self._threads)  # a setting of the thread, and Ray may use another one
        if job != self._job:
            self._begin(job)

    def _begin(self, job: ActorJob) -> None:
        self._job = None  # until everything below has worked
        self._is_open = False
        self._pieces.clear()
        self._room = self._cache_bytes
        self._predictors.clear()
        self._ever = ()
        if job.run != self._run:
            self._run, self._idle_since = job.run, None
            self._meter = metrics.Meter(job.run, self._shard)
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

    def _open_assignments(self, job: ActorJob) -> None:
        if not self._is_open:
            self._assignments = Assignments.open(job.assignments)
            self._blocks = self._assignments.blocks
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

        They are kept decoded while the budget lasts. Then nothing is evicted: blocks come round in turns, so
        the one used longest ago is needed next. Further blocks are in memory one piece at a time.
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

    Yields each with the seconds that reading it took, and the seconds of waiting for it.
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
    """The peak memory of this process."""
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
            images = pool.read(start, stop).transpose(0, 2, 3, 1)[flags]  # a copy: the chunk is freed
            yield _Piece(start - block.start + np.flatnonzero(flags), images.transpose(0, 3, 1, 2))
