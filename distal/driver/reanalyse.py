"""Reduce and select again from stored assignments: another measure, window or budget, without any inference.

Results lie under `analyses/<measure><window>`; the record of the cycle itself is never overwritten.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from distal import cluster
from distal.acquire.batch import select
from distal.acquire.strategy import by_scores
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Analysis, Cycle
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.artifacts.stages import AnalysisOutputs, Marker, ScoreOutputs, SelectOutputs
from distal.config import Config, ScoreConfig, SelectSection, check_measure
from distal.errors import ConfigError, Damage, RunConflict, UserError
from distal.hashing import digest
from distal.pool import Pool
from distal.progress import Display, Silent, counter
from distal.records import Result, Window
from distal.reduce.measures import FROM_RECORDED, FROM_VOTES
from distal.reduce.stream import Mapper, Reduction, in_threads, reduce
from distal.storage import be_durable

_WHOLE = Window()


@dataclass(frozen=True)
class MeasureResult(Result):
    """A measure of a cycle that has been computed.

    Attributes:
        window: as in its name; empty for all checkpoints.
        checkpoints: how many it was computed from.
        scores: the folder with the array.
        seconds: that the computation took, whenever that was.
    """

    measure: str
    window: str
    checkpoints: int
    scores: Path
    seconds: float


@dataclass(frozen=True)
class ReduceResult(Result):
    """The measures that `distal reduce` computed, or found."""

    state: str
    run: Path
    cycle: int
    analyses: tuple[MeasureResult, ...]


@dataclass(frozen=True)
class SelectResult(Result):
    """The selection that `distal select` made, or found.

    Attributes:
        window: as in the name of the measure; empty for all checkpoints.
        selection: the file.
        tie_share: the share of the batch that a tie-break decided.
    """

    state: str
    run: Path
    cycle: int
    measure: str
    window: str
    selection: Path
    n_selected: int
    tie_share: float
    selection_sha256: str


def reduce_run(
    path: Path,
    *,
    cycle: int | None = None,
    measures: tuple[str, ...] = (),
    window: Window = _WHOLE,
    annotate: bool = False,
    pool: Path | None = None,
    ray_address: str | None = None,
    display: Display | None = None,
) -> ReduceResult:
    """Compute measures of a cycle that has been scored.

    Args:
        path: the run directory.
        cycle: by default the last one that has been scored.
        measures: by default the one that the run selects by.
        annotate: also store the two most frequent classes of each sample.
        pool: where the pool of the run is now, if it has moved.
        ray_address: of a cluster whose nodes share the work; None: the threads of this process.

    Raises:
        UserError: no such cycle or measure, or the window selects no checkpoint.
        Damage: a chunk is missing or does not decode.
    """
    display = display or Silent()
    scored = ScoredCycle(path, cycle, pool)
    with _connection(ray_address):
        mapper: Mapper = cluster.in_tasks if ray_address else in_threads
        analyses = [
            scored.reduce(*_named(measure, window), annotate=annotate, mapper=mapper, display=display)
            for measure in measures or (scored.config.select.measure,)
        ]
    return ReduceResult("complete", scored.directory.path, scored.cycle.index, tuple(analyses))


def select_run(
    path: Path,
    *,
    budget: int,
    measure: str | None = None,
    cycle: int | None = None,
    window: Window = _WHOLE,
    how: SelectSection | None = None,
    annotate: bool = False,
    pool: Path | None = None,
    ray_address: str | None = None,
    display: Display | None = None,
) -> SelectResult:
    """Choose the `budget` samples with the largest scores; they are computed first if need be.

    Arguments as for `reduce_run`; `how` is by default that of the run.

    Raises like `reduce_run`, and UserError when there are fewer samples than the budget.
    """
    display = display or Silent()
    scored = ScoredCycle(path, cycle, pool)
    how = how or scored.config.select
    name, window = _named(measure or how.measure, window)
    with _connection(ray_address):
        mapper: Mapper = cluster.in_tasks if ray_address else in_threads
        scored.reduce(name, window, annotate=annotate, mapper=mapper, display=display)
    return scored.select(name, window, budget, how)


def _named(measure: str, window: Window) -> tuple[str, Window]:
    """A measure and its window, which may be part of its name."""
    try:
        name, own = Window.of_name(measure)
    except ValueError as error:
        raise ConfigError(f"--measure: {measure}: {error}") from None
    if own != _WHOLE and window != _WHOLE:
        raise ConfigError(f"--measure: {measure} has a window already; leave out --last, --from and --every")
    return name, window if own == _WHOLE else own


def _connection(address: str | None) -> AbstractContextManager[None]:
    if address is None:
        return nullcontext()
    cluster.secure(address)
    return cluster.connect(address)


class ScoredCycle:
    """A cycle whose assignments are complete."""

    def __init__(self, path: Path, cycle: int | None, pool: Path | None) -> None:
        self.directory = Run.open(path)
        begun = self.directory.begun_cycles()
        able = [each for each in begun if each.marker("score") is not None]
        if not able:
            raise RunConflict(f"{path}: no cycle has been scored yet")
        found = [each for each in able if cycle in (None, each.index)]
        if not found:
            raise RunConflict(
                f"{path}: cycle {cycle} has not been scored; scored are {', '.join(str(each.index) for each in able)}"
            )
        self.cycle: Cycle = found[-1]
        marker = self.cycle.marker("score")
        assert marker is not None
        self.marker: Marker[ScoreOutputs] = marker
        self.config: Config | ScoreConfig = self.cycle.config
        self.n_rows = marker.outputs.n_rows
        be_durable(self.config.durable)
        self._pool_path = pool or Path(self.config.pool.path)

    @cached_property
    def pool(self) -> Pool:
        """The pool of the run."""
        return Pool.open(self._pool_path).require(self.marker.inputs["pool"])

    @cached_property
    def assignments(self) -> Assignments:
        """The assignments of the cycle."""
        return Assignments.open(self.cycle.assignments)

    def scores_of(self, name: str, display: Display) -> Path:
        """The folder of the scores of a measure, computed if need be; its window is part of its name."""
        measure, window = _named(name, _WHOLE)
        self.reduce(measure, window, annotate=False, mapper=in_threads, display=display)
        return self._analysis(measure, window).scores

    def reduce(
        self, measure: str, window: Window, *, annotate: bool, mapper: Mapper, display: Display
    ) -> MeasureResult:
        """Compute one measure, unless that is done."""
        rows = self._rows(measure, window)
        analysis = self._analysis(measure, window)
        made_from = {"score": self.marker.inputs_sha256, "rows": digest(rows)}
        marker = analysis.reduced
        if marker is None or marker.inputs != made_from or annotate > marker.outputs.annotated:
            started = time.monotonic()
            analysis.invalidate("reduce")
            reduction = Reduction(
                self.assignments,
                self.pool,
                (measure,),
                rows,
                annotate=annotate,
                remaining=self.cycle.remaining(self.n_rows),
                seed=self.config.seed,
                cycle=self.cycle.index,
            )
            reduce(
                reduction,
                analysis.scores,
                mapper=mapper,
                on_progress=counter(display.progress, f"reduce {measure}{window}", self.cycle.index),
            )
            outputs = AnalysisOutputs(rows=len(rows), samples=self.pool.n_samples, annotated=annotate)
            marker = analysis.complete("reduce", made_from, outputs, time.monotonic() - started)
        scores = analysis.scores / measure
        return MeasureResult(measure, str(window), len(rows), scores, marker.seconds)

    def select(self, measure: str, window: Window, budget: int, how: SelectSection) -> SelectResult:
        """Choose from a measure that has been computed, unless that is done.

        Args:
            how: the tie-break, the kind of batch and the cap on groups.
        """
        analysis = self._analysis(measure, window)
        reduced = analysis.reduced
        assert reduced is not None
        n_candidates = self.marker.outputs.n_eligible
        if budget > n_candidates:
            raise UserError(f"--budget: {budget} is more than the {n_candidates} candidates; lower it")
        if self.config.score.eliminate == "exact" and budget > self.budget:
            raise UserError(
                f"--budget: {budget}: samples that could not be among the first {self.budget} were left out "
                "(score.eliminate: exact), so no more than that can be selected; score again with "
                "score.eliminate=none in another run directory"
            )
        how = by_scores(how, measure)
        made_from = {
            "reduce": reduced.inputs_sha256,
            "seed": str(self.config.seed),
            "select": digest(how.model_dump(mode="json")),
        }
        stage, dest = f"select-{budget}", analysis.selection(budget)
        marker = analysis.selected(stage)
        if marker is None or marker.inputs != made_from:
            started = time.monotonic()
            analysis.invalidate(stage)
            selection = select(
                Scores.open(analysis.scores),
                self.assignments,
                self.pool,
                how,
                dest,
                last_row=self.n_rows - 1,
                budget=budget,
                seed=self.config.seed,
                cycle=self.cycle.index,
                expected=analysis.expected(stage, made_from),
            )
            outputs = SelectOutputs.of(selection)
            marker = analysis.complete(stage, made_from, outputs, time.monotonic() - started)
        elif Selection.read(dest).sha256 != marker.outputs.selection_sha256:
            raise Damage(f"{dest}: not the selection that was made; remove {analysis.folder} to make it again")
        return SelectResult(
            state="complete",
            run=self.directory.path,
            cycle=self.cycle.index,
            measure=measure,
            window=str(window),
            selection=dest,
            n_selected=marker.outputs.n_selected,
            tie_share=marker.outputs.tie_share,
            selection_sha256=marker.outputs.selection_sha256,
        )

    @property
    def augmented(self) -> bool:
        """Whether images were scored as training augments them."""
        return self.config.augments

    @property
    def n_checkpoints(self) -> int:
        """Checkpoints of the cycle, scored or not."""
        n = self.config.n_checkpoints if self.config.trains else None
        return self.n_rows if n is None else n

    @property
    def budget(self) -> int:
        """What the run selects in a cycle."""
        return self.config.budget

    def _analysis(self, measure: str, window: Window) -> Analysis:
        # A directory of checkpoints may grow, and every length of it has its own analyses.
        grown = f"@rows={self.n_rows}" if not self.config.trains else ""
        return self.cycle.analysis(f"{measure}{grown}{window}")

    def _rows(self, measure: str, window: Window) -> list[int]:
        """The rows of a window; raises ConfigError when the measure cannot be computed from them."""
        try:
            check_measure(measure, window)
        except ValueError as error:
            raise ConfigError(f"--measure: {error}") from None
        if self.config.score.eliminate == "exact" and (measure != "dispersion" or window != _WHOLE):
            raise ConfigError(
                f"--measure: {measure}{window}: the samples that could not be selected by dispersion were left out "
                "(score.eliminate: exact), so only dispersion over all checkpoints can be computed; score again with "
                "score.eliminate=none in another run directory"
            )
        if measure in FROM_RECORDED and measure not in self.config.score.record:
            raise ConfigError(
                f"--measure: {measure} was not recorded; score.record was {list(self.config.score.record)}; to have "
                f"it, score in another run directory with {measure} in score.record"
            )
        if measure == "dispersion_authors" and not self.augmented:
            raise ConfigError(
                f"--measure: {measure} is defined on images as training sees them; score in another run directory with "
                "score.transform=train"
            )
        rows = window.rows(self.n_rows)
        if measure in FROM_VOTES and self.n_rows < self.n_checkpoints:
            raise ConfigError(
                f"--measure: {measure} is of all checkpoints, and {self.n_rows} of {self.n_checkpoints} were scored; "
                "run again in another directory with score.checkpoints=all"
            )
        if not rows:
            raise ConfigError(f"window {str(window)[1:]} selects no checkpoint: there are {self.n_rows}")
        if measure in FROM_VOTES and len(rows) == 1:
            raise ConfigError(f"{measure} of one checkpoint is always 0; take a window of several")
        return rows
