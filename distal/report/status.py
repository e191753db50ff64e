"""How far a run is, from storage alone: no Ray, and nothing is loaded."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle, Evaluation
from distal.artifacts.lease import EXPIRY_S, latest, lease_path
from distal.artifacts.runs import Run
from distal.labels.waiting import Waiting, WaitingResult
from distal.progress import spoken
from distal.records import OPTIONAL, Result, Stage
from distal.train.folder import known

RATE_WINDOW_S = 60.0
STOPPED = 3  # exit code of `distal status --watch` when the driver has stopped


@dataclass(frozen=True)
class Driver(Result):
    """The process that drives a run, or drove it last.

    Attributes:
        seen: whether its process can be looked up from here.
        at_work: whether it lives; where it cannot be seen, whether its beat is younger than `EXPIRY_S`.
        silent_s: seconds since its last beat, by the clock of this machine.
    """

    attempt: str
    host: str
    pid: int
    beat: int
    seen: bool
    at_work: bool
    silent_s: float


@dataclass(frozen=True)
class CycleStatus(Evaluation):
    """How far a cycle is.

    Attributes:
        complete: its stages that are complete.
        next: the first one that is not; None when none is due.
        checkpoints: that there will be, as far as is known.
    """

    complete: list[Stage]
    next: Stage | None
    checkpoints_published: int
    checkpoints: int
    blocks_scored: int
    blocks: int
    selection_sha256: str | None


@dataclass(frozen=True)
class Status(Result):
    """How far a run is.

    Attributes:
        state: "complete" when no stage is due in the cycles that the configuration of the last one
            asks for; else "running" while a driver is at work, "waiting_for_labels", "stopped" when
            the last driver has ended or gives no sign of life, and "unfinished" without a driver.
        driver: None when nobody ever drove it.
        waiting: the batch that people were asked for last; None when nothing is open.
        cycles: that have begun.
        exit_code: of `distal status --watch`, when the driver has stopped.
    """

    run: Path
    state: str
    driver: Driver | None
    waiting: WaitingResult | None
    cycles: list[CycleStatus]
    exit_code: int | None = field(default=None, metadata=OPTIONAL)


def status(path: Path) -> Status:
    """The state of every cycle that has begun; raises RunConflict when there is no run."""
    run = Run.open(path)
    begun = run.begun_cycles()
    n_cycles = begun[-1].config.n_cycles if begun else 0
    waiting, driver = Waiting.read(run), _driver(run.path)
    waits = waiting is not None and waiting.remade(run) is None
    return Status(
        run=run.path,
        state="complete" if run.is_complete(n_cycles) else _state(driver, waits=waits),
        driver=driver,
        waiting=waiting.report(run) if waiting else None,
        cycles=[_cycle(cycle, last=cycle.index + 1 >= n_cycles) for cycle in begun],
    )


def _driver(run: Path) -> Driver | None:
    number, holder = latest(run)
    if holder is None:
        return None
    silent_s = 0.0
    with suppress(FileNotFoundError):
        silent_s = max(0.0, time.time() - lease_path(run, number).stat().st_mtime)
    lives = False if holder.released else holder.lives()
    return Driver(
        attempt=holder.attempt,
        host=holder.host,
        pid=holder.pid,
        beat=holder.beat,
        seen=lives is not None,
        at_work=silent_s < EXPIRY_S if lives is None else lives,
        silent_s=round(silent_s, 1),
    )


def _state(driver: Driver | None, *, waits: bool) -> str:
    """The state of a run that is not complete."""
    if driver is not None and driver.at_work:
        return "running"
    return "waiting_for_labels" if waits else "stopped" if driver is not None else "unfinished"


def _cycle(cycle: Cycle, last: bool) -> CycleStatus:
    complete = [stage for stage in cycle.config.stages if cycle.is_complete(stage)]
    selected = cycle.marker("select")
    done = total = 0
    if Assignments.begun(cycle.assignments):
        assignments = Assignments.open(cycle.assignments)
        done = sum(len(assignments.committed(row)) for row in range(assignments.n_rows))
        total = _n_rows(cycle, assignments) * len(assignments.blocks)
    return CycleStatus(
        **vars(cycle.evaluation()),
        complete=complete,
        next=next((stage for stage in _due(cycle, last) if stage not in complete), None),
        checkpoints_published=_n_published(cycle),
        checkpoints=_n_checkpoints(cycle),
        blocks_scored=done,
        blocks=total,
        selection_sha256=selected.outputs.selection_sha256 if selected else None,
    )


def _due(cycle: Cycle, last: bool) -> list[Stage]:
    """The stages of a cycle, in order."""
    # The last cycle does not label.
    return [stage for stage in cycle.config.stages if not (last and stage == "label")]


def _n_published(cycle: Cycle) -> int:
    if cycle.config.trains:
        return len(checkpoints.committed(cycle.checkpoints))
    return sum(entry.index is not None for entry in known(cycle.folder_checkpoints))


def _n_checkpoints(cycle: Cycle) -> int:
    """Checkpoints that there will be, as far as is known."""
    return cycle.config.n_checkpoints or _n_published(cycle)


def _n_rows(cycle: Cycle, assignments: Assignments) -> int:
    """Checkpoints that are scored; for a folder that grows the assignments have spare rows."""
    return assignments.n_rows if cycle.config.trains else _n_checkpoints(cycle)


@dataclass(frozen=True)
class Figures:
    """How far the scoring of a cycle is, over all its checkpoints.

    Attributes:
        checkpoints: that there will be; of those `published`, and `scored` for every sample.
        images_per_s: over the last minute of looks; None where unknown.
        seconds_left: at that rate.
    """

    published: int = 0
    scored: int = 0
    checkpoints: int = 0
    blocks_scored: int = 0
    blocks: int = 0
    images_scored: int = 0
    images: int = 0
    images_per_s: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class Look(Figures):
    """One look of a `Watch`.

    Attributes:
        cycle: the last one that has begun; None while none has, and all its figures are 0.
        stage: that is at work.
        state, driver: as in `Status`, but clocks of two machines are not compared: a driver of
            another machine is at work while its beat goes on from look to look.
        faults: of each kind, since the run began.
        new_faults: since the last look, in words.
    """

    run: Path
    cycle: int | None
    stage: str
    driver: Driver | None
    state: str
    faults: dict[str, int]
    new_faults: list[str]


def watch(path: Path, show: Callable[[Look], None], interval: float = 2.0) -> Status:
    """Look at a run until it is complete or its driver has stopped; return its `status`.

    Args:
        show: called with every `Watch.look`.
        interval: seconds between two looks.

    Raises:
        RunConflict: there is no run.
    """
    watching = Watch(path)
    while True:
        look = watching.look()
        show(look)
        if look.state == "complete":
            return status(path)
        if look.state == "stopped":
            return replace(status(path), state="stopped", exit_code=STOPPED)
        time.sleep(interval)


class Watch:
    """Looks at a run again and again.

    A look reads only files that can have changed: the last cycle, its rows that are not complete,
    the end of the events.

    Args:
        clock: returns seconds.

    Raises:
        RunConflict: there is no run.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = Run.open(path)
        self._clock = clock
        self._rows: _Rows | None = None
        self._heard: tuple[object, float] = (None, 0.0)  # the last new beat of a driver elsewhere, and when
        self._read: dict[str, int] = {}  # bytes of each event file
        self._faults: Counter[str] = Counter()

    def look(self) -> Look:
        """How far the last cycle is."""
        driver = self._driver()
        cycle, figures, stage, complete = self._last_cycle(), Figures(), "begin", False
        if cycle is not None:
            if self._rows is None or self._rows.cycle is not cycle or self._rows.path != cycle.assignments:
                self._rows = _Rows(cycle)
            figures = self._rows.look(self._clock())
            n_cycles = cycle.config.n_cycles
            due = _due(cycle, last=cycle.index + 1 >= n_cycles)
            open_ = next((each for each in due if not cycle.is_complete(each)), None)
            stage = "train + score" if open_ == "train" else open_ or "done"
            complete = open_ is None and self._run.is_complete(n_cycles)
        waits = stage in ("begin", "label") and Waiting.read(self._run) is not None
        events = [(event["event"], spoken(event)) for event in self._run.new_events(self._read)]
        faults = [(name, line) for name, line in events if line is not None]
        self._faults.update(name for name, _ in faults)
        return Look(
            run=self._run.path,
            cycle=cycle.index if cycle else None,
            stage=stage,
            driver=driver,
            **vars(figures),
            state="complete" if complete else _state(driver, waits=waits),
            faults=dict(self._faults),
            new_faults=[line for _, line in faults],
        )

    def _driver(self) -> Driver | None:
        driver = _driver(self._run.path)
        if driver is None or driver.seen:
            return driver
        key = driver.attempt, driver.beat
        if key != self._heard[0]:
            self._heard = key, self._clock()
        return replace(driver, at_work=self._clock() - self._heard[1] < EXPIRY_S)

    def _last_cycle(self) -> Cycle | None:
        """The last one that has begun; always the same object, which keeps its configuration."""
        for cycle in reversed(self._run.cycles()):
            if self._rows is not None and self._rows.cycle.index == cycle.index:
                return self._rows.cycle
            if cycle.begun:
                return cycle
        return None


class _Rows:
    """Counts the assignments of a cycle by listing folders; rows that are complete stay so."""

    def __init__(self, cycle: Cycle) -> None:
        self.cycle = cycle
        self.path = cycle.assignments  # changes when a training script starts again
        self._assignments: Assignments | None = None
        self._eligible: Sequence[int] = ()  # samples per block
        self._n_published = 0
        self._counts: dict[int, Sequence[int]] = {}  # of each row that is begun: samples per block,
        self._images: dict[int, int] = {}  # and in all
        self._complete: set[int] = set()
        self._seen: deque[tuple[float, int]] = deque()  # time, and images at that time

    def look(self, now: float) -> Figures:
        n_checkpoints = self._count_checkpoints()
        if self._assignments is None and not self._open():
            return Figures(published=self._n_published, checkpoints=n_checkpoints)
        assert self._assignments is not None
        n_rows = _n_rows(self.cycle, self._assignments)
        first = n_checkpoints - n_rows  # the checkpoint of row 0: not every selection needs all of them
        n_blocks = len(self._eligible)
        blocks = n_blocks * len(self._complete)
        images = sum(self._images[row] for row in self._complete)
        for row in range(min(self._n_published - first, n_rows)):
            if row in self._complete:
                continue
            there = self._assignments.committed(row)
            if there and row not in self._counts:  # elimination decides before a row is begun
                self._counts[row] = self.cycle.remaining(row + 1) or self._eligible
                self._images[row] = sum(self._counts[row])
            blocks += len(there)
            images += sum(self._counts[row][block] for block in there)
            if len(there) == n_blocks:
                self._complete.add(row)
        last = self._images[max(self._images)] if self._images else sum(self._eligible)
        total = sum(self._images.get(row, last) for row in range(n_rows))
        rate = self._rate(now, images)
        return Figures(
            published=self._n_published,
            scored=len(self._complete),
            checkpoints=n_checkpoints,
            blocks_scored=blocks,
            blocks=n_rows * n_blocks,
            images_scored=images,
            images=total,
            images_per_s=rate,
            seconds_left=(total - images) / rate if rate else None,
        )

    def _count_checkpoints(self) -> int:
        """Count the published ones; returns how many there will be."""
        if self.cycle.config.trains:
            while checkpoints.is_committed(self.cycle.checkpoints, self._n_published):
                self._n_published += 1
        else:
            self._n_published = _n_published(self.cycle)
        return _n_checkpoints(self.cycle)

    def _open(self) -> bool:
        if not Assignments.begun(self.cycle.assignments):
            return False
        self._assignments = assignments = Assignments.open(self.cycle.assignments)
        self._eligible = [int(assignments.eligible(b.start, b.stop).sum()) for b in assignments.blocks]
        return True

    def _rate(self, now: float, images: int) -> float | None:
        """Images per second since the first look of the last minute; None at the first look."""
        self._seen.append((now, images))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0]
        return (images - before) / (now - since) if now > since else None
