"""`distal repair`: delete damaged files, so that the command that made them makes them again.

They can be made again from the files that are left: the next `distal run` or `distal score` refills
them, and must reproduce a selection that was made before, or it stops. Files that no command can
make again are reported and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distal.artifacts.cycles import Analysis, Cycle
from distal.artifacts.lease import Lease
from distal.artifacts.selection import Selection
from distal.artifacts.stages import Marker, SelectOutputs, Staged
from distal.errors import Damage, UnknownFormat
from distal.pool.images import MANIFEST
from distal.progress import Display, Silent
from distal.records import Result, Stage
from distal.report.verify import UNREADABLE, inspect, open_run
from distal.storage import remove_tree, sweep

State = Literal["sound", "repaired", "damaged"]

_REDO: dict[str, tuple[Stage, ...]] = {
    "train": ("train",),
    "score": ("score", "reduce", "select"),
    "test": ("test",),
    "reduce": ("reduce", "select"),
    "select": ("select",),
    "label": ("label",),
}
"""The stages to redo when an output of a stage is damaged."""


@dataclass(frozen=True)
class RunRepair(Result):
    """The result of repairing a run.

    Attributes:
        state: damaged when something is left.
        deleted: files and folders.
        redone: `<folder>: <stage>` of each stage that the next run does again.
        mended: one line for each thing repaired on the spot.
        swept: temporary files removed.
        left: one line, with advice, for each thing that no command can make again.
        next: advice; empty when there is nothing to do.
    """

    state: State
    path: Path
    deleted: list[str]
    redone: list[str]
    mended: list[str]
    swept: int
    left: list[str]
    next: str


@dataclass(frozen=True)
class PoolRepair(Result):
    """The result of repairing a pool.

    Attributes:
        packed_again: one line for each part that was packed again from the source.
        left: one line, with advice, for each thing that could not be repaired.
    """

    state: State
    path: Path
    packed_again: list[str]
    left: list[str]
    next: str = ""


def repair(path: Path, display: Display | None = None) -> RunRepair | PoolRepair:
    """Delete damaged files that can be made again; in a pool, pack its images again from the source.

    Raises:
        RunConflict: there is neither a run nor a pool, or a driver is at work.
        UnknownFormat: another version of distal made the run; nothing is deleted.
    """
    display = display or Silent()
    return _repair_pool(path, display) if (path / MANIFEST).exists() else _repair_run(path, display)


def _repair_run(path: Path, display: Display) -> RunRepair:
    run = open_run(path)
    deleted: list[str] = []
    redone: list[str] = []
    mended: list[str] = []
    with Lease(run.path, run.attempt, display.say) as lease:
        n_swept = sweep(run.path)
        found = inspect(path, display).found
        for damaged in found:
            if damaged.advice:
                continue
            lease.require()
            if damaged.redo is not None:
                _invalidate(*damaged.redo)
                redone.append(f"{damaged.redo[0].folder}: {damaged.redo[1]}")
            if damaged.mend is not None:
                damaged.mend()
                mended.append(damaged.what)
            for file in damaged.delete:
                remove_tree(file) if file.is_dir() else file.unlink(missing_ok=True)
                deleted.append(str(file))
        redone = sorted({*redone})
        if deleted or redone:
            run.event("repaired", deleted=deleted, redone=redone)
    left = [f"{damaged.what}; {damaged.advice}" for damaged in found if damaged.advice]
    return RunRepair(
        state="damaged" if left else "repaired" if deleted or redone or mended else "sound",
        path=path,
        deleted=deleted,
        redone=redone,
        mended=mended,
        swept=n_swept,
        left=left,
        next="run the command that made it again" if deleted or redone else "",
    )


def _invalidate(staged: Staged, stage: str) -> None:
    """Remove the markers of a stage and of those after it; the selections must be made again."""
    stages: list[str]
    if isinstance(staged, Analysis):
        stages = [stage] if stage != "reduce" else ["reduce", *staged.selections()]
    else:
        stages = list(_REDO[stage])
    for name in stages:
        if name.startswith("select"):
            staged.expect_again(name, _made_before(staged, name))
        staged.invalidate(name)
    if isinstance(staged, Cycle) and stage == "score":
        for analysis in staged.analyses():
            _invalidate(analysis, "reduce")


def _made_before(staged: Staged, stage: str) -> str | None:
    """The hash of a selection, by its marker, by the marker of its labels, or by the file itself."""
    ways: list[Callable[[], str | None]]
    if isinstance(staged, Analysis):
        ways = [lambda: _selected(staged.selected(stage)), lambda: _in_file(staged.selection_of(stage))]
    else:
        assert isinstance(staged, Cycle)
        ways = [
            lambda: _selected(staged.marker("select")),
            lambda: _labelled(staged),
            lambda: _in_file(staged.selection),
        ]
    for way in ways:
        with suppress(Damage, UnknownFormat, *UNREADABLE):
            found = way()
            if found is not None:
                return found
    return None


def _selected(marker: Marker[SelectOutputs] | None) -> str | None:
    return marker.outputs.selection_sha256 if marker else None


def _labelled(cycle: Cycle) -> str | None:
    marker = cycle.marker("label")
    return marker.inputs.get("selection") if marker else None


def _in_file(path: Path) -> str:
    return Selection.read(path).sha256


def _repair_pool(path: Path, display: Display) -> PoolRepair:
    """Pack the damaged images of a pool again."""
    damaged = inspect(path, display).found
    packed: list[str] = []
    if damaged and all("distal repair" in one.advice for one in damaged):
        from distal.pool.build import pack_again

        packed = pack_again(path)
    still = inspect(path, display).found if damaged else []
    return PoolRepair(
        state="damaged" if still else "repaired" if packed else "sound",
        path=path,
        packed_again=packed,
        left=[f"{one.what}; {one.advice}" for one in still],
    )
