"""MkDocs hooks: pages from outside docs/ join the site, links to other files become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BESIDE = {
    "cluster/README.md": "cluster.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<fragment>#[^)\s]*)?\)",
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, name in BESIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Resolve the links of a page to pages of the site; of other links only the text stays."""
    sources = {name: source for source, name in BESIDE.items()}
    folder = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def rewritten(link: re.Match[str]) -> str:
        target = link["target"]
        if re.match(r"\w+:", target):
            return link[0]
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if not path.startswith("docs/") and path not in BESIDE:
            return link["text"]
        name = BESIDE.get(path, path.removeprefix("docs/"))
        return f"{link['image']}[{link['text']}]({name}{link['fragment'] or ''})"

    return LINK.sub(rewritten, markdown)
