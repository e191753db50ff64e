"""The Python API: docs/api.md is current, its snippet and the example run on a finished run."""

from __future__ import annotations

import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import distal
from docs.api import markdown

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"


def test_the_reference_is_current() -> None:
    assert API.read_text() == markdown(), "run: python -m docs.api > docs/api.md"


def test_the_snippet_runs(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(import distal\n.*?)```", API.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet, names)  # it asserts that the dispersion on disk is the one it computes
    assert names["labels"].shape == (16,)  # type: ignore[attr-defined]


def test_the_example_draws(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "dispersion.png"
    monkeypatch.setattr(sys, "argv", ["dispersion.py", str(small_run), "--out", str(out)])
    names = runpy.run_path(str(ROOT / "examples" / "dispersion.py"))
    with Image.open(out) as figure:
        assert min(figure.size) > 400
    assert sum(names["counts"]) == names["scored"].sum() > 0
    assert all(0 <= share <= 1 for share in names["error"])


@pytest.mark.parametrize("name", ["compare", "reduce", "score"])
def test_a_command_that_shares_its_name_with_a_package(name: str) -> None:
    """It can be called before and after its package is imported, and its modules stay reachable."""
    code = (
        f"import distal\ncalled = distal.{name}\nimport distal.{name}\n"
        f"assert called is distal.{name} and callable(called)\n"
        f"try: called()\nexcept TypeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "missing 1 required" in result.stdout
    assert next(iter(inspect.signature(getattr(distal, name)).parameters)) in ("config", "path")
