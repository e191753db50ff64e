"""The first labelled set: drawn from the pool, asked of people, or brought by a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distal.acquire.batch import random_batch
from distal.artifacts.ledger import LABELS_PER_RANK, Ledger, too_few, write_labels
from distal.driver.context import RunContext
from distal.errors import ConfigError
from distal.labels.oracle import choose_at_random, choose_initial, label_from_pool
from distal.labels.waiting import WaitingResult
from distal.pool.sample_files import find, read_labels, require_readable


def label_first_set(context: RunContext) -> WaitingResult | None:
    """Choose and label the samples to start from, unless that is done.

    Returns:
        What people are to label first, if anything.
    """
    directory, config = context.directory, context.config
    if directory.initial.exists():
        return None
    if isinstance(config.loop.initial, str):
        _take_file(context, Path(config.loop.initial))
    elif config.label.oracle == "pool":
        draw = choose_initial if config.loop.balance else choose_at_random
        chosen = _enough(context, draw(context.unlabeled, config.loop.initial, config.seed))
        label_from_pool(context.pool, chosen, directory.initial)
        _warn_of_missing_classes(context, Ledger.read([directory.initial]))
    else:
        return _ask(context, config.loop.initial)
    return None


def _ask(context: RunContext, n: int) -> WaitingResult | None:
    directory = context.directory
    if not directory.initial_selection.exists():
        chosen = _enough(context, choose_at_random(context.unlabeled, n, context.config.seed))
        random_batch(context.pool, chosen, directory.initial_selection)
    waiting = context.ask(-1, directory.initial_selection)
    context.session.lease.require()
    waiting.write(directory)
    return None if waiting.collect(directory) else waiting.report(directory)


def _warn_of_missing_classes(context: RunContext, ledger: Ledger) -> None:
    """Whole groups may leave classes out."""
    present = set(ledger.labels.tolist())
    counts = zip(context.classes, context.pool.class_counts, strict=False)
    missing = [name for label, (name, count) in enumerate(counts) if count and label not in present]
    if missing:
        others = f" and {len(missing) - 5} more classes" if len(missing) > 5 else ""
        context.session.display.say(
            f"warning: loop.initial: {len(ledger)} samples, and none of {', '.join(missing[:5])}{others}; raise it"
        )


def _enough(context: RunContext, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Refuse a set that is too small to train on: whole groups may be too large to start from."""
    wanted = context.config.loop.initial
    assert isinstance(wanted, int)
    if len(chosen) < LABELS_PER_RANK * context.config.train.workers:
        raise ConfigError(
            f"loop.initial: {wanted}: groups are never cut, and whole ones of {len(chosen)} samples "
            "fit; training needs at least 2 per rank: raise it"
        )
    if len(chosen) < wanted:
        context.session.display.say(f"loop.initial: {len(chosen)} of {wanted}: groups are never cut")
    return chosen


def _take_file(context: RunContext, file: Path) -> None:
    """Take the labels of a file."""
    pool, classes = context.pool, context.classes
    ids, labels = read_labels(file, "loop.initial", classes, len(classes))
    indices = find(pool, ids)
    missing = [sample_id for sample_id, index in zip(ids, indices, strict=True) if index < 0]
    if missing:
        raise ConfigError(f"loop.initial: {file}: sample {missing[0]} is not in the pool ({len(missing)} are not)")
    require_readable(pool, ids, indices, f"loop.initial: {file}")
    short = too_few(labels, context.config.train.workers)
    if short is not None:
        raise ConfigError(f"loop.initial: {file}: {short}; add some")
    order = np.argsort(indices)
    ordered = [ids[i] for i in order]
    write_labels(context.directory.initial, indices[order], ordered, np.array(labels)[order], file.name)
