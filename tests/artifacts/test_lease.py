"""Exactly one driver: with real processes, some of them killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from distal.artifacts import lease
from distal.artifacts.lease import Holder, Lease
from distal.errors import RunConflict, Superseded
from distal.storage import names_in, write_json
from tests.helpers import wait_until

HOLD = """
import sys, time
from pathlib import Path
from distal.artifacts.lease import Lease
with Lease(Path(sys.argv[1]), "other"):
    time.sleep(60)
"""


def hold(run: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)])
    while not (run / "driver/000001.json").exists():
        time.sleep(0.01)
    return process


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").touch()
    return folder


def test_a_living_driver_is_named(run: Path) -> None:
    other = hold(run)
    try:
        with pytest.raises(RunConflict, match=rf"attempt other \(process {other.pid} on .*\) is working on this run"):
            Lease(run, "mine").__enter__()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_driver_is_taken_over_at_once(run: Path, reaped: bool) -> None:
    other = hold(run)
    os.kill(other.pid, signal.SIGKILL)
    if reaped:
        other.wait()
    else:
        wait_until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE)
    said: list[str] = []
    with Lease(run, "mine", said.append) as mine:
        mine.check()
        assert names_in(run / "driver") == ["000001.json", "000002.json"]  # a number is given once
    assert said == []  # it waited for nothing
    other.wait()


def test_another_process_with_the_same_id_is_not_the_driver(run: Path) -> None:
    """Process ids are used again."""
    me = Holder.this_process("before the reboot")
    write_json(run / "driver/000004.json", asdict(replace(me, started=me.started - 100)))
    with Lease(run, "mine"):
        assert (run / "driver/000005.json").exists()


def test_of_many_that_take_over_together_one_wins(run: Path) -> None:
    held, refused = [], []
    ready = threading.Barrier(8)

    def take(name: str) -> None:
        mine = Lease(run, name)
        ready.wait()
        try:
            mine.__enter__()
        except RunConflict:
            refused.append(name)
        else:
            held.append(mine)

    threads = [threading.Thread(target=take, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].__exit__(None, None, None)
    with Lease(run, "next"):
        pass


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[float], object] = lambda now: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a lease sleeps by."""
    made = Clock()
    monkeypatch.setattr(lease, "time", made)
    return made


class TestFromAnotherMachine:
    """Whether the holder lives cannot be seen, only whether its beat goes on."""

    def far(self, run: Path, beat: int = 3) -> None:
        holder = replace(Holder.this_process("far"), host="elsewhere", pid=7, beat=beat)
        write_json(run / "driver/000001.json", asdict(holder))

    def test_a_beat_that_stands_still_is_taken_over(self, run: Path, clock: Clock) -> None:
        self.far(run)
        said: list[str] = []
        with Lease(run, "mine", said.append) as mine:
            mine.check()
        assert clock.now == lease.EXPIRY_S
        assert said == [f"{run}: waiting 30 s to see whether attempt far (process 7 on elsewhere) is still at work"]

    def test_a_beat_that_goes_on_is_refused(self, run: Path, clock: Clock) -> None:
        self.far(run)
        clock.on_sleep = lambda now: self.far(run, 4) if now == lease.EXPIRY_S - 1 else None
        with pytest.raises(RunConflict, match=r"attempt far \(process 7 on elsewhere\) is working on this run"):
            Lease(run, "mine").__enter__()

    def test_one_that_was_released_is_free(self, run: Path, clock: Clock) -> None:
        holder = replace(Holder.this_process("far"), host="elsewhere", released=True)
        write_json(run / "driver/000001.json", asdict(holder))
        with Lease(run, "mine"):
            assert clock.now == 0

    @pytest.mark.parametrize("machine", ["another boot", "{}0"])
    def test_the_same_host_name_is_not_the_same_machine(self, run: Path, machine: str, clock: Clock) -> None:
        """A container, a cloned machine: process ids of theirs mean nothing here."""
        me = Holder.this_process("far")
        other = replace(me, machine=machine.format(me.machine), pid=2**22 - 1)
        write_json(run / "driver/000001.json", asdict(other))
        with Lease(run, "mine"):
            assert clock.now == lease.EXPIRY_S


def test_a_lease_that_cannot_be_read_is_waited_for(run: Path, clock: Clock) -> None:
    """A power loss may leave it empty."""
    (run / "driver").mkdir()
    (run / "driver/000001.json").touch()
    with Lease(run, "mine"):
        assert clock.now == lease.EXPIRY_S


def test_a_driver_that_was_superseded_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It slept, and another machine took over."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    with Lease(run, "mine") as mine:
        write_json(run / "driver/000002.json", asdict(replace(Holder.this_process("late"), host="elsewhere")))
        wait_until(lambda: not mine._thread.is_alive())
        with pytest.raises(Superseded, match=r"attempt late \(process \d+ on elsewhere\) has taken over"):
            mine.check()
    record = json.loads((run / "driver/000002.json").read_text())
    assert not record["released"]  # it is not ours any more


def test_the_beat_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)

    def beat() -> int:
        return json.loads((run / "driver/000001.json").read_text())["beat"]

    with Lease(run, "mine"):
        wait_until(beat)
        first = beat()
        wait_until(lambda: beat() > first)
    assert json.loads((run / "driver/000001.json").read_text())["released"]


def test_a_run_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Lease(tmp_path / "run", "mine"):
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()
