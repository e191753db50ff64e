"""The command line: parsing and printing, nothing else. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from distal import __version__
from distal.errors import ConfigError, Damage, DistalError, UserError, one_line
from distal.records import Result

if TYPE_CHECKING:
    from rich.table import Table

    from distal.compare.informativeness import InformativenessResult
    from distal.compare.strategies import CompareResult
    from distal.labels.waiting import ExportResult, ImportResult
    from distal.pool.images import PoolInfo
    from distal.records import JsonObject, Window
    from distal.report.explain import DiffResult, ExplainResult
    from distal.report.plan import PlanResult
    from distal.report.repair import PoolRepair, RunRepair
    from distal.report.status import Status
    from distal.report.tensorboard import TensorboardResult
    from distal.report.verify import VerifyResult

app = typer.Typer(
    name="distal",
    help="Find the few thousand images worth labelling in a pool of millions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pool_app = typer.Typer(help="Pack images into a pool, and look at one.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pool_app, name="pool")
labels_app = typer.Typer(help="Out to annotators, and back.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(labels_app, name="labels")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Log to stderr as JSON, a line per event, instead of showing progress.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", metavar="[KEY=VALUE]...")]
Channels = Literal["auto", "grey", "rgb"]
AnyResult = TypeVar("AnyResult", bound="Result | JsonObject")
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the process of a job


@dataclass(frozen=True)
class Written(Result):
    """The file that a command wrote."""

    path: Path


def main() -> None:
    """Entry point of the `distal` command."""
    app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("distal.yaml"), as_json: Json = False
) -> None:
    """Write a commented configuration with every key."""
    from distal.config import commented_yaml

    def work() -> Written:
        if path.exists():
            raise ConfigError(f"{path}: there is a file already; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commented_yaml())
        return Written(path)

    _answer(work, as_json, lambda result: f"wrote {result.path}; next: distal run {result.path}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see docs/config.md.")],
    overrides: Overrides = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Go on when images to evaluate on are in the pool (eval.allow_overlap)."),
    ] = False,
    log_json: LogJson = False,
    as_json: Json = False,
) -> None:
    """Run the whole loop. The same command again continues where it stopped."""
    from distal import cluster
    from distal.cli.tables import run_table
    from distal.cli.terminal import JsonLines, Terminal
    from distal.config import load

    def work() -> dict[str, Any]:
        loaded = load(config, [*(overrides or []), *(["eval.allow_overlap=true"] if allow_overlap else [])])
        cluster.secure(loaded.ray.address)
        with JsonLines() if log_json else Terminal() as display:
            from distal.driver import run as driver

            return driver.run(loaded, display)

    _answer(work, as_json, run_table, _same_command)


@app.command()
def score(
    config: Annotated[Path, typer.Argument(help="YAML file such as configs/score.yaml; see docs/config.md.")],
    overrides: Overrides = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Wait for more, until checkpoints.expect of them are there or checkpoints.idle s pass."
        ),
    ] = False,
    no_select: Annotated[bool, typer.Option("--no-select", help="Score only; `distal select` selects later.")] = False,
    exclude: Annotated[Path | None, typer.Option(help="File of samples that are labelled (pool.exclude).")] = None,
    check: Annotated[Path | None, typer.Option(help="File of known samples (sample_id, label), scored first.")] = None,
    expect_accuracy: Annotated[
        float | None, typer.Option(help="With --check: refuse to go on below it.", min=0, max=1)
    ] = None,
    check_precision: Annotated[int | None, typer.Option(help="Blocks to score in fp32, too.", min=1)] = None,
    log_json: LogJson = False,
    as_json: Json = False,
) -> None:
    """Score a pool at the checkpoints of a directory, then reduce and select. Again, it does what is missing."""
    from distal import cluster
    from distal.cli.tables import score_table
    from distal.cli.terminal import JsonLines, Terminal
    from distal.config import ScoreConfig, load

    def work() -> dict[str, Any]:
        if expect_accuracy is not None and check is None:
            raise ConfigError("--expect-accuracy needs --check FILE")
        extra = [f"pool.exclude={exclude}"] if exclude else []
        loaded = load(config, [*(overrides or []), *extra], ScoreConfig)
        cluster.secure(loaded.ray.address)
        with JsonLines() if log_json else Terminal() as display:
            from distal.driver.score_folder import score_directory

            return score_directory(
                loaded,
                display,
                watch=watch,
                select=not no_select,
                check=check,
                expect_accuracy=expect_accuracy,
                check_precision=check_precision,
            )

    _answer(work, as_json, score_table, _same_command)


@app.command()
def submit(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run, a comparison, or `distal score`; absolute paths.")
    ],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, or a tunnel to it: http://HOST:PORT.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show its log, and end as it ends.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Have `distal score` wait for more checkpoints.")] = False,
    as_json: Json = False,
) -> None:
    """Run it as a job of a Ray cluster. The same command again continues a run that was stopped."""
    from distal.cli.tables import submit_table
    from distal.cli.terminal import Terminal
    from distal.config import load_portable

    commands: dict[str, str] = {}

    def work() -> dict[str, Any]:
        loaded = load_portable(config, overrides or [])
        if watch and loaded.command != "score":
            raise UserError(f"--watch: {config} is for `distal {loaded.command}`; leave it out")
        with Terminal() as terminal:
            from distal.driver import submit as jobs

            submitted = jobs.submit(loaded, address, ["--watch"] if watch else [])
            if not wait:
                return submitted.record()
            commands.update(submitted.commands)
            terminal.say(submit_table(submitted.record()))
            return jobs.follow(submitted, terminal.say)

    def if_stopped() -> str:
        return f"; the job goes on, stop it with: {commands['stop']}" if commands else ""

    _answer(work, as_json, submit_table, if_stopped)


RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
CycleIndex = Annotated[int | None, typer.Option("--cycle", help="Which cycle; the last one that is scored.", min=0)]
Last = Annotated[float | None, typer.Option(help="Only the last checkpoints: a number, or below 1 a share.")]
Every = Annotated[int, typer.Option(help="Only every k-th checkpoint, counted from the last one.", min=1)]
From = Annotated[int, typer.Option("--from", help="Leave out the checkpoints before this one.", min=0)]
PoolPlace = Annotated[Path | None, typer.Option("--pool", help="Where the pool of the run is, if it has moved.")]
Annotate = Annotated[bool, typer.Option("--annotate", help="Keep each sample's most frequent classes, too.")]
RayAddress = Annotated[str | None, typer.Option(help="Share the work among the nodes of a cluster: auto or host:port.")]


def _window(first: int, last: float | None, every: int) -> Window:
    from distal.records import Window

    try:
        return Window(first, last, every)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


@app.command()
def reduce(
    run_directory: RunDirectory,
    measure: Annotated[list[str] | None, typer.Option(help="A measure; may be given several times.")] = None,
    last: Last = None,
    every: Every = 1,
    first: From = 0,
    annotate: Annotate = False,
    cycle: CycleIndex = None,
    pool: PoolPlace = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Compute measures of stored assignments, of all checkpoints or of a window; no inference."""
    from distal.cli.tables import reduce_table
    from distal.cli.terminal import Terminal

    def work() -> dict[str, Any]:
        with Terminal() as terminal:
            from distal.driver.reanalyse import reduce_run

            return reduce_run(
                run_directory,
                cycle=cycle,
                measures=tuple(measure or ()),
                window=_window(first, last, every),
                annotate=annotate,
                pool=pool,
                ray_address=ray_address,
                display=terminal,
            )

    _answer(work, as_json, reduce_table)


@app.command()
def select(
    run_directory: RunDirectory,
    budget: Annotated[int, typer.Option(help="Samples to select.", min=1)],
    measure: Annotated[str | None, typer.Option(help="The measure; by default the run's.")] = None,
    last: Last = None,
    every: Every = 1,
    first: From = 0,
    annotate: Annotate = False,
    cycle: CycleIndex = None,
    pool: PoolPlace = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Select samples by stored assignments, under another measure, window or budget; no inference."""
    from distal.cli.tables import select_table
    from distal.cli.terminal import Terminal

    def work() -> dict[str, Any]:
        with Terminal() as terminal:
            from distal.driver.reanalyse import select_run

            return select_run(
                run_directory,
                budget=budget,
                measure=measure,
                cycle=cycle,
                window=_window(first, last, every),
                annotate=annotate,
                pool=pool,
                ray_address=ray_address,
                display=terminal,
            )

    _answer(work, as_json, select_table)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of a run, a comparison, or `distal score`.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Tell what a run will cost before anything starts: passes, objects, disk, memory, and what would be cheaper."""
    from distal.cli.tables import plan_table
    from distal.config import load_any

    def work() -> PlanResult:
        loaded = load_any(config, overrides or [])
        from distal.report.plan import plan as plan_run

        return plan_run(loaded)

    _answer(work, as_json, plan_table)


@app.command()
def status(
    run_directory: RunDirectory,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until the run is complete.")] = False,
    interval: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=0.1)] = 2.0,
    as_json: Json = False,
) -> None:
    """Tell from storage alone how far a run is."""
    from distal.cli.tables import status_table
    from distal.cli.terminal import WatchScreen
    from distal.report.status import status as status_of
    from distal.report.status import watch as watch_run

    def work() -> Status:
        if not watch:
            return status_of(run_directory)
        with WatchScreen() as screen:
            return watch_run(run_directory, screen.show, interval)

    _answer(work, as_json, status_table)


@app.command()
def tensorboard(
    run_directory: RunDirectory,
    out: Annotated[Path, typer.Option("--out", help="Folder for TensorBoard; a new or an empty one.")],
    as_json: Json = False,
) -> None:
    """Write what a run has measured so far for TensorBoard: losses, accuracies, seconds, faults."""

    def work() -> TensorboardResult:
        from distal.report.tensorboard import export

        return export(run_directory, out)

    _answer(work, as_json, lambda result: f"{result.scalars} values; next: tensorboard --logdir {result.out}")


@app.command()
def explain(
    run_directory: RunDirectory,
    sample_id: Annotated[str, typer.Argument(metavar="SAMPLE_ID", help="The name of a sample.")],
    pool: PoolPlace = None,
    as_json: Json = False,
) -> None:
    """Tell what every checkpoint said of a sample, and why it was chosen or not."""
    from distal.cli.tables import explain_table

    def work() -> ExplainResult:
        from distal.report.explain import explain as explain_sample

        return explain_sample(run_directory, sample_id, pool=pool)

    _answer(work, as_json, explain_table)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    cycle: CycleIndex = None,
    as_json: Json = False,
) -> None:
    """Tell what the selections of two runs share, and which decisive keys differ."""
    from distal.cli.tables import diff_table

    def work() -> DiffResult:
        from distal.report.explain import diff as diff_runs

        return diff_runs(first, second, cycle=cycle)

    _answer(work, as_json, diff_table)


@app.command()
def informativeness(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    measure: Annotated[list[str] | None, typer.Option(help="A measure, such as flips@last=0.5; several times.")] = None,
    cycle: CycleIndex = None,
    budget: Annotated[int | None, typer.Option(help="Samples of which the overlap is told.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the table, the figure and the numbers.")] = None,
    pool: PoolPlace = None,
    as_json: Json = False,
) -> None:
    """Tell how often the final network errs on what each measure ranks first; needs the pool's labels."""
    from distal.cli.tables import informativeness_table
    from distal.cli.terminal import Terminal

    def work() -> InformativenessResult:
        with Terminal() as terminal:
            from distal.compare.informativeness import informativeness as of_runs

            return of_runs(
                run_directories,
                measures=measure or (),
                cycle=cycle,
                budget=budget,
                out=out,
                pool=pool,
                display=terminal,
            )

    _answer(work, as_json, informativeness_table)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file with a section `compare`.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run strategies x seeds and compare them. The same command again continues where it stopped."""
    from distal import cluster
    from distal.cli.tables import comparison_table
    from distal.cli.terminal import Terminal
    from distal.config import CompareConfig, load

    def work() -> CompareResult:
        loaded = load(config, overrides or [], CompareConfig)
        cluster.secure(loaded.ray.address)
        with Terminal() as terminal:
            from distal.compare.strategies import compare as compare_strategies

            return compare_strategies(loaded, terminal)

    _answer(work, as_json, comparison_table, _same_command)


RunOrPool = Annotated[Path, typer.Argument(metavar="RUN|POOL", help="Run directory, or folder of a pool.")]


@app.command()
def verify(path: RunOrPool, as_json: Json = False) -> None:
    """Read everything of a run or a pool and check it; exit 4 when something is damaged. Nothing is changed."""
    from distal.cli.tables import verify_table
    from distal.cli.terminal import Terminal

    def work() -> VerifyResult:
        with Terminal() as terminal:
            from distal.report.verify import verify as verify_all
            from distal.storage import local_path

            return verify_all(local_path(path, "RUN|POOL"), terminal)

    _answer(work, as_json, verify_table)


@app.command()
def repair(path: RunOrPool, as_json: Json = False) -> None:
    """Delete what is damaged, so that the command that made it makes it again; in a pool, pack the images again."""
    from distal.cli.tables import repair_table
    from distal.cli.terminal import Terminal

    def work() -> RunRepair | PoolRepair:
        with Terminal() as terminal:
            from distal.report.repair import repair as repair_all
            from distal.storage import local_path

            return repair_all(local_path(path, "RUN|POOL"), terminal)

    _answer(work, as_json, repair_table)


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

    _answer(work, as_json, export_table)


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

    def work() -> ImportResult:
        from distal.labels.waiting import import_labels

        return import_labels(run_directory, file, annotator=annotator, allow_unasked=allow_unasked)

    _answer(work, as_json, import_table)


@pool_app.command("build")
def pool_build(
    source: Annotated[
        str, typer.Argument(help="Parquet file or folder, image folder, builtin:NAME, torchvision:NAME.")
    ],
    dest: Annotated[Path, typer.Argument(help="Folder of the pool.")],
    size: Annotated[str | None, typer.Option(help="Resize all images to WIDTHxHEIGHT pixels.")] = None,
    channels: Annotated[Channels, typer.Option(help="auto: grey when the first images are.")] = "auto",
    image_column: Annotated[str, typer.Option(help="Column of encoded images, or of bytes and path.")] = "image",
    id_column: Annotated[str, typer.Option(help="Column of stable names.")] = "sample_id",
    label_column: Annotated[str, typer.Option(help="Column of labels, if any.")] = "label",
    class_column: Annotated[str, typer.Option(help="Column of class names, if any.")] = "class_name",
    group_column: Annotated[str, typer.Option(help="Column of groups, if any.")] = "group_id",
    follow_symlinks: Annotated[
        bool, typer.Option("--follow-symlinks", help="Also follow links that lead out of the source's folder.")
    ] = False,
    ray_address: Annotated[str, typer.Option(help="local, auto or host:port.")] = "local",
    as_json: Json = False,
) -> None:
    """Pack a source into a pool, once, in parallel."""
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
            from distal.pool.sources import Columns
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

    _answer(work, as_json, pool_table)


@pool_app.command("info")
def pool_info(pool: Annotated[Path, typer.Argument(help="Folder of the pool.")], as_json: Json = False) -> None:
    """Describe a pool."""
    from distal.cli.tables import pool_table

    def work() -> PoolInfo:
        from distal.pool import Pool
        from distal.storage import local_path

        return Pool.open(local_path(pool, "POOL")).describe()

    _answer(work, as_json, pool_table)


def _size(text: str | None) -> tuple[int, int] | None:
    """(H, W) from WIDTHxHEIGHT, or from one number for a square."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) > 2:
        raise ConfigError(f"--size must be WIDTHxHEIGHT or one number, in pixels, got {text!r}")
    return int(parts[-1]), int(parts[0])


def _answer(
    work: Callable[[], AnyResult],
    as_json: bool,
    render: Callable[[AnyResult], Table | str],
    if_stopped: Callable[[], str] = str,
) -> None:
    """Run a command's work and print what it returns; every exit code is decided here.

    Args:
        if_stopped: what to add when a signal stops it.
    """
    _stop_on_signals(as_json, if_stopped)
    try:
        result = work()
    except DistalError as error:
        raise _refuse(one_line(error), error.exit_code, as_json) from None
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        line = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}; give a path that can be used"
        raise _refuse(line, UserError.exit_code, as_json) from None
    except Exception as error:
        if as_json:
            print(json.dumps({"state": "error", "error": one_line(error), "exit_code": 1}))
        raise
    record = result.to_record() if isinstance(result, Result) else result
    if as_json:
        print(json.dumps(record))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(render(result), markup=False, highlight=False)
    if record.get("state") == "damaged":
        raise typer.Exit(Damage.exit_code)
    if record.get("exit_code"):
        raise typer.Exit(record["exit_code"])


def _refuse(line: str, exit_code: int, as_json: bool) -> typer.Exit:
    """Say in one line what went wrong, and nothing that a terminal would obey: names of files may hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"distal: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"state": "error", "error": line, "exit_code": exit_code}))
    return typer.Exit(exit_code)


def _same_command() -> str:
    if IN_A_JOB in os.environ:  # where the command names a file that lives as long as the job
        return "; submit it again to go on"
    return f"; continue with: distal {shlex.join(sys.argv[1:])}"


def _stop_on_signals(as_json: bool, if_stopped: Callable[[], str]) -> None:
    """Leave at once on SIGINT and SIGTERM, with one line that says how to continue.

    Everything committed is on disk and nothing else counts, so there is nothing to tidy up: a run that was
    stopped is continued like one that was killed. Ray's processes end when their driver is gone.
    """

    def stop(number: int, _: FrameType | None) -> None:
        line = f"stopped by {signal.Signals(number).name}{if_stopped()}"
        # os.write: the signal may have come in the middle of a print. A progress bar stays and had hidden the cursor.
        bar = "\n\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{bar}distal: {line}\n".encode())
        if as_json:
            os.write(1, json.dumps({"state": "stopped", "error": line, "exit_code": 128 + number}).encode() + b"\n")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
