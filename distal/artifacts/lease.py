"""Exactly one driver works on a run directory.

::

    RUN/driver/000003.json    who drives: host, process, attempt, and a beat that goes on while it lives

The file with the highest number is the lease. It is created exclusively, so of two that take over at the same moment
one wins; a driver that finds a higher number than its own has been superseded. Nothing is locked, and no lease of a run
is ever removed: a number is given once, so nobody who was paused can create one that somebody else had.

A driver that was paused may write after its successor has begun. What then? Every artifact has one of these answers:

- created exclusively, the first one stays: `run.yaml`, `cycle.yaml`, manifests, label files, the layout of assignments
  and what they were begun with (fingerprint, weights of a row), what was decided at a barrier, who may train, and
  which attempt at training counts, whose checkpoints and assignments are in folders of its own;
- the same bytes, whoever writes them: chunks, scores, selections, the state of training, on processors of one kind;
- written after `require`, and found out if it is late all the same: see `Waiting.write`, `Staged.expect_again`,
  `FolderCheckpoints.keep`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from distal.errors import DiskFull, DistalError, RunConflict, Superseded
from distal.processes import ProcessIdentity, this_process
from distal.storage import Numbered, create_json, read_json, write_json

_FOLDER = "driver"
EXPIRY_S = 30.0  # a lease whose beat stood still for so long is given up
BEAT_S = 5.0


@dataclass(frozen=True)
class Holder(ProcessIdentity):
    """A driver.

    Attributes:
        beat: grows while it lives.
        released: whether it ended by itself.
    """

    attempt: str
    beat: int = 0
    released: bool = False

    @classmethod
    def this_process(cls, attempt: str) -> Self:
        """What this process is as a driver."""
        return cls(**asdict(this_process()), attempt=attempt)

    def __str__(self) -> str:
        return f"attempt {self.attempt} ({super().__str__()})"


class Lease:
    """The right to drive a run, as a context.

    Args:
        run: the run directory.
        attempt: names this driver.
        say: told when it has to wait.

    Attributes:
        number: which of the drivers of this run it is, from 1; of two the larger one came later.

    Raises:
        RunConflict: another driver holds it, and lives.
    """

    def __init__(self, run: Path, attempt: str, say: Callable[[str], None] = lambda line: None) -> None:
        self._run, self._folder, self._say = run, run / _FOLDER, say
        self._me = Holder.this_process(attempt)
        self.number = 0
        self._successor: Holder | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if self._successor is not None:
            return
        if not (self._run / "run.yaml").exists():  # it came to nothing, and leaves nothing; see `_take`
            self._path(self.number).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                self._folder.rmdir()
                self._run.rmdir()
            return
        with suppress(DiskFull):  # the next one finds out that this process is gone
            write_json(self._path(self.number), asdict(replace(self._me, released=True)))

    def check(self) -> None:
        """Raise Superseded when another driver has taken over."""
        if self._successor is not None:
            raise Superseded(f"{self._run}: {self._successor} has taken over; this one stops, nothing is lost")

    def require(self) -> None:
        """Look again, and raise Superseded when another driver has taken over: before anything is replaced."""
        number, holder = self._latest()
        if number > self.number:
            self._successor = holder
        self.check()

    def _take(self) -> None:
        watched: tuple[int, int] | None = None
        since = time.monotonic()
        while True:
            number, holder = self._latest()
            lives = False if holder is None or holder.released else holder.lives()
            moved = holder is not None and watched not in (None, (number, holder.beat))
            if lives or (lives is None and moved):
                raise RunConflict(
                    f"{self._run}: {holder} is working on this run; wait until it is done, or stop it and try again"
                )
            if lives is None and watched is None and holder is not None:
                watched, since = (number, holder.beat), time.monotonic()
                self._say(f"{self._run}: waiting {EXPIRY_S:.0f} s to see whether {holder} is still at work")
            if lives is None and time.monotonic() - since < EXPIRY_S:
                time.sleep(min(1.0, EXPIRY_S / 10))
                continue
            with suppress(FileNotFoundError):  # whoever was here came to nothing, and has just removed the folder
                if create_json(self._path(number + 1), asdict(self._me)):
                    # Leases of what came to nothing are removed, so numbers may have been given while we were paused.
                    if _leases(self._run).last() == number + 1:
                        self.number = number + 1
                        return
                    self._path(number + 1).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                number, holder = self._latest()
                if number > self.number:
                    self._successor = holder
                    return
                self._me = replace(self._me, beat=self._me.beat + 1)
                write_json(self._path(self.number), asdict(self._me))
            except (OSError, DistalError):
                continue  # a file system that is away for a moment; what it is needed for says so when it stays away

    def _latest(self) -> tuple[int, Holder | None]:
        return latest(self._run)

    def _path(self, number: int) -> Path:
        return lease_path(self._run, number)


def latest(run: Path) -> tuple[int, Holder | None]:
    """The highest number of the leases on a run, and who has it; (0, None) when nobody ever drove."""
    for number in reversed(_leases(run).numbers()):
        try:
            return number, Holder(**read_json(lease_path(run, number), required=("host", "pid", "attempt")))
        except FileNotFoundError:
            continue  # of a run that came to nothing just now
        except (DistalError, TypeError):  # such as a file that a power loss left empty
            return number, Holder("an unknown host", "", 0, 0.0, "unknown")
    return 0, None


def lease_path(run: Path, number: int) -> Path:
    """The file of a lease."""
    return _leases(run).path(number)


def _leases(run: Path) -> Numbered:
    return Numbered(run / _FOLDER, digits=6, suffix=".json")
