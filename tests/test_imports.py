"""Imports point down one ladder, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distal"

# From the top: a module imports what stands on its own rung or below. Stages share a rung and never meet.
LADDER = [
    ["__main__", "cli"],
    ["compare"],
    ["driver", "report"],
    ["score", "reduce", "acquire", "labels", "train"],
    ["artifacts", "pool", "model", "cluster"],
    ["config"],
    ["progress", "errors", "records", "hashing", "storage", "plugins", "kernels", "machine", "processes"],
]
STAGES = LADDER[3]
MAY_IMPORT_RAY = {"cluster", "driver/submit", "pool/build", "score/actor", "score/fleet", "score/loop", "train/launch"}
MAY_IMPORT_ZARR = {"artifacts/arrays"}
MAY_IMPORT_DISTRIBUTED = {"train/rank"}


def modules() -> list[str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [str(path.relative_to(PACKAGE).with_suffix("")) for path in paths]
    return [name for name in names if name != "__init__"]


def imported(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "distal":
            found |= {f"distal.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def part(name: str) -> str:
    """The rung's name of a module: its first component below distal."""
    return name.removeprefix("distal.").replace(".", "/").split("/")[0]


def rung(name: str) -> int:
    return next(i for i, names in enumerate(LADDER) if part(name) in names)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down_the_ladder(module: str) -> None:
    for other in imported(module):
        if not other.startswith("distal.") or other == "distal.__version__":
            continue
        assert rung(other) >= rung(module), f"{module} imports {other}, which stands above it"
        if part(module) in STAGES and part(other) in STAGES:
            assert part(module) == part(other), f"the stages {module} and {other} must not know each other"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("ray", MAY_IMPORT_RAY), ("zarr", MAY_IMPORT_ZARR), ("torch.distributed", MAY_IMPORT_DISTRIBUTED)],
)
def test_libraries_stay_at_the_rim(library: str, allowed: set[str]) -> None:
    users = {
        module
        for module in modules()
        if any(name == library or name.startswith(f"{library}.") for name in imported(module))
    }
    assert {module for module in users if not {module, part(module)} & allowed} == set()


@pytest.mark.parametrize("statement", ["import distal", "import distal.cli.app", "import distal.config"])
def test_light_imports_stay_light(statement: str) -> None:
    heavy = ["torch", "ray", "zarr", "numba", "pyarrow"]
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    import distal

    for name in distal.__all__:
        assert getattr(distal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distal.nothing
