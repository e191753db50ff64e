"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Log events to stderr as JSON lines instead of showing progress.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Override keys, such as train.lr=0.1.", metavar="[KEY=VALUE]...")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
