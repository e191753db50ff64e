"""Training beside scoring: what the driver does while it waits for the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from distal.driver.training import Training
from distal.records import CheckpointRef

RANKS, ALL = 2, 6


class Published:
    """A queue of checkpoints that are all there."""

    def published(self) -> Sequence[CheckpointRef]:
        return []

    def complete(self) -> bool:
        return True


@pytest.mark.timeout(60)
def test_actors_give_way_to_ranks_that_find_no_room_after_all_is_scored() -> None:
    """Training that resumes after its last epoch needs its slots once more; nothing is left to score by then."""
    gave_way, fits, held = threading.Event(), threading.Event(), []
    fits.set()

    def stage(starve: Callable[[], None]) -> None:
        starve()
        assert gave_way.wait(50)

    def give_way() -> None:
        held.append(training.slots_held())
        if held[-1] == ALL:
            gave_way.set()

    training = Training(stage, lambda: None, Published(), fits, slots=RANKS, all_slots=ALL)  # type: ignore[arg-type]
    training.start(at_once=False)
    training.wait(give_way)
    assert ALL in held
    assert training.slots_held() == 0
