"""The run directory: where everything is, and which stages are complete.

::

    RUN/
      run.yaml            what the run is: pool, classes, seed, resolved constants; written once
      initial.parquet     the first labelled set
      initial-selection.parquet  answers/  waiting.json
                          with label.oracle: files, what people were asked first, what they said, what is waited for
      summary.json        what each finished cycle came to
      events/<attempt>.jsonl   what happened when; for people, no decision reads it
      driver/             who drives the run; see `lease`
      cycles/003/
        cycle.yaml        the resolved configuration of the cycle
        checkpoints/  assignments.zarr  test.zarr  val.zarr  scores.zarr  selection.parquet  labels.parquet
        <stage>.json      the stage is complete: what it was made from, and what it came to
        expected.json     after a repair: the selection that must come out again

Storage is the only truth: a run is resumed from these files alone.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from distal import storage
from distal.artifacts.ledger import Ledger, label_files
from distal.artifacts.selection import Selection
from distal.config import Config, Root, ScoreConfig, from_record
from distal.errors import Damage, RunConflict, Superseded, one_line
from distal.hashing import digest
from distal.records import JsonObject
from distal.storage import Numbered

EXPECTED, ATTEMPTS = "expected.json", "attempts"
STAGES = Config.stages


@dataclass(frozen=True)
class Staged:
    """A folder with the completion markers of stages.

    Attributes:
        folder: where the markers and what they speak of are.
    """

    folder: Path

    def marker(self, stage: str) -> JsonObject | None:
        """The completion marker of a stage; None when it is not complete."""
        try:
            return storage.read_json(self.folder / f"{stage}.json", required=("inputs", "inputs_sha256", "seconds"))
        except FileNotFoundError:
            return None

    def invalidate(self, stage: str) -> None:
        """Remove the completion marker of a stage, before what it speaks of is replaced."""
        (self.folder / f"{stage}.json").unlink(missing_ok=True)

    def expect_again(self, stage: str, sha256: str | None) -> None:
        """Keep which selection a stage made, before its marker goes: made again, it must be the same.

        For the holder of the lease, who looks right before. A writer that is late all the same puts back what its
        marker said: should another selection have been made since, the run stops and names both rather than go on.
        """
        if sha256 is not None:
            try:
                inputs = (self.marker(stage) or {}).get("inputs")
            except Damage:
                inputs = None
            kept = {"inputs": inputs, "selection_sha256": sha256}
            storage.write_json(self.folder / EXPECTED, {**self._expectations(), stage: kept})

    def expected(self, stage: str, inputs: dict[str, str], *, labelled: bool = False) -> str | None:
        """The sha256 that a selection made again must have; None when it may be any.

        Args:
            inputs: what it is made from. From other inputs another selection may come, unless
            labelled: people have labelled what was selected.
        """
        kept = self._expectations().get(stage)
        bound = kept and (labelled or kept["inputs"] in (None, inputs))
        return kept["selection_sha256"] if kept and bound else None

    def _expectations(self) -> JsonObject:
        try:
            return storage.read_json(self.folder / EXPECTED)
        except FileNotFoundError:
            return {}

    def complete(self, stage: str, inputs: dict[str, str], outputs: JsonObject, seconds: float) -> JsonObject:
        """Write the completion marker of a stage."""
        marker = {
            "inputs": inputs,
            "inputs_sha256": digest([stage, inputs]),
            "seconds": round(seconds, 3),
            **outputs,
        }
        storage.write_json(self.folder / f"{stage}.json", marker)
        return marker

    def run_stage(self, stage: str, inputs: Callable[[], dict[str, str]], work: Callable[[], JsonObject]) -> JsonObject:
        """Do `work` unless the stage is complete; either way return its marker.

        Args:
            inputs: names and hashes of what the stage is made from. Called after the work, because training
                publishes what scoring reads while both run.
            work: does the stage and returns what to keep in the marker.

        Raises:
            Damage: the stage is complete, and one of its inputs has changed since.
        """
        marker = self.marker(stage)
        if marker is None:
            started = time.monotonic()
            outputs = work()
            return self.complete(stage, inputs(), outputs, time.monotonic() - started)
        now = inputs()
        changed = sorted(name for name in {*now, *marker["inputs"]} if now.get(name) != marker["inputs"].get(name))
        if changed:
            raise Damage(
                f"{self.folder / stage}.json: {', '.join(changed)} changed after this stage was completed; "
                "put back what was there, or start another run directory"
            )
        return marker


@dataclass(frozen=True)
class Analysis(Staged):
    """What was computed again from the assignments of a cycle: `analyses/<measure><window>`."""

    @property
    def scores(self) -> Path:
        """The scores by one measure."""
        return self.folder / "scores.zarr"

    def selection(self, budget: int) -> Path:
        """The samples chosen with a budget."""
        return self.folder / f"selection-{budget}.parquet"

    def selection_of(self, stage: str) -> Path:
        """What the stage `select-<budget>` chose."""
        return self.selection(int(stage.removeprefix("select-")))

    def selections(self) -> list[str]:
        """The stages that selected: `select-<budget>`."""
        names = storage.names_in(self.folder)
        return [name.removesuffix(".json") for name in names if re.fullmatch(r"select-\d+\.json", name)]


@dataclass(frozen=True)
class Cycle(Staged):
    """One cycle's folder, `cycles/<index>`; the index counts from 0."""

    @property
    def index(self) -> int:
        """Its number, from 0."""
        return int(self.folder.name)

    @property
    def checkpoints(self) -> Path:
        """Folder of the published weights: that of the last attempt at training."""
        return self._of_attempt("checkpoints", self._attempts.last() or 0)

    @property
    def assignments(self) -> Path:
        """Assignments of the pool at every checkpoint of the last attempt at training."""
        return self._of_attempt("assignments", self._assignments_of(self._attempts.last()), ".zarr")

    def published_to(self) -> list[Path]:
        """The folders that the attempts at training published to, the latest first."""
        return [self._of_attempt("checkpoints", number) for number in reversed(self._attempts.numbers())]

    def earlier_assignments(self) -> list[Path]:
        """Those of earlier attempts, the latest first."""
        numbers = sorted({self._assignments_of(number) for number in self._attempts.numbers()}, reverse=True)
        return [self._of_attempt("assignments", number, ".zarr") for number in numbers[1:]]

    def begin_attempt(self, still_ours: Callable[[], None] = lambda: None) -> Path:
        """Make a folder for the checkpoints of a training script that is started, and return it.

        Each start has a folder of its own: what an earlier one still writes stays out of it. Unless the cycle has been
        scored, it has assignments of its own, too, for the same reason. `cycle.checkpoints` and `cycle.assignments` are
        those of the last attempt from here on.

        Attempts are numbered records. The number is chosen before the lease is checked, see `Numbered.append`, so a
        driver that was paused finds it taken, checks again, and stops.

        Args:
            still_ours: raises when another driver has the run.
        """

        def content(last: int | None) -> JsonObject:
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
        return Numbered(self.folder / "train" / ATTEMPTS, digits=5, suffix=".json")

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
        """What was decided at each barrier, `<row>.json`; see `score.eliminate`.

        It follows from the assignments and has their name, so that it goes when all `assignments.zarr*` are removed.
        """
        return self.assignments.with_name(f"{self.assignments.name}.elimination")

    def remaining(self, n_rows: int) -> tuple[int, ...] | None:
        """Of each block, how many samples were scored at the last of `n_rows` rows; None when nothing was left out."""
        before = [name for name in storage.names_in(self.elimination) if int(name.removesuffix(".json")) < n_rows]
        if not before:
            return None
        return tuple(storage.read_json(self.elimination / before[-1], required=("remaining",))["remaining"])

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
        """What the oracle answered."""
        return self.folder / "labels.parquet"

    @cached_property
    def config(self) -> Config | ScoreConfig | None:
        """The resolved configuration the cycle began with; None when it has not begun."""
        try:
            record = storage.read_yaml(self.folder / "cycle.yaml")
        except FileNotFoundError:
            return None
        try:
            return from_record(record)
        except ValueError as error:
            raise Damage(
                f"{self.folder / 'cycle.yaml'}: not the configuration of a cycle ({one_line(error)[:300]})"
            ) from error

    def begin(self, config: Root) -> None:
        """Write `cycle.yaml`; from here on the configuration of this cycle is fixed."""
        if not storage.create_yaml(self.folder / "cycle.yaml", config.to_record()):
            raise Superseded(f"{self.folder}: another driver has begun this cycle meanwhile; this one stops")
        vars(self).pop("config", None)  # it was None until now

    def analysis(self, name: str) -> Analysis:
        """A later `reduce` or `select`; the cycle's own record is never overwritten."""
        return Analysis(self.folder / "analyses" / name)

    def analyses(self) -> list[Analysis]:
        """All of them."""
        return [self.analysis(name) for name in storage.names_in(self.folder / "analyses")]

    @property
    def foreign(self) -> Path:
        """The indices of checkpoints that something else writes."""
        return self.folder / "checkpoints.json"

    def evaluation(self) -> JsonObject:
        """What the labels of the cycle are, and what its last checkpoint came to; None where that is not known yet.

        It was trained on `n_labeled` samples, `n_val` more are labelled to validate on, and `n_paid` are both. `test`
        and `val` have a value for each of `eval.metrics`, or are None; `undefined` tells why a value is None.
        """
        train, test = self.marker("train") or {}, self.marker("test") or {}
        n_labeled, n_val = train.get("n_labeled"), test.get("n_val")
        return {
            "n_labeled": n_labeled,
            "n_val": n_val,
            "n_paid": None if n_labeled is None or n_val is None else n_labeled + n_val,
            "test": test.get("test"),
            "val": test.get("val"),
            "undefined": test.get("undefined", {}),
        }

    def took_all(self) -> bool:
        """Whether the cycle selected everything that was left, so that there is no next one."""
        scored, selected = self.marker("score"), self.marker("select")
        return bool(scored and selected and scored["n_eligible"] == selected["n_selected"])

    def chosen(self) -> Selection:
        """The selection of the cycle, which must be complete.

        Raises:
            Damage: the file is missing, or is not the selection that was made.
        """
        selection = Selection.read(self.selection)
        marker = self.marker("select")
        if marker is None or selection.sha256 != marker["selection_sha256"]:
            raise Damage(f"{self.selection}: not the selection that was made; put the old file back")
        return selection


class Run:
    """A run directory.

    Attributes:
        path: the directory.
        attempt: names this process's attempt; part of the names of its actors and of its event file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self._identity: JsonObject | None = None
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
    def identity(self) -> JsonObject | None:
        """What `run.yaml` says; None while the run has not begun, which another driver may do at any time."""
        if self._identity is None:
            with suppress(FileNotFoundError):
                self._identity = storage.read_yaml(self.path / "run.yaml", required=("fixed", "constants"))
        return self._identity

    def check(self, fixed: JsonObject) -> None:
        """Refuse to be continued as another run.

        Args:
            fixed: keys and hashes that must be the same for as long as the run exists.

        Raises:
            RunConflict: the run was begun with something else, or the folder holds something else.
        """
        self.require_own_folder()
        if self.identity is None:
            return
        for name, value in fixed.items():
            kept = self.identity["fixed"].get(name)
            if kept != value:
                raise RunConflict(
                    f"{name}: {_short(kept)} -> {_short(value)}: it is part of what the run in {self.path} is; "
                    "give another run directory (run=...)"
                )

    def require_own_folder(self) -> None:
        """Raise RunConflict when the folder holds something else than a run."""
        ours = ("events", "driver", "run.yaml")
        foreign = [name for name in storage.names_in(self.path) if name not in ours]
        if foreign and self.identity is None:  # asked last: who begins a run writes `run.yaml` first
            raise RunConflict(f"{self.path}: not an empty folder and not a run (it holds {foreign[0]})")

    def begin(self, fixed: JsonObject, constants: JsonObject) -> None:
        """Write `run.yaml`, unless the run has begun.

        Args:
            constants: what each `auto` came to.
        """
        self.check(fixed)
        if self.identity is None:
            began = storage.create_yaml(self.path / "run.yaml", {"fixed": fixed, "constants": constants})
            if not began:  # with values of its own for each `auto`
                raise Superseded(f"{self.path}: another driver has begun this run meanwhile; this one stops")

    def is_complete(self, n_cycles: int) -> bool:
        """Whether nothing is left to do, told from storage alone."""
        begun = self.begun_cycles()[:n_cycles]
        if begun and isinstance(begun[-1].config, ScoreConfig):
            return begun[-1].marker("score") is not None
        if not begun:
            return False
        last = begun[-1]
        labelled = last.index + 1 < n_cycles
        if labelled and not last.took_all():
            return False
        due = [(cycle, stage) for cycle in begun for stage in STAGES if labelled or (cycle, stage) != (last, "label")]
        return all(cycle.marker(stage) is not None for cycle, stage in due)

    def sweep(self) -> None:
        """Remove the temporary files that killed processes left in the last cycle. For the driver alone."""
        for cycle in self.begun_cycles()[-1:]:
            storage.sweep(cycle.folder)

    def check_answers(self) -> None:
        """Look at what people take from a finished run: what is labelled, and what was selected.

        Raises:
            Damage: one of these files is missing, or is not what was written.
        """
        for cycle in self.begun_cycles():
            trained = cycle.marker("train")
            if trained is not None and trained["inputs"].get("ledger") != self.ledger(before=cycle.index).sha256:
                raise Damage(f"{self.path}: a label file is not the one that cycle {cycle.index} was trained with")
            if cycle.marker("select") is not None:
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
        """What annotators said, as it came."""
        return self.path / "answers"

    @property
    def waiting(self) -> Path:
        """What people have been asked for last."""
        return self.path / "waiting.json"

    def asked(self) -> set[int]:
        """Every sample that a batch asked labels for."""
        files = [self.initial_selection] if self.initial_selection.exists() else []
        files += [cycle.selection for cycle in self.begun_cycles() if cycle.marker("select")]
        return {index for file in files for index in Selection.read(file).indices.tolist()}

    def cycle(self, index: int) -> Cycle:
        """A cycle, begun or not."""
        return Cycle(self.path / "cycles" / f"{index:03d}")

    def begun_cycles(self) -> list[Cycle]:
        """The cycles that have a `cycle.yaml`, in order."""
        return [cycle for cycle in self.cycles() if cycle.config is not None]

    def cycles(self) -> list[Cycle]:
        """The folders of cycles, begun or not, in order."""
        return [self.cycle(index) for index in Numbered(self.path / "cycles", digits=3).numbers()]

    def label_files(self, before: int) -> list[Path]:
        """The files that make up the ledger at the start of cycle `before`."""
        later = [file for index in range(before) for file in label_files(self.cycle(index).folder)]
        return [self.initial, *later]

    def ledger(self, before: int) -> Ledger:
        """What is labelled at the start of cycle `before`."""
        return Ledger.read(self.label_files(before))

    def summary(self) -> JsonObject:
        """What each cycle with a selection came to, from the markers."""
        needed = ("train", "score", "select")
        return {"cycles": [_summarize(cycle) for cycle in self.begun_cycles() if all(map(cycle.marker, needed))]}

    def write_summary(self) -> JsonObject:
        """Write `summary.json` and return it."""
        summary = self.summary()
        storage.write_json(self.path / "summary.json", summary)
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


def _summarize(cycle: Cycle) -> JsonObject:
    markers = {stage: cycle.marker(stage) or {} for stage in STAGES}
    return {
        "cycle": cycle.index,
        **cycle.evaluation(),
        "seconds": {stage: marker["seconds"] for stage, marker in markers.items() if marker},
        "images_scored": markers["score"]["images_scored"],
        "left_out": markers["score"]["left_out"],
        "n_selected": markers["select"]["n_selected"],
        "tie_share": markers["select"]["tie_share"],
        "selection_sha256": markers["select"]["selection_sha256"],
    }


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
