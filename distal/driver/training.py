"""Train the network of a cycle in the background, while its checkpoints are scored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.ledger import Ledger
from distal.artifacts.stages import TrainOutputs
from distal.cluster import Slots, metrics
from distal.config import Config
from distal.driver.context import RunContext, begun_config
from distal.errors import Damage
from distal.hashing import digest
from distal.labels import answers
from distal.model.spec import ModelSpec
from distal.records import CheckpointRef
from distal.score.job import Producer
from distal.storage import sha256
from distal.train.command import run_command
from distal.train.launch import Ranks, abandon, train
from distal.train.rank import TrainJob

_POLL_S = 0.1


def start_training(context: RunContext, cycle: Cycle) -> Training:
    """Start to train in the background; of a cycle that is trained, only check the inputs."""
    config, session = begun_config(cycle), context.session
    label_files = tuple(context.directory.label_files(before=cycle.index))
    ledger = Ledger.read(label_files)
    n_imports = answers.n_imports(context.directory.answers)  # recorded, so that a lost one is noticed
    session.meter.set(metrics.CYCLE, cycle.index)
    session.meter.set(metrics.LABELLED, len(ledger))
    warm_from = None
    if config.train.init == "warm" and cycle.index:
        warm_from = checkpoints_of(context.directory.cycle(cycle.index - 1))[-1]
    made_from = {
        "pool": context.pool.content_sha256,
        "ledger": ledger.sha256,
        "config": config.digest("seed", "device", "model.", "train."),
        "weights": _file_sha256(config.model.weights),
        "warm_from": warm_from.sha256 if warm_from else "",
    }
    job = _train_job(context, cycle, label_files, warm_from, digest(made_from))
    ranks = _ranks(context.config, session.slots)
    trained = cycle.is_complete("train")
    published_to = _published_to(context, cycle)
    given_up, fits = threading.Event(), threading.Event()
    if config.train.command is None or trained:
        fits.set()

    def work(starve: Callable[[], None]) -> TrainOutputs:
        require, command = session.lease.require, config.train.command
        if command is None:
            on_event = partial(_on_event, context, cycle, starve)
            train(job, ranks, given_up=given_up, still_ours=require, on_event=on_event)
        else:
            run_command(command, job, context.pool, published_to, given_up, fits, require)
        return TrainOutputs(
            n_labeled=len(ledger),
            n_imports=n_imports,
            device=session.slots.device,
            world_size=ranks.workers,
            # A GPU may lack a deterministic kernel; see `be_deterministic`.
            deterministic=session.slots.device == "cpu",
        )

    training = Training(
        lambda starve: context.stage(cycle, "train", lambda: made_from, lambda: work(starve)),
        partial(abandon, job, given_up),
        checkpoints.Queue(published_to, len(config.train.checkpoint_epochs)),
        fits,
        slots=session.slots.training(ranks.workers, ranks.threads),
        all_slots=session.slots.scoring if session.slots.shared else 0,
    )
    training.start(at_once=trained)
    return training


def _train_job(
    context: RunContext,
    cycle: Cycle,
    label_files: tuple[Path, ...],
    warm_from: CheckpointRef | None,
    inputs: str,
) -> TrainJob:
    config = begun_config(cycle)
    max_failures = context.config.train.max_failures  # may change at any time
    return TrainJob(
        pool=context.pool.path,
        pool_sha256=context.pool.content_sha256,
        folder=cycle.folder,
        labels=label_files,
        model=ModelSpec.of(config.model, context.pool),
        config=config.train.model_copy(update={"max_failures": max_failures}),
        seed=config.seed,
        cycle=cycle.index,
        threads=int(config.train.threads),
        warm_from=warm_from,
        inputs=inputs,
        attempt=context.directory.attempt,
    )


def _ranks(config: Config, slots: Slots) -> Ranks:
    return Ranks(
        workers=config.train.workers,
        threads=int(config.train.threads),
        use_gpu=slots.device == "cuda",
        label_selector=slots.selectors["train"],
    )


def _on_event(context: RunContext, cycle: Cycle, starve: Callable[[], None], name: str, **values: Any) -> None:
    context.session.event(name, cycle=cycle.index, **values)
    if name == "training_waits":
        starve()


def _published_to(context: RunContext, cycle: Cycle) -> Path:
    """The folder that training publishes to: a new one for each start of a script.

    A script may train otherwise when it is started again.
    """
    if begun_config(cycle).train.command is None or cycle.is_complete("train"):
        return cycle.checkpoints
    before = checkpoints.committed(cycle.checkpoints)
    dest = cycle.begin_attempt(context.session.lease.require)
    if before:
        reason = (
            f"restarting train.command, which publishes to {dest.name}; the {len(before)} earlier "
            "checkpoints are reused only if it resumes from them or publishes the same weights"
        )
        context.session.event("training_anew", cycle=cycle.index, published_before=len(before), reason=reason)
    return dest


def checkpoints_of(cycle: Cycle) -> list[CheckpointRef]:
    """The published checkpoints of a cycle, in order."""
    folder = cycle.checkpoints
    return [checkpoints.read(folder, index) for index in checkpoints.committed(folder)]


def _file_sha256(weights: str | None) -> str:
    path = Path(weights) if weights else None
    return sha256(path.read_bytes()) if path and path.is_file() else weights or ""


class Training:
    """Training in a daemon thread, which cannot keep a stopped process alive; a `Producer`.

    As a context it ends with training done, or abandoned when the block failed.

    Args:
        stage: the work. It is given a function to call while the ranks find no room.
        abandon: stops running ranks.
        queue: the checkpoints that training publishes.
        fits: set when they can be scored: a script may train another network than the one that scores.
        slots: held while it runs.
        all_slots: held while the ranks find no room.
    """

    def __init__(
        self,
        stage: Callable[[Callable[[], None]], None],
        abandon: Callable[[], None],
        queue: checkpoints.Queue,
        fits: threading.Event,
        *,
        slots: int,
        all_slots: int,
    ) -> None:
        self._stage, self._abandon, self._queue, self._fits = stage, abandon, queue, fits
        self._slots, self._all_slots = slots, all_slots
        self._starved_at: int | None = None
        self._future: Future[None] = Future()

    def start(self, *, at_once: bool) -> None:
        """Begin; `at_once` in this thread, when there is nothing to do but to check."""
        if at_once:
            self._run()
        else:
            threading.Thread(target=self._run, name="train", daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._stage(self._starve))
        except BaseException as error:
            self._future.set_exception(error)

    def _starve(self) -> None:
        """Hold all slots until the ranks run: the free ones are spread over nodes, or taken by others."""
        self._starved_at = len(self.published())

    def __enter__(self) -> Training:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif not self._future.done():
            self._abandon()

    def published(self) -> Sequence[CheckpointRef]:
        """The checkpoints so far."""
        return self._queue.published() if self._fits.is_set() else []

    def finished(self) -> bool:
        """Whether training is done, and its checkpoints can be seen; raises the error it ended with."""
        if not self._future.done():
            return False
        self._future.result()
        return self._queue.complete()

    def slots_held(self) -> int:
        """Slots that the ranks take from scoring now."""
        if self._future.done():
            return 0
        return self._all_slots if self._starved_at == len(self.published()) else self._slots

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when training is done, and call `meanwhile` until then; raises the error it ended with."""
        while not self.finished():
            meanwhile()
            time.sleep(_POLL_S)  # in slices: one long wait would not let a signal through


def reuse_earlier_rows(
    context: RunContext,
    cycle: Cycle,
    assignments: Assignments,
    training: Training,
    first_index: int,
) -> Producer:
    """The producer of the checkpoints to score, which first takes over the rows of earlier starts."""
    on_event = partial(context.session.event, cycle=cycle.index)
    earlier = []
    for path in filter(Assignments.begun, cycle.earlier_assignments()):
        try:
            earlier.append(Assignments.open(path))
        except Damage as damage:
            on_event("damaged_block", reason=f"{damage}; its rows will be scored again")
    if not earlier:
        return training
    return ReusingRows(training, assignments, earlier, first_index, on_event)


class ReusingRows:
    """The checkpoints of a restarted training script: rows scored before are reused for equal weights.

    A row is reused while all rows up to it have the weights of before. From the first that has not, this
    is another training, and its rows are scored anew.

    Args:
        assignments: the ones the scoring loop writes.
        earlier: those of the starts before, the latest first.
        first_index: the checkpoint of row 0.
    """

    def __init__(
        self,
        training: Producer,
        assignments: Assignments,
        earlier: Sequence[Assignments],
        first_index: int,
        on_event: Callable[..., None],
    ) -> None:
        self._training, self._assignments = training, assignments
        # Read once. A driver that was paused may still begin rows there; scoring them here does no harm.
        self._earlier = [(each, each.weights) for each in earlier]
        self._first_index, self._on_event = first_index, on_event
        self._weights: list[str] = []  # of the rows that have been looked at, which are the first ones
        self.finished, self.slots_held = training.finished, training.slots_held

    def published(self) -> Sequence[CheckpointRef]:
        """See `Producer`."""
        refs = self._training.published()
        weights = {ref.index - self._first_index: ref.sha256 for ref in refs}
        while (row := len(self._weights)) < self._assignments.n_rows and row in weights:
            self._weights.append(weights[row])
            self._take_over(row)
        return refs

    def _take_over(self, row: int) -> None:
        begun = [(each, weights) for each, weights in self._earlier if row in weights]
        up_to_here = range(row + 1)
        same = [each for each, weights in begun if [weights.get(i) for i in up_to_here] == self._weights]
        for each in same:
            for damage in each.remove_damaged(row):
                self._on_event("damaged_block", reason=f"{damage}; it will be scored again")
            # First: no chunk is without its weights.
            self._assignments.adopt_weights(row, self._weights[row])
            self._assignments.take_over(each, row)
        if begun and not same:
            reason = (
                f"train.command published other weights for checkpoint {row + self._first_index} than "
                "before its restart; checkpoints from this one on are scored again"
            )
            self._on_event("other_weights", row=row, reason=reason)
            self._earlier = []
