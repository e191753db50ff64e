"""Workflows, issue forms and CITATION.cff are what their readers accept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
SCHEMAS = {
    "github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_match_their_schema(schema: str) -> None:
    assert SCHEMAS[schema]
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [str(program), "--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SCHEMAS["github-workflows"], ids=lambda path: path.name)
def test_workflows_hold_no_secret_and_few_rights(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert "secrets" not in path.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.get("permissions", {"id-token": "write"}) == {"id-token": "write"}
        assert "uses" in job or "timeout-minutes" in job
        for step in job.get("steps", []):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step.get("uses", "a/b@c"))


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in navigation, page.name
