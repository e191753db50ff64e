"""`distal pool`: pack images, and describe a pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distal.cli.answer import answer
from distal.cli.options import RAY_ADDRESS, Command, Json
from distal.errors import ConfigError

if TYPE_CHECKING:
    from distal.pool.images import PoolInfo

_Channels = Literal["auto", "grey", "rgb"]

pool_app = typer.Typer(help="Pack images into a pool, or describe one.", no_args_is_help=True, rich_markup_mode=None)


@pool_app.command("build", cls=Command)
def _build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Parquet file or folder of them, image folder, builtin:NAME or torchvision:NAME."
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Pool folder, new or empty.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Resize all images to W x H pixels; needed when sizes differ."),
    ] = None,
    channels: Annotated[
        _Channels, typer.Option(help="Channels to convert to. auto: grey if the first images are grey, else rgb.")
    ] = "auto",
    image_column: Annotated[
        str,
        typer.Option(metavar="NAME", help="Parquet only: column of encoded images, or of structs {bytes, path}."),
    ] = "image",
    id_column: Annotated[
        str, typer.Option(metavar="NAME", help="Parquet only: column of unique names that never change, if any.")
    ] = "sample_id",
    label_column: Annotated[
        str, typer.Option(metavar="NAME", help="Parquet only: column of labels, if any.")
    ] = "label",
    class_column: Annotated[
        str, typer.Option(metavar="NAME", help="Parquet only: column of class names, if any.")
    ] = "class_name",
    group_column: Annotated[
        str, typer.Option(metavar="NAME", help="Parquet only: column of groups, such as patients, if any.")
    ] = "group_id",
    follow_symlinks: Annotated[
        bool, typer.Option("--follow-symlinks", help="Follow links that lead out of the source folder.")
    ] = False,
    ray_address: Annotated[str, typer.Option(metavar="ADDRESS", help=RAY_ADDRESS, show_default=False)] = "local",
    as_json: Json = False,
) -> None:
    """Pack images into a pool, in parallel."""
    from distal import cluster
    from distal.cli.tables import pool_table
    from distal.cli.terminal import Terminal

    def work() -> PoolInfo:
        from distal.config import NAMED
        from distal.storage import local_path

        where = source if source.startswith(NAMED) else str(local_path(source, "SOURCE"))
        folder = local_path(dest, "DEST")
        shape = _size(size)
        cluster.secure(ray_address)
        with Terminal() as terminal:
            from distal.pool.build import build
            from distal.pool.parquet_source import Columns
            from distal.records import Progress

            columns = Columns(image_column, id_column, label_column, class_column, group_column)
            with cluster.connect(ray_address):
                pool = build(
                    where,
                    folder,
                    columns=columns,
                    size=shape,
                    channels=channels,
                    follow_symlinks=follow_symlinks,
                    on_progress=lambda done, total: terminal.progress(
                        Progress(-1, "packing", images_scored=done, images=total)
                    ),
                )
        return pool.describe()

    answer(work, as_json, pool_table)


@pool_app.command("info", cls=Command)
def pool_info(
    pool: Annotated[Path, typer.Argument(metavar="POOL", help="Pool folder.")], as_json: Json = False
) -> None:
    """Describe a pool: counts, classes, the first unreadable images."""
    from distal.cli.tables import pool_table

    def work() -> PoolInfo:
        from distal.pool import Pool
        from distal.storage import local_path

        return Pool.open(local_path(pool, "POOL")).describe()

    answer(work, as_json, pool_table)


def _size(text: str | None) -> tuple[int, int] | None:
    """(H, W) from WIDTHxHEIGHT, or from one number for a square."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) > 2:
        raise ConfigError(f"--size must be WIDTHxHEIGHT or one number, in pixels, got {text!r}")
    return int(parts[-1]), int(parts[0])
