"""Arguments and options: shared ones, ones with long help, and the format of `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from distal.errors import ConfigError

if TYPE_CHECKING:
    from distal.records import Window

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Log events to stderr as JSON lines instead of showing progress.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to override, such as score.batch_size=64.")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
CycleIndex = Annotated[
    int | None,
    typer.Option("--cycle", metavar="N", help="Cycle, counted from 0 (default: the last one scored).", min=0),
]
Last = Annotated[
    float | None,
    typer.Option(metavar="N", help="Use only the last N checkpoints (10), or that share of them (0.25)."),
]
Every = Annotated[
    int, typer.Option(metavar="K", help="Use only every K-th checkpoint, counted back from the last one.", min=1)
]
From = Annotated[int, typer.Option("--from", metavar="N", help="Leave out the first N checkpoints.", min=0)]
PoolPlace = Annotated[Path | None, typer.Option("--pool", metavar="POOL", help="Path of the pool, if it has moved.")]
Annotate = Annotated[bool, typer.Option("--annotate", help="Also store the two most frequent classes of each sample.")]
RAY_ADDRESS = "Ray to run on: auto, host:port, or local (this machine, the default)."
RayAddress = Annotated[str | None, typer.Option(metavar="ADDRESS", help=RAY_ADDRESS)]
RunOrPool = Annotated[Path, typer.Argument(metavar="RUN|POOL", help="Run directory or pool folder.")]
SampleId = Annotated[
    str,
    typer.Argument(metavar="SAMPLE_ID", help="Name of the image: column sample_id of selection.parquet."),
]
NoSelect = Annotated[bool, typer.Option("--no-select", help="Score only; select later with `distal select`.")]
WatchFolder = Annotated[
    bool,
    typer.Option(
        "--watch",
        help="Keep scoring new checkpoints until there are checkpoints.expect, or none has appeared for "
        "checkpoints.idle seconds.",
    ),
]
Exclude = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Samples already labelled, left out (pool.exclude).")
]
Check = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="CSV or Parquet with known labels; predicted first, to check weights and preprocessing.",
    ),
]
ExpectAccuracy = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="With --check: exit before scoring the pool if the accuracy is lower.", min=0, max=1
    ),
]
CheckPrecision = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Score N blocks of images in fp32 too, and report how many predictions differ.",
        min=1,
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEASURE",
        help="Measure to compute, such as vote_entropy@last=0.5; see docs/selecting.md. Can be repeated "
        "(default: that of the run).",
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        metavar="MEASURE",
        help="Measure to rank by, such as vote_entropy@last=0.5; see docs/selecting.md (default: that of the run).",
    ),
]
ComparedMeasures = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEASURE",
        help="Measure, such as flips@last=0.5; can be repeated (default: all that the stored predictions allow, "
        "and windows of dispersion).",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Size of the batches whose overlap with dispersion is reported (default: the budget of the run).",
        min=1,
    ),
]


class Command(TyperCommand):
    """A command whose `--help` shows an argument by its name alone: typer adds a type of Python."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the arguments, then the options."""
        for kind in ("argument", "option"):
            records = [param.get_help_record(ctx) for param in self.get_params(ctx) if param.param_type_name == kind]
            rows = [
                (name.partition(" <")[0] if kind == "argument" else name, text) for name, text in filter(None, records)
            ]
            if rows:
                with formatter.section(f"{kind.capitalize()}s"):
                    formatter.write_dl(rows)


def window_of(first: int, last: float | None, every: int) -> Window:
    """The window of the options --from, --last and --every."""
    from distal.records import Window

    try:
        return Window(first, last, every)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
