"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distal.errors import ConfigError

if TYPE_CHECKING:
    from distal.records import Window

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Log events to stderr as JSON lines instead of showing progress.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Override keys, such as train.lr=0.1.", metavar="[KEY=VALUE]...")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
CycleIndex = Annotated[int | None, typer.Option("--cycle", help="Cycle index (default: last scored).", min=0)]
Last = Annotated[float | None, typer.Option(help="Use only the last checkpoints: a number, or a fraction below 1.")]
Every = Annotated[int, typer.Option(help="Use only every k-th checkpoint, counted from the last one.", min=1)]
From = Annotated[int, typer.Option("--from", help="Skip the checkpoints before this index.", min=0)]
PoolPlace = Annotated[Path | None, typer.Option("--pool", help="Path of the pool, if it has moved.")]
Annotate = Annotated[bool, typer.Option("--annotate", help="Also store each sample's most frequent classes.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Run on a Ray cluster: auto or host:port (default: this machine).")
]
RunOrPool = Annotated[Path, typer.Argument(metavar="RUN|POOL", help="Run directory or pool folder.")]


def window_of(first: int, last: float | None, every: int) -> Window:
    """The window of the options --from, --last and --every."""
    from distal.records import Window

    try:
        return Window(first, last, every)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
