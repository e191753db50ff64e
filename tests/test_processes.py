from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from distal.processes import this_process


def test_whether_a_process_lives() -> None:
    me = this_process()
    assert me.lives() is True
    assert replace(me, started=me.started - 100).lives() is False  # its id is used again
    for other in (replace(me, machine="another boot"), replace(me, host="elsewhere"), replace(me, machine="")):
        assert other.lives() is None
    assert str(replace(me, pid=7, host="here")) == "process 7 on here"


def test_one_that_has_ended_does_not() -> None:
    code = "from distal.processes import this_process; print(this_process().pid, this_process().started)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, started = process.stdout.readline().split()
    other = replace(this_process(), pid=int(pid), started=float(started))
    process.stdout.close()
    process.wait()
    assert other.lives() is False
