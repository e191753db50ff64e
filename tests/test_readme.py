"""The README is what a newcomer types: its Python runs, its files exist, its commands are those of the CLI."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_do_all_the_setup() -> None:
    setup = "python -m venv .venv && . .venv/bin/activate && "
    assert f"{setup}pip install -e . && distal run configs/quickstart.yaml\n" in README
    assert f"{setup}pip install -e '.[dev]' && pytest\n" in README
    assert "pip install --quiet -e '.[dev]'" in (ROOT / ".ci" / "run").read_text()


def test_the_python_in_the_readme_runs(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet, names)  # it asserts that the dispersion on disk is the one it computes
    assert names["labels"].shape == (16,)  # type: ignore[attr-defined]


def test_files_and_links_exist() -> None:
    links = re.findall(r"\]\(([^)h][^)]*)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    tree = README.split("## The files")[1].split("```")[1]
    for name in re.findall(r"[\w/-]+\.(?:py|md|yaml)\b", tree):
        assert list(ROOT.rglob(name)), name
    listed = set(re.findall(r"\w+\.py", tree))
    modules = {path.name for path in (ROOT / "distal").rglob("*.py") if not path.name.startswith("__")}
    assert modules <= listed, f"not in the README: {modules - listed}"
