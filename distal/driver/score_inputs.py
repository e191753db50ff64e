"""What `distal score` works on: a pool, and the checkpoints of a directory. None of it needs Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import Assignments, dtype_for
from distal.artifacts.checkpoints import KEEP_ALL
from distal.artifacts.cycles import Cycle
from distal.artifacts.lease import Lease
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import Run
from distal.config import ScoreConfig
from distal.driver import checks
from distal.driver.resolve import actor_job, resolve, resolved_autos
from distal.driver.session import Session
from distal.errors import ModelError, UserError
from distal.hashing import digest
from distal.model.spec import ModelSpec
from distal.model.weights import LIGHTNING, Location
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.sample_files import find, read_ids
from distal.progress import Display
from distal.records import CheckpointRef, JsonObject, Progress, Window
from distal.reduce.measures import FROM_VOTES
from distal.score.job import ActorJob, AllPublished, Elimination, Producer, Scored
from distal.train.folder import FolderCheckpoints, matching, versions

_LOOK_S = 1.0
STAGE = "score"


@dataclass(frozen=True)
class ScoreInputs:
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
    checkpoints: FolderCheckpoints
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
        return marker is not None and marker.inputs == self.made_from() and not self.watch

    def begin(self) -> None:
        """Fix what the run is, unless it has begun."""
        keys = _identity_keys(self.config, self.pool, self.excluded)
        self.directory.begin(keys, resolved_autos(self.config))
        if not self.cycle.begun:
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

    def score(
        self,
        session: Session,
        job: ActorJob,
        assignments: Assignments,
        producer: Producer,
        title: str = STAGE,
        elimination: Elimination | None = None,
    ) -> Scored:
        """Score what is missing in some assignments; only under the title `STAGE` the metrics follow."""
        return session.score(
            job,
            assignments,
            producer,
            Progress(-1, title),
            elimination=elimination,
            n_expected=self.config.checkpoints.expect,
            metered=title == STAGE,
        )

    def producer(self) -> Producer:
        """The checkpoints to score."""
        if self.watch:
            return WatchedFolder(self.checkpoints, self.config, self.display)
        return AllPublished(self.checkpoints.refs)

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


def look_at_inputs(
    config: ScoreConfig, pool: Pool, directory: Run, lease: Lease, display: Display, watch: bool
) -> ScoreInputs:
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
    checkpoints = FolderCheckpoints(
        directory.cycle(0).folder_checkpoints,
        Path(config.checkpoints.path),
        config.checkpoints.pattern,
        spec.build(pretrained=False).state_dict(),
        Location(config.checkpoints.key, config.checkpoints.strip_prefix),
        lease.require,
    )
    inputs = ScoreInputs(config, pool, directory, display, watch, checkpoints, excluded, eligible)
    if watch:
        checkpoints.look(patient=True)
    else:
        checkpoints.settle()
        inputs.refuse_too_few()
    inputs.report_order()
    return inputs


def resolve_inputs(inputs: ScoreInputs, session: Session) -> ScoreInputs:
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


class WatchedFolder:
    """A directory that is being filled: a producer for the scoring loop."""

    def __init__(self, checkpoints: FolderCheckpoints, config: ScoreConfig, display: Display) -> None:
        self._checkpoints, self._config, self._display = checkpoints, config.checkpoints, display
        self._looked = -np.inf
        self._grew = time.monotonic()
        self._finished = False
        self._there = checkpoints.n_there

    def published(self) -> Sequence[CheckpointRef]:
        """See `Producer`."""
        return self._checkpoints.refs

    def finished(self) -> bool:
        """Once it is, nothing is looked at any more: a file that comes then belongs to another pass."""
        self._finished = self._finished or self._look()
        return self._finished

    def _look(self) -> bool:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
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
        """See `Producer`."""
        return 0
