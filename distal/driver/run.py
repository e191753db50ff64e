"""The conductor: the only module that knows the order of the stages.

pool -> train -> checkpoints -> score -> assignments -> reduce -> scores -> select -> label -> ledger -> (train)
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal import __version__, cluster
from distal.acquire.batch import listed_batch, random_batch, select
from distal.artifacts import checkpoints
from distal.artifacts.assignments import PROBABILITIES, Assignments
from distal.artifacts.ledger import LABELS_PER_RANK, Ledger, too_few, write_labels
from distal.artifacts.runs import Cycle, Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection, short_of
from distal.cluster import metrics
from distal.config import Config, check_unchanged
from distal.config.needs import scored_epochs
from distal.driver import checks, preflight
from distal.driver.session import Attempt, begin
from distal.errors import ConfigError, Damage, ModelError, RunConflict
from distal.hashing import digest
from distal.labels import answers
from distal.labels.oracle import choose_at_random, choose_initial, label_from_pool
from distal.labels.waiting import Waiting
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.images import MANIFEST, OK
from distal.pool.sample_files import find, read_labels, require_readable
from distal.progress import Display, Silent
from distal.records import CheckpointRef, JsonObject, Progress, auto_block_size
from distal.reduce.measures import measures_of
from distal.reduce.stream import Reduction, reduce
from distal.score.evaluate import evaluate
from distal.score.job import Elimination, Producer, Published, Scored
from distal.storage import be_durable, sha256
from distal.train.command import run_command
from distal.train.launch import Ranks, abandon, train
from distal.train.rank import TrainJob


def run(config: Config, display: Display | None = None) -> JsonObject:
    """Run the whole loop; called again, it continues where it stopped.

    Returns:
        `{"state": "complete", "run": ..., "cycles": [...]}`: the summary of the run; or, when people are to label a
        batch, `{"state": "waiting_for_labels", ...}`, see `Waiting.report`.

    Raises:
        UserError: the configuration, the pool and the run directory do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    config = config.absolute()
    be_durable(config.durable)
    display = display or Silent()
    directory = Run(Path(config.run))
    waiting: JsonObject | None = None
    if _is_complete(directory, config):
        display.say(f"{directory.path}: complete")
    else:
        with ExitStack() as stack:
            connect = cache(partial(stack.enter_context, cluster.connect(config.ray.address)))
            pool = checks.with_classes(config, checks.open_pool(config, connect, display))
            held_out = checks.open_held_out(config, connect, display)
            checks.check(config, pool, held_out)
            waiting = _still_waiting(directory, config, pool)
            if waiting is not None:
                return waiting
            if directory.identity is None:  # it keeps the content of the pools, so once is enough
                if held_out:
                    connect()
                checks.check_overlap(config, pool, held_out, display)
            lease = stack.enter_context(begin(directory, display))
            connect()
            preflight.check(config, directory.path, [pool, *held_out.values()], display)
            directory.sweep()
            attempt = Attempt(directory, pool, display, lease)
            stack.enter_context(attempt.meter)
            waiting = _Driver(config, attempt, pool, held_out).run()
    if waiting is not None:
        directory.write_summary()
        return waiting
    return {"state": "complete", "run": str(directory.path), **directory.write_summary()}


def _still_waiting(directory: Run, config: Config, pool: Pool) -> JsonObject | None:
    """What people have not answered yet, told from storage alone; None when there is something to do."""
    waiting = Waiting.read(directory) if directory.identity else None
    if waiting is None or waiting.remade(directory) is not None:
        return None
    if waiting != _waiting(config, pool, waiting.cycle, waiting.selection):
        return None
    report = waiting.report(directory)
    return None if report["ready"] else report


def _waiting(config: Config, pool: Pool, cycle: int, selection: Path) -> Waiting:
    """What is asked of people: a batch."""
    assert pool.classes is not None
    n_asked = len(Selection.read(selection))
    needed = n_asked if config.label.min_labels is None else min(config.label.min_labels, n_asked)
    workers = config.train.workers if cycle < 0 else 0
    policy = config.label.conflict
    return Waiting(cycle, selection, pool.classes, needed, workers, policy, pool.path, pool.content_sha256)


def _is_complete(directory: Run, config: Config) -> bool:
    """Whether nothing is left to do, told from storage alone. Raises RunConflict when the run is another one."""
    if directory.identity is None or not directory.is_complete(config.loop.cycles):
        return False
    if not directory.initial.exists():  # after a repair; it comes out the same, or training says that it did not
        return False
    config = checks.resolved(config, directory.identity["constants"])
    fixed = config.identity_keys()
    folder = Path(config.pool.path)
    if (folder / MANIFEST).exists():  # a finished run does not need its pool
        fixed |= checks.content(Pool.open(folder))
    directory.check(fixed)
    directory.check_answers()
    last = directory.begun_cycles()[: config.loop.cycles][-1]
    classes = checks.named_classes(config) or _begun(last).pool.classes
    config = config.with_values({"pool.classes": classes})
    check_unchanged(_begun(last), config, last.index)  # what would never be used is no answer to what was asked
    return True


class _Driver:
    """One attempt at a run."""

    def __init__(self, config: Config, attempt: Attempt, pool: Pool, held_out: Mapping[str, Pool]) -> None:
        self.attempt, self.pool, self.held_out = attempt, pool, held_out
        self.directory = directory = attempt.directory
        self.display = attempt.display
        self.config = attempt.settle(config.with_values({"pool.classes": pool.classes}))
        self.slots = attempt.slots
        fixed = checks.fixed(self.config, pool, held_out)
        directory.check(fixed)
        self._check_changes()
        self._check_classes()
        self._check_slots()

        self.unlabeled = Eligibility.of(pool, self.config.pool.limit, self.config.seed)
        self.ranks = Ranks(
            workers=self.config.train.workers,
            threads=int(self.config.train.threads),
            use_gpu=self.slots.device == "cuda",
            label_selector=self.slots.selectors["train"],
        )
        n_labeled = config.loop.initial if isinstance(config.loop.initial, int) else 0
        self.config = attempt.hire(self.config, n_labeled)
        directory.begin(fixed, attempt.constants)

    def run(self) -> JsonObject | None:
        """Every cycle in turn; stages that are complete are skipped. Returns what people are to label, if anything."""
        self.attempt.event(
            "attempt",
            distal=__version__,
            host=platform.node(),
            pid=os.getpid(),
            device=self.slots.device,
            slots=self.slots.scoring,
        )
        try:
            if not self.directory.initial.exists():
                asked = self._initial()
                if asked is not None:
                    return asked
            for index in range(self.config.loop.cycles):
                cycle = self.directory.cycle(index)
                if not self._begin(cycle):
                    break
                with self._train(cycle) as training:
                    self._score(cycle, training)
                self._test(cycle)
                self._reduce(cycle)
                self._select(cycle)
                self.directory.write_summary()
                if index + 1 < self.config.loop.cycles and self.config.label.oracle == "files":
                    asked = self._ask(cycle)
                    if asked is not None:
                        return asked
                elif index + 1 < self.config.loop.cycles:
                    self._label(cycle)
        finally:
            self.attempt.scorers.shrink(0)
        return None

    def _initial(self) -> JsonObject | None:
        """Choose and label the samples to start from; returns what people are to label first, if any."""
        initial, seed = self.config.loop.initial, self.config.seed
        if isinstance(initial, str):
            self._take_initial(Path(initial))
        elif self.config.label.oracle == "pool":
            draw = choose_initial if self.config.loop.balance else choose_at_random
            chosen = self._enough(draw(self.unlabeled, initial, seed))
            label_from_pool(self.pool, chosen, self.directory.initial)
            self._tell_missing_classes(Ledger.read([self.directory.initial]))
        else:
            if not self.directory.initial_selection.exists():
                chosen = self._enough(choose_at_random(self.unlabeled, initial, seed))
                random_batch(self.pool, chosen, self.directory.initial_selection)
            waiting = _waiting(self.config, self.pool, -1, self.directory.initial_selection)
            self.attempt.lease.require()
            waiting.write(self.directory)
            if not waiting.collect(self.directory):
                return waiting.report(self.directory)
        return None

    def _tell_missing_classes(self, ledger: Ledger) -> None:
        """Whole groups may leave classes out."""
        present = set(ledger.labels.tolist())
        counts = zip(self.pool.classes or (), self.pool.class_counts, strict=False)
        missing = [name for label, (name, count) in enumerate(counts) if count and label not in present]
        if missing:
            self.display.say(
                f"warning: loop.initial: {len(ledger)} samples, and none of {', '.join(missing[:5])}"
                f"{'' if len(missing) <= 5 else f' and {len(missing) - 5} more classes'}; raise it"
            )

    def _enough(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Whole groups may be too large to start from."""
        assert isinstance(self.config.loop.initial, int)
        if len(chosen) < LABELS_PER_RANK * self.config.train.workers:
            raise ConfigError(
                f"loop.initial: {self.config.loop.initial}: groups are never cut, and whole ones of {len(chosen)} "
                "samples fit; training needs at least 2 per rank: raise it"
            )
        if len(chosen) < self.config.loop.initial:
            self.display.say(f"loop.initial: {len(chosen)} of {self.config.loop.initial}: groups are never cut")
        return chosen

    def _take_initial(self, file: Path) -> None:
        """The labels that a file brings."""
        assert self.pool.classes is not None
        ids, labels = read_labels(file, "loop.initial", self.pool.classes, len(self.pool.classes))
        indices = find(self.pool, ids)
        missing = [sample_id for sample_id, index in zip(ids, indices, strict=True) if index < 0]
        if missing:
            raise ConfigError(f"loop.initial: {file}: sample {missing[0]} is not in the pool ({len(missing)} are not)")
        require_readable(self.pool, ids, indices, f"loop.initial: {file}")
        short = too_few(labels, self.config.train.workers)
        if short is not None:
            raise ConfigError(f"loop.initial: {file}: {short}; add some")
        order = np.argsort(indices)
        ordered = [ids[i] for i in order]
        write_labels(self.directory.initial, indices[order], ordered, np.array(labels)[order], file.name)

    def _ask(self, cycle: Cycle) -> JsonObject | None:
        """Have people label the batch of a cycle; returns what they still have to, if anything."""
        waiting = _waiting(self.config, self.pool, cycle.index, cycle.selection)

        if cycle.marker("label") is None and not cycle.labels.exists():
            self.attempt.lease.require()
            waiting.write(self.directory)
            if not waiting.collect(self.directory):  # the one look at the answers: an import may come at any time
                report = waiting.report(self.directory)
                self.attempt.event("waiting", cycle=cycle.index, asked=report["asked"], answered=report["answered"])
                return report

        def made_from() -> dict[str, str]:
            return {"selection": cycle.chosen().sha256, "labels": Ledger.read([cycle.labels]).sha256}

        self._stage(cycle, "label", made_from, partial(_came_back, cycle.labels))
        return None

    def _begin(self, cycle: Cycle) -> bool:
        """Fix the configuration of a cycle; False when no eligible image is left for it."""
        if cycle.config is not None:
            return True
        n_eligible, budget = self._eligible(cycle).count(), self.config.loop.budget
        if not n_eligible:
            self.display.say(f"every eligible image is labelled: the loop ends before cycle {cycle.index}")
            return False
        if n_eligible < budget:
            if cycle.index == 0:  # later on that is how a pool ends
                raise ConfigError(f"loop.budget: {budget} is more than the {n_eligible} candidates; lower it")
            self.display.say(
                f"cycle {cycle.index}: {n_eligible} eligible images are left, fewer than the budget of {budget}; "
                "it takes all of them"
            )
        self._check_enough(cycle)
        self._check_warm_start(cycle)
        cycle.begin(self.config)
        self.attempt.event("cycle", cycle=cycle.index, n_eligible=n_eligible)
        return True

    def _train(self, cycle: Cycle) -> _Training:
        """Train in the background; its checkpoints are scored as they appear."""
        config = _begun(cycle)
        label_files = tuple(self.directory.label_files(before=cycle.index))
        ledger = Ledger.read(label_files)
        n_imports = answers.n_imports(self.directory.answers)  # kept, so that one that goes missing is missed
        self.attempt.meter.set(metrics.CYCLE, cycle.index)
        self.attempt.meter.set(metrics.LABELLED, len(ledger))
        warm_from = None
        if config.train.init == "warm" and cycle.index:
            warm_from = _checkpoints(self.directory.cycle(cycle.index - 1))[-1]
        made_from = {
            "pool": self.pool.content_sha256,
            "ledger": ledger.sha256,
            "config": config.digest("seed", "device", "model.", "train."),
            "weights": _file_sha256(config.model.weights),
            "warm_from": warm_from.sha256 if warm_from else "",
        }
        job = TrainJob(
            pool=self.pool.path,
            pool_sha256=self.pool.content_sha256,
            folder=cycle.folder,
            labels=label_files,
            model=ModelSpec.of(config.model, self.pool),
            config=config.train.model_copy(update={"max_failures": self.config.train.max_failures}),
            seed=config.seed,
            cycle=cycle.index,
            threads=int(config.train.threads),
            warm_from=warm_from,
            inputs=digest(made_from),
            attempt=self.directory.attempt,
        )

        published_to = self._published_to(cycle)
        given_up, fits = threading.Event(), threading.Event()
        if config.train.command is None or cycle.marker("train") is not None:
            fits.set()

        def on_event(name: str, **values: Any) -> None:
            self.attempt.event(name, cycle=cycle.index, **values)
            if name == "training_waits":
                training.starve()

        def work() -> JsonObject:
            if config.train.command is None:
                train(job, self.ranks, given_up=given_up, still_ours=self.attempt.lease.require, on_event=on_event)
            else:
                require = self.attempt.lease.require
                run_command(config.train.command, job, self.pool, published_to, given_up, fits, require)
            return {
                "n_labeled": len(ledger),
                "n_imports": n_imports,
                "device": self.slots.device,
                "world_size": self.ranks.workers,
                "deterministic": self.slots.device == "cpu",  # a GPU may lack such a kernel; see `be_deterministic`
            }

        training = _Training(
            stage=partial(self._stage, cycle, "train", lambda: made_from, work),
            abandon=partial(abandon, job, given_up),
            queue=checkpoints.Queue(published_to, len(config.train.checkpoint_epochs)),
            fits=fits,
            slots=self.slots.training(self.ranks.workers, self.ranks.threads),
            all_slots=self.slots.scoring if self.slots.shared else 0,
        )
        training.start(at_once=cycle.marker("train") is not None)
        return training

    def _published_to(self, cycle: Cycle) -> Path:
        """Where training publishes. A script may train otherwise when it is started again, so it starts on its own."""
        if _begun(cycle).train.command is None or cycle.marker("train") is not None:
            return cycle.checkpoints
        before = checkpoints.committed(cycle.checkpoints)
        dest = cycle.begin_attempt(self.attempt.lease.require)
        if before:
            reason = (
                f"restarting train.command, which publishes to {dest.name}; the {len(before)} earlier checkpoints are "
                "reused only if it resumes from them or publishes the same weights"
            )
            self.attempt.event("training_anew", cycle=cycle.index, published_before=len(before), reason=reason)
        return dest

    def _score(self, cycle: Cycle, training: _Training) -> None:
        """Score the eligible samples of the pool at every checkpoint, those still to come included."""
        config = _begun(cycle)
        n_rows = len(scored_epochs(config))

        def work() -> JsonObject:
            recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
            assignments = self._assignments(
                cycle,
                cycle.assignments,
                self.pool,
                int(config.pool.block_size),
                n_rows,
                self._eligible(cycle).read,
                config.score.record,
            )
            job = self.attempt.job(config, self.pool, cycle.assignments)
            first_index = len(config.train.checkpoint_epochs) - n_rows
            augmented = config.score.transform == "train" and config.train.augment != "none"
            job = replace(
                job,
                recorded_from=recorded_from,
                first_index=first_index,
                augment=(config.seed, cycle.index) if augmented else None,
            )
            progress = Progress(cycle.index, "train + score", epochs=config.train.epochs)
            if n_rows:
                scored = self.attempt.fill(
                    job,
                    assignments,
                    self._reusing(cycle, assignments, training, first_index),
                    progress,
                    elimination=_elimination(cycle),
                    n_expected=n_rows,
                    metered=True,
                    cycle=cycle.index,
                )
                n_eligible = (scored.images + scored.left_out) // n_rows
            else:
                self._follow(cycle, training)
                scored, n_eligible = Scored(images=0, n_rows=0), self._eligible(cycle).count()
            return {
                "images_scored": scored.images,
                "left_out": scored.left_out,
                "n_eligible": n_eligible,
                "n_rows": n_rows,
                "fingerprint": assignments.fingerprint,
            }

        def made_from() -> dict[str, str]:
            training.wait()
            return {
                "pool": self.pool.content_sha256,
                "ledger": self.directory.ledger(before=cycle.index).sha256,
                "checkpoints": digest([ref.sha256 for ref in _checkpoints(cycle)]),
                "config": config.digest("seed", "device", "pool.", "model.", "score.", "select.subpool"),
            }

        self._stage(cycle, "score", made_from, work)

    def _reusing(self, cycle: Cycle, assignments: Assignments, training: _Training, first_index: int) -> Producer:
        """The producer of the checkpoints to score, which first takes over what is scored of them already."""
        on_event, earlier = partial(self.attempt.event, cycle=cycle.index), []
        for path in filter(Assignments.begun, cycle.earlier_assignments()):
            try:
                earlier.append(Assignments.open(path))
            except Damage as damage:
                on_event("damaged_block", reason=f"{damage}; its rows will be scored again")
        return _Reusing(training, assignments, earlier, first_index, on_event) if earlier else training

    def _test(self, cycle: Cycle) -> None:
        """Predict the images to test and validate on at the last checkpoint with the same actors, and evaluate it."""
        config = _begun(cycle)
        last = len(config.train.checkpoint_epochs) - 1

        def work() -> JsonObject:
            came_to: JsonObject = {"n_test": 0, "n_val": 0, "test": None, "val": None, "undefined": {}}
            for name, pool in self.held_out.items():
                labels, assignments = self._predict(cycle, name, pool, last)
                values, undefined = evaluate(config.eval.metrics, labels, *_predictions(assignments), self._classes)
                came_to |= {f"n_{name}": len(labels), name: values}
                came_to["undefined"] |= {f"{name}.{metric}": reason for metric, reason in undefined.items()}
            return came_to

        def made_from() -> dict[str, str]:
            if not self.held_out:
                return {}
            return {
                **{name: pool.content_sha256 for name, pool in self.held_out.items()},
                "checkpoint": checkpoints.read(cycle.checkpoints, last).sha256,
                "config": config.digest("device", "model.", "score.precision", "score.batch_size", "eval.metrics"),
            }

        self._stage(cycle, "test", made_from, work)
        if (accuracy := (cycle.evaluation()["test"] or {}).get("accuracy")) is not None:
            self.attempt.meter.set(metrics.TEST_ACCURACY, accuracy)

    def _predict(self, cycle: Cycle, name: str, pool: Pool, index: int) -> tuple[NDArray[np.int64], Assignments]:
        """Score the labelled images of another pool at a checkpoint: (n,) their labels, and what was predicted."""
        labels = _labels_in(pool, self._classes)
        path = cycle.held_out(name)
        assignments = self._assignments(
            cycle,
            path,
            pool,
            auto_block_size(pool.n_samples),
            1,
            lambda start, stop: labels[start:stop] >= 0,
            (PROBABILITIES,),
        )
        job = replace(self.attempt.job(_begun(cycle), pool, path), first_index=index)
        producer = Published([checkpoints.read(cycle.checkpoints, index)])
        progress = Progress(cycle.index, name)
        self.attempt.fill(job, assignments, producer, progress, n_expected=1, cycle=cycle.index)
        return labels[labels >= 0], assignments

    def _reduce(self, cycle: Cycle) -> None:
        config = _begun(cycle)
        n_rows = len(scored_epochs(config))

        def work() -> JsonObject:
            reduction = Reduction(
                Assignments.open(cycle.assignments),
                self.pool,
                measures_of(config),
                range(n_rows),
                remaining=cycle.remaining(n_rows),
                seed=self.config.seed,
                cycle=cycle.index,
            )
            scores = reduce(
                reduction,
                cycle.scores,
                on_progress=lambda done, total: self.attempt.progress(
                    Progress(cycle.index, "reduce", images_scored=done, images=total)
                ),
            )
            return {"measures": list(scores.measures)}

        self._stage(cycle, "reduce", partial(_after, cycle, "score"), work)

    def _select(self, cycle: Cycle) -> None:
        config = _begun(cycle)

        def work() -> JsonObject:
            selection = self._choose(cycle, cycle.expected("select", made_from(), labelled=cycle.labels.exists()))
            most, budget = config.select.max_per_group, config.loop.budget
            if most is not None and len(selection) < budget:
                self.display.say(short_of(budget, len(selection), most))
            return {
                "n_selected": len(selection),
                "tie_share": round(selection.tie_share, 6),
                "selection_sha256": selection.sha256,
            }

        def made_from() -> dict[str, str]:
            return {**_after(cycle, "reduce"), "config": config.digest("seed", "select.", "loop.budget")}

        self._stage(cycle, "select", made_from, work)

    def _choose(self, cycle: Cycle, expected: str | None) -> Selection:
        config = _begun(cycle)
        if config.select.from_ is not None:
            return listed_batch(self.pool, self._eligible(cycle), Path(config.select.from_), cycle.selection)
        last = checkpoints.read(cycle.checkpoints, len(config.train.checkpoint_epochs) - 1)
        job = self.attempt.job(config, self.pool, cycle.assignments)
        assignments = Assignments.open(cycle.assignments)
        return select(
            Scores.open(cycle.scores),
            assignments,
            self.pool,
            config.select,
            cycle.selection,
            budget=config.loop.budget,
            seed=config.seed,
            cycle=cycle.index,
            last_row=len(scored_epochs(config)) - 1,
            outputs=lambda indices, names: self.attempt.outputs(job, assignments, indices, last, names),
            expected=expected,
        )

    def _label(self, cycle: Cycle) -> None:
        def work() -> JsonObject:
            chosen = cycle.chosen()
            label_from_pool(self.pool, chosen.indices, cycle.labels)
            return {"n_answered": len(chosen)}

        def made_from() -> dict[str, str]:
            return {"selection": cycle.chosen().sha256, "labels": Ledger.read([cycle.labels]).sha256}

        self._stage(cycle, "label", made_from, work)

    def _stage(
        self, cycle: Cycle, stage: str, made_from: Callable[[], dict[str, str]], work: Callable[[], JsonObject]
    ) -> None:
        """Run a stage unless it is complete, and log that it has been."""
        self.attempt.lease.require()
        complete = cycle.marker(stage) is not None
        marker = cycle.run_stage(stage, made_from, work)
        self.attempt.meter.progressed()
        if not complete:
            self.attempt.event("stage", cycle=cycle.index, stage=stage, seconds=marker["seconds"])

    def _assignments(
        self,
        cycle: Cycle,
        path: Path,
        pool: Pool,
        block_size: int,
        n_rows: int,
        eligible: Callable[[int, int], NDArray[np.bool_]],
        recorded: tuple[str, ...] = (),
    ) -> Assignments:
        assert self.pool.classes is not None
        return Assignments.take_up(
            path,
            n_rows=n_rows,
            n_samples=pool.n_samples,
            block_size=block_size,
            n_classes=len(self.pool.classes),
            eligible=eligible,
            recorded=recorded,
            on_damage=lambda damage: self.attempt.event(
                "damaged_block", cycle=cycle.index, reason=f"{damage}; it will be scored again"
            ),
        )

    @property
    def _classes(self) -> tuple[str, ...]:
        assert self.pool.classes is not None
        return self.pool.classes

    def _follow(self, cycle: Cycle, training: _Training) -> None:
        """Show how far training is, when there is nothing to score."""
        epochs = _begun(cycle).train.checkpoint_epochs
        while not training.finished():
            n_published = len(training.published())
            self.attempt.progress(Progress(cycle.index, "train", images_scored=n_published, images=len(epochs)))
            time.sleep(0.2)

    def _eligible(self, cycle: Cycle) -> Eligibility:
        eligible = self.unlabeled.without(self.directory.ledger(before=cycle.index))
        subpool = (cycle.config or self.config).select.subpool
        return eligible if subpool is None else eligible.within(subpool, cycle.index)

    def _check_changes(self) -> None:
        """Refuse what a cycle that has begun, and has not selected yet, cannot take."""
        begun = self.directory.begun_cycles()
        if begun and begun[-1].marker("select") is None:
            check_unchanged(_begun(begun[-1]), self.config, begun[-1].index)

    def _check_classes(self) -> None:
        """A class may come after the others; an index means the same class for ever."""
        for cycle in self.directory.begun_cycles()[-1:]:
            before, now = _begun(cycle).pool.classes, self.pool.classes
            assert before is not None
            assert now is not None
            if now[: len(before)] != tuple(before):
                raise RunConflict(
                    f"pool.classes: cycle {cycle.index} was begun with {', '.join(before)}; keep them in this order, "
                    "and append new ones"
                )

    def _check_slots(self) -> None:
        """On a cluster of our own no slot will ever be added, so training would wait for ever."""
        workers, threads = self.config.train.workers, int(self.config.train.threads)
        needed = self.slots.training(workers, threads)
        if cluster.is_own(self.config.ray.address) and needed > self.slots.scoring:
            unit = "GPUs" if self.slots.device == "cuda" else "CPU slots"
            raise ConfigError(
                f"train.workers: {workers} ranks of {threads} threads need {needed} {unit}, this machine has "
                f"{self.slots.scoring}; lower train.workers or train.threads, or use a larger machine if the cycle has "
                "begun"
            )

    def _check_enough(self, cycle: Cycle) -> None:
        """`train.workers` may have been raised since the first labels were counted."""
        n, workers = len(self.directory.ledger(before=cycle.index)), self.config.train.workers
        if n < LABELS_PER_RANK * workers:
            raise ConfigError(
                f"train.workers: {workers} ranks need {LABELS_PER_RANK * workers} labelled samples, {LABELS_PER_RANK} "
                f"each, and cycle {cycle.index} has {n}; lower train.workers"
            )

    def _check_warm_start(self, cycle: Cycle) -> None:
        before = self.directory.cycle(cycle.index - 1).config if cycle.index else None
        if not isinstance(before, Config) or self.config.train.init != "warm":
            return
        if before.pool.classes != self.config.pool.classes:
            raise ModelError(
                "train.init: warm continues with the network of the cycle before, which has fewer classes; set "
                "train.init=scratch for this cycle"
            )
        if before.model != self.config.model:
            raise ModelError(
                f"train.init: warm continues with the network of cycle {cycle.index - 1}, and the model section has "
                "changed since; set train.init=scratch, or put the model back"
            )


class _Training:
    """Training in a daemon thread: it must not keep a process alive that was told to stop.

    As a context it ends with training done, or abandoned when the block failed.

    Args:
        stage: the work.
        abandon: tells ranks that are still at work to stop.
        queue: where its checkpoints appear.
        fits: set when they can be scored: a script may train another network than the one that scores.
        slots: held while it runs.
        all_slots: held while the ranks find no room.
    """

    def __init__(
        self,
        stage: Callable[[], None],
        abandon: Callable[[], None],
        queue: checkpoints.Queue,
        fits: threading.Event,
        slots: int,
        all_slots: int,
    ) -> None:
        self._stage, self._abandon, self._queue, self._fits = stage, abandon, queue, fits
        self._slots, self._all_slots = slots, all_slots
        self._starved_at: int | None = None
        self._future: Future[None] = Future()

    def start(self, *, at_once: bool) -> None:
        """Begin; `at_once` when there is nothing to do but to check."""
        if at_once:
            self._run()
        else:
            threading.Thread(target=self._run, name="train", daemon=True).start()

    def starve(self) -> None:
        """The ranks find no room: what is free is spread over nodes, or taken by others. They get all slots until they
        run."""
        self._starved_at = len(self.published())

    def _run(self) -> None:
        try:
            self._future.set_result(self._stage())
        except BaseException as error:
            self._future.set_exception(error)

    def __enter__(self) -> _Training:
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
        """Whether training is done, and its checkpoints can be seen; raises what went wrong with it."""
        if not self._future.done():
            return False
        self._future.result()
        return self._queue.complete()

    def slots_held(self) -> int:
        """Slots that the ranks take from scoring now."""
        if self._future.done():
            return 0
        return self._all_slots if self._starved_at == len(self.published()) else self._slots

    def wait(self) -> None:
        """Return when training is done; raises what went wrong with it."""
        while not self.finished():
            time.sleep(0.1)  # in slices: one long wait would not let a signal through


class _Reusing:
    """The checkpoints of a training script that was started again: what was scored before counts for equal weights.

    A row counts while all rows up to it have the weights of before. From the first that has not, this is another
    training, and its rows are scored anew.

    Args:
        assignments: those of this attempt, as the scoring loop has them.
        earlier: those of the attempts before, the latest first.
        first_index: the checkpoint that row 0 belongs to.
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
        # Read once. A driver that was paused may still begin rows there; they are scored here, which does no harm.
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
        same = [each for each, weights in begun if [weights.get(i) for i in range(row + 1)] == self._weights]
        for each in same:
            for damage in each.remove_damaged(row):
                self._on_event("damaged_block", reason=f"{damage}; it will be scored again")
            self._assignments.adopt_weights(row, self._weights[row])  # first: no chunk is without its weights
            self._assignments.take_over(each, row)
        if begun and not same:
            reason = (
                f"train.command published other weights for checkpoint {row + self._first_index} than before its "
                "restart; checkpoints from this one on are scored again"
            )
            self._on_event("other_weights", row=row, reason=reason)
            self._earlier = []


def _came_back(labels: Path) -> JsonObject:
    """The numbers of a label file, late answers to earlier batches included."""
    ledger = Ledger.read([labels])
    return {"n_answered": len(ledger) + len(ledger.declined), "n_labeled": len(ledger)}


def _elimination(cycle: Cycle) -> Elimination | None:
    config = _begun(cycle)
    if config.score.eliminate == "none":
        return None
    return Elimination(cycle.elimination, config.loop.budget)


def _labels_in(pool: Pool, classes: Sequence[str]) -> NDArray[np.int64]:
    """Labels of the samples of a pool as indices into `classes`: (n_samples,); -1 where unreadable or unlabelled."""
    assert pool.classes is not None
    index_of = np.array([*(classes.index(name) for name in pool.classes), -1])
    labels, status = pool.columns(0, pool.n_samples, "label", "status")
    return np.where(status == OK, index_of[labels], -1)


def _predictions(assignments: Assignments) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What row 0 says of the samples that are scored: (n,) classes, and (n, C) probabilities."""
    scored = assignments.eligible(0, assignments.n_samples)
    labels = assignments.read(0, assignments.n_samples, complete=True)[0, scored].astype(np.int64)
    probabilities = np.empty((len(labels), assignments.n_classes), np.float32)
    done = 0
    for block in assignments.blocks:
        found = assignments.read_recorded(PROBABILITIES, 0, block.start, block.stop)[scored[block.start : block.stop]]
        probabilities[done : done + len(found)] = found
        done += len(found)
    return labels, probabilities


def _begun(cycle: Cycle) -> Config:
    assert isinstance(cycle.config, Config), f"cycle {cycle.index} has not begun"
    return cycle.config


def _checkpoints(cycle: Cycle) -> list[CheckpointRef]:
    return [checkpoints.read(cycle.checkpoints, index) for index in checkpoints.committed(cycle.checkpoints)]


def _after(cycle: Cycle, stage: str) -> dict[str, str]:
    """The input of a stage that reads nothing but what another one wrote."""
    marker = cycle.marker(stage)
    assert marker is not None, f"{stage} is not complete"
    return {stage: marker["inputs_sha256"]}


def _file_sha256(weights: str | None) -> str:
    path = Path(weights) if weights else None
    return sha256(path.read_bytes()) if path and path.is_file() else weights or ""
