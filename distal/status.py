"""How far a run is, told from storage alone: no Ray, nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from distal import checkpoints, foreign
from distal.assignments import Assignments
from distal.config import Config, ForeignConfig
from distal.labelling import Waiting
from distal.records import JsonObject
from distal.runs import STAGES, Cycle, Run


def status(path: Path) -> JsonObject:
    """The state of every cycle that has begun; raises RunConflict when there is no run.

    `state` is "complete" when no stage is due in the cycles that the configuration of the last one asks for.
    """
    run = Run.open(path)
    begun = run.begun_cycles()
    n_cycles = _n_cycles(begun[-1]) if begun else 0
    waiting = Waiting.read(run)
    return {
        "run": str(run.path),
        "state": "complete" if run.is_complete(n_cycles) else "waiting_for_labels" if waiting else "unfinished",
        "waiting": waiting.report(run) if waiting else None,
        "cycles": [_cycle(cycle, last=cycle.index + 1 >= n_cycles) for cycle in begun],
    }


def _cycle(cycle: Cycle, last: bool) -> JsonObject:
    assert cycle.config is not None
    due = [stage for stage in STAGES if not (last and stage == "label")]  # the last cycle does not label
    if isinstance(cycle.config, ForeignConfig):
        due = ["score"]
    markers = {stage: cycle.marker(stage) for stage in STAGES}
    done = total = 0
    if Assignments.begun(cycle.assignments):
        assignments = Assignments.open(cycle.assignments)
        done = sum(len(assignments.committed(row)) for row in range(assignments.n_rows))
        n_rows = assignments.n_rows if isinstance(cycle.config, Config) else _n_checkpoints(cycle)
        total = n_rows * len(assignments.blocks)
    return {
        "cycle": cycle.index,
        "complete": [stage for stage, marker in markers.items() if marker],
        "next": next((stage for stage in due if not markers[stage]), None),
        "checkpoints_published": _n_published(cycle),
        "checkpoints": _n_checkpoints(cycle),
        "blocks_scored": done,
        "blocks": total,
        **cycle.evaluation(),
        "selection_sha256": (markers["select"] or {}).get("selection_sha256"),
    }


def _n_cycles(cycle: Cycle) -> int:
    return cycle.config.loop.cycles if isinstance(cycle.config, Config) else 1


def _n_published(cycle: Cycle) -> int:
    if isinstance(cycle.config, Config):
        return len(checkpoints.committed(cycle.checkpoints))
    return sum(entry.index is not None for entry in foreign.known(cycle.foreign))


def _n_checkpoints(cycle: Cycle) -> int:
    """How many there will be, as far as is known."""
    if isinstance(cycle.config, Config):
        return len(cycle.config.train.checkpoint_epochs)
    assert cycle.config is not None
    return cycle.config.checkpoints.expect or _n_published(cycle)
