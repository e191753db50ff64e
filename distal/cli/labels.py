"""`distal labels`: out to annotators, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from distal.cli.answer import answer
from distal.cli.options import Json, RunDirectory
from distal.errors import ConfigError

labels_app = typer.Typer(help="Out to annotators, and back.", no_args_is_help=True, rich_markup_mode=None)


@labels_app.command("export")
def labels_export(
    run_directory: RunDirectory,
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    fmt: Annotated[Literal["csv", "parquet", "label-studio"], typer.Option("--format", help="Of the file.")] = "csv",
    copy_images: Annotated[Path | None, typer.Option(help="Folder to write the images to, as PNG.")] = None,
    url_map: Annotated[
        str | None, typer.Option(help="FROM=TO: a beginning of every path or URL, and what annotators see instead.")
    ] = None,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Pre-select what the model says. It biases annotators.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what is still to be labelled of the batch that a run waits for."""
    from distal.cli.tables import export_table

    def work() -> dict[str, Any]:
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


@labels_app.command("import")
def labels_import(
    run_directory: RunDirectory,
    file: Annotated[Path, typer.Argument(help="CSV, Parquet, or JSON of Label Studio.")],
    annotator: Annotated[
        str | None, typer.Option(help="Who gave the answers that name nobody; by default the name of the file.")
    ] = None,
    allow_unasked: Annotated[
        bool, typer.Option("--allow-unasked", help="Take labels of samples that no batch asked for, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep the answers of annotators. Importing a file again changes nothing. The next `distal run` uses them."""
    from distal.cli.tables import import_table

    def work() -> dict[str, Any]:
        from distal.labels.waiting import import_labels

        return import_labels(run_directory, file, annotator=annotator, allow_unasked=allow_unasked)

    answer(work, as_json, import_table)
