"""`distal tensorboard`: the figures of a run for TensorBoard, from storage alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from tensorboardX import SummaryWriter

from distal.artifacts import checkpoints
from distal.artifacts.runs import Run
from distal.errors import ConfigError
from distal.progress import spoken
from distal.records import Result
from distal.storage import names_in


@dataclass(frozen=True, kw_only=True)
class TensorboardResult(Result):
    """The event file that was written.

    Attributes:
        scalars: values in it.
    """

    state: Literal["complete"] = "complete"
    run: Path
    out: Path
    scalars: int


def export(path: Path, out: Path) -> TensorboardResult:
    """Write an event file of TensorBoard.

    The metrics of checkpoints go over epochs, a curve per cycle; `test/<metric>` and `val/<metric>`
    over labelled samples; `seconds/<stage>` over cycles; `faults/<event>`, the count so far, over
    seconds since the run began.

    Args:
        path: the run directory.
        out: a folder that is new, or empty: TensorBoard shows all files of a folder as one.

    Raises:
        RunConflict: there is no run.
        ConfigError: `out` is not empty.
    """
    run = Run.open(path)
    if names_in(out):
        raise ConfigError(f"--out: {out}: not an empty folder; give a new one, or remove what is there")
    n = 0
    with SummaryWriter(logdir=str(out), write_to_disk=True) as writer:

        def add(name: str, value: float, step: int, when: float | None = None) -> None:
            nonlocal n
            writer.add_scalar(name, value, step, walltime=when)
            n += 1

        for cycle in run.begun_cycles():
            for index in checkpoints.committed(cycle.checkpoints):
                ref = checkpoints.read(cycle.checkpoints, index)
                for name, value in ref.metrics.items():
                    add(f"{name}/cycle {cycle.index}", value, ref.epoch, ref.path.stat().st_mtime)
            evaluation = cycle.evaluation()
            for name, values in (("test", evaluation.test), ("val", evaluation.val)):
                for metric, figure in (values or {}).items():
                    if figure is not None:
                        add(f"{name}/{metric}", figure, evaluation.n_labeled or 0)
        began: float | None = None
        faults: Counter[str] = Counter()
        for event in run.new_events({}):
            when = datetime.fromisoformat(event["time"]).timestamp()
            began = began or when
            if event["event"] == "stage":
                add(f"seconds/{event['stage']}", event["seconds"], event["cycle"], when)
            if spoken(event):
                faults[event["event"]] += 1
                add(f"faults/{event['event']}", faults[event["event"]], round(when - began), when)
    return TensorboardResult(run=run.path, out=out, scalars=n)
