"""Exactly one driver works on a run directory.

::

    RUN/driver/000003.json    the driver: host, process, attempt, and a beat that advances while it lives

The file with the highest number is the lease. It is created exclusively, so of two drivers that take over at the same
moment one wins; a driver that finds a higher number than its own has been superseded. There is no lock, and no lease of
a run is ever removed: a number is given once, so a driver that was paused cannot create a number given to another.

A driver that was paused may still write after its successor has started. Each artifact is safe in one of these ways:

- created exclusively, so the first one stays: `run.yaml`, `cycle.yaml`, manifests, label files, the layout of
  assignments with their fingerprint and the weights of each row, decisions at barriers, claims on training, and
  attempts at training, whose checkpoints and assignments are in folders of their own;
- the same bytes, whoever writes them: chunks, scores, selections, the state of training, on processors of one kind;
- written after `require`, and a late write is detected: see `Waiting.write`, `Staged.expect_again`,
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
EXPIRY_S = 30.0  # a lease whose beat has not advanced for so long has expired
BEAT_S = 5.0


@dataclass(frozen=True)
class Holder(ProcessIdentity):
    """A driver.

    Attributes:
        beat: advances while the driver lives.
        released: whether it has ended regularly.
    """

    attempt: str
    beat: int = 0
    released: bool = False

    @classmethod
    def this_process(cls, attempt: str) -> Self:
        """This process as a driver."""
        return cls(**asdict(this_process()), attempt=attempt)

    def __str__(self) -> str:
        return f"attempt {self.attempt} ({super().__str__()})"


class Lease:
    """The right to drive a run, as a context.

    Args:
        run: the run directory.
        attempt: names this driver.
        say: called with a line when it has to wait.

    Attributes:
        number: of this driver of the run, from 1; later drivers have larger numbers.

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
        if not (self._run / "run.yaml").exists():  # the run never began, so leave nothing; see `_take`
            self._path(self.number).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                self._folder.rmdir()
                self._run.rmdir()
            return
        with suppress(DiskFull):  # the next driver sees that this process is gone
            write_json(self._path(self.number), asdict(replace(self._me, released=True)))

    def check(self) -> None:
        """Raise Superseded when another driver has taken over."""
        if self._successor is not None:
            raise Superseded(f"{self._run}: {self._successor} has taken over; this one stops, nothing is lost")

    def require(self) -> None:
        """Check storage, and raise Superseded when another driver has taken over. Call before replacing anything."""
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
            with suppress(FileNotFoundError):  # another driver never began its run, and has just removed the folder
                if create_json(self._path(number + 1), asdict(self._me)):
                    # Leases of runs that never began are removed, so a number may have been given while we were paused.
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
                continue  # a short outage of the file system; a lasting one fails where files are needed

    def _latest(self) -> tuple[int, Holder | None]:
        return latest(self._run)

    def _path(self, number: int) -> Path:
        return lease_path(self._run, number)


def latest(run: Path) -> tuple[int, Holder | None]:
    """The highest number of the leases on a run, and its holder; (0, None) without any."""
    for number in reversed(_leases(run).numbers()):
        try:
            return number, Holder(**read_json(lease_path(run, number), required=("host", "pid", "attempt")))
        except FileNotFoundError:
            continue  # its run never began, and it has just been removed
        except (DistalError, TypeError):  # such as a file that a power loss left empty
            return number, Holder("an unknown host", "", 0, 0.0, "unknown")
    return 0, None


def lease_path(run: Path, number: int) -> Path:
    """The file of a lease."""
    return _leases(run).path(number)


def _leases(run: Path) -> Numbered:
    return Numbered(run / _FOLDER, digits=6, suffix=".json")
