"""How far a run is, from a real run directory that grows under the eyes of the watcher. But for the last test without Ray."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text

from distal.artifacts import checkpoints
from distal.artifacts.arrays import Array
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.lease import Holder, Lease, lease_path
from distal.artifacts.runs import Run
from distal.artifacts.stages import (
    EvaluationOutputs,
    ReduceOutputs,
    ScoreOutputs,
    SelectOutputs,
    TrainOutputs,
)
from distal.cli.terminal import WatchScreen
from distal.config import Config, parse
from distal.pool import Pool
from distal.records import Result
from distal.report.status import Look, Watch, status
from distal.storage import write_json
from tests.helpers import SMALL_RUN, small_overrides

ROOT = Path(__file__).parents[2]
ROWS, N, BLOCK = 3, 240, 64
ELIGIBLE = np.arange(N) % 5 != 0
PER_BLOCK = [int(ELIGIBLE[start : start + BLOCK].sum()) for start in range(0, N, BLOCK)]


OUTPUTS: dict[str, Result] = {
    "train": TrainOutputs(n_labeled=24, device="cpu", world_size=1, deterministic=True),
    "score": ScoreOutputs(n_rows=ROWS, n_eligible=192, images_scored=ROWS * 192, left_out=0),
    "test": EvaluationOutputs(),
    "reduce": ReduceOutputs(measures=("dispersion",)),
    "select": SelectOutputs(n_selected=16, tie_share=0.0, selection_sha256="0" * 64),
}


class Growing:
    """A run of one cycle, written bit by bit by what a real run writes with."""

    def __init__(self, path: Path) -> None:
        self.run = Run(path)
        self.run.begin({"seed": 0}, {"device": "cpu"})
        self.cycle: Cycle = self.run.cycle(0)

    def begin_cycle(self) -> None:
        tree = {**SMALL_RUN, "run": str(self.run.path), "loop": {"cycles": 1}, "pool": {"path": "/nowhere"}}
        self.cycle.begin(parse(tree, []))

    def lay_out(self, n_rows: int = ROWS) -> None:
        flags = [ELIGIBLE[start : start + BLOCK] for start in range(0, N, BLOCK)]
        shape = {"n_rows": n_rows, "n_samples": N, "block_size": BLOCK, "n_classes": 4}
        self.assignments = Assignments.create(self.cycle.assignments, **shape, eligible=flags)

    def publish(self, row: int) -> None:
        checkpoints.commit(self.cycle.checkpoints, row, row + 1, {"w": torch.zeros(1)})

    def score(self, row: int, *blocks: int) -> None:
        for block in blocks:
            where = self.assignments.blocks[block]
            self.assignments.write(row, where, np.zeros(len(where), np.uint8))

    def complete(self, *stages: str) -> None:
        for stage in stages:
            self.cycle.complete(stage, {}, OUTPUTS[stage], 1.0)


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return Growing(tmp_path / "run")


def test_what_a_watcher_sees_of_a_run_that_grows(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    listed: list[int] = []
    stored = Array.stored
    watch = Watch(growing.run.path, clock=lambda: now)

    def look(after: float = 2.0) -> Look:
        nonlocal now
        now += after
        listed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Array, "stored", lambda array, row: (listed.append(row), stored(array, row))[1])
            told = watch.look()
        if told.cycle is not None:  # counted anew, by another way
            (cycle,) = status(growing.run.path).cycles
            assert (told.blocks_scored, told.published) == (
                cycle.blocks_scored,
                cycle.checkpoints_published,
            )
        return told

    told = look()
    assert (told.state, told.stage, told.cycle, told.faults) == ("unfinished", "begin", None, {})
    growing.begin_cycle()
    told = look()
    assert (told.stage, told.published, told.checkpoints, told.blocks) == ("train + score", 0, ROWS, 0)

    growing.lay_out()
    told = look()
    assert (told.blocks, told.images, told.images_per_s) == (ROWS * 4, ROWS * ELIGIBLE.sum(), None)
    assert listed == [], "nothing is published, so there is nothing to look for"

    growing.publish(0)
    growing.publish(1)
    growing.score(0, 0, 2)
    growing.score(1, 0)
    told = look()
    scored = 2 * PER_BLOCK[0] + PER_BLOCK[2]
    assert (told.published, told.scored, told.blocks_scored) == (2, 0, 3)
    assert told.images_scored == scored
    assert told.images_per_s == scored / 2
    assert told.seconds_left == pytest.approx((ROWS * ELIGIBLE.sum() - scored) / (scored / 2))
    assert listed == [0, 1]

    growing.score(0, 1, 3)
    assert look().scored == 1
    growing.publish(2)
    growing.complete("train")
    growing.score(2, 3)
    told = look()
    assert listed == [1, 2], "a row that is complete is not listed again"
    assert (told.stage, told.blocks_scored) == ("score", 6)
    assert look(after=1000.0).images_per_s == 0

    growing.score(1, 1, 2, 3)
    growing.score(2, 0, 1, 2)
    growing.complete("score", "test")
    told = look()
    assert (told.stage, told.images_scored, told.seconds_left) == ("reduce", told.images, 0)
    growing.complete("reduce", "select")
    assert look().state == "complete"


def test_a_cycle_that_scores_only_its_last_checkpoint(growing: Growing) -> None:
    growing.begin_cycle()
    growing.lay_out(n_rows=1)
    watch = Watch(growing.run.path)
    for row in range(ROWS - 1):
        growing.publish(row)
        told = watch.look()
        assert (told.published, told.scored, told.blocks) == (row + 1, 0, 4)
    growing.publish(ROWS - 1)
    growing.score(0, 1)
    told = watch.look()
    assert (told.published, told.checkpoints) == (ROWS, ROWS)
    assert (told.blocks_scored, told.images_scored, told.images) == (1, PER_BLOCK[1], ELIGIBLE.sum())


def test_what_is_left_out_of_later_rows_is_not_expected(growing: Growing) -> None:
    growing.begin_cycle()
    growing.lay_out()
    for row in range(ROWS):
        growing.publish(row)
    growing.score(0, 0, 1, 2, 3)
    growing.score(1, 0, 1, 2, 3)
    watch = Watch(growing.run.path)
    assert watch.look().images == ROWS * ELIGIBLE.sum()
    write_json(growing.cycle.elimination / "00002.json", {"row": 2, "theta": 1, "remaining": [5, 4, 3, 2]})
    growing.score(2, 1)
    told = watch.look()
    assert told.images == 2 * ELIGIBLE.sum() + 14
    assert told.images_scored == 2 * ELIGIBLE.sum() + 4


def test_faults_are_told_once_and_counted_over_all_attempts(growing: Growing) -> None:
    growing.run.event("actor_lost", cycle=0, actor=1, reason="its node died", blocks_in_hand=2)
    watch = Watch(growing.run.path)
    told = watch.look()
    assert (told.faults, told.new_faults) == ({"actor_lost": 1}, ["cycle 0: actor lost: its node died"])
    other = Run(growing.run.path)  # another attempt: another file
    other.event("stage", cycle=0, stage="train", seconds=1.0)
    other.event("actor_lost", cycle=0, actor=0, reason="killed")
    log = growing.run.path / "events" / f"{other.attempt}.jsonl"
    whole = json.dumps({"event": "block_failed", "cycle": 0, "reason": "ValueError: no"})
    with log.open("a") as out:
        out.write(whole[:20])  # it is being written
    told = watch.look()
    assert (told.faults, told.new_faults) == ({"actor_lost": 2}, ["cycle 0: actor lost: killed"])
    with log.open("a") as out:
        out.write(whole[20:] + "\n")
    assert watch.look().faults == {"actor_lost": 2, "block_failed": 1}
    assert watch.look().new_faults == []


def test_on_a_terminal_it_is_redrawn_and_elsewhere_a_line_now_and_then(growing: Growing) -> None:
    growing.begin_cycle()
    growing.lay_out()
    watch = Watch(growing.run.path, clock=iter([0.0, 2.0]).__next__)
    looks = [watch.look()]
    growing.publish(0)
    growing.score(0, 0)
    growing.run.event("block_failed", cycle=0, block=1, rows=[0], reason="ValueError: [bold]")
    looks.append(watch.look())
    shown = {}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, width=80, force_terminal=terminal, legacy_windows=False, _environ={"TERM": "xterm"})
        with WatchScreen(console) as screen:
            for look in looks:
                screen.show(look)
        shown[terminal] = Text.from_ansi(out.getvalue()).plain
    for told in ("0 scored of 1 published of 3 checkpoints", "1/12 blocks", "26 images/s", "0:00:21 left"):
        assert told in shown[True]
    assert "block failed (1)" in shown[True]
    assert "cycle 0: block failed: ValueError: [bold]" in shown[True]
    assert shown[False].splitlines() == [
        "unfinished  cycle 0  train + score  0 scored of 0 published of 3 checkpoints  0/12 blocks  0/576 images",
        "cycle 0: block failed: ValueError: [bold]",
    ]


def watching(path: Path, state: str = "unfinished") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distal", "status", str(path), "--watch", "--interval=0.1", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"{state}  ")
    return process


def test_the_command_ends_with_the_run(growing: Growing) -> None:
    process = watching(growing.run.path)
    growing.begin_cycle()
    growing.lay_out()
    for row in range(ROWS):
        growing.publish(row)
        growing.score(row, 0, 1, 2, 3)
    growing.run.event("actor_lost", cycle=0, actor=1, reason="killed")
    growing.complete(*Config.stages[:-1])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(output) == status(growing.run.path).to_record()
    assert json.loads(output)["state"] == "complete"
    assert "cycle 0: actor lost: killed" in errors
    assert "12/12 blocks" in errors.splitlines()[-1]


DRIVE = """
import sys, time
from pathlib import Path
from distal.artifacts.lease import Lease
with Lease(Path(sys.argv[1]), "killed"):
    print("drives", flush=True)
    time.sleep(600)
"""


@contextmanager
def driven(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lease on a run."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVE, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "drives\n"
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def test_the_command_ends_when_the_driver_is_killed(growing: Growing) -> None:
    growing.begin_cycle()
    with driven(growing.run.path) as driver:
        told = status(growing.run.path)
        assert (told.state, told.driver.pid, told.driver.attempt) == ("running", driver.pid, "killed")
        process = watching(growing.run.path, "running")
        driver.kill()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert json.loads(output)["state"] == "stopped"
    assert f"stopped (process {driver.pid} on " in errors.splitlines()[-1]
    assert status(growing.run.path).state == "stopped"


def test_a_driver_that_ended_by_itself_has_stopped(growing: Growing) -> None:
    growing.begin_cycle()
    with Lease(growing.run.path, "ends"):
        assert status(growing.run.path).state == Watch(growing.run.path).look().state == "running"
    assert status(growing.run.path).state == Watch(growing.run.path).look().state == "stopped"


def test_a_driver_of_another_machine_lives_while_its_beat_goes_on(growing: Growing) -> None:
    growing.begin_cycle()
    now = [1000.0]
    watch = Watch(growing.run.path, clock=lambda: now[0])
    path = lease_path(growing.run.path, 1)
    far = replace(Holder.this_process("far"), host="elsewhere", pid=7)

    def look(beat: int, at: float) -> str:
        now[0] = 1000.0 + at
        write_json(path, asdict(replace(far, beat=beat)))
        os.utime(path, (0, 0))  # the clock of that machine is wrong
        return str(watch.look().state)

    assert [look(1, 0), look(1, 29), look(2, 31), look(3, 36), look(3, 65)] == ["running"] * 5
    assert look(3, 66) == "stopped"
    assert status(growing.run.path).state == "stopped"  # a single look has nothing but the time of the file
    write_json(path, asdict(replace(far, beat=4)))
    assert status(growing.run.path).state == "running"
    write_json(path, asdict(replace(far, beat=4, released=True)))
    assert status(growing.run.path).state == watch.look().state == "stopped"


def test_the_command_ends_with_ctrl_c(growing: Growing) -> None:
    process = watching(growing.run.path)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(output)["exit_code"] == 130
    assert errors.splitlines()[-1] == "distal: stopped by SIGINT"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_is_watched(cluster: str, pool: Pool, tmp_path: Path) -> None:
    """`distal status --watch` beside `distal run`, from its first file to its last."""
    run = tmp_path / "run"
    overrides = [*small_overrides(run, pool, None), f"ray.address={cluster}", "loop.cycles=2", "train.epochs=6"]
    config = str(ROOT / "configs" / "quickstart.yaml")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen([sys.executable, "-m", "distal", "run", config, *overrides], **pipes)
    deadline = time.monotonic() + 120
    while not (run / "run.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command = [sys.executable, "-m", "distal", "status", str(run), "--watch", "--interval=0.2", "--json"]
    watching = subprocess.Popen(command, **pipes)
    output, errors = watching.communicate(timeout=300)
    assert watching.returncode == 0, errors
    assert json.loads(output)["state"] == "complete"
    stages = [line.split("  ")[1:3] for line in errors.splitlines()]
    assert ["cycle 0", "train + score"] in stages
    assert stages[-1] == ["cycle 1", "done"]
    assert running.communicate(timeout=60)[1] is not None
    assert running.returncode == 0
