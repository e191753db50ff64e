"""The conductor: the only module that knows the order of the stages.

pool -> train -> checkpoints -> score -> assignments -> reduce -> scores -> select -> label -> ledger -> ...
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from distal import __version__, checkpoints, cluster
from distal.acquire.batch import select
from distal.assignments import Assignments, dtype_for
from distal.config import BUILTIN, Config, check_unchanged
from distal.eligibility import Eligibility
from distal.errors import ConfigError, PoolError, UserError
from distal.hashing import digest
from distal.labels.oracle import choose_initial, label_from_pool
from distal.ledger import Ledger
from distal.models import ModelSpec
from distal.monitor import Display, Silent
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.images import MANIFEST, OK
from distal.records import CheckpointRef, JsonObject, Progress, auto_block_size, split_blocks
from distal.reduce.stream import reduce
from distal.runs import Cycle, Run
from distal.score.actors import Job, Scorers, score
from distal.score.plan import batch_size_for
from distal.scores import Scores
from distal.selection import Selection
from distal.storage import sha256
from distal.train.launch import Ranks, train
from distal.train.loop import TrainJob

SCORER_THREADS = 1
AUTO_BATCH_SIZE = {"cpu": 128, "cuda": 512}


def run(config: Config, display: Display | None = None) -> JsonObject:
    """Run the whole loop; called again, it continues where it stopped.

    Returns:
        `{"state": "complete", "run": ..., "cycles": [...]}`: the summary of the run.

    Raises:
        UserError: the configuration, the pool and the run directory do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    display = display or Silent()
    directory = Run(Path(config.run))
    if _is_complete(directory, config):
        display.say(f"{directory.path}: complete")
    else:
        with ExitStack() as stack:
            connect = cache(partial(stack.enter_context, cluster.connect(config.ray.address)))
            pool = _open_pool(config, connect, display)
            test = _open_test(config, connect, display)
            _check_inputs(config, pool, test)
            connect()
            _Driver(config, directory, pool, test, display).run()
    return {"state": "complete", "run": str(directory.path), **directory.write_summary()}


class _Driver:
    """One attempt at a run."""

    def __init__(self, config: Config, directory: Run, pool: Pool, test: Pool | None, display: Display) -> None:
        self.directory = directory
        self.pool = pool
        self.test = test
        self.display = display
        self.slots = cluster.find_slots(config.device)
        self.config = self._resolve(config)
        _check_changes(directory, self.config)
        self._check_slots()
        self.all_eligible = Eligibility.of(pool, self.config.pool.limit, self.config.seed)
        self.ranks = Ranks(
            workers=self.config.train.workers,
            threads=int(self.config.train.threads),
            use_gpu=self.slots.device == "cuda",
            label_selector=self.slots.selector("train"),
        )
        on_gpu = {"num_gpus": 1} if self.slots.device == "cuda" else {}
        self.scorers = Scorers(
            f"scorer-{directory.attempt}",
            {"num_cpus": SCORER_THREADS, **on_gpu, "label_selector": self.slots.selector("score")},
            asked=None if config.score.actors == "auto" else config.score.actors,
            slots=self.slots.total,
            cache_bytes=int(config.score.cache_gb * 2**30),
            threads=SCORER_THREADS,
        )

    def run(self) -> None:
        """Every cycle in turn; stages that are complete are skipped."""
        self._log_attempt()
        self._initial()
        try:
            for index in range(self.config.loop.cycles):
                cycle = self.directory.cycle(index)
                if not self._begin(cycle):
                    break
                training = self._train(cycle)
                self._score(cycle, training)
                self._test(cycle)
                self._reduce(cycle)
                self._select(cycle)
                if index + 1 < self.config.loop.cycles:
                    self._label(cycle)
                self.directory.write_summary()
        finally:
            self.scorers.shrink(0)

    def _begin(self, cycle: Cycle) -> bool:
        """Fix the configuration of a cycle; False when no eligible image is left for it."""
        if cycle.config is not None:
            return True
        n_eligible, budget = self._eligible(cycle).count(), self.config.loop.budget
        if not n_eligible:
            self.display.say(f"every eligible image is labelled: the loop ends before cycle {cycle.index}")
            return False
        if n_eligible < budget:
            self.display.say(
                f"cycle {cycle.index}: {n_eligible} eligible images are left, fewer than the budget of {budget}; "
                "it takes all of them"
            )
        cycle.begin(self.config)
        self.directory.event("cycle", cycle=cycle.index, n_eligible=n_eligible)
        return True

    def _train(self, cycle: Cycle) -> _Training:
        """Train in the background; its checkpoints are scored as they appear."""
        config = _begun(cycle)
        label_files = tuple(self.directory.label_files(before=cycle.index))
        ledger = Ledger.read(label_files)
        warm_from = self._last_checkpoint(cycle.index - 1) if config.train.init == "warm" and cycle.index else None
        inputs = {
            "pool": self.pool.content_sha256,
            "ledger": ledger.sha256,
            "config": _decisive(config, "seed", "device", "model.", "train."),
            "weights": _file_sha256(config.model.weights),
            "warm_from": warm_from.sha256 if warm_from else "",
        }
        job = TrainJob(
            pool=self.pool.path,
            folder=cycle.folder,
            labels=label_files,
            model=ModelSpec.of(config.model, self.pool),
            config=config.train.model_copy(update={"max_failures": self.config.train.max_failures}),
            seed=config.seed,
            cycle=cycle.index,
            threads=int(config.train.threads),
            warm_from=warm_from,
            inputs=digest(inputs),
        )

        def work() -> JsonObject:
            train(job, self.ranks, on_event=partial(self.directory.event, cycle=cycle.index))
            return {"n_labeled": len(ledger), "device": self.slots.device, "world_size": self.ranks.workers}

        stage = partial(self._stage, cycle, "train", lambda: inputs, work)
        held = self.slots.training(self.ranks.workers, self.ranks.threads)
        return _Training(stage, held, at_once=cycle.marker("train") is not None)

    def _score(self, cycle: Cycle, training: _Training) -> None:
        """Score the eligible samples of the pool at every checkpoint, those still to come included."""
        config = _begun(cycle)
        n_rows = len(config.train.checkpoint_epochs)

        def work() -> JsonObject:
            assignments = self._assignments(
                cycle.assignments,
                self.pool,
                int(config.pool.block_size),
                n_rows,
                self._eligible(cycle).read,
                config.score.record,
            )
            recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
            job = self._job(cycle, self.pool, cycle.assignments, recorded_from=recorded_from)
            images = self._fill(
                job, assignments, training, Progress(cycle.index, "train + score", epochs=config.train.epochs)
            )
            training.wait()
            return {
                "images_scored": images,
                "n_rows": n_rows,
                "fingerprint": assignments.attributes["fingerprint"],
            }

        def inputs() -> dict[str, str]:
            training.wait()
            return {
                "pool": self.pool.content_sha256,
                "ledger": self.directory.ledger(before=cycle.index).sha256,
                "checkpoints": digest([ref.sha256 for ref in _checkpoints(cycle)]),
                "config": _decisive(config, "seed", "device", "pool.", "model.", "score."),
            }

        self._stage(cycle, "score", inputs, work)

    def _test(self, cycle: Cycle) -> None:
        """Predict the test images at the last checkpoint with the same actors, and count the right ones."""
        config, test = _begun(cycle), self.test
        if test is None:
            self._stage(cycle, "test", dict, lambda: {"test_accuracy": None, "n_test": 0})
            return
        last = len(config.train.checkpoint_epochs) - 1
        expected = partial(_test_labels, test, self.pool)

        def work() -> JsonObject:
            block_size = auto_block_size(test.n_samples)
            assignments = self._assignments(
                cycle.test_assignments,
                test,
                block_size,
                1,
                lambda start, stop: expected(start, stop) >= 0,
                (),
            )
            job = self._job(cycle, test, cycle.test_assignments, first_index=last)
            n_test = self._fill(job, assignments, _Finished(), Progress(cycle.index, "test"))
            right = sum(
                int((assignments.read(block.start, block.stop)[0] == expected(block.start, block.stop)).sum())
                for block in assignments.blocks
            )
            return {"test_accuracy": right / n_test, "n_test": n_test}

        def inputs() -> dict[str, str]:
            checkpoint = checkpoints.read(cycle.checkpoints, last)
            return {
                "test": test.content_sha256,
                "checkpoint": checkpoint.sha256,
                "config": _decisive(config, "device", "model.", "score.precision", "score.batch_size"),
            }

        self._stage(cycle, "test", inputs, work)

    def _reduce(self, cycle: Cycle) -> None:
        config = _begun(cycle)

        def work() -> JsonObject:
            scores = reduce(
                Assignments.open(cycle.assignments),
                self.pool,
                cycle.scores,
                seed=config.seed,
                cycle=cycle.index,
                on_progress=lambda done, total: self.display.progress(
                    Progress(cycle.index, "reduce", images_scored=done, images=total)
                ),
            )
            return {"measures": list(scores.measures)}

        self._stage(cycle, "reduce", lambda: _after(cycle, "score"), work)

    def _select(self, cycle: Cycle) -> None:
        config = _begun(cycle)

        def work() -> JsonObject:
            selection = select(
                Scores.open(cycle.scores),
                Assignments.open(cycle.assignments),
                self.pool,
                config.select,
                cycle.selection,
                budget=config.loop.budget,
                seed=config.seed,
                cycle=cycle.index,
            )
            return {
                "n_selected": len(selection),
                "tie_share": round(selection.tie_share, 6),
                "selection_sha256": selection.sha256,
            }

        def inputs() -> dict[str, str]:
            return {**_after(cycle, "reduce"), "config": _decisive(config, "seed", "select.", "loop.budget")}

        self._stage(cycle, "select", inputs, work)

    def _label(self, cycle: Cycle) -> None:
        def work() -> JsonObject:
            selection = Selection.read(cycle.selection)
            label_from_pool(self.pool, selection.indices, cycle.labels)
            return {"n_answered": len(selection)}

        self._stage(cycle, "label", lambda: {"selection": Selection.read(cycle.selection).sha256}, work)

    def _stage(
        self, cycle: Cycle, stage: str, inputs: Callable[[], dict[str, str]], work: Callable[[], JsonObject]
    ) -> None:
        """Run a stage unless it is complete, and log that it has been."""
        complete = cycle.marker(stage) is not None
        marker = cycle.run_stage(stage, inputs, work)
        if not complete:
            self.directory.event("stage", cycle=cycle.index, stage=stage, seconds=marker["seconds"])

    def _assignments(
        self,
        path: Path,
        pool: Pool,
        block_size: int,
        n_rows: int,
        eligible: Callable[[int, int], np.ndarray[Any, np.dtype[np.bool_]]],
        recorded: tuple[str, ...],
    ) -> Assignments:
        """Lay out an array, or take up one that an earlier attempt began; its damaged blocks are deleted."""
        try:
            assignments = Assignments.open(path)
        except FileNotFoundError:
            assert self.pool.classes is not None
            return Assignments.create(
                path,
                n_rows=n_rows,
                n_samples=pool.n_samples,
                block_size=block_size,
                n_classes=len(self.pool.classes),
                eligible=(eligible(b.start, b.stop) for b in split_blocks(pool.n_samples, block_size)),
                recorded=recorded,
            )
        for row in range(assignments.n_rows):
            for damage in assignments.remove_damaged(row):
                self.display.say(f"{damage}; it will be scored again")
                self.directory.event("damaged_block", what=damage)
        return assignments

    def _job(self, cycle: Cycle, pool: Pool, assignments: Path, **rows: int) -> Job:
        config = _begun(cycle)
        assert config.score.precision != "auto"
        return Job(
            pool=pool.path,
            assignments=assignments,
            checkpoints=cycle.checkpoints,
            model=ModelSpec.of(config.model, self.pool),
            precision=config.score.precision,
            batch_size=int(config.score.batch_size),
            device=self.slots.device,
            **rows,
        )

    def _fill(self, job: Job, assignments: Assignments, producer: _Training | _Finished, progress: Progress) -> int:
        return score(
            job,
            assignments,
            self.scorers,
            producer,
            mixed_hardware=self.config.score.mixed_hardware == "allow",
            progress=progress,
            on_progress=self.display.progress,
            on_event=partial(self.directory.event, cycle=progress.cycle),
        )

    def _resolve(self, config: Config) -> Config:
        """Give every `auto` that can change a bit of the answer the value it had when the run began."""
        threads = self.slots.train_threads(config.train.workers)
        auto = {
            "device": self.slots.device,
            "pool.block_size": auto_block_size(self.pool.n_samples),
            "train.threads": threads,
            "score.precision": "fp32",
            "score.batch_size": batch_size_for(self._eligible_per_block(config), AUTO_BATCH_SIZE[self.slots.device]),
        }
        leaves = config.leaves()
        constants = {key: value if leaves[key] == "auto" else leaves[key] for key, value in auto.items()}
        identity = {
            "seed": config.seed,
            "pool_sha256": self.pool.content_sha256,
            "test_sha256": self.test.content_sha256 if self.test else None,
            "classes": list(self.pool.classes or ()),
        }
        kept = self.directory.begin(identity, {"pool": str(self.pool.path), "constants": constants})
        return config.with_values({key: kept["constants"][key] for key in config.autos()})

    def _eligible_per_block(self, config: Config) -> int:
        """About how many samples of a block will be scored while little is labelled."""
        pool, size = self.pool, config.pool.block_size
        block_size = auto_block_size(pool.n_samples) if size == "auto" else size
        n_readable = pool.n_samples - pool.n_unreadable
        n_scored = min(config.pool.limit or n_readable, n_readable) - config.loop.initial
        return max(1, min(block_size, pool.n_samples) * n_scored // pool.n_samples)

    def _check_slots(self) -> None:
        """On a cluster of our own no slot will ever be added, so training would wait for ever."""
        train = self.config.train
        needed = self.slots.training(train.workers, int(train.threads))
        if cluster.is_own(self.config.ray.address) and needed > self.slots.total:
            unit = "GPUs" if self.slots.device == "cuda" else "CPU slots"
            raise ConfigError(
                f"train.workers: {train.workers} ranks of {train.threads} threads need {needed} {unit}, "
                f"this machine has {self.slots.total}; lower train.workers or train.threads"
            )

    def _initial(self) -> None:
        """Choose and label the samples to start from."""
        if self.directory.initial.exists():
            return
        chosen = choose_initial(self.all_eligible, self.config.loop.initial, self.config.seed)
        label_from_pool(self.pool, chosen, self.directory.initial)

    def _eligible(self, cycle: Cycle) -> Eligibility:
        return self.all_eligible.without(self.directory.ledger(before=cycle.index))

    def _last_checkpoint(self, cycle_index: int) -> CheckpointRef:
        return _checkpoints(self.directory.cycle(cycle_index))[-1]

    def _log_attempt(self) -> None:
        self.directory.event(
            "attempt",
            distal=__version__,
            host=platform.node(),
            pid=os.getpid(),
            device=self.slots.device,
            slots=self.slots.total,
        )


class _Training:
    """Training in a daemon thread: it must not keep a process alive that was told to stop.

    Args:
        work: the stage. slots: held while it runs. at_once: whether to run it here and now, which is right
            when it is complete already.
    """

    def __init__(self, work: Callable[[], object], slots: int, *, at_once: bool) -> None:
        self._slots = slots
        self._future: Future[object] = Future()

        def target() -> None:
            try:
                self._future.set_result(work())
            except BaseException as error:
                self._future.set_exception(error)

        if at_once:
            target()
        else:
            threading.Thread(target=target, name="train", daemon=True).start()

    def slots_held(self) -> int:
        """Slots that training holds; 0 when it is done. Raises what went wrong with it."""
        if not self._future.done():
            return self._slots
        self._future.result()
        return 0

    def wait(self) -> None:
        """Return when it is done; raises what went wrong with it."""
        while not self._future.done():
            # In slices: waiting without an end would not let a signal through.
            threading.Event().wait(0.1)
        self._future.result()


class _Finished:
    """A producer that has published everything and holds nothing."""

    def slots_held(self) -> int:
        return 0


def _is_complete(directory: Run, config: Config) -> bool:
    """Whether nothing is left to do, told from storage alone. Raises when the run is another one."""
    begun = directory.begun_cycles()
    if not begun or directory.identity is None:
        return False
    constants = directory.identity["constants"]
    _check_changes(directory, config.with_values({key: constants[key] for key in config.autos()}))
    return len(begun) >= config.loop.cycles and begun[config.loop.cycles - 1].marker("select") is not None


def _check_changes(directory: Run, config: Config) -> None:
    """Refuse keys that differ from those of the cycle that has begun last."""
    begun = directory.begun_cycles()
    if begun:
        last = begun[-1]
        check_unchanged(_begun(last), config, last.index, finished=last.marker("select") is not None)


def _open_pool(config: Config, connect: Callable[[], None], display: Display) -> Pool:
    folder, source = Path(config.pool.path), config.pool.source
    if (folder / MANIFEST).exists() or source is None:
        return Pool.open(folder)
    return _build(source, folder, connect, display)


def _open_test(config: Config, connect: Callable[[], None], display: Display) -> Pool | None:
    """The test pool: none, a packed one, or one that is packed beside the pool."""
    test = config.pool.test
    if test is None:
        return None
    if not test.startswith(BUILTIN) and (Path(test) / MANIFEST).exists():
        return Pool.open(Path(test))
    folder = Path(f"{config.pool.path}-test")
    if not (folder / MANIFEST).exists():
        return _build(test, folder, connect, display)
    pool = Pool.open(folder)
    if pool.source != test:
        raise PoolError(f"pool.test: {folder} was packed from {pool.source}, not from {test}; remove it first")
    return pool


def _build(source: str, folder: Path, connect: Callable[[], None], display: Display) -> Pool:
    connect()
    display.say(f"packing {source} into {folder}")

    def on_progress(done: int, total: int) -> None:
        display.progress(Progress(-1, "packing", images_scored=done, images=total))

    return build(source, folder, on_progress=on_progress)


def _check_inputs(config: Config, pool: Pool, test: Pool | None) -> None:
    """Refuse at once what would fail later. Raises UserError."""
    n_readable = pool.n_samples - pool.n_unreadable
    if pool.classes is None or pool.n_labeled < n_readable:
        raise PoolError(
            f"{pool.path}: {n_readable - pool.n_labeled} of {n_readable} readable images have no label; "
            "label.oracle: pool needs a label for every image"
        )
    if len(pool.classes) < 2:
        raise PoolError(f"{pool.path}: one class only ({pool.classes[0]}); at least two are needed to classify")
    dtype_for(len(pool.classes))
    if test is not None:
        unknown = sorted(set(test.classes or ()) - set(pool.classes))
        if test.image_shape != pool.image_shape:
            raise PoolError(
                f"pool.test: its images have shape {test.image_shape}, those of the pool {pool.image_shape}; "
                "pack it with the same --size and --channels"
            )
        if unknown:
            raise PoolError(f"pool.test: class {unknown[0]!r} is not in the pool, which has {', '.join(pool.classes)}")
        if not test.n_labeled:
            raise PoolError(f"pool.test: {test.path} has no labels; set pool.test=null to go without")
    limit = n_readable if config.pool.limit is None else min(config.pool.limit, n_readable)
    if limit < config.loop.initial + 1:
        raise UserError(
            f"loop.initial: {config.loop.initial} labelled samples and at least one to select need "
            f"{config.loop.initial + 1} readable images, the pool has {limit}; lower it"
        )
    ModelSpec.of(config.model, pool).check()


def _test_labels(test: Pool, pool: Pool, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Labels of the test samples [start, stop) in the pool's class order; -1 where unreadable or unlabelled."""
    assert test.classes is not None
    assert pool.classes is not None
    to_pool = np.array([*(pool.classes.index(name) for name in test.classes), -1])
    labels, status = test.columns(start, stop, "label", "status")
    return np.where(status == OK, to_pool[labels], -1)


def _begun(cycle: Cycle) -> Config:
    assert cycle.config is not None, f"cycle {cycle.index} has not begun"
    return cycle.config


def _checkpoints(cycle: Cycle) -> list[CheckpointRef]:
    return [checkpoints.read(cycle.checkpoints, index) for index in checkpoints.committed(cycle.checkpoints)]


def _after(cycle: Cycle, stage: str) -> dict[str, str]:
    """The input of a stage that reads nothing but what another one wrote."""
    marker = cycle.marker(stage)
    assert marker is not None, f"{stage} is not complete"
    return {stage: marker["inputs_sha256"]}


def _decisive(config: Config, *prefixes: str) -> str:
    """Hash of the keys under these prefixes that can change a result."""
    return digest({key: value for key, value in config.decisive().items() if key.startswith(prefixes)})


def _file_sha256(weights: str | None) -> str:
    path = Path(weights) if weights else None
    return sha256(path.read_bytes()) if path and path.is_file() else weights or ""
