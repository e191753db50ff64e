"""What the benchmarks share: the conditions they print, and a table."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def conditions() -> dict[str, Any]:
    """The machine, the versions and the command."""
    with Path("/proc/cpuinfo").open() as lines:
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "torchvision", "ray", "zarr", "numpy", "numba")
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(os.path.basename, sys.argv[1:])]),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def peak_rss_bytes() -> int:
    """The most memory this process has had. Not `ru_maxrss`: that starts with the memory of the parent process."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def report(title: str, rows: list[dict[str, Any]], out: Path | None, **facts: Any) -> None:
    """Print a Markdown table with its conditions; write the same as JSON."""
    where = conditions() | facts
    print(f"\n### {title}\n")
    print("; ".join(f"{name} {value}" for name, value in where.items() if name != "command"))
    print(f"\n`{where['command']}`\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |")
    if out is not None:
        out.write_text(json.dumps({"title": title, "conditions": where, "rows": rows}, indent=2) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
