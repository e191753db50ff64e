"""Evaluate the last checkpoint of a cycle on the held-out pools, with the actors that score the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from distal.artifacts import checkpoints
from distal.artifacts.assignments import PROBABILITIES, Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.stages import EvaluationOutputs
from distal.cluster import metrics
from distal.driver.context import RunContext, begun_config
from distal.pool import Pool
from distal.pool.images import OK
from distal.records import Progress, auto_block_size
from distal.score.evaluate import evaluate
from distal.score.job import AllPublished


def evaluate_cycle(context: RunContext, cycle: Cycle) -> None:
    """Predict the images to test and validate on at the last checkpoint, and compute the metrics."""
    config = begun_config(cycle)
    last = len(config.train.checkpoint_epochs) - 1

    def work() -> EvaluationOutputs:
        outputs = EvaluationOutputs()
        for name, pool in context.held_out.items():
            labels, assignments = _predict(context, cycle, name, pool, last)
            predicted, probabilities = _predictions(assignments)
            values, undefined = evaluate(config.eval.metrics, labels, predicted, probabilities, context.classes)
            reasons = {f"{name}.{metric}": reason for metric, reason in undefined.items()}
            outputs = outputs.with_images(name, len(labels), values, reasons)
        return outputs

    def made_from() -> dict[str, str]:
        if not context.held_out:
            return {}
        keys = ("device", "model.", "score.precision", "score.batch_size", "eval.metrics")
        return {
            **{name: pool.content_sha256 for name, pool in context.held_out.items()},
            "checkpoint": checkpoints.read(cycle.checkpoints, last).sha256,
            "config": config.digest(*keys),
        }

    context.stage(cycle, "test", made_from, work)
    if (accuracy := (cycle.evaluation().test or {}).get("accuracy")) is not None:
        context.session.meter.set(metrics.TEST_ACCURACY, accuracy)


def _predict(
    context: RunContext, cycle: Cycle, name: str, pool: Pool, index: int
) -> tuple[NDArray[np.int64], Assignments]:
    """Score the labelled images of a held-out pool at a checkpoint: (n,) their labels, and the assignments."""
    labels = _labels_in(pool, context.classes)
    path = cycle.held_out(name)
    assignments = context.assignments(
        cycle,
        path,
        pool,
        auto_block_size(pool.n_samples),
        1,
        lambda start, stop: labels[start:stop] >= 0,
        (PROBABILITIES,),
    )
    context.session.score(
        replace(context.actor_job(cycle, pool, path), first_index=index),
        assignments,
        AllPublished([checkpoints.read(cycle.checkpoints, index)]),
        Progress(cycle.index, name),
        n_expected=1,
        cycle=cycle.index,
    )
    return labels[labels >= 0], assignments


def _labels_in(pool: Pool, classes: Sequence[str]) -> NDArray[np.int64]:
    """Labels of the samples of a pool as indices into `classes`: (n_samples,); -1 where there is none."""
    assert pool.classes is not None
    index_of = np.array([*(classes.index(name) for name in pool.classes), -1])
    labels, status = pool.columns(0, pool.n_samples, "label", "status")
    return np.where(status == OK, index_of[labels], -1)


def _predictions(assignments: Assignments) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Row 0 of the samples that are scored: (n,) classes, and (n, C) probabilities."""
    scored = assignments.eligible(0, assignments.n_samples)
    labels = assignments.read(0, assignments.n_samples, complete=True)[0, scored].astype(np.int64)
    probabilities = np.empty((len(labels), assignments.n_classes), np.float32)
    done = 0
    for block in assignments.blocks:
        rows = assignments.read_recorded(PROBABILITIES, 0, block.start, block.stop)
        rows = rows[scored[block.start : block.stop]]
        probabilities[done : done + len(rows)] = rows
        done += len(rows)
    return labels, probabilities
