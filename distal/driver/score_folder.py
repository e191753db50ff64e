"""The loop of `distal score`: a pool at the checkpoints of a directory, then reduce and select.

pool, checkpoints of a directory -> score -> assignments -> reduce -> scores -> select
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distal import cluster
from distal.artifacts.assignments import Assignments, dtype_for
from distal.artifacts.checkpoints import KEEP_ALL, LIGHTNING
from distal.artifacts.lease import Lease
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import Cycle, Run
from distal.artifacts.selection import short_of
from distal.config import ScoreConfig
from distal.driver import checks, precision, preflight, reanalyse
from distal.driver.precision import PrecisionResult
from distal.driver.resolve import actor_job, resolve, resolved_autos, with_recorded
from distal.driver.session import Session, acquire_lease, open_session
from distal.errors import ConfigError, ModelError, UserError
from distal.hashing import digest
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.sample_files import find, read_ids, read_labels, require_readable
from distal.progress import Display, Silent
from distal.records import OPTIONAL, CheckpointRef, JsonObject, Progress, Result, Window
from distal.reduce.measures import FROM_VOTES
from distal.score.actor import peak_rss_bytes
from distal.score.job import ActorJob, AllPublished, Elimination, Producer, Scored
from distal.storage import be_durable
from distal.train.folder import ForeignCheckpoints, Layout, matching, versions

SPARE_ROWS = 1000  # for checkpoints that are not there yet; a row that never comes costs nothing
FEW_CHECKPOINTS = 5
LOOK_S = 1.0
POLL_S = 0.1
STAGE = "score"


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
        check_precision: blocks to score in fp32, too, to report what bf16 changes.

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
        inputs = _inputs(with_recorded(config, directory), pool, directory, lease, display, watch)
        if check is not None or check_precision is not None or not inputs.is_complete():
            connect()
            preflight.check(config, directory.path, [pool], display)
            session = stack.enter_context(open_session(inputs.config, pool, directory, lease, display))
            inputs = _resolved(inputs, session)
            if check is not None:
                known = _check_known(inputs, session, check, expect_accuracy)
            directory.sweep()
            inputs.begin()
            if not inputs.is_complete():
                _score(inputs, session)
            if check_precision is not None:
                compared = _check_precision(inputs, session, check_precision)
        result = replace(
            inputs.result(),
            known_accuracy=known,
            accuracy=_accuracy(inputs),
            precision_check=compared,
        )
    if select:
        chosen = reanalyse.select_run(
            Path(config.run),
            budget=config.budget,
            how=config.select,
            pool=Path(config.pool.path),
            display=display,
        )
        result = replace(
            result,
            measure=chosen.measure,
            selection=chosen.selection,
            n_selected=chosen.n_selected,
            tie_share=chosen.tie_share,
            selection_sha256=chosen.selection_sha256,
        )
        if chosen.n_selected < config.budget:  # as many are eligible: it is the cap on groups
            most = config.select.max_per_group
            display.say(short_of(config.budget, chosen.n_selected, most))
    return result


@dataclass(frozen=True)
class _Inputs:
    """What is scored, at which checkpoints: everything that needs no Ray, so that a mistake is reported at once.

    Attributes:
        config: with the recorded values, and resolved once there is a session.
        checkpoints: the directory as far as it has been looked at; grows while it is watched.
        excluded: `sample_index` of the samples that are labelled already, ascending.
        reported: checkpoints that the display has named as repeated.
    """

    config: ScoreConfig
    pool: Pool
    directory: Run
    display: Display
    watch: bool
    checkpoints: ForeignCheckpoints
    excluded: NDArray[np.int64]
    eligible: Eligibility
    reported: set[str] = field(default_factory=set)

    @property
    def cycle(self) -> Cycle:
        """The only cycle."""
        return self.directory.cycle(0)

    @property
    def elimination(self) -> Elimination | None:
        """What to leave out, if anything."""
        if self.config.score.eliminate != "exact":
            return None
        return Elimination(self.cycle.elimination, self.config.budget)

    @property
    def n_known(self) -> int:
        """Checkpoints that are there or expected."""
        return max(len(self.checkpoints.refs), self.config.checkpoints.expect or 0)

    def is_complete(self) -> bool:
        """Whether every checkpoint that is there is scored."""
        marker = self.cycle.marker("score")
        return marker is not None and marker["inputs"] == self.made_from() and not self.watch

    def begin(self) -> None:
        """Fix what the run is, unless it has begun."""
        keys = _identity_keys(self.config, self.pool, self.excluded)
        self.directory.begin(keys, resolved_autos(self.config))
        if self.cycle.config is None:
            self.cycle.begin(self.config)
        self.checkpoints.keep()

    def made_from(self) -> dict[str, str]:
        """Names and hashes of what the assignments are made from."""
        return {
            "pool": self.pool.content_sha256,
            "excluded": digest(self.excluded.tolist()),
            "checkpoints": digest([ref.sha256 for ref in self.checkpoints.refs]),
        }

    def actor_job(self, assignments: Path) -> ActorJob:
        """What scoring actors get to score the pool."""
        name = self.directory.path.name
        return actor_job(self.config, self.pool, self.pool, assignments, name)

    def producer(self) -> Producer:
        """The checkpoints to score."""
        if self.watch:
            return _Watched(self.checkpoints, self.config, self.display)
        return AllPublished(self.checkpoints.refs)

    def result(self) -> ScoreResult:
        """The figures of the scoring, which is complete."""
        marker = self.cycle.marker(STAGE)
        assert marker is not None
        return ScoreResult(
            state="complete",
            run=self.directory.path,
            checkpoints=marker["n_rows"],
            images_scored=marker["images_scored"],
            images_left_out=marker["left_out"],
            seconds=marker["scoring_seconds"],
            bookkeeping_seconds=marker["driver_seconds"],
            images_per_s=marker["images_per_s"],
            startup_s=marker["startup_s"],
            hand_outs=marker["hand_outs"],
            peak_rss_bytes=marker["peak_rss_bytes"],
            precision=self.config.score.precision,
            batch_size=int(self.config.score.batch_size),
        )

    def refuse_too_few(self) -> None:
        """Raise ModelError when the checkpoints do not suffice for a score."""
        refs, wanted = self.checkpoints.refs, self.config.checkpoints
        if not refs:
            todo = "none came" if self.watch else "wait for them with --watch"
            if others := matching(Path(wanted.path), f"*{LIGHTNING}"):
                todo = f"it has {len(others)} of Lightning's: set checkpoints.pattern=*{LIGHTNING}"
            raise ModelError(f"checkpoints.path: {wanted.path} has no file {wanted.pattern}; {todo}")
        n_taken = self.checkpoints.n_taken
        if not self.watch and wanted.expect is not None and n_taken < wanted.expect:
            raise ModelError(
                f"checkpoints.expect: {wanted.expect}, and {n_taken} are there; wait for the others with --watch"
            )
        if len(refs) == 1 and Window.of_name(self.config.select.measure)[0] in FROM_VOTES:
            keep = f"set {KEEP_ALL}" if refs[0].path.suffix == LIGHTNING else "keep more of them"
            raise ModelError(
                f"{wanted.path}: one checkpoint only; {self.config.select.measure} of one checkpoint is "
                f"always 0; {keep}, or select.measure=margin"
            )

    def report_order(self) -> None:
        """Say which files stand for which training steps: nothing else would show that `best.pt` came first."""
        refs = self.checkpoints.refs
        if not refs:
            return
        names = [ref.path.name for ref in refs]
        shown = names if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
        self.display.say(f"{len(names)} checkpoints, in this order: {', '.join(shown)}")
        self.report_repeated()
        if doubtful := versions(names):
            self.display.say(
                f"warning: {doubtful[0]} was written when there was a file of that name; if two trainings "
                "wrote to this directory, leave one out with checkpoints.pattern"
            )

    def report_repeated(self) -> None:
        """Say which files are left out because their weights are there already."""
        for name, earlier in self.checkpoints.repeated:
            if name not in self.reported:
                self.reported.add(name)
                self.display.say(f"{name} is left out: it has the weights of {earlier}")


def _inputs(config: ScoreConfig, pool: Pool, directory: Run, lease: Lease, display: Display, watch: bool) -> _Inputs:
    """Check configuration, pool and run directory, and look at the checkpoints."""
    excluded = _excluded(config, pool, display)
    if directory.identity is not None:
        directory.check(_identity_keys(config, pool, excluded))
    dtype_for(config.model.num_classes)
    checks.check_groups(config, pool)
    spec = ModelSpec.of(config.model, pool)
    spec.check()
    unlabeled = Eligibility.of(pool, config.pool.limit, config.seed)
    eligible = unlabeled.without(Ledger(excluded, np.zeros_like(excluded)))
    n_candidates = eligible.count()
    if config.budget > n_candidates:
        raise UserError(f"score.budget: {config.budget} is more than the {n_candidates} candidates; lower it")
    checkpoints = ForeignCheckpoints(
        directory.cycle(0).foreign,
        Path(config.checkpoints.path),
        config.checkpoints.pattern,
        spec.build(pretrained=False).state_dict(),
        Layout(config.checkpoints.key, config.checkpoints.strip_prefix),
        lease.require,
    )
    inputs = _Inputs(config, pool, directory, display, watch, checkpoints, excluded, eligible)
    if watch:
        checkpoints.look(patient=True)
    else:
        checkpoints.settle()
        inputs.refuse_too_few()
    inputs.report_order()
    return inputs


def _resolved(inputs: _Inputs, session: Session) -> _Inputs:
    """The same inputs with a value in the place of every `auto`."""
    config = resolve(
        inputs.config,
        inputs.pool,
        session.slots,
        session.fleet,
        session.owner(),
        len(inputs.excluded),
    )
    return replace(inputs, config=config)


def _identity_keys(config: ScoreConfig, pool: Pool, excluded: NDArray[np.int64]) -> JsonObject:
    """What must stay the same: everything that decides the assignments."""
    free = () if config.score.eliminate == "exact" else ("select.", "score.budget")
    keys = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.result_keys().items()
        if not any(name.startswith(prefix) for prefix in free)
    }
    return {
        **keys,
        **checks.content_key(pool),
        "excluded samples (pool.exclude)": digest(excluded.tolist()),
    }


def _excluded(config: ScoreConfig, pool: Pool, display: Display) -> NDArray[np.int64]:
    """`sample_index` of the samples that are labelled already, ascending."""
    if config.pool.exclude is None:
        return np.empty(0, np.int64)
    ids = read_ids(Path(config.pool.exclude), "pool.exclude")
    indices = find(pool, ids)
    n_unknown = int((indices < 0).sum())
    if n_unknown == len(indices):
        raise UserError(f"pool.exclude: none of its {len(ids)} samples, such as {ids[0]}, is in the pool")
    if n_unknown:
        display.say(f"pool.exclude: {n_unknown} of its {len(ids)} samples are not in the pool")
    return np.sort(indices[indices >= 0])


def _check_known(inputs: _Inputs, session: Session, file: Path, expected: float | None) -> list[float]:
    """Score known samples at the checkpoints that are there; returns the accuracy at each."""
    ids, labels = read_labels(file, "--check", inputs.pool.classes, inputs.config.model.num_classes)
    indices = find(inputs.pool, ids)
    if (indices < 0).any():
        raise UserError(f"--check: {file}: sample {ids[int(np.argmin(indices))]} is not in the pool")
    require_readable(inputs.pool, ids, indices, f"--check: {file}")
    job = inputs.actor_job(inputs.cycle.assignments)
    accuracies = []
    if inputs.watch:
        watched = _Watched(inputs.checkpoints, inputs.config, inputs.display)
        while not inputs.checkpoints.refs and not watched.finished():
            time.sleep(POLL_S)
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


def _score(inputs: _Inputs, session: Session) -> None:
    """Fill the assignments at all checkpoints that are there or still to come."""
    started = time.monotonic()
    assignments = _assignments(inputs, session)
    job = replace(inputs.actor_job(assignments.path), recorded_from=_recorded_from(inputs))
    scored = _pass(inputs, session, job, assignments, inputs.producer())
    inputs.report_repeated()
    inputs.refuse_too_few()
    if scored.n_rows <= job.recorded_from:  # recorded values are wanted of the row that proved to be the last
        job = replace(job, recorded_from=scored.n_rows - 1)
        refs = AllPublished(inputs.checkpoints.refs)
        again = _pass(inputs, session, job, assignments, refs, "score: recorded arrays")
        scored = scored.then(again)
    if scored.n_rows < FEW_CHECKPOINTS:
        inputs.display.say(f"warning: {scored.n_rows} checkpoints only; with so few, most samples have the same score")
    seconds = time.monotonic() - started
    inputs.cycle.complete(STAGE, inputs.made_from(), _figures(scored), seconds)


def _pass(
    inputs: _Inputs,
    session: Session,
    job: ActorJob,
    assignments: Assignments,
    producer: Producer,
    title: str = STAGE,
    elimination: bool = True,
) -> Scored:
    return session.score(
        job,
        assignments,
        producer,
        Progress(-1, title),
        elimination=inputs.elimination if elimination else None,
        n_expected=inputs.config.checkpoints.expect,
        metered=title == STAGE,  # not what is scored again
    )


def _assignments(inputs: _Inputs, session: Session) -> Assignments:
    config, n_known = inputs.config, inputs.n_known
    exact = inputs.elimination is not None
    assignments = Assignments.take_up(
        inputs.cycle.assignments,
        n_rows=n_known if exact else n_known + SPARE_ROWS,
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


def _recorded_from(inputs: _Inputs) -> int:
    """The first row to record at: the last one, as far as it is known."""
    return 0 if inputs.config.score.record_rows == "all" else max(0, inputs.n_known - 1)


def _figures(scored: Scored) -> JsonObject:
    return {
        "n_rows": scored.n_rows,
        "n_eligible": (scored.images + scored.left_out) // max(1, scored.n_rows),
        "images_scored": scored.images,
        "left_out": scored.left_out,
        "images_per_s": round(scored.images_predicted / scored.seconds, 1) if scored.seconds else None,
        "scoring_seconds": round(scored.seconds, 3),
        "driver_seconds": round(scored.driver_s, 3),
        "hand_outs": scored.hand_outs,
        "startup_s": round(scored.startup_s, 3),
        "peak_rss_bytes": {"driver": peak_rss_bytes(), "actor": scored.actor_rss_bytes},
    }


def _accuracy(inputs: _Inputs) -> float | None:
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


def _check_precision(inputs: _Inputs, session: Session, n_blocks: int) -> PrecisionResult:
    """Score some blocks in fp32, too, and compare."""
    if inputs.config.score.precision == "fp32":
        raise ConfigError("--check-precision: score.precision is fp32 already")
    main = Assignments.open(inputs.cycle.assignments)
    blocks = precision.spread(main.blocks, n_blocks)
    inside = {block.start for block in blocks}
    n_rows = len(inputs.checkpoints.refs)
    other = Assignments.take_up(
        inputs.cycle.folder / f"precision-{n_rows}x{n_blocks}.zarr",
        n_rows=n_rows,
        n_samples=main.n_samples,
        block_size=main.block_size,
        n_classes=main.n_classes,
        eligible=lambda start, stop: main.eligible(start, stop) & (start in inside),
        recorded=main.recorded,
        on_damage=inputs.display.say,
    )
    job = replace(inputs.actor_job(other.path), precision="fp32", recorded_from=n_rows - 1)
    refs = AllPublished(inputs.checkpoints.refs)
    _pass(inputs, session, job, other, refs, "score in fp32", elimination=False)
    report = precision.compare(main, other, blocks, n_rows, inputs.config.budget)
    inputs.display.say(
        f"bf16 against fp32 on {report.images:,} images: {report.label_agreement:.2%} of the "
        f"labels agree, rank correlation of dispersion {report.dispersion_spearman:.4f}, "
        f"{report.selection_overlap:.1%} of the batch is the same"
    )
    return report


class _Watched:
    """A directory that is being filled: a producer for the scoring loop."""

    def __init__(self, checkpoints: ForeignCheckpoints, config: ScoreConfig, display: Display) -> None:
        self._checkpoints, self._config, self._display = checkpoints, config.checkpoints, display
        self._looked = -np.inf
        self._grew = time.monotonic()
        self._finished = False
        self._there = checkpoints.n_there

    def published(self) -> Sequence[CheckpointRef]:
        return self._checkpoints.refs

    def finished(self) -> bool:
        """Once it is, nothing is looked at any more: a file that comes then belongs to another pass."""
        self._finished = self._finished or self._look()
        return self._finished

    def _look(self) -> bool:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        self._checkpoints.look(patient=True)
        there = self._checkpoints.n_there
        if there != self._there:
            self._there, self._grew = there, now
        expect = self._config.expect
        enough = expect is not None and self._checkpoints.no_more(expect)
        if not (enough or now - self._grew >= self._config.idle):
            return False
        if not self._checkpoints.look(patient=True, closing=True):
            return False
        if enough:
            return True
        n = len(self._checkpoints.refs)
        self._display.say(f"no new checkpoint for {self._config.idle:.0f} s: going on with the {n} that are there")
        return True

    def slots_held(self) -> int:
        return 0
