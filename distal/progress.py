"""What a driver tells while it works: the protocol of a display, and which events a person should know of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distal.records import JsonObject, Progress

_SPOKEN = (  # events that a person should know of; each has a `reason`
    "training_waits",
    "training_failed",
    "training_anew",
    "other_weights",
    "scoring_waits",
    "actor_lost",
    "actor_asked_for_again",
    "actor_refused",
    "block_failed",
    "damaged_block",
)


class Display(Protocol):
    """What the driver tells while it works."""

    def progress(self, state: Progress) -> None:
        """The present state of a cycle."""
        ...

    def say(self, line: str) -> None:
        """One line that stays."""
        ...

    def event(self, record: JsonObject) -> None:
        """What was logged."""
        ...


def counter(show: Callable[[Progress], None], stage: str, cycle: int = -1) -> Callable[[int, int], None]:
    """A function of (images done, images in all) that shows how far a stage is."""
    return lambda done, total: show(Progress(cycle, stage, images_scored=done, images=total))


class Silent:
    """Shows nothing."""

    def progress(self, state: Progress) -> None:
        """Ignore it."""

    def say(self, line: str) -> None:
        """Ignore it."""

    def event(self, record: JsonObject) -> None:
        """Ignore it."""


def spoken(record: JsonObject) -> str | None:
    """An event in words; None when nobody need know of it."""
    if record["event"] not in _SPOKEN:
        return None
    where = f"cycle {record['cycle']}: " if "cycle" in record else ""
    return f"{where}{record['event'].replace('_', ' ')}: {record['reason']}"
