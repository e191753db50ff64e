"""How far a run is, told from storage alone: no Ray, nothing is loaded."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.lease import EXPIRY_S, latest, lease_path
from distal.artifacts.runs import STAGES, Cycle, Run
from distal.labels.waiting import Waiting
from distal.progress import spoken
from distal.records import JsonObject
from distal.train.folder import known

RATE_WINDOW_S = 60.0
STOPPED = 3  # exit code of `distal status --watch` when the driver has stopped


def status(path: Path) -> JsonObject:
    """The state of every cycle that has begun; raises RunConflict when there is no run.

    `state` is "complete" when no stage is due in the cycles that the configuration of the last one asks for; else
    "running" while a driver is at work, "waiting_for_labels", "stopped" when the last driver has ended or gives no sign
    of life, and "unfinished" when there never was one. `driver` says who drives, or drove last.
    """
    run = Run.open(path)
    begun = run.begun_cycles()
    n_cycles = _n_cycles(begun[-1]) if begun else 0
    waiting, driver = Waiting.read(run), _driver(run.path)
    waits = waiting is not None and waiting.remade(run) is None
    return {
        "run": str(run.path),
        "state": "complete" if run.is_complete(n_cycles) else _state(driver, waits=waits),
        "driver": driver,
        "waiting": waiting.report(run) if waiting else None,
        "cycles": [_cycle(cycle, last=cycle.index + 1 >= n_cycles) for cycle in begun],
    }


def _driver(run: Path) -> JsonObject | None:
    """Who drives a run, or drove it last; None when nobody ever did.

    Returns:
        `attempt`, `host`, `pid`, `beat`; `at_work`, whether it lives, as its process says where that can be seen from
        here (`seen`), else as its beat was written less than `EXPIRY_S` ago; `silent_s`, the seconds since then by the
        clock of this machine.
    """
    number, holder = latest(run)
    if holder is None:
        return None
    silent_s = 0.0
    with suppress(FileNotFoundError):
        silent_s = max(0.0, time.time() - lease_path(run, number).stat().st_mtime)
    lives = False if holder.released else holder.lives()
    return {
        **{name: getattr(holder, name) for name in ("attempt", "host", "pid", "beat")},
        "seen": lives is not None,
        "at_work": silent_s < EXPIRY_S if lives is None else lives,
        "silent_s": round(silent_s, 1),
    }


def _state(driver: JsonObject | None, *, waits: bool) -> str:
    """The state of a run that is not complete."""
    if driver is not None and driver["at_work"]:
        return "running"
    return "waiting_for_labels" if waits else "stopped" if driver is not None else "unfinished"


def _cycle(cycle: Cycle, last: bool) -> JsonObject:
    assert cycle.config is not None
    markers = {stage: cycle.marker(stage) for stage in STAGES}
    done = total = 0
    if Assignments.begun(cycle.assignments):
        assignments = Assignments.open(cycle.assignments)
        done = sum(len(assignments.committed(row)) for row in range(assignments.n_rows))
        total = _n_rows(cycle, assignments) * len(assignments.blocks)
    return {
        "cycle": cycle.index,
        "complete": [stage for stage, marker in markers.items() if marker],
        "next": next((stage for stage in _due(cycle, last) if not markers[stage]), None),
        "checkpoints_published": _n_published(cycle),
        "checkpoints": _n_checkpoints(cycle),
        "blocks_scored": done,
        "blocks": total,
        **cycle.evaluation(),
        "selection_sha256": (markers["select"] or {}).get("selection_sha256"),
    }


def _due(cycle: Cycle, last: bool) -> Sequence[str]:
    """The stages of a cycle, in order."""
    assert cycle.config is not None
    stages = cycle.config.stages
    return [stage for stage in stages if not (last and stage == "label")]  # the last cycle does not label


def _n_cycles(cycle: Cycle) -> int:
    assert cycle.config is not None
    return cycle.config.n_cycles


def _n_published(cycle: Cycle) -> int:
    assert cycle.config is not None
    if cycle.config.trains:
        return len(checkpoints.committed(cycle.checkpoints))
    return sum(entry.index is not None for entry in known(cycle.foreign))


def _n_checkpoints(cycle: Cycle) -> int:
    """How many there will be, as far as is known."""
    assert cycle.config is not None
    return cycle.config.n_checkpoints or _n_published(cycle)


def _n_rows(cycle: Cycle, assignments: Assignments) -> int:
    """How many of them are scored; of a directory that grows there are spare rows."""
    assert cycle.config is not None
    return assignments.n_rows if cycle.config.trains else _n_checkpoints(cycle)


def watch(path: Path, show: Callable[[JsonObject], None], interval: float = 2.0) -> JsonObject:
    """Look at a run until it is complete or nobody drives it any more, and return its `status`.

    It has `exit_code` 3 when the driver has stopped.

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
        if look["state"] == "complete":
            return status(path)
        if look["state"] == "stopped":
            return {**status(path), "state": "stopped", "exit_code": STOPPED}
        time.sleep(interval)


class Watch:
    """A run that is looked at again and again.

    A look costs what can have changed: the last cycle, its rows that are not complete, what was added to the events.

    Args:
        clock: tells seconds.

    Raises:
        RunConflict: there is no run.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = Run.open(path)
        self._clock = clock
        self._rows: _Rows | None = None
        self._heard: tuple[object, float] = (None, 0.0)  # the last new beat of a driver of another machine, and when
        self._read: dict[str, int] = {}  # bytes of each event file
        self._faults: Counter[str] = Counter()

    def look(self) -> JsonObject:
        """How far the last cycle is.

        Returns:
            `state` and `driver` as in `status`, but clocks of two machines are not compared: a driver of another one is
            at work while its beat goes on from look to look; `stage`, what is being done; `checkpoints`, how many there
            will be, and those
            `published` and `scored`; `blocks_scored` of `blocks` and `images_scored` of `images`, over all checkpoints;
            `images_per_s` over the last minute of looks and the `seconds_left` at that rate, None where unknown;
            `faults`, how many of each kind since the run began, and `new_faults`, those since the last look in words.
        """
        told: JsonObject = {"run": str(self._run.path), "cycle": None, "stage": "begin", "driver": self._driver()}
        complete = False
        cycle = self._last_cycle()
        if cycle is not None:
            if self._rows is None or self._rows.cycle is not cycle or self._rows.path != cycle.assignments:
                self._rows = _Rows(cycle)
            told |= {"cycle": cycle.index, **self._rows.look(self._clock())}
            n_cycles = _n_cycles(cycle)
            due = _due(cycle, last=cycle.index + 1 >= n_cycles)
            stage = next((stage for stage in due if cycle.marker(stage) is None), None)
            told["stage"] = "train + score" if stage == "train" else stage or "done"
            complete = stage is None and self._run.is_complete(n_cycles)
        waits = told["stage"] in ("begin", "label") and Waiting.read(self._run) is not None
        told["state"] = "complete" if complete else _state(told["driver"], waits=waits)
        faults = [
            (event["event"], line) for event in self._run.new_events(self._read) if (line := spoken(event)) is not None
        ]
        self._faults.update(name for name, _ in faults)
        return {**told, "faults": dict(self._faults), "new_faults": [line for _, line in faults]}

    def _driver(self) -> JsonObject | None:
        driver = _driver(self._run.path)
        if driver is None or driver["seen"]:
            return driver
        key = driver["attempt"], driver["beat"]
        if key != self._heard[0]:
            self._heard = key, self._clock()
        return {**driver, "at_work": self._clock() - self._heard[1] < EXPIRY_S}

    def _last_cycle(self) -> Cycle | None:
        """The last one that has begun; always the same object, which keeps its configuration."""
        for cycle in reversed(self._run.cycles()):
            if self._rows is not None and self._rows.cycle.index == cycle.index:
                return self._rows.cycle
            if cycle.config is not None:
                return cycle
        return None


class _Rows:
    """What there is of the assignments of a cycle, counted by listing folders; rows that are complete stay so."""

    def __init__(self, cycle: Cycle) -> None:
        self.cycle = cycle
        self.path = cycle.assignments  # another one after a training script was started again
        self._assignments: Assignments | None = None
        self._eligible: Sequence[int] = ()  # samples per block
        self._n_published = 0
        self._counts: dict[int, Sequence[int]] = {}  # of the rows that are begun: samples scored per block,
        self._images: dict[int, int] = {}  # and in all
        self._complete: set[int] = set()
        self._seen: deque[tuple[float, int]] = deque()  # when, and the images that there were

    def look(self, now: float) -> JsonObject:
        n_checkpoints = self._count_checkpoints()
        told: JsonObject = {"published": self._n_published, "scored": 0, "checkpoints": n_checkpoints}
        told |= dict.fromkeys(("blocks_scored", "blocks", "images_scored", "images"), 0)
        told |= dict.fromkeys(("images_per_s", "seconds_left"))
        if self._assignments is None and not self._open():
            return told
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
            if there and row not in self._counts:  # what is left out of a row is decided before it is begun
                self._counts[row] = self.cycle.remaining(row + 1) or self._eligible
                self._images[row] = sum(self._counts[row])
            blocks += len(there)
            images += sum(self._counts[row][block] for block in there)
            if len(there) == n_blocks:
                self._complete.add(row)
        last = self._images[max(self._images)] if self._images else sum(self._eligible)
        total = sum(self._images.get(row, last) for row in range(n_rows))
        rate = self._rate(now, images)
        return told | {
            "scored": len(self._complete),
            "blocks_scored": blocks,
            "blocks": n_rows * n_blocks,
            "images_scored": images,
            "images": total,
            "images_per_s": rate,
            "seconds_left": (total - images) / rate if rate else None,
        }

    def _count_checkpoints(self) -> int:
        """Count those that are published; returns how many there will be."""
        assert self.cycle.config is not None
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
