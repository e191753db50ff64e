"""Promises 1 and 2 of a run, tested by killing it: nothing is lost, and the answer is the same however it ran.

The driver is a process of its own that joins the cluster of the test run. It gets SIGKILL when a named artifact
appears, and the same command is given again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.errors import DiskFull
from distal.pool import Pool
from distal.pool.build import build
from tests.helpers import png, small_overrides, write_source

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
N, ROWS, CYCLES = 240, 3, 2


def start(run: Path, pool: Pool, test: Pool, address: str, *overrides: str) -> subprocess.Popen[bytes]:
    arguments = [*small_overrides(run, pool, test), f"ray.address={address}", *overrides]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "distal", "run", CONFIG, *arguments], stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], run: Path) -> None:
    log = run.parent / f"{run.name}.log"
    assert process.wait(timeout=200) == 0, log.read_text()[-3000:]


def kill_when(start: Callable[[], subprocess.Popen[bytes]], appears: Callable[[], bool]) -> None:
    """Start the driver, and SIGKILL it as soon as something is on disk that was not there before."""
    assert not appears()
    process = start()
    deadline = time.monotonic() + 120
    while not appears():
        assert process.poll() is None, "the run ended before what should have stopped it appeared"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL


def answer(path: Path) -> dict[str, object]:
    """Everything a run says, decoded: assignments, margins, weights, scores, selections, labels, accuracies."""
    run = Run.open(path)
    told: dict[str, object] = {}
    for index in range(CYCLES):
        cycle = run.cycle(index)
        assignments, scores = Assignments.open(cycle.assignments), Scores.open(cycle.scores)
        told[f"{index} assignments"] = assignments.read(0, N).tolist()
        told[f"{index} margin"] = assignments.read_recorded("margin", ROWS - 1, 0, N).tobytes()
        told[f"{index} test"] = Assignments.open(cycle.held_out("test")).read(0, 100).tolist()
        told[f"{index} scores"] = {name: scores.read(name, 0, N).tobytes() for name in scores.measures}
        weights = [checkpoints.read(cycle.checkpoints, row) for row in checkpoints.committed(cycle.checkpoints)]
        told[f"{index} weights"] = [(ref.epoch, ref.sha256, ref.metrics) for ref in weights]
        told[f"{index} selection"] = Selection.read(cycle.selection).table.to_pylist()
        told[f"{index} ledger"] = run.ledger(before=index).sha256
    told["summary"] = [replace(cycle, seconds={}) for cycle in run.summary().cycles]
    return told


@pytest.fixture(scope="module")
def undisturbed(small_run: Path) -> dict[str, object]:
    """What the same run comes to in a process of the caller, with other actors."""
    return answer(small_run)


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs"


def test_of_two_drivers_on_one_run_one_works(
    cluster: str, pool: Pool, test_pool: Pool, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    run = tmp_path / "run"
    both = [start(run, pool, test_pool, cluster), start(run, pool, test_pool, cluster)]
    codes = [process.wait(timeout=200) for process in both]
    said = (tmp_path / "run.log").read_text()
    assert sorted(codes) == [0, 2], said
    winner = both[codes.index(0)]
    assert re.search(rf"run: attempt \S+ \(process {winner.pid} on .*\) is working on this run; wait until", said)
    assert_same(answer(run), undisturbed)


@pytest.mark.slow
def test_more_actors_on_another_attempt_give_the_same_answer(
    cluster: str, pool: Pool, test_pool: Pool, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """One actor without a cache until the second row is begun, then two with one."""
    run = tmp_path / "run"
    one = partial(start, run, pool, test_pool, cluster, "score.actors=1", "score.cache_gb=0")
    kill_when(one, lambda: any((run / "cycles/000/assignments.zarr/assignments/c/1").glob("[0-9]")))
    finish(start(run, pool, test_pool, cluster, "score.actors=2"), run)
    assert_same(answer(run), undisturbed)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
class TestFullDisk:
    """Promise 3: a full disk is one line, and what was committed stays valid."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        self.mount(disk, "-t", "tmpfs", "-o", "size=400k", "tmpfs")
        yield disk
        subprocess.run(["umount", "--lazy", str(disk)], check=True)

    def mount(self, disk: Path, *options: str) -> None:
        subprocess.run(["mount", *options, str(disk)], check=True)

    def test_a_pool_that_does_not_fit_leaves_nothing(self, cluster: str, disk: Path) -> None:
        rng = np.random.default_rng(0)
        images = [png(rng.integers(0, 256, (64, 64), dtype=np.uint8)) for _ in range(200)]
        path = write_source(disk.parent / "a.parquet", 200, seed=1, image=images)
        with pytest.raises(DiskFull, match="no space left on device; nothing was kept"):
            build(str(path), disk / "pool")
        assert list(disk.iterdir()) == []

    @pytest.mark.slow
    def test_a_run_goes_on_when_there_is_space_again(
        self, cluster: str, pool: Pool, test_pool: Pool, disk: Path, undisturbed: dict[str, object]
    ) -> None:
        run = disk / "run"
        overrides = [*small_overrides(run, pool, test_pool), f"ray.address={cluster}"]
        command = [sys.executable, "-m", "distal", "run", CONFIG, *overrides]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 2, result.stderr
        assert "no space left on device; everything committed so far stays valid" in result.stderr.splitlines()[-1]
        self.mount(disk, "-o", "remount,size=20m")
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 0, result.stderr
        assert_same(answer(run), undisturbed)
