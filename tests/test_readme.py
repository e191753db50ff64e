"""What a newcomer reads: commands, files and links in README, CONTRIBUTING and docs/ exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

import distal
from distal.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands(group: typer.Typer, prefix: str = "") -> set[str]:
    """What can be typed after `distal`, as names of one or two words."""
    own = {prefix + (info.name or info.callback.__name__) for info in group.registered_commands if info.callback}
    below = [commands(info.typer_instance, f"{info.name} ") for info in group.registered_groups if info.typer_instance]
    return own.union(*below)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_two_commands_do_all_the_setup() -> None:
    setup = "python -m venv .venv && . .venv/bin/activate && "
    assert f"{setup}pip install -e . && distal run configs/quickstart.yaml\n" in README
    assert f"{setup}pip install -e '.[dev]' && pytest\n" in README
    assert "pip install --quiet -e '.[dev]'" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_lists_every_command_and_every_page() -> None:
    rows = re.findall(r"^\| `distal ([^`]*)`", README, flags=re.MULTILINE)
    assert {re.sub(r" [A-Z].*", "", row) for row in rows} == commands(app)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= set(
        re.findall(r"\w[\w-]*\.md", README)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def test_contributing_lists_every_module() -> None:
    tree = CONTRIBUTING.split("## The files")[1].split("```")[1]
    listed = set(re.findall(r"\w+\.py", tree))
    modules = {path.name for path in (ROOT / "distal").rglob("*.py") if not path.name.startswith("__")}
    assert modules <= listed, f"not in CONTRIBUTING.md: {modules - listed}"
    for name in re.findall(r"[\w./-]+\.(?:py|md|yaml|yml)\b", CONTRIBUTING):
        assert list(ROOT.rglob(name)), name


def test_the_glossary_names_modules_that_exist() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text()
    for name in re.findall(r"`([a-z_]+/(?:\w+\.py)?|\w+\.py)`", page):
        assert (ROOT / "distal" / name).exists(), name


def test_versions_agree() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version == distal.__version__
