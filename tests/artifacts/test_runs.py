"""Where things are in a cycle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.runs import Run
from distal.artifacts.stages import ScoreOutputs
from distal.config import parse
from distal.errors import Damage, RunConflict
from distal.score.eliminate import Barrier
from distal.score.loop import barrier_path, read_barriers
from distal.storage import create_json, remove_tree
from tests.helpers import flip

ROWS = 9
WAS, NOW = "a" * 64, "b" * 64


def lay_out(cycle: Cycle) -> Assignments:
    return Assignments.create(
        cycle.assignments, n_rows=ROWS, n_samples=4, block_size=4, n_classes=3, eligible=[np.ones(4, bool)]
    )


def score_up_to_a_barrier(cycle: Cycle) -> None:
    assignments = lay_out(cycle)
    assignments.adopt_weights(0, WAS)
    assignments.write(0, assignments.blocks[0], np.zeros(4, np.uint8))
    create_json(barrier_path(cycle.elimination, 5), Barrier(5, 3, (4,)).to_record())


@pytest.mark.parametrize("n_starts", [0, 1, 2])
def test_all_rows_are_scored_again_as_the_message_says(tmp_path: Path, n_starts: int) -> None:
    """What was left out follows from the weights of before, so it goes, too; what an earlier start left stays."""
    cycle = Run(tmp_path).cycle(0)
    for _ in range(max(n_starts, 1)):
        if n_starts:
            cycle.begin_attempt()
        score_up_to_a_barrier(cycle)
    path, earlier = cycle.assignments, cycle.earlier_assignments()
    assert read_barriers(cycle.elimination, [5, 7]) == [Barrier(5, 3, (4,))]
    with pytest.raises(Damage) as raised:
        Assignments.open(path).adopt_weights(0, NOW)
    advice = re.search(r"remove (\S+\*) to score all rows again", str(raised.value))
    assert advice is not None
    for each in path.parent.glob(Path(advice[1]).name):
        remove_tree(each) if each.is_dir() else each.unlink()

    assert (cycle.assignments, cycle.earlier_assignments()) == (path, earlier)
    assert not Assignments.begun(path)
    assert read_barriers(cycle.elimination, [5, 7]) == []
    assert cycle.remaining(ROWS) is None
    assert all(map(Assignments.begun, earlier))
    again = lay_out(cycle)
    again.adopt_weights(0, NOW)
    assert again.committed(0) == set()


def test_a_start_after_scoring_keeps_the_assignments(tmp_path: Path) -> None:
    """Weights that were lost are made again; what was scored with them stays where it is."""
    cycle = Run(tmp_path).cycle(0)
    assert (cycle.checkpoints.name, cycle.assignments.name) == ("checkpoints", "assignments.zarr")
    for number in range(12):
        assert cycle.begin_attempt().name == (f"checkpoints-{number}" if number else "checkpoints")
    assert cycle.assignments.name == "assignments-11.zarr"
    outputs = ScoreOutputs(n_rows=ROWS, n_eligible=4, images_scored=4 * ROWS, left_out=0)
    cycle.complete("score", {}, outputs, 0.0)
    for number in (12, 13):
        assert cycle.begin_attempt() == cycle.checkpoints == cycle.folder / f"checkpoints-{number}"
        assert cycle.assignments.name == "assignments-11.zarr"
    assert [path.name for path in cycle.earlier_assignments()][:2] == ["assignments-10.zarr", "assignments-9.zarr"]
    assert [path.name for path in cycle.published_to()][:2] == ["checkpoints-13", "checkpoints-12"]


def test_a_run_keeps_its_identity_whatever_its_keys_are(tmp_path: Path) -> None:
    """Arguments of a model may have numbers as keys, and a path any bytes."""
    fixed = {"model.args": {"widths": {1: 64, 2: 128}}, "loop.initial": "/data/\udcff/labels.csv"}
    run = Run(tmp_path)
    run.begin(fixed, {"score.batch_size": 64})
    Run.open(tmp_path).check(fixed)
    with pytest.raises(RunConflict, match="model.args"):
        Run.open(tmp_path).check({**fixed, "model.args": {"widths": {1: 32}}})


def test_a_damaged_configuration_of_any_cycle_is_damage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for index in range(2):
        run.cycle(index).begin(parse({"run": str(tmp_path), "pool": {"path": "/pool"}}))
    assert [cycle.index for cycle in Run(tmp_path).begun_cycles()] == [0, 1]
    flip(run.cycle(0).folder / "cycle.yaml")
    with pytest.raises(Damage, match="cycles/000/cycle.yaml"):
        Run(tmp_path).begun_cycles()


def test_what_was_not_scored_has_no_fingerprint() -> None:
    assert ScoreOutputs(n_rows=0, n_eligible=4, images_scored=0, left_out=0).to_record()["fingerprint"] is None
