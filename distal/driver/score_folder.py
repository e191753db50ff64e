"""The loop of `distal score`: a pool at the checkpoints of a directory, then reduce and select.

pool, checkpoints of a directory -> score -> assignments -> reduce -> scores -> select
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from distal import cluster
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.selection import short_of
from distal.artifacts.stages import FolderScoreOutputs
from distal.config import ScoreConfig
from distal.driver import checks, preflight, reanalyse
from distal.driver.precision import PrecisionResult, check_in_fp32
from distal.driver.resolve import with_recorded
from distal.driver.score_inputs import STAGE, ScoreInputs, WatchedFolder, look_at_inputs, resolve_inputs
from distal.driver.session import Session, acquire_lease, open_session
from distal.errors import ConfigError, UserError
from distal.pool.sample_files import find, read_labels, require_readable
from distal.progress import Display, Silent
from distal.records import OPTIONAL, Result
from distal.score.actor import peak_rss_bytes
from distal.score.job import AllPublished, Scored
from distal.storage import be_durable

_SPARE_ROWS = 1000  # for checkpoints that are not there yet; a row that never comes costs nothing
_FEW_CHECKPOINTS = 5
_POLL_S = 0.1


@dataclass(frozen=True)
class ScoreResult(Result):
    """The figures of `distal score`.

    Attributes:
        run: the run directory.
        images_scored, images_left_out: predictions that were made, and that elimination saved.
        seconds: from the first hand-out to the last commit.
        bookkeeping_seconds: of those, the seconds that the driver was busy.
        startup_s: from the start to the first hand-out.
        peak_rss_bytes: of the driver, and the largest of an actor.
        known_accuracy: at each checkpoint, on the known samples of `--check`.
        accuracy: of the last checkpoint, where the pool has labels.
        measure, selection, n_selected, tie_share, selection_sha256: of the batch, if one was selected.
    """

    state: str
    run: Path
    checkpoints: int
    images_scored: int
    images_left_out: int
    seconds: float
    bookkeeping_seconds: float
    images_per_s: float | None
    startup_s: float
    hand_outs: int
    peak_rss_bytes: dict[str, int]
    precision: str
    batch_size: int
    known_accuracy: list[float] | None = field(default=None, metadata=OPTIONAL)
    accuracy: float | None = field(default=None, metadata=OPTIONAL)
    precision_check: PrecisionResult | None = field(default=None, metadata=OPTIONAL)
    measure: str | None = field(default=None, metadata=OPTIONAL)
    selection: Path | None = field(default=None, metadata=OPTIONAL)
    n_selected: int | None = field(default=None, metadata=OPTIONAL)
    tie_share: float | None = field(default=None, metadata=OPTIONAL)
    selection_sha256: str | None = field(default=None, metadata=OPTIONAL)


def score_directory(
    config: ScoreConfig,
    display: Display | None = None,
    *,
    watch: bool = False,
    select: bool = True,
    check: Path | None = None,
    expect_accuracy: float | None = None,
    check_precision: int | None = None,
) -> ScoreResult:
    """Score a pool at every checkpoint of a directory; called again, it does what is missing.

    Args:
        watch: wait for more checkpoints, until there are `checkpoints.expect` of them or none has come for
            `checkpoints.idle` seconds.
        select: whether to reduce and to select `score.budget` samples afterwards.
        check: file of known samples (sample_id, label), which are scored first.
        expect_accuracy: refuse to go on when the last checkpoint is right less often than that, in [0, 1].
        check_precision: blocks to score in fp32 too, to report what bf16 changes.

    Raises:
        UserError: configuration, pool, checkpoints and run directory do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    config = config.absolute()
    be_durable(config.durable)
    display = display or Silent()
    if config.score.eliminate == "exact" and watch and config.checkpoints.expect is None:
        raise ConfigError("score.eliminate: exact needs to know how many checkpoints will come; set checkpoints.expect")
    known: list[float] | None = None
    compared: PrecisionResult | None = None
    with ExitStack() as stack:
        connect = cache(partial(stack.enter_context, cluster.connect(config.ray.address)))
        pool = checks.open_pool(config, connect, display)
        directory = Run(Path(config.run))
        lease = stack.enter_context(acquire_lease(directory, display))
        inputs = look_at_inputs(with_recorded(config, directory), pool, directory, lease, display, watch)
        if check is not None or check_precision is not None or not inputs.is_complete():
            connect()
            preflight.check(config, directory.path, [pool], display)
            session = stack.enter_context(open_session(inputs.config, pool, directory, lease, display))
            inputs = resolve_inputs(inputs, session)
            if check is not None:
                known = _check_known(inputs, session, check, expect_accuracy)
            directory.sweep()
            inputs.begin()
            if not inputs.is_complete():
                _score(inputs, session)
            if check_precision is not None:
                compared = check_in_fp32(inputs, session, check_precision)
        result = replace(
            _result(inputs),
            known_accuracy=known,
            accuracy=_accuracy(inputs),
            precision_check=compared,
        )
    return _with_selection(result, config, display) if select else result


def _with_selection(result: ScoreResult, config: ScoreConfig, display: Display) -> ScoreResult:
    """Reduce and select, and add the selection to the result."""
    budget, pool = config.budget, Path(config.pool.path)
    chosen = reanalyse.select_run(result.run, budget=budget, how=config.select, pool=pool, display=display)
    if chosen.n_selected < budget:  # as many are eligible: it is the cap on groups
        display.say(short_of(budget, chosen.n_selected, config.select.max_per_group))
    return replace(
        result,
        measure=chosen.measure,
        selection=chosen.selection,
        n_selected=chosen.n_selected,
        tie_share=chosen.tie_share,
        selection_sha256=chosen.selection_sha256,
    )


def _check_known(inputs: ScoreInputs, session: Session, file: Path, expected: float | None) -> list[float]:
    """Score known samples at the checkpoints that are there; returns the accuracy at each."""
    ids, labels = read_labels(file, "--check", inputs.pool.classes, inputs.config.model.num_classes)
    indices = find(inputs.pool, ids)
    if (indices < 0).any():
        raise UserError(f"--check: {file}: sample {ids[int(np.argmin(indices))]} is not in the pool")
    require_readable(inputs.pool, ids, indices, f"--check: {file}")
    job = inputs.actor_job(inputs.cycle.assignments)
    accuracies = []
    if inputs.watch:
        watched = WatchedFolder(inputs.checkpoints, inputs.config, inputs.display)
        while not inputs.checkpoints.refs and not watched.finished():
            time.sleep(_POLL_S)
    for ref in inputs.checkpoints.refs:
        predicted = session.fleet.predict(job, indices.tolist(), ref, session.owner())
        accuracies.append(float((predicted == np.array(labels)).mean()))
        inputs.display.say(f"{ref.path.name}: {accuracies[-1]:.4f} of {len(ids)} known samples right")
    if not accuracies:
        inputs.refuse_too_few()
    if expected is not None and accuracies[-1] < expected:
        raise UserError(
            f"--expect-accuracy: {inputs.checkpoints.refs[-1].path.name} is right on "
            f"{accuracies[-1]:.4f} of the known samples, less than {expected}; check model.name, "
            "model.normalize and the order of the classes"
        )
    return accuracies


def _score(inputs: ScoreInputs, session: Session) -> None:
    """Fill the assignments at all checkpoints that are there or still to come."""
    started = time.monotonic()
    exact = inputs.elimination
    assignments = _assignments(inputs, session)
    job = replace(inputs.actor_job(assignments.path), recorded_from=_recorded_from(inputs))
    scored = inputs.score(session, job, assignments, inputs.producer(), elimination=exact)
    inputs.report_repeated()
    inputs.refuse_too_few()
    if scored.n_rows <= job.recorded_from:  # recorded values are wanted of the row that proved to be the last
        job = replace(job, recorded_from=scored.n_rows - 1)
        refs = AllPublished(inputs.checkpoints.refs)
        again = inputs.score(session, job, assignments, refs, "score: recorded arrays", exact)
        scored = scored.then(again)
    if scored.n_rows < _FEW_CHECKPOINTS:
        inputs.display.say(f"warning: {scored.n_rows} checkpoints only; with so few, most samples have the same score")
    seconds = time.monotonic() - started
    session.lease.require()  # right before the marker is written: a successor's may be there
    inputs.cycle.complete(STAGE, inputs.made_from(), _outputs(scored), seconds)


def _assignments(inputs: ScoreInputs, session: Session) -> Assignments:
    config, n_known = inputs.config, inputs.n_known
    exact = inputs.elimination is not None
    assignments = Assignments.take_up(
        inputs.cycle.assignments,
        n_rows=n_known if exact else n_known + _SPARE_ROWS,
        n_samples=inputs.pool.n_samples,
        block_size=int(config.pool.block_size),
        n_classes=config.model.num_classes,
        eligible=inputs.eligible.read,
        recorded=config.score.record,
        on_damage=lambda damage: session.event("damaged_block", reason=f"{damage}; it will be scored again"),
    )
    if n_known > assignments.n_rows:
        why = "with score.eliminate: exact" if exact else "at first"
        raise UserError(
            f"{inputs.cycle.assignments}: laid out {why} for {assignments.n_rows} checkpoints, and "
            f"there are {n_known}; give another run directory (run=...)"
        )
    return assignments


def _recorded_from(inputs: ScoreInputs) -> int:
    """The first row to record at: the last one, as far as it is known."""
    return 0 if inputs.config.score.record_rows == "all" else max(0, inputs.n_known - 1)


def _result(inputs: ScoreInputs) -> ScoreResult:
    """The figures of the scoring, which is complete."""
    marker = inputs.cycle.scored_folder
    assert marker is not None
    outputs = marker.outputs
    return ScoreResult(
        state="complete",
        run=inputs.directory.path,
        checkpoints=outputs.n_rows,
        images_scored=outputs.images_scored,
        images_left_out=outputs.left_out,
        seconds=outputs.scoring_seconds,
        bookkeeping_seconds=outputs.driver_seconds,
        images_per_s=outputs.images_per_s,
        startup_s=outputs.startup_s,
        hand_outs=outputs.hand_outs,
        peak_rss_bytes=outputs.peak_rss_bytes,
        precision=inputs.config.score.precision,
        batch_size=int(inputs.config.score.batch_size),
    )


def _outputs(scored: Scored) -> FolderScoreOutputs:
    return FolderScoreOutputs(
        n_rows=scored.n_rows,
        n_eligible=(scored.images + scored.left_out) // max(1, scored.n_rows),
        images_scored=scored.images,
        left_out=scored.left_out,
        images_per_s=round(scored.images_predicted / scored.seconds, 1) if scored.seconds else None,
        scoring_seconds=round(scored.seconds, 3),
        driver_seconds=round(scored.driver_s, 3),
        hand_outs=scored.hand_outs,
        startup_s=round(scored.startup_s, 3),
        peak_rss_bytes={"driver": peak_rss_bytes(), "actor": scored.actor_rss_bytes},
    )


def _accuracy(inputs: ScoreInputs) -> float | None:
    """How often the last checkpoint is right, where the pool has labels."""
    pool, n_classes = inputs.pool, inputs.config.model.num_classes
    if pool.classes is None or len(pool.classes) != n_classes or inputs.elimination is not None:
        return None
    assignments = Assignments.open(inputs.cycle.assignments)
    right = total = 0
    for block in assignments.blocks:
        (labels,) = pool.columns(block.start, block.stop, "label")
        known = assignments.eligible(block.start, block.stop) & (labels >= 0)
        last = assignments.read(block.start, block.stop, [len(inputs.checkpoints.refs) - 1])[0]
        right += int((last == labels)[known].sum())
        total += int(known.sum())
    if not total:
        return None
    accuracy = right / total
    inputs.display.say(f"the last checkpoint is right on {accuracy:.4f} of the {total:,} samples whose label is known")
    if accuracy < 1.5 / n_classes:
        inputs.display.say(
            f"warning: that is near chance (1 in {n_classes}); check model.normalize and the order of the classes"
        )
    return accuracy
