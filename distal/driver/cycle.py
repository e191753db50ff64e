"""The stages of a cycle beside training and evaluation: begin, score, reduce, select, label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from distal.acquire.batch import listed_batch, select
from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.ledger import LABELS_PER_RANK, Ledger
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection, short_of
from distal.artifacts.stages import LabelOutputs, ReduceOutputs, ScoreOutputs, SelectOutputs
from distal.config.needs import scored_epochs
from distal.driver.context import RunContext, begun_config
from distal.driver.training import Training, checkpoints_of, reuse_earlier_rows
from distal.errors import ConfigError, ModelError
from distal.hashing import digest
from distal.labels.oracle import label_from_pool
from distal.labels.waiting import WaitingResult
from distal.progress import counter
from distal.records import Progress
from distal.reduce.measures import measures_of
from distal.reduce.stream import Reduction, reduce
from distal.score.job import Elimination, Scored


def begin_cycle(context: RunContext, cycle: Cycle) -> bool:
    """Fix the configuration of a cycle; False when no eligible image is left for it."""
    if cycle.begun:
        return True
    session = context.session
    n_eligible, budget = context.eligible(cycle).count(), context.config.loop.budget
    if not n_eligible:
        session.display.say(f"every eligible image is labelled: the loop ends before cycle {cycle.index}")
        return False
    if n_eligible < budget:
        if cycle.index == 0:  # later on that is how a pool ends
            raise ConfigError(f"loop.budget: {budget} is more than the {n_eligible} candidates; lower it")
        session.display.say(
            f"cycle {cycle.index}: {n_eligible} eligible images are left, fewer than the budget of "
            f"{budget}; it takes all of them"
        )
    _check_enough(context, cycle)
    _check_warm_start(context, cycle)
    cycle.begin(context.config)
    session.event("cycle", cycle=cycle.index, n_eligible=n_eligible)
    return True


def _check_enough(context: RunContext, cycle: Cycle) -> None:
    """`train.workers` may have been raised since the first labels were counted."""
    n, workers = len(context.directory.ledger(before=cycle.index)), context.config.train.workers
    if n < LABELS_PER_RANK * workers:
        raise ConfigError(
            f"train.workers: {workers} ranks need {LABELS_PER_RANK * workers} labelled samples, "
            f"{LABELS_PER_RANK} each, and cycle {cycle.index} has {n}; lower train.workers"
        )


def _check_warm_start(context: RunContext, cycle: Cycle) -> None:
    config = context.config
    if config.train.init != "warm" or not cycle.index:
        return
    before = begun_config(context.directory.cycle(cycle.index - 1))
    if before.pool.classes != config.pool.classes:
        raise ModelError(
            "train.init: warm continues with the network of the cycle before, which has fewer classes; "
            "set train.init=scratch for this cycle"
        )
    if before.model != config.model:
        raise ModelError(
            f"train.init: warm continues with the network of cycle {cycle.index - 1}, and the model "
            "section has changed since; set train.init=scratch, or put the model back"
        )


def score_cycle(context: RunContext, cycle: Cycle, training: Training) -> None:
    """Score the eligible samples of the pool at every checkpoint, those still to come included."""
    config, pool = begun_config(cycle), context.pool

    def made_from() -> dict[str, str]:
        training.wait(lambda: _give_way(context, training))
        return {
            "pool": pool.content_sha256,
            "ledger": context.directory.ledger(before=cycle.index).sha256,
            "checkpoints": digest([ref.sha256 for ref in checkpoints_of(cycle)]),
            "config": config.digest("seed", "device", "pool.", "model.", "score.", "select.subpool"),
        }

    context.stage(cycle, "score", made_from, lambda: _score(context, cycle, training))


def _score(context: RunContext, cycle: Cycle, training: Training) -> ScoreOutputs:
    config = begun_config(cycle)
    n_rows = len(scored_epochs(config))
    assignments = context.assignments(
        cycle,
        cycle.assignments,
        context.pool,
        int(config.pool.block_size),
        n_rows,
        context.eligible(cycle).read,
        config.score.record,
    )
    if n_rows:
        scored = _score_rows(context, cycle, training, assignments)
        n_eligible = (scored.images + scored.left_out) // n_rows
    else:
        _follow(context, cycle, training)
        scored, n_eligible = Scored(images=0, n_rows=0), context.eligible(cycle).count()
    return ScoreOutputs(
        n_rows=n_rows,
        n_eligible=n_eligible,
        images_scored=scored.images,
        left_out=scored.left_out,
        fingerprint=assignments.fingerprint,
    )


def _score_rows(context: RunContext, cycle: Cycle, training: Training, assignments: Assignments) -> Scored:
    config = begun_config(cycle)
    n_rows = assignments.n_rows
    first_index = len(config.train.checkpoint_epochs) - n_rows
    augmented = config.score.transform == "train" and config.train.augment != "none"
    job = replace(
        context.actor_job(cycle, context.pool, cycle.assignments),
        recorded_from=n_rows - 1 if config.score.record_rows == "last" else 0,
        first_index=first_index,
        augment=(config.seed, cycle.index) if augmented else None,
    )
    elimination = None
    if config.score.eliminate != "none":
        elimination = Elimination(cycle.elimination, config.loop.budget)
    return context.session.score(
        job,
        assignments,
        reuse_earlier_rows(context, cycle, assignments, training, first_index),
        Progress(cycle.index, "train + score", epochs=config.train.epochs),
        elimination=elimination,
        n_expected=n_rows,
        metered=True,
        cycle=cycle.index,
    )


def _follow(context: RunContext, cycle: Cycle, training: Training) -> None:
    """Show how far training is while there is nothing to score."""
    n_epochs = len(begun_config(cycle).train.checkpoint_epochs)
    show = counter(context.session.progress, "train", cycle.index)

    def meanwhile() -> None:
        show(len(training.published()), n_epochs)
        _give_way(context, training)

    training.wait(meanwhile)


def _give_way(context: RunContext, training: Training) -> None:
    """Stop idle actors in slots that training holds: its ranks may still look for room."""
    fleet = context.session.fleet
    fleet.shrink(fleet.allowed(training.slots_held()))


def reduce_cycle(context: RunContext, cycle: Cycle) -> None:
    """Reduce the assignments to a score per sample and measure."""
    config = begun_config(cycle)
    n_rows = len(scored_epochs(config))
    show = counter(context.session.progress, "reduce", cycle.index)

    def work() -> ReduceOutputs:
        reduction = Reduction(
            Assignments.open(cycle.assignments),
            context.pool,
            measures_of(config),
            range(n_rows),
            remaining=cycle.remaining(n_rows),
            seed=context.config.seed,
            cycle=cycle.index,
        )
        scores = reduce(reduction, cycle.scores, on_progress=show)
        return ReduceOutputs(measures=tuple(scores.measures))

    context.stage(cycle, "reduce", lambda: _made_by(cycle, "score"), work)


def select_cycle(context: RunContext, cycle: Cycle) -> None:
    """Select the samples to label."""
    config = begun_config(cycle)

    def made_from() -> dict[str, str]:
        config_sha256 = config.digest("seed", "select.", "loop.budget")
        return {**_made_by(cycle, "reduce"), "config": config_sha256}

    def work() -> SelectOutputs:
        expected = cycle.expected("select", made_from(), labelled=cycle.labels.exists())
        selection = _select(context, cycle, expected)
        most, budget = config.select.max_per_group, config.loop.budget
        if most is not None and len(selection) < budget:
            context.session.display.say(short_of(budget, len(selection), most))
        return SelectOutputs.of(selection)

    context.stage(cycle, "select", made_from, work)


def _select(context: RunContext, cycle: Cycle, expected: str | None) -> Selection:
    config, pool = begun_config(cycle), context.pool
    if config.select.from_ is not None:
        file = Path(config.select.from_)
        return listed_batch(pool, context.eligible(cycle), file, cycle.selection)
    last = checkpoints.read(cycle.checkpoints, len(config.train.checkpoint_epochs) - 1)
    job = context.actor_job(cycle, pool, cycle.assignments)
    assignments = Assignments.open(cycle.assignments)
    return select(
        Scores.open(cycle.scores),
        assignments,
        pool,
        config.select,
        cycle.selection,
        budget=config.loop.budget,
        seed=config.seed,
        cycle=cycle.index,
        last_row=len(scored_epochs(config)) - 1,
        outputs=lambda indices, names: context.session.outputs(job, assignments, indices, last, names),
        expected=expected,
    )


def label_cycle(context: RunContext, cycle: Cycle) -> WaitingResult | None:
    """Collect the labels of the batch; returns what people still have to label, if anything."""
    if context.config.label.oracle == "files":
        asked = _ask(context, cycle)
        if asked is not None:
            return asked

    def made_from() -> dict[str, str]:
        return {"selection": cycle.chosen().sha256, "labels": Ledger.read([cycle.labels]).sha256}

    def work() -> LabelOutputs:
        if context.config.label.oracle == "files":  # late answers to earlier batches included
            ledger = Ledger.read([cycle.labels])
            n_answered = len(ledger) + len(ledger.declined)
            return LabelOutputs(n_answered=n_answered, n_labeled=len(ledger))
        chosen = cycle.chosen()
        label_from_pool(context.pool, chosen.indices, cycle.labels)
        return LabelOutputs(n_answered=len(chosen))

    context.stage(cycle, "label", made_from, work)
    return None


def _ask(context: RunContext, cycle: Cycle) -> WaitingResult | None:
    """Ask people to label the batch of a cycle; returns what they still have to label, if anything."""
    if cycle.marker("label") is not None or cycle.labels.exists():
        return None
    waiting = context.ask(cycle.index, cycle.selection)
    context.session.lease.require()
    waiting.write(context.directory)
    # The only look at the answers: an import may come at any time.
    if waiting.collect(context.directory):
        return None
    report = waiting.report(context.directory)
    session = context.session
    session.event("waiting", cycle=cycle.index, asked=report.asked, answered=report.answered)
    return report


def _made_by(cycle: Cycle, stage: Literal["score", "reduce"]) -> dict[str, str]:
    """The input of a stage that reads nothing but the output of another one."""
    marker = cycle.marker(stage)
    assert marker is not None, f"{stage} is not complete"
    return {stage: marker.inputs_sha256}
