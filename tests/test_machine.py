"""Limits of control groups, as systemd, Slurm, Docker and Kubernetes set them, and the CPUs a process is bound to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distal import machine

GIB = 2**30


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:       67108864 kB\nBuffers: 3 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus", "memory"),
    [
        pytest.param("0::/\n", {}, 64, 64, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000", "memory.max": str(8 * GIB)}, 2, 8, id="container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 64, 64, id="max"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 1, 64, id="half a CPU"),
        pytest.param("0::/\n", {"cpu.max": "350000 100000"}, 3, 64, id="three and a half"),
        pytest.param("0::/job/step\n", {"job/memory.max": str(4 * GIB), "job/step/memory.max": "max"}, 64, 4, id="Slurm"),
        pytest.param(
            "0::/a/b\n", {"cpu.max": "300000 100000", "a/cpu.max": "max 1", "a/b/cpu.max": "500000 100000"}, 3, 64,
            id="the least of all above",
        ),
        pytest.param(
            "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": str(16 * GIB),
            },
            4, 16, id="version 1, the group of the host",
        ),
        pytest.param(
            "5:memory:/\n4:cpu,cpuacct:/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            64, 64, id="version 1, no limit",
        ),
        pytest.param("0::/../other\n", {"memory.max": str(2 * GIB)}, 64, 2, id="outside of the namespace"),
    ],
)  # fmt: skip
def test_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, files: dict[str, str], cpus: int, memory: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    root = system(tmp_path, cgroup, files)
    assert machine.cpus(root) == cpus
    assert machine.memory_bytes(root) == memory * GIB


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert machine.cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert machine.memory_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_process_that_is_bound_to_one_cpu() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from distal import machine; print(machine.cpus(), machine.memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpus, memory = map(int, done.stdout.split())
    assert cpus == 1
    assert 2**26 < memory < 2**50
