"""What of this machine this process may use: a batch system or a container gives it less than there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 of control groups writes "no limit" as a number of about 2^63


def cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may use, at least 1: those it is bound to, and no more than its control groups allow."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas(root)])))


def memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process may use: that of the machine, and no more than its control groups allow."""
    limits = [int(found[0]) for names in (("memory.max",), ("memory.limit_in_bytes",)) for found in _read(root, names)]
    return min([_installed(root), *(limit for limit in limits if limit < _UNLIMITED)])


def _installed(root: Path) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int((root / "proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _quotas(root: Path) -> Iterator[float]:
    """CPUs by each limit of time: `cpu.max` has quota and period, version 1 has a file for each."""
    for (both,) in _read(root, ("cpu.max",)):
        quota, period = both.split()
        yield int(quota) / int(period)
    for quota, period in _read(root, ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        if int(quota) > 0:  # -1: no limit
            yield int(quota) / int(period)


def _read(root: Path, names: tuple[str, ...]) -> Iterator[list[str]]:
    """What some files say in each of the control groups of this process that has them all, and sets a limit."""
    for folder in _groups(root):
        with suppress(OSError):
            found = [(folder / name).read_text().strip() for name in names]
            if not found[0].startswith("max"):
                yield found


def _groups(root: Path) -> list[Path]:
    """The folders of the control groups of this process, of both versions, and of those above them.

    In a container the path of a group may be that of the host, which is not there. Its own is then the mounted folder.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounted = root / "sys/fs/cgroup" / controllers
        own = mounted / path.lstrip("/")
        folders += [own, *(above for above in own.parents if above.is_relative_to(mounted))]
    return list(dict.fromkeys(folders))
