"""The conductor of `distal score`: a pool at the checkpoints of a directory, then reduce and select.

pool, checkpoints of a directory -> score -> assignments -> reduce -> scores -> select
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from distal import cluster
from distal.acquire.topk import Candidates, TopK
from distal.artifacts.assignments import Assignments, dtype_for
from distal.artifacts.checkpoints import KEEP_ALL
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import Cycle, Run
from distal.artifacts.selection import short_of
from distal.config import ScoreConfig
from distal.driver import checks, preflight, reanalyse
from distal.driver.session import Attempt, begin
from distal.errors import ConfigError, ModelError, UserError
from distal.hashing import digest
from distal.model.spec import ModelSpec
from distal.model.weights import LIGHTNING, Location
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.sample_files import find, read_ids, read_labels, require_readable
from distal.progress import Display, Silent
from distal.records import Block, CheckpointRef, JsonObject, Progress, Window
from distal.reduce.measures import FROM_VOTES, Votes, dispersion
from distal.score.actor import peak_rss_bytes
from distal.score.job import Elimination, Job, Producer, Published, Scored
from distal.storage import be_durable
from distal.train.folder import FolderCheckpoints, matching, versions

SPARE_ROWS = 1000  # for checkpoints that are not there yet; a row that never comes costs nothing
FEW_CHECKPOINTS = 5
LOOK_S = 1.0
STAGE = "score"


def score_directory(
    config: ScoreConfig,
    display: Display | None = None,
    *,
    watch: bool = False,
    select: bool = True,
    check: Path | None = None,
    expect_accuracy: float | None = None,
    check_precision: int | None = None,
) -> JsonObject:
    """Score a pool at every checkpoint of a directory; called again, it does what is missing.

    Args:
        watch: wait for more checkpoints, until there are `checkpoints.expect` of them or none has come for
            `checkpoints.idle` seconds.
        select: whether to reduce and to select `score.budget` samples afterwards.
        check: file of known samples (sample_id, label), which are scored first.
        expect_accuracy: refuse to go on when the last checkpoint is right less often than that, in [0, 1].
        check_precision: blocks to score in fp32 as well, to tell what bf16 changes.

    Returns:
        `{"state": "complete", "run": ..., "images_scored": ..., "seconds": ..., "selection": ..., ...}`.

    Raises:
        UserError: configuration, pool, checkpoints and run directory do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    config = config.absolute()
    be_durable(config.durable)
    display = display or Silent()
    if config.score.eliminate == "exact" and watch and config.checkpoints.expect is None:
        raise ConfigError("score.eliminate: exact needs to know how many checkpoints will come; set checkpoints.expect")
    with ExitStack() as stack:
        connect = cache(partial(stack.enter_context, cluster.connect(config.ray.address)))
        pool = checks.open_pool(config, connect, display)
        directory = Run(Path(config.run))
        lease = stack.enter_context(begin(directory, display))
        scoring = _Scoring(config, Attempt(directory, pool, display, lease), pool, watch)
        known: JsonObject = {}
        if check is not None or check_precision is not None or not scoring.is_complete():
            connect()
            stack.enter_context(scoring.attempt.meter)
            preflight.check(config, directory.path, [pool], display)
            scoring.prepare()
            stack.callback(scoring.attempt.scorers.shrink, 0)
            known = scoring.check_known(check, expect_accuracy) if check is not None else {}
            directory.sweep()
            scoring.begin()
        result = {"state": "complete", "run": config.run, **scoring.score(), **known, **scoring.accuracy()}
        if check_precision is not None:
            result["precision_check"] = scoring.check_precision(check_precision)
    if select:
        chosen = reanalyse.select_run(
            Path(config.run),
            budget=config.score.budget,
            how=config.select,
            pool=Path(config.pool.path),
            display=display,
        )
        result |= {name: chosen[name] for name in ("measure", "selection", "n_selected", "tie_share")}
        result["selection_sha256"] = chosen["selection_sha256"]
        if chosen["n_selected"] < config.score.budget:  # as many are eligible: it is the cap on groups
            display.say(short_of(config.score.budget, chosen["n_selected"], config.select.max_per_group))
    return result


class _Scoring:
    """One attempt at a run of `distal score`. What needs no Ray comes first, so that a mistake is told at once."""

    def __init__(self, config: ScoreConfig, attempt: Attempt, pool: Pool, watch: bool) -> None:
        self.attempt, self.pool, self.watch = attempt, pool, watch
        self.directory = directory = attempt.directory
        self.display = attempt.display
        self.config = checks.resolved(config, attempt.constants)
        self.excluded = self._excluded()
        if directory.identity is not None:
            directory.check(self._fixed())
        dtype_for(config.model.num_classes)
        checks.check_groups(config, pool)
        spec = ModelSpec.of(config.model, pool)
        spec.check()
        unlabeled = Eligibility.of(pool, config.pool.limit, config.seed)
        self.eligible = unlabeled.without(Ledger(self.excluded, np.zeros_like(self.excluded)))
        n_candidates = self.eligible.count()
        if config.score.budget > n_candidates:
            raise UserError(f"score.budget: {config.score.budget} is more than the {n_candidates} candidates; lower it")

        self.cycle: Cycle = directory.cycle(0)
        self.told: set[str] = set()
        self.checkpoints = FolderCheckpoints(
            self.cycle.foreign,
            Path(config.checkpoints.path),
            config.checkpoints.pattern,
            spec.build(pretrained=False).state_dict(),
            Location(config.checkpoints.key, config.checkpoints.strip_prefix),
            attempt.lease.require,
        )
        if watch:
            self.checkpoints.look(patient=True)
        else:
            self.checkpoints.settle()
            self._refuse_too_few()
        self._tell_order()
        self.elimination = (
            Elimination(self.cycle.elimination, config.score.budget) if config.score.eliminate == "exact" else None
        )

    def is_complete(self) -> bool:
        """Whether every checkpoint that is there is scored."""
        marker = self.cycle.marker("score")
        return marker is not None and marker["inputs"] == self._made_from() and not self.watch

    def prepare(self) -> None:
        """What needs Ray: slots, and what each `auto` comes to. Nothing is written yet."""
        self.config = self.attempt.hire(self.attempt.settle(self.config), len(self.excluded))

    def begin(self) -> None:
        """From here on it is fixed what the run is."""
        self.directory.begin(self._fixed(), self.attempt.constants)
        if self.cycle.config is None:
            self.cycle.begin(self.config)
        self.checkpoints.keep()

    def check_known(self, file: Path, expected: float | None) -> JsonObject:
        """Score known samples at the checkpoints that are there."""
        n_classes = self.config.model.num_classes
        ids, labels = read_labels(file, "--check", self.pool.classes, n_classes)
        indices = find(self.pool, ids)
        if (indices < 0).any():
            raise UserError(f"--check: {file}: sample {ids[int(np.argmin(indices))]} is not in the pool")
        require_readable(self.pool, ids, indices, f"--check: {file}")
        job = self._job(self.cycle.assignments)
        accuracies = []
        if self.watch:
            watched = _Watched(self.checkpoints, self.config, self.display)
            while not self.checkpoints.refs and not watched.finished():
                time.sleep(0.1)
        for ref in self.checkpoints.refs:
            right = self.attempt.scorers.predict(job, indices.tolist(), ref) == np.array(labels)
            accuracies.append(float(right.mean()))
            self.display.say(f"{ref.path.name}: {accuracies[-1]:.4f} of {len(ids)} known samples right")
        if not accuracies:
            self._refuse_too_few()
        if expected is not None and accuracies[-1] < expected:
            raise UserError(
                f"--expect-accuracy: {self.checkpoints.refs[-1].path.name} is right on {accuracies[-1]:.4f} of the "
                f"known samples, less than {expected}; check model.name, model.normalize and the order of the classes"
            )
        return {"known_accuracy": accuracies}

    def score(self) -> JsonObject:
        """Fill the assignments, unless that is done for all checkpoints that are there."""
        marker = self.cycle.marker("score")
        if marker is None or not self.is_complete():
            started = time.monotonic()
            assignments = self._assignments()
            job = replace(self._job(assignments.path), recorded_from=self._recorded_from())
            producer: Producer = Published(self.checkpoints.refs)
            if self.watch:
                producer = _Watched(self.checkpoints, self.config, self.display)
            done = self._pass(job, assignments, producer, self.elimination)
            self._tell_repeated()
            self._refuse_too_few()
            if done.n_rows <= job.recorded_from:  # of the one that turned out to be last they are wanted
                job = replace(job, recorded_from=done.n_rows - 1)
                refs = Published(self.checkpoints.refs)
                done = done.then(self._pass(job, assignments, refs, self.elimination, "score: recorded arrays"))
            if done.n_rows < FEW_CHECKPOINTS:
                self.display.say(
                    f"warning: {done.n_rows} checkpoints only; with so few, most samples have the same score"
                )
            marker = self.cycle.complete("score", self._made_from(), _figures(done), time.monotonic() - started)
        return {
            "checkpoints": marker["n_rows"],
            "images_scored": marker["images_scored"],
            "images_left_out": marker["left_out"],
            "seconds": marker["scoring_seconds"],
            "bookkeeping_seconds": marker["driver_seconds"],
            **{name: marker[name] for name in ("images_per_s", "startup_s", "hand_outs", "peak_rss_bytes")},
            "precision": self.config.score.precision,
            "batch_size": self.config.score.batch_size,
        }

    def accuracy(self) -> JsonObject:
        """How often the last checkpoint is right, where the pool knows."""
        n_classes = self.config.model.num_classes
        if self.pool.classes is None or len(self.pool.classes) != n_classes or self.elimination is not None:
            return {}
        assignments = Assignments.open(self.cycle.assignments)
        right = total = 0
        for block in assignments.blocks:
            (labels,) = self.pool.columns(block.start, block.stop, "label")
            known = assignments.eligible(block.start, block.stop) & (labels >= 0)
            last = assignments.read(block.start, block.stop, [len(self.checkpoints.refs) - 1])[0]
            right += int((last == labels)[known].sum())
            total += int(known.sum())
        if not total:
            return {}
        accuracy = right / total
        self.display.say(
            f"the last checkpoint is right on {accuracy:.4f} of the {total:,} samples whose label is known"
        )
        if accuracy < 1.5 / n_classes:
            self.display.say(
                f"warning: that is near chance (1 in {n_classes}); check model.normalize and the order of the classes"
            )
        return {"accuracy": accuracy}

    def check_precision(self, n_blocks: int) -> JsonObject:
        """Score some blocks in fp32 as well, and compare."""
        if self.config.score.precision == "fp32":
            raise ConfigError("--check-precision: score.precision is fp32 already")
        main = Assignments.open(self.cycle.assignments)
        places = np.linspace(0, len(main.blocks) - 1, min(n_blocks, len(main.blocks)))
        blocks = [main.blocks[i] for i in sorted({int(place) for place in places})]
        inside = {block.start for block in blocks}
        n_rows = len(self.checkpoints.refs)
        other = Assignments.take_up(
            self.cycle.folder / f"precision-{n_rows}x{n_blocks}.zarr",
            n_rows=n_rows,
            n_samples=main.n_samples,
            block_size=main.block_size,
            n_classes=main.n_classes,
            eligible=lambda start, stop: main.eligible(start, stop) & (start in inside),
            recorded=main.recorded,
            on_damage=self.display.say,
        )
        job = replace(self._job(other.path), precision="fp32", recorded_from=n_rows - 1)
        self._pass(job, other, Published(self.checkpoints.refs), None, "score in fp32")
        report = _compare(main, other, blocks, n_rows, self.config.score.budget)
        self.display.say(
            f"bf16 against fp32 on {report['images']:,} images: {report['label_agreement']:.2%} of the labels agree, "
            f"rank correlation of dispersion {report['dispersion_spearman']:.4f}, "
            f"{report['selection_overlap']:.1%} of the batch is the same"
        )
        return report

    def _refuse_too_few(self) -> None:
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
                f"{wanted.path}: one checkpoint only; {self.config.select.measure} of one checkpoint is always 0; "
                f"{keep}, or select.measure=margin"
            )

    def _tell_order(self) -> None:
        """Say which files are taken for which training steps: nothing else would show that `best.pt` came first."""
        refs = self.checkpoints.refs
        if not refs:
            return
        names = [ref.path.name for ref in refs]
        shown = names if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
        self.display.say(f"{len(names)} checkpoints, in this order: {', '.join(shown)}")
        self._tell_repeated()
        if doubtful := versions(names):
            self.display.say(
                f"warning: {doubtful[0]} was written when there was a file of that name; if two trainings wrote to "
                "this directory, leave one out with checkpoints.pattern"
            )

    def _tell_repeated(self) -> None:
        for name, earlier in self.checkpoints.repeated:
            if name not in self.told:
                self.told.add(name)
                self.display.say(f"{name} is left out: it has the weights of {earlier}")

    def _made_from(self) -> dict[str, str]:
        return {
            "pool": self.pool.content_sha256,
            "excluded": digest(self.excluded.tolist()),
            "checkpoints": digest([ref.sha256 for ref in self.checkpoints.refs]),
        }

    def _fixed(self) -> JsonObject:
        """What must stay the same: everything that decides the assignments."""
        free = () if self.config.score.eliminate == "exact" else ("select.", "score.budget")
        decisive = {
            name: value for name, value in self.config.result_keys().items() if not name.startswith(free or "-")
        }
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in decisive.items()}
        return {
            **listed,
            **checks.content(self.pool),
            "excluded samples (pool.exclude)": digest(self.excluded.tolist()),
        }

    def _excluded(self) -> NDArray[np.int64]:
        """`sample_index` of the samples that are labelled already, ascending."""
        if self.config.pool.exclude is None:
            return np.empty(0, np.int64)
        ids = read_ids(Path(self.config.pool.exclude), "pool.exclude")
        found = find(self.pool, ids)
        if (found < 0).all():
            raise UserError(f"pool.exclude: none of its {len(ids)} samples, such as {ids[0]}, is in the pool")
        if (found < 0).any():
            self.display.say(f"pool.exclude: {int((found < 0).sum())} of its {len(ids)} samples are not in the pool")
        return np.sort(found[found >= 0])

    def _assignments(self) -> Assignments:
        n_known = max(len(self.checkpoints.refs), self.config.checkpoints.expect or 0)
        assignments = Assignments.take_up(
            self.cycle.assignments,
            n_rows=n_known if self.elimination is not None else n_known + SPARE_ROWS,
            n_samples=self.pool.n_samples,
            block_size=int(self.config.pool.block_size),
            n_classes=self.config.model.num_classes,
            eligible=self.eligible.read,
            recorded=self.config.score.record,
            on_damage=lambda damage: self.attempt.event("damaged_block", reason=f"{damage}; it will be scored again"),
        )
        if n_known > assignments.n_rows:
            why = "with score.eliminate: exact" if self.elimination is not None else "at first"
            raise UserError(
                f"{self.cycle.assignments}: laid out {why} for {assignments.n_rows} checkpoints, and there are "
                f"{n_known}; give another run directory (run=...)"
            )
        return assignments

    def _recorded_from(self) -> int:
        """The first row to record at: the last one, as far as is known which that will be."""
        if self.config.score.record_rows == "all":
            return 0
        n_known = max(len(self.checkpoints.refs), self.config.checkpoints.expect or 0)
        return max(0, n_known - 1)

    def _job(self, assignments: Path) -> Job:
        return self.attempt.job(self.config, self.pool, assignments)

    def _pass(
        self,
        job: Job,
        assignments: Assignments,
        producer: Producer,
        elimination: Elimination | None,
        title: str = STAGE,
    ) -> Scored:
        return self.attempt.fill(
            job,
            assignments,
            producer,
            Progress(-1, title),
            elimination=elimination,
            n_expected=self.config.checkpoints.expect,
            metered=title == STAGE,  # not what is scored again
        )


class _Watched:
    """A directory that is being filled: a producer for the scoring loop."""

    def __init__(self, checkpoints: FolderCheckpoints, config: ScoreConfig, display: Display) -> None:
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


def _figures(done: Scored) -> JsonObject:
    return {
        "n_rows": done.n_rows,
        "n_eligible": (done.images + done.left_out) // max(1, done.n_rows),
        "images_scored": done.images,
        "left_out": done.left_out,
        "images_per_s": round(done.images_predicted / done.seconds, 1) if done.seconds else None,
        "scoring_seconds": round(done.seconds, 3),
        "driver_seconds": round(done.driver_s, 3),
        "hand_outs": done.hand_outs,
        "startup_s": round(done.startup_s, 3),
        "peak_rss_bytes": {"driver": peak_rss_bytes(), "actor": done.actor_rss_bytes},
    }


def _compare(main: Assignments, other: Assignments, blocks: list[Block], n_rows: int, budget: int) -> JsonObject:
    """What another precision changes, on some blocks. Cells that elimination left out are not compared."""
    rows, agreeing, compared = range(n_rows), 0, 0
    dispersions: list[list[NDArray[np.float64]]] = [[], []]
    for block in blocks:
        votes = [each.read(block.start, block.stop, rows) for each in (main, other)]
        assigned = (votes[0] < main.n_classes) & (votes[1] < main.n_classes)
        agreeing += int((votes[0] == votes[1])[assigned].sum())
        compared += int(assigned.sum())
        complete = assigned.all(axis=0)
        for kept, vote in zip(dispersions, votes, strict=True):
            kept.append(dispersion(Votes(vote[:, complete], main.n_classes)))
    first, second = (np.concatenate(parts) for parts in dispersions)
    share = max(1, round(budget * len(first) / sum(int(main.eligible(b.start, b.stop).sum()) for b in main.blocks)))
    batches = [_top(scores, share) for scores in (first, second)]
    same_rank = bool(np.array_equal(first, second))
    return {
        "blocks": len(blocks),
        "images": len(first),
        "label_agreement": agreeing / max(1, compared),
        "dispersion_spearman": 1.0 if same_rank else float(spearmanr(first, second).statistic),
        "selection_overlap": len(batches[0] & batches[1]) / share,
    }


def _top(scores: NDArray[np.float64], k: int) -> set[int]:
    top = TopK(k)
    n = len(scores)
    index = np.arange(n, dtype=np.int64)
    top.add(Candidates(index, scores.astype(np.float32), np.zeros(n, np.float16), index.astype(np.uint64)))
    return set(top.result()[0].index.tolist())
