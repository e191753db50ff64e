"""The loop of a run, and the order of its stages.

pool -> train -> checkpoints -> score -> assignments -> reduce -> scores -> select -> label -> ledger -> (train)
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from distal import __version__, cluster
from distal.artifacts.lease import Lease
from distal.artifacts.runs import CycleSummary, Run
from distal.config import Config, check_unchanged
from distal.driver import checks, preflight
from distal.driver.context import RunContext, asked_of_people, begun_config
from distal.driver.cycle import begin_cycle, label_cycle, reduce_cycle, score_cycle, select_cycle
from distal.driver.evaluation import evaluate_cycle
from distal.driver.first_set import label_first_set
from distal.driver.resolve import resolve, resolved_autos, with_recorded
from distal.driver.session import acquire_lease, open_session
from distal.driver.training import start_training
from distal.labels.waiting import Waiting, WaitingResult
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.images import MANIFEST
from distal.progress import Display, Silent
from distal.records import Result
from distal.storage import be_durable


@dataclass(frozen=True)
class RunResult(Result):
    """The summary of a run that is complete."""

    state: str
    run: Path
    cycles: tuple[CycleSummary, ...]


def run(config: Config, display: Display | None = None) -> RunResult | WaitingResult:
    """Run the whole loop; called again, it continues where it stopped.

    Returns:
        The summary of the run; or, when people are to label a batch, that batch.

    Raises:
        UserError: the configuration, the pool and the run directory do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    config = config.absolute()
    be_durable(config.durable)
    display = display or Silent()
    directory = Run(Path(config.run))
    if _is_complete(directory, config):
        display.say(f"{directory.path}: complete")
    else:
        waiting = _continue(directory, config, display)
        if waiting is not None:
            return waiting
    return RunResult("complete", directory.path, directory.write_summary().cycles)


def _continue(directory: Run, config: Config, display: Display) -> WaitingResult | None:
    """Check everything, and go through the loop; returns what people are to label, if anything."""
    with ExitStack() as stack:
        # Packing a pool needs Ray before the run has its lease; a run that waits for labels never starts it.
        connect = cache(partial(stack.enter_context, cluster.connect(config.ray.address)))
        pool = checks.with_classes(config, checks.open_pool(config, connect, display))
        held_out = checks.open_held_out(config, connect, display)
        checks.check(config, pool, held_out)
        waiting = _still_waiting(directory, config, pool)
        if waiting is not None:
            return waiting
        if directory.identity is None:  # it has the content of the pools, so once is enough
            if held_out:
                connect()
            checks.check_overlap(config, pool, held_out, display)
        lease = stack.enter_context(acquire_lease(directory, display))
        connect()
        preflight.check(config, directory.path, [pool, *held_out.values()], display)
        directory.sweep()
        context = _begin(stack, directory, config, pool, held_out, lease, display)
        waiting = _loop(context)
    if waiting is not None:
        directory.write_summary()
    return waiting


def _begin(
    stack: ExitStack,
    directory: Run,
    config: Config,
    pool: Pool,
    held_out: Mapping[str, Pool],
    lease: Lease,
    display: Display,
) -> RunContext:
    """Check the configuration against the run, resolve it, and begin the run unless it has begun."""
    config = with_recorded(config.with_values({"pool.classes": pool.classes}), directory)
    checks.check_begun(directory, config, pool, held_out)
    session = stack.enter_context(open_session(config, pool, directory, lease, display))
    checks.check_slots(config, session.slots)
    n_labeled = config.loop.initial if isinstance(config.loop.initial, int) else 0
    config = resolve(config, pool, session.slots, session.fleet, session.owner(), n_labeled)
    directory.begin(checks.identity_keys(config, pool, held_out), resolved_autos(config))
    session.event(
        "attempt",
        distal=__version__,
        host=platform.node(),
        pid=os.getpid(),
        device=session.slots.device,
        slots=session.slots.scoring,
    )
    unlabeled = Eligibility.of(pool, config.pool.limit, config.seed)
    return RunContext(session, config, pool, held_out, unlabeled)


def _loop(context: RunContext) -> WaitingResult | None:
    """The first set, then every cycle in turn; stages that are complete are skipped.

    Returns:
        What people are to label, if anything.
    """
    waiting = label_first_set(context)
    if waiting is not None:
        return waiting
    n_cycles = context.config.loop.cycles
    for index in range(n_cycles):
        cycle = context.directory.cycle(index)
        if not begin_cycle(context, cycle):
            break
        with start_training(context, cycle) as training:
            score_cycle(context, cycle, training)
        evaluate_cycle(context, cycle)
        reduce_cycle(context, cycle)
        select_cycle(context, cycle)
        context.directory.write_summary()
        if index + 1 < n_cycles:  # nobody needs the labels of the last batch
            waiting = label_cycle(context, cycle)
            if waiting is not None:
                return waiting
    return None


def _still_waiting(directory: Run, config: Config, pool: Pool) -> WaitingResult | None:
    """What people have not answered yet, from storage alone; None when there is something to do."""
    waiting = Waiting.read(directory) if directory.identity else None
    if waiting is None or waiting.remade(directory) is not None:
        return None
    if waiting != asked_of_people(config, pool, waiting.cycle, waiting.selection):
        return None
    report = waiting.report(directory)
    return None if report.ready else report


def _is_complete(directory: Run, config: Config) -> bool:
    """Whether nothing is left to do, from storage alone. Raises RunConflict when the run is another one."""
    if directory.identity is None or not directory.is_complete(config.loop.cycles):
        return False
    # After a repair it may be missing; it is made again, or training reports that it differs.
    if not directory.initial.exists():
        return False
    config = with_recorded(config, directory)
    keys = config.identity_keys()
    folder = Path(config.pool.path)
    if (folder / MANIFEST).exists():  # a finished run does not need its pool
        keys |= checks.content_key(Pool.open(folder))
    directory.check(keys)
    directory.check_answers()
    last = directory.begun_cycles()[: config.loop.cycles][-1]
    begun = begun_config(last)
    classes = checks.named_classes(config) or begun.pool.classes
    # A change that would never be used is refused too.
    check_unchanged(begun, config.with_values({"pool.classes": classes}), last.index)
    return True
