from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from distal.artifacts import checkpoints
from distal.artifacts.runs import Run
from distal.artifacts.stages import EvaluationOutputs, TrainOutputs
from distal.config import parse
from distal.errors import ConfigError, RunConflict
from distal.report.tensorboard import export
from tests.helpers import SMALL_RUN


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every value, read from the file by its format: length, checksum, message, checksum."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
    return found


def test_what_was_measured_comes_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin({"seed": 0}, {})
    for index in range(2):
        cycle = run.cycle(index)
        cycle.begin(parse({**SMALL_RUN, "run": str(run.path), "pool": {"path": "/nowhere"}}, []))
        for row in range(2):
            metrics = {"train_loss": 1.5 - index - row / 4}
            checkpoints.commit(cycle.checkpoints, row, 3 * (row + 1), {"w": torch.zeros(1)}, metrics=metrics)
        trained = TrainOutputs(n_labeled=24 + 16 * index, device="cpu", world_size=1, deterministic=True)
        cycle.complete("train", {}, trained, 2.5)
        run.event("stage", cycle=index, stage="train", seconds=2.5 + index)
        run.event("actor_lost", cycle=index, reason="killed")
    tested = EvaluationOutputs(test={"accuracy": 0.75, "auroc": None}, val={"accuracy": 0.5})
    run.cycle(0).complete("test", {}, tested, 0.1)
    run.cycle(1).complete("test", {}, EvaluationOutputs(), 0.1)
    assert export(run.path, tmp_path / "out").scalars == 10
    assert scalars(tmp_path / "out") == {
        "train_loss/cycle_0": [(3, 1.5), (6, 1.25)],
        "train_loss/cycle_1": [(3, 0.5), (6, 0.25)],
        "test/accuracy": [(24, 0.75)],
        "val/accuracy": [(24, 0.5)],
        "seconds/train": [(0, 2.5), (1, 3.5)],
        "faults/actor_lost": [(0, 1.0), (0, 2.0)],
    }
    with pytest.raises(ConfigError, match="not an empty folder; give a new one"):
        export(run.path, tmp_path / "out")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunConflict, match="no run here"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
