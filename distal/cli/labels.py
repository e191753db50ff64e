"""`distal labels`: export samples to annotators, import their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distal.cli.answer import answer
from distal.cli.options import Command, Json, RunDirectory
from distal.errors import ConfigError

if TYPE_CHECKING:
    from distal.labels.waiting import ExportResult, ImportResult

labels_app = typer.Typer(
    help="Export a batch to annotators, and import their labels.", no_args_is_help=True, rich_markup_mode=None
)


@labels_app.command("export", cls=Command)
def _export(
    run_directory: RunDirectory,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Output file.")],
    fmt: Annotated[Literal["csv", "parquet", "label-studio"], typer.Option("--format", help="File format.")] = "csv",
    copy_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the images to DIR, as PNG.")
    ] = None,
    url_map: Annotated[
        str | None,
        typer.Option(metavar="FROM=TO", help="Replace the prefix FROM of every path or URL by TO."),
    ] = None,
    predictions: Annotated[
        bool,
        typer.Option(
            "--predictions",
            help="Label Studio only: pre-select the predicted class. This biases annotators.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export the samples of a batch that have no label yet.

    In random order, so that annotators learn nothing from the rank.
    """
    from distal.cli.tables import export_table

    def work() -> ExportResult:
        from distal.labels.waiting import export_labels

        if url_map is not None and "=" not in url_map:
            raise ConfigError(f"--url-map must be FROM=TO, got {url_map!r}")
        begins, _, becomes = (url_map or "").partition("=")
        return export_labels(
            run_directory,
            out,
            fmt=fmt,
            copy_images=copy_images,
            url_map=(begins, becomes) if url_map else None,
            predictions=predictions,
        )

    answer(work, as_json, export_table)


@labels_app.command("import", cls=Command)
def _import(
    run_directory: RunDirectory,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, Parquet, or JSON from Label Studio.")],
    annotator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Annotator of rows that name none (default: the name of the file)."),
    ] = None,
    allow_unasked: Annotated[
        bool, typer.Option("--allow-unasked", help="Also accept labels of samples that no batch asked for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Import labels from annotators.

    The next `distal run` uses them. Importing the same file again changes nothing.
    """
    from distal.cli.tables import import_table

    def work() -> ImportResult:
        from distal.labels.waiting import import_labels

        return import_labels(run_directory, file, annotator=annotator, allow_unasked=allow_unasked)

    answer(work, as_json, import_table)
