"""The run directory: where everything is, and which stages are complete.

::

    RUN/
      run.yaml            pool, classes, seed, the value of each `auto`; written once
      initial.parquet     the first labelled set
      initial-selection.parquet  answers/  waiting.json
                          with label.oracle: files, the first batch that people were asked for, their
                          answers, and the batch that the run waits for
      summary.json        the figures of each finished cycle
      events/<attempt>.jsonl   the log, for people; no decision reads it
      driver/             who drives the run; see `lease`
      cycles/003/         see `cycles`

Storage is the only truth: a run is resumed from these files alone.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from distal import storage
from distal.artifacts.cycles import Cycle, Evaluation
from distal.artifacts.ledger import Ledger, label_files
from distal.artifacts.selection import Selection
from distal.config import Config
from distal.errors import Damage, RunConflict, Superseded, shown
from distal.records import JsonObject, Result
from distal.storage import Numbered


@dataclass(frozen=True)
class Identity:
    """`run.yaml`: what must stay the same for as long as the run exists.

    Attributes:
        fixed: keys of the configuration, and hashes of the pools.
        constants: the value of each `auto`.
    """

    fixed: dict[str, Any]
    constants: dict[str, Any]


@dataclass(frozen=True)
class CycleSummary(Evaluation):
    """The figures of a cycle that has selected.

    Attributes:
        seconds: of each stage.
        images_scored: predictions.
        left_out: predictions that elimination saved.
        tie_share: of the batch, the share that a tie-break decided.
    """

    seconds: dict[str, float]
    images_scored: int
    left_out: int
    n_selected: int
    tie_share: float
    selection_sha256: str


@dataclass(frozen=True)
class RunSummary(Result):
    """`summary.json`: the cycles that have selected."""

    cycles: tuple[CycleSummary, ...]


class Run:
    """A run directory.

    Attributes:
        path: the directory.
        attempt: names this process's attempt; part of the names of its actors and of its event file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self._identity: Identity | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing run.

        Raises:
            RunConflict: there is no run.
        """
        run = cls(Path(path).absolute())
        if run.identity is None:
            raise RunConflict(f"{path}: no run here (run.yaml is missing); start one with `distal run CONFIG`")
        return run

    @property
    def identity(self) -> Identity | None:
        """The contents of `run.yaml`; None while no driver, this one or another, has begun the run."""
        if self._identity is None:
            path = self.path / "run.yaml"
            with suppress(FileNotFoundError):
                record = storage.read_yaml(path, required=("fixed", "constants"))
                # Not through JSON, as markers are: keys of `model.args` may be numbers, and paths any bytes.
                self._identity = Identity(*(_mapping(path, record, key) for key in ("fixed", "constants")))
        return self._identity

    def check(self, fixed: Mapping[str, Any]) -> None:
        """Refuse to continue this run as another one.

        Args:
            fixed: see `Identity`.

        Raises:
            RunConflict: the run began with another value, or the folder holds something else.
        """
        self.require_own_folder()
        if self.identity is None:
            return
        for name, value in fixed.items():
            kept = self.identity.fixed.get(name)
            if kept != value:
                raise RunConflict(
                    f"{name}: {shown(kept)} -> {shown(value)}: it is part of what the run in "
                    f"{self.path} is; give another run directory (run=...)"
                )

    def require_own_folder(self) -> None:
        """Raise RunConflict when the folder holds something else than a run."""
        ours = ("events", "driver", "run.yaml")
        foreign = [name for name in storage.names_in(self.path) if name not in ours]
        if foreign and self.identity is None:  # asked last: who begins a run writes `run.yaml` first
            raise RunConflict(f"{self.path}: not an empty folder and not a run (it holds {foreign[0]})")

    def begin(self, fixed: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        """Write `run.yaml`, unless the run has begun. Arguments as of `Identity`."""
        self.check(fixed)
        if self.identity is None:
            record = {"fixed": dict(fixed), "constants": dict(constants)}
            if not storage.create_yaml(self.path / "run.yaml", record):  # its `auto`s may differ
                raise Superseded(f"{self.path}: another driver has begun this run meanwhile; this one stops")

    def is_complete(self, n_cycles: int) -> bool:
        """Whether no stage is due, by the markers alone."""
        begun = self.begun_cycles()[:n_cycles]
        if not begun:
            return False
        last = begun[-1]
        stages = last.config.stages
        if not last.config.trains:
            return all(map(last.is_complete, stages))
        labelled = last.index + 1 < n_cycles
        if labelled and not last.took_all():
            return False
        return all(
            cycle.is_complete(stage)
            for cycle in begun
            for stage in stages
            if labelled or (cycle, stage) != (last, "label")  # the last cycle does not label
        )

    def sweep(self) -> None:
        """Remove the temporary files that killed processes left in the last cycle. For the driver alone."""
        for cycle in self.begun_cycles()[-1:]:
            storage.sweep(cycle.folder)

    def check_answers(self) -> None:
        """Check the files that people take from a finished run: labels and selections.

        Raises:
            Damage: one of these files is missing, or its content has changed.
        """
        for cycle in self.begun_cycles():
            trained = cycle.marker("train")
            kept = trained.inputs.get("ledger") if trained else None
            if trained and kept != self.ledger(before=cycle.index).sha256:
                raise Damage(f"{self.path}: cycle {cycle.index} was trained with another label file than is here")
            if cycle.is_complete("select"):
                cycle.chosen()

    @property
    def initial(self) -> Path:
        """The first labelled set."""
        return self.path / "initial.parquet"

    @property
    def initial_selection(self) -> Path:
        """The samples to start from, when people label them."""
        return self.path / "initial-selection.parquet"

    @property
    def answers(self) -> Path:
        """The answers of annotators, file by file as they were imported."""
        return self.path / "answers"

    @property
    def waiting(self) -> Path:
        """The batch that people were asked for last."""
        return self.path / "waiting.json"

    def asked(self) -> set[int]:
        """Every sample that a batch asked labels for."""
        files = [self.initial_selection] if self.initial_selection.exists() else []
        files += [cycle.selection for cycle in self.begun_cycles() if cycle.is_complete("select")]
        return {index for file in files for index in Selection.read(file).indices.tolist()}

    def cycle(self, index: int) -> Cycle:
        """A cycle, begun or not."""
        return Cycle(self.path / "cycles" / f"{index:03d}")

    def begun_cycles(self) -> list[Cycle]:
        """The cycles that have a `cycle.yaml`, in order. Raises Damage when one of these files is damaged."""
        return [cycle for cycle in self.cycles() if cycle.begun and cycle.config]

    def cycles(self) -> list[Cycle]:
        """The folders of cycles, begun or not, in order."""
        return [self.cycle(index) for index in Numbered(self.path / "cycles", digits=3).numbers()]

    def label_files(self, before: int) -> list[Path]:
        """The files that make up the ledger at the start of cycle `before`."""
        later = [file for index in range(before) for file in label_files(self.cycle(index).folder)]
        return [self.initial, *later]

    def ledger(self, before: int) -> Ledger:
        """The labelled samples at the start of cycle `before`."""
        return Ledger.read(self.label_files(before))

    def summary(self) -> RunSummary:
        """The figures of each cycle that has selected, from its markers."""
        cycles = (_summarize(cycle) for cycle in self.begun_cycles())
        return RunSummary(tuple(summary for summary in cycles if summary is not None))

    def write_summary(self) -> RunSummary:
        """Write `summary.json` and return it."""
        summary = self.summary()
        storage.write_json(self.path / "summary.json", summary.to_record())
        return summary

    def event(self, name: str, **values: Any) -> JsonObject:
        """Add a line to this attempt's event file, and return it. A log grows: it is the one file appended to."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **values}
        line = json.dumps(record)
        with self._lock, storage.disk_errors(self.path):
            folder = self.path / "events"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{self.attempt}.jsonl").open("a") as log:
                log.write(line + "\n")
        return record

    def new_events(self, read: dict[str, int]) -> Iterator[JsonObject]:
        """What all attempts have logged, attempt by attempt.

        Args:
            read: how many bytes of each file are known already; brought up to date.
        """
        for name in storage.names_in(self.path / "events"):
            with (self.path / "events" / name).open("rb") as log:
                log.seek(read.get(name, 0))
                lines, end, _ = log.read().rpartition(b"\n")  # the last one may be cut off
            read[name] = read.get(name, 0) + len(lines) + len(end)
            for line in lines.splitlines():
                with suppress(ValueError):  # of a full disk; no decision reads a log
                    yield json.loads(line)


def _mapping(path: Path, record: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(record[key], dict):
        raise Damage(f"{path}: {key}: not a mapping")
    return dict(record[key])


def _summarize(cycle: Cycle) -> CycleSummary | None:
    markers = [(stage, cycle.marker(stage)) for stage in Config.stages]
    scored, selected = cycle.marker("score"), cycle.marker("select")
    if not cycle.is_complete("train") or scored is None or selected is None:
        return None
    return CycleSummary(
        **vars(cycle.evaluation()),
        seconds={stage: marker.seconds for stage, marker in markers if marker is not None},
        images_scored=scored.outputs.images_scored,
        left_out=scored.outputs.left_out,
        n_selected=selected.outputs.n_selected,
        tie_share=selected.outputs.tie_share,
        selection_sha256=selected.outputs.selection_sha256,
    )
