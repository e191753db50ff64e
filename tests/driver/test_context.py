"""What the stages of a run share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distal.artifacts.runs import Run
from distal.artifacts.stages import ReduceOutputs
from distal.driver.context import RunContext
from distal.errors import Superseded


def test_the_marker_of_a_successor_stays(tmp_path: Path) -> None:
    """A driver that was suspended during a stage finds that another has taken over, and done it."""
    cycle = Run(tmp_path).cycle(0)
    cycle.folder.mkdir(parents=True)
    taken_over = False

    def require() -> None:
        if taken_over:
            raise Superseded("another driver has taken over")

    def work() -> ReduceOutputs:
        nonlocal taken_over
        taken_over = True
        cycle.complete("reduce", {}, ReduceOutputs(measures=("dispersion",)), 1.0)
        return ReduceOutputs(measures=("margin",))

    session = SimpleNamespace(lease=SimpleNamespace(require=require))
    context: Any = SimpleNamespace(session=session)
    with pytest.raises(Superseded):
        RunContext.stage(context, cycle, "reduce", dict, work)
    marker = cycle.marker("reduce")
    assert marker is not None
    assert marker.outputs.measures == ("dispersion",)
