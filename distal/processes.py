"""The identity of a process, recorded so that others can check later whether it lives."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ProcessIdentity:
    """A process.

    Attributes:
        host: name of its machine, for people.
        machine: boot and process namespace in which `pid` is valid; empty when unknown.
        pid, started: process id and start time (seconds since 1970), because ids are reused.
    """

    host: str
    machine: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def lives(self) -> bool | None:
        """Whether this process lives; None when that cannot be seen from here.

        A name is not enough: other machines and containers may have the same one, and their processes cannot be seen.
        """
        if (self.host, self.machine) != (platform.node(), _machine()):
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def this_process() -> ProcessIdentity:
    """The process that calls this."""
    pid = os.getpid()
    return ProcessIdentity(platform.node(), _machine(), pid, psutil.Process(pid).create_time())


def _machine() -> str:
    """The boot of this machine and the namespace of its process ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return str(int(psutil.boot_time()))
