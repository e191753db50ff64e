"""Two writers, one of them paused before any of its operations on files while the other one finishes.

All that two drivers share is on the disk, so no other place to pause could make a difference. A call of `stat` is none
of these operations, but the one that follows it is.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable

OPERATIONS = {"open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}
LIMIT_S = 60

Work = Callable[[], object]


class _Pause(threading.local):
    """Of each thread: called before each operation on a file."""

    before: Callable[[], None] | None = None


_pause = _Pause()


def _audit(event: str, _: object) -> None:
    before = _pause.before
    if before is not None and event in OPERATIONS:
        before()


sys.addaudithook(_audit)  # there is no way to remove one


def interleavings(begin: Callable[[], tuple[Work, Work]], check: Callable[[], None]) -> int:
    """Do `first` in a thread, paused before its n-th operation on a file, then all of `second`, then the rest of it.

    That is done for n = 1, 2, ... until `first` ends before its n-th, each time from the beginning.

    Args:
        begin: makes a fresh start, and returns `first` and `second`; an error of theirs counts as their end.
        check: asserts what must be true afterwards.

    Returns:
        At how many operations it was paused.
    """
    _paused(*begin(), 10**9)  # once without a pause: nobody may be paused with the lock of an import
    for n in itertools.count(1):
        reached = _paused(*begin(), n)
        check()
        if not reached:
            return n - 1
    raise AssertionError


def _paused(first: Work, second: Work, n: int) -> bool:
    """Whether there was an `n`-th operation."""
    paused, resume = threading.Event(), threading.Event()
    left = n

    def before() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            paused.set()
            assert resume.wait(LIMIT_S)

    def work() -> None:
        _pause.before = before
        try:
            _end(first)
        finally:
            paused.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert paused.wait(LIMIT_S)
    _end(second)
    resume.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    return left <= 0


def _end(work: Work) -> None:
    try:
        work()
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
