"""A cycle's folder, and what was computed again from it: where everything is.

::

    RUN/cycles/003/
      cycle.yaml        the resolved configuration of the cycle
      checkpoints/  assignments.zarr  test.zarr  val.zarr  scores.zarr  selection.parquet  labels.parquet
      <stage>.json      the completion marker of a stage; see `stages`
      analyses/<measure><window>/    a later `reduce` or `select`
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from distal import storage
from distal.artifacts.selection import Selection
from distal.artifacts.stages import (
    AnalysisOutputs,
    EvaluationOutputs,
    FolderScoreOutputs,
    LabelOutputs,
    Marker,
    ReduceOutputs,
    ScoreOutputs,
    SelectOutputs,
    Staged,
    TrainOutputs,
)
from distal.config import Config, Root, ScoreConfig, from_record
from distal.errors import Damage, Superseded, one_line
from distal.records import Result, Stage
from distal.storage import Numbered

_ATTEMPTS = "attempts"
_OUTPUTS: dict[Stage, type[Result]] = {
    "train": TrainOutputs,
    "score": ScoreOutputs,
    "test": EvaluationOutputs,
    "reduce": ReduceOutputs,
    "select": SelectOutputs,
    "label": LabelOutputs,
}


@dataclass(frozen=True)
class Evaluation(Result):
    """The labels of a cycle, and how well its last checkpoint does; None where that is not known yet.

    Attributes:
        n_labeled: samples that it was trained on.
        n_val: more that are labelled to validate on.
        n_paid: both.
        test, val: a value for each of `eval.metrics`.
        undefined: the reason for each value that is None.
    """

    cycle: int
    n_labeled: int | None
    n_val: int | None
    n_paid: int | None
    test: dict[str, float | None] | None
    val: dict[str, float | None] | None
    undefined: dict[str, str]


@dataclass(frozen=True)
class Analysis(Staged):
    """A measure computed again from the assignments of a cycle: `analyses/<measure><window>`."""

    @property
    def reduced(self) -> Marker[AnalysisOutputs] | None:
        """The completion marker of `reduce`; None when it is not complete."""
        return self.read_marker("reduce", AnalysisOutputs)

    def selected(self, stage: str) -> Marker[SelectOutputs] | None:
        """The completion marker of a stage `select-<budget>`; None when it is not complete."""
        return self.read_marker(stage, SelectOutputs)

    @property
    def scores(self) -> Path:
        """The scores by one measure."""
        return self.folder / "scores.zarr"

    def selection(self, budget: int) -> Path:
        """The samples chosen with a budget."""
        return self.folder / f"selection-{budget}.parquet"

    def selection_of(self, stage: str) -> Path:
        """The file of the stage `select-<budget>`."""
        return self.selection(int(stage.removeprefix("select-")))

    def selections(self) -> list[str]:
        """The stages that selected: `select-<budget>`."""
        names = storage.names_in(self.folder)
        markers = [name for name in names if re.fullmatch(r"select-\d+\.json", name)]
        return [name.removesuffix(".json") for name in markers]


@dataclass(frozen=True)
class Cycle(Staged):
    """One cycle's folder, `cycles/<index>`; the index counts from 0."""

    @property
    def index(self) -> int:
        """Its number, from 0."""
        return int(self.folder.name)

    @overload
    def marker(self, stage: Literal["train"]) -> Marker[TrainOutputs] | None: ...
    @overload
    def marker(self, stage: Literal["score"]) -> Marker[ScoreOutputs] | None: ...
    @overload
    def marker(self, stage: Literal["test"]) -> Marker[EvaluationOutputs] | None: ...
    @overload
    def marker(self, stage: Literal["reduce"]) -> Marker[ReduceOutputs] | None: ...
    @overload
    def marker(self, stage: Literal["select"]) -> Marker[SelectOutputs] | None: ...
    @overload
    def marker(self, stage: Literal["label"]) -> Marker[LabelOutputs] | None: ...
    def marker(self, stage: Stage) -> Marker[Result] | None:
        """The completion marker of a stage; None when it is not complete."""
        return self.read_marker(stage, _OUTPUTS[stage])

    @property
    def scored_folder(self) -> Marker[FolderScoreOutputs] | None:
        """The completion marker of scoring that `distal score` wrote."""
        return self.read_marker("score", FolderScoreOutputs)

    def run_stage(
        self, stage: Stage, inputs: Callable[[], dict[str, str]], work: Callable[[], Result]
    ) -> Marker[Result]:
        """Do `work` unless the stage is complete; either way return its marker.

        Args:
            inputs: names and hashes of what the stage is made from. Called after the work, because
                training publishes what scoring reads while both run.
            work: does the stage and returns its outputs.

        Raises:
            Damage: the stage is complete, and one of its inputs has changed since.
        """
        marker = self.read_marker(stage, _OUTPUTS[stage])
        if marker is None:
            started = time.monotonic()
            outputs = work()
            return self.complete(stage, inputs(), outputs, time.monotonic() - started)
        now = inputs()
        names = sorted({*now, *marker.inputs})
        changed = [name for name in names if now.get(name) != marker.inputs.get(name)]
        if changed:
            raise Damage(
                f"{self.folder / stage}.json: {', '.join(changed)} changed after this stage was "
                "completed; put back what was there, or start another run directory"
            )
        return marker

    @property
    def checkpoints(self) -> Path:
        """Folder of the weights that the last attempt at training published."""
        return self._of_attempt("checkpoints", self._attempts.last() or 0)

    @property
    def assignments(self) -> Path:
        """Assignments of the pool at every checkpoint of the last attempt at training."""
        return self._of_attempt("assignments", self._assignments_of(self._attempts.last()), ".zarr")

    def published_to(self) -> list[Path]:
        """The folders that attempts at training published to, the latest first."""
        return [self._of_attempt("checkpoints", number) for number in reversed(self._attempts.numbers())]

    def earlier_assignments(self) -> list[Path]:
        """The assignments of earlier attempts at training, the latest first."""
        numbers = sorted({self._assignments_of(number) for number in self._attempts.numbers()}, reverse=True)
        return [self._of_attempt("assignments", number, ".zarr") for number in numbers[1:]]

    def begin_attempt(self, still_ours: Callable[[], None] = lambda: None) -> Path:
        """Make a folder for the checkpoints of a training script that starts, and return it.

        Each start has a folder of its own, which a script of an earlier start cannot write to. For
        the same reason it has assignments of its own, unless the cycle has been scored. From here
        on `cycle.checkpoints` and `cycle.assignments` are those of this attempt.

        Attempts are numbered records. The number is chosen before the lease is checked, see
        `Numbered.append`, so a driver that was paused finds it taken, checks again, and stops.

        Args:
            still_ours: raises when another driver has the run.
        """

        def content(last: int | None) -> dict[str, Any]:
            still_ours()
            if self.marker("score") is None:
                return {"assignments": 0 if last is None else last + 1}
            return {"assignments": self._assignments_of(last)}

        number = self._attempts.append(storage.create_json, content, first=0)
        assert number is not None
        dest = self._of_attempt("checkpoints", number)
        storage.make_folder(dest)
        return dest

    @property
    def _attempts(self) -> Numbered:
        """The attempts at training by a script."""
        return Numbered(self.folder / "train" / _ATTEMPTS, digits=5, suffix=".json")

    def _assignments_of(self, attempt: int | None) -> int:
        """The number of the assignments that an attempt at training is scored into."""
        if attempt is None:
            return 0
        return int(storage.read_json(self._attempts.path(attempt), required=("assignments",))["assignments"])

    def _of_attempt(self, stem: str, number: int, suffix: str = "") -> Path:
        return self.folder / f"{stem}-{number}{suffix}" if number else self.folder / f"{stem}{suffix}"

    def held_out(self, name: str) -> Path:
        """Assignments of the images to evaluate on, `test` or `val`, at the last checkpoint."""
        return self.folder / f"{name}.zarr"

    @property
    def elimination(self) -> Path:
        """The decision at each barrier, `<row>.json`; see `score.eliminate`.

        It follows from the assignments and has their name, so that removing all `assignments.zarr*`
        removes it too.
        """
        return self.assignments.with_name(f"{self.assignments.name}.elimination")

    def remaining(self, n_rows: int) -> tuple[int, ...] | None:
        """Samples of each block that were scored at the last of `n_rows` rows; None: all."""
        names = storage.names_in(self.elimination)
        before = [name for name in names if int(name.removesuffix(".json")) < n_rows]
        if not before:
            return None
        record = storage.read_json(self.elimination / before[-1], required=("remaining",))
        return tuple(record["remaining"])

    @property
    def scores(self) -> Path:
        """One array per measure."""
        return self.folder / "scores.zarr"

    @property
    def selection(self) -> Path:
        """The samples to label."""
        return self.folder / "selection.parquet"

    @property
    def labels(self) -> Path:
        """The answers of the oracle."""
        return self.folder / "labels.parquet"

    @property
    def begun(self) -> bool:
        """Whether its configuration is fixed."""
        return (self.folder / "cycle.yaml").exists()

    @cached_property
    def config(self) -> Config | ScoreConfig:
        """The resolved configuration the cycle began with.

        Raises:
            FileNotFoundError: the cycle has not begun.
            Damage: the file is not the configuration of a cycle.
        """
        path = self.folder / "cycle.yaml"
        record = storage.read_yaml(path)
        try:
            return from_record(record)
        except ValueError as error:
            why = one_line(error)[:300]
            raise Damage(f"{path}: not the configuration of a cycle ({why})") from error

    def begin(self, config: Root) -> None:
        """Write `cycle.yaml`; from here on the configuration of this cycle is fixed."""
        if not storage.create_yaml(self.folder / "cycle.yaml", config.to_record()):
            raise Superseded(f"{self.folder}: another driver has begun this cycle meanwhile; this one stops")

    def analysis(self, name: str) -> Analysis:
        """A later `reduce` or `select`; the cycle's own record is never overwritten."""
        return Analysis(self.folder / "analyses" / name)

    def analyses(self) -> list[Analysis]:
        """All analyses of the cycle."""
        return [self.analysis(name) for name in storage.names_in(self.folder / "analyses")]

    @property
    def folder_checkpoints(self) -> Path:
        """The index of each checkpoint of the folder that `distal score` scores."""
        return self.folder / "checkpoints.json"

    def evaluation(self) -> Evaluation:
        """How many labels the cycle has, and how well its last checkpoint does."""
        trained, tested = self.marker("train"), self.marker("test")
        n_labeled = trained.outputs.n_labeled if trained else None
        n_val = tested.outputs.n_val if tested else None
        return Evaluation(
            cycle=self.index,
            n_labeled=n_labeled,
            n_val=n_val,
            n_paid=None if n_labeled is None or n_val is None else n_labeled + n_val,
            test=tested.outputs.test if tested else None,
            val=tested.outputs.val if tested else None,
            undefined=tested.outputs.undefined if tested else {},
        )

    def took_all(self) -> bool:
        """Whether the cycle selected every remaining sample: it is the last one."""
        scored, selected = self.marker("score"), self.marker("select")
        if scored is None or selected is None:
            return False
        return scored.outputs.n_eligible == selected.outputs.n_selected

    def chosen(self) -> Selection:
        """The selection of the cycle, whose stage `select` must be complete.

        Raises:
            Damage: the file is missing, or is not the selection that was made.
        """
        selection = Selection.read(self.selection)
        marker = self.marker("select")
        if marker is None or selection.sha256 != marker.outputs.selection_sha256:
            raise Damage(f"{self.selection}: not the selection that was made; put the old file back")
        return selection
