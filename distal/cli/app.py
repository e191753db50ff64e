"""The command line: parsing and printing, nothing else. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distal import __version__
from distal.cli.answer import Written, answer, same_command
from distal.cli.labels import labels_app
from distal.cli.options import (
    Annotate,
    BatchSize,
    Check,
    CheckPrecision,
    Command,
    ComparedMeasures,
    CycleIndex,
    Every,
    Exclude,
    ExpectAccuracy,
    From,
    Json,
    Last,
    LogJson,
    Measure,
    Measures,
    NoSelect,
    Overrides,
    PoolPlace,
    RayAddress,
    RunDirectory,
    RunOrPool,
    SampleId,
    WatchFolder,
    window_of,
)
from distal.cli.pool import pool_app
from distal.errors import ConfigError, UserError

if TYPE_CHECKING:
    from distal.compare.informativeness import InformativenessResult
    from distal.compare.strategies import CompareResult
    from distal.driver.reanalyse import ReduceResult, SelectResult
    from distal.driver.run import RunResult
    from distal.driver.score_folder import ScoreResult
    from distal.driver.submit import SubmitResult
    from distal.labels.waiting import WaitingResult
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
app.add_typer(pool_app, name="pool")
app.add_typer(labels_app, name="labels")


def main() -> None:
    """Entry point of the `distal` command."""
    app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("init", cls=Command)
def _init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("distal.yaml"),
    as_json: Json = False,
) -> None:
    """Write a configuration file with every key, commented."""
    from distal.config import commented_yaml

    def work() -> Written:
        if path.exists():
            raise ConfigError(f"{path}: there is a file already; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commented_yaml())
        return Written(path)

    answer(work, as_json, lambda result: f"wrote {result.path}; next: distal run {result.path}")


@app.command("run", cls=Command)
def _run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see docs/config.md.")],
    overrides: Overrides = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Accept evaluation images that are in the pool (eval.allow_overlap)."),
    ] = False,
    log_json: LogJson = False,
    as_json: Json = False,
) -> None:
    """Run the whole loop: train, score, select, label.

    The same command resumes a run that was interrupted.
    """
    from distal import cluster
    from distal.cli.tables import run_table
    from distal.cli.terminal import JsonLines, Terminal
    from distal.config import load

    def work() -> RunResult | WaitingResult:
        loaded = load(config, [*(overrides or []), *(["eval.allow_overlap=true"] if allow_overlap else [])])
        cluster.secure(loaded.ray.address)
        with JsonLines() if log_json else Terminal() as display:
            from distal.driver import run as driver

            return driver.run(loaded, display)

    answer(work, as_json, run_table, same_command)


@app.command("score", cls=Command)
def _score(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file such as configs/score.yaml; see docs/config.md.")
    ],
    overrides: Overrides = None,
    watch: WatchFolder = False,
    no_select: NoSelect = False,
    exclude: Exclude = None,
    check: Check = None,
    expect_accuracy: ExpectAccuracy = None,
    check_precision: CheckPrecision = None,
    log_json: LogJson = False,
    as_json: Json = False,
) -> None:
    """Predict a pool with another program's weights, and select.

    The same command resumes, and scores checkpoints that have appeared since.
    """
    from distal import cluster
    from distal.cli.tables import score_table
    from distal.cli.terminal import JsonLines, Terminal
    from distal.config import ScoreConfig, load

    def work() -> ScoreResult:
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

    answer(work, as_json, score_table, same_command)


@app.command("submit", cls=Command)
def _submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file for run, score or compare, with absolute paths.")
    ],
    address: Annotated[str, typer.Option(metavar="URL", help="URL of the cluster's dashboard: http://HOST:PORT.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stream the log; exit with the exit code of the job.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Pass --watch to `distal score`.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run, score or compare configuration as a Ray job.

    The same command resumes a run that was interrupted.
    """
    from distal.cli.tables import submit_table
    from distal.cli.terminal import Terminal
    from distal.config import load_portable

    commands: dict[str, str] = {}

    def work() -> SubmitResult:
        loaded = load_portable(config, overrides or [])
        if watch and loaded.command != "score":
            raise UserError(f"--watch: {config} is for `distal {loaded.command}`; leave it out")
        with Terminal() as terminal:
            from distal.driver import submit as jobs

            submitted = jobs.submit(loaded, address, ["--watch"] if watch else [])
            if not wait:
                return submitted
            commands.update(submitted.commands)
            terminal.say(submit_table(submitted))
            return jobs.follow(submitted, terminal.say)

    def if_stopped() -> str:
        return f"; the job goes on, stop it with: {commands['stop']}" if commands else ""

    answer(work, as_json, submit_table, if_stopped)


@app.command("reduce", cls=Command)
def _reduce(
    run_directory: RunDirectory,
    measure: Measures = None,
    last: Last = None,
    every: Every = 1,
    first: From = 0,
    annotate: Annotate = False,
    cycle: CycleIndex = None,
    pool: PoolPlace = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Compute other uncertainty measures from stored predictions.

    The network is not run. Over all checkpoints, or over a window of them: --from, --last, --every.
    """
    from distal.cli.tables import reduce_table
    from distal.cli.terminal import Terminal

    def work() -> ReduceResult:
        with Terminal() as terminal:
            from distal.driver.reanalyse import reduce_run

            return reduce_run(
                run_directory,
                cycle=cycle,
                measures=tuple(measure or ()),
                window=window_of(first, last, every),
                annotate=annotate,
                pool=pool,
                ray_address=ray_address,
                display=terminal,
            )

    answer(work, as_json, reduce_table)


@app.command("select", cls=Command)
def _select(
    run_directory: RunDirectory,
    budget: Annotated[int, typer.Option(metavar="N", help="Number of samples to select.", min=1)],
    measure: Measure = None,
    last: Last = None,
    every: Every = 1,
    first: From = 0,
    annotate: Annotate = False,
    cycle: CycleIndex = None,
    pool: PoolPlace = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Select samples from stored predictions.

    The network is not run. By another measure, window of checkpoints, or budget than the run.
    """
    from distal.cli.tables import select_table
    from distal.cli.terminal import Terminal

    def work() -> SelectResult:
        with Terminal() as terminal:
            from distal.driver.reanalyse import select_run

            return select_run(
                run_directory,
                budget=budget,
                measure=measure,
                cycle=cycle,
                window=window_of(first, last, every),
                annotate=annotate,
                pool=pool,
                ray_address=ray_address,
                display=terminal,
            )

    answer(work, as_json, select_table)


@app.command("plan", cls=Command)
def _plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file for run, score or compare.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a run before it starts.

    Forward passes, files, disk and memory, and cheaper alternatives.
    """
    from distal.cli.tables import plan_table
    from distal.config import load_any

    def work() -> PlanResult:
        loaded = load_any(config, overrides or [])
        from distal.report.plan import plan as plan_run

        return plan_run(loaded)

    answer(work, as_json, plan_table)


@app.command("status", cls=Command)
def _status(
    run_directory: RunDirectory,
    watch: Annotated[bool, typer.Option("--watch", help="Poll until the run is complete.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --watch: seconds between two polls.", min=0.1)
    ] = 2.0,
    as_json: Json = False,
) -> None:
    """Report the progress of a run, from its files alone."""
    from distal.cli.tables import status_table
    from distal.cli.terminal import WatchScreen
    from distal.report.status import status as status_of
    from distal.report.status import watch as watch_run

    def work() -> Status:
        if not watch:
            return status_of(run_directory)
        with WatchScreen() as screen:
            return watch_run(run_directory, screen.show, interval)

    answer(work, as_json, status_table)


@app.command("tensorboard", cls=Command)
def _tensorboard(
    run_directory: RunDirectory,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder, new or empty.")],
    as_json: Json = False,
) -> None:
    """Export the metrics of a run for TensorBoard.

    Losses, accuracies, seconds per stage, and faults.
    """

    def work() -> TensorboardResult:
        from distal.report.tensorboard import export

        return export(run_directory, out)

    answer(work, as_json, lambda result: f"{result.scalars} values; next: tensorboard --logdir {result.out}")


@app.command("explain", cls=Command)
def _explain(
    run_directory: RunDirectory,
    sample_id: SampleId,
    pool: PoolPlace = None,
    as_json: Json = False,
) -> None:
    """Show why a sample was selected or not.

    Prints the class predicted at every checkpoint, and the scores.
    """
    from distal.cli.tables import explain_table

    def work() -> ExplainResult:
        from distal.report.explain import explain as explain_sample

        return explain_sample(run_directory, sample_id, pool=pool)

    answer(work, as_json, explain_table)


@app.command("diff", cls=Command)
def _diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another run directory.")],
    cycle: CycleIndex = None,
    as_json: Json = False,
) -> None:
    """Compare the selections of two runs.

    Also lists the configuration keys that differ and affect results.
    """
    from distal.cli.tables import diff_table

    def work() -> DiffResult:
        from distal.report.explain import diff as diff_runs

        return diff_runs(first, second, cycle=cycle)

    answer(work, as_json, diff_table)


@app.command("informativeness", cls=Command)
def _informativeness(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    measure: ComparedMeasures = None,
    cycle: CycleIndex = None,
    budget: BatchSize = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for table, figure and numbers.")] = None,
    pool: PoolPlace = None,
    as_json: Json = False,
) -> None:
    """Report the network's error on each measure's top samples.

    Needs a pool with labels. Nothing is trained or predicted.
    """
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

    answer(work, as_json, informativeness_table)


@app.command("compare", cls=Command)
def _compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with a `compare` section.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run several strategies and seeds, and compare them.

    Paired tests, corrected for multiple testing (Holm). The same command resumes.
    """
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

    answer(work, as_json, comparison_table, same_command)


@app.command("verify", cls=Command)
def _verify(path: RunOrPool, as_json: Json = False) -> None:
    """Check every file of a run or pool against its checksum.

    Changes nothing. Exits with 4 when a file is damaged.
    """
    from distal.cli.tables import verify_table
    from distal.cli.terminal import Terminal

    def work() -> VerifyResult:
        with Terminal() as terminal:
            from distal.report.verify import verify as verify_all
            from distal.storage import local_path

            return verify_all(local_path(path, "RUN|POOL"), terminal)

    answer(work, as_json, verify_table)


@app.command("repair", cls=Command)
def _repair(path: RunOrPool, as_json: Json = False) -> None:
    """Delete or mend damaged files.

    RUN: delete damaged files; the original command recomputes them. POOL: repack damaged images now, from its source.
    """
    from distal.cli.tables import repair_table
    from distal.cli.terminal import Terminal

    def work() -> RunRepair | PoolRepair:
        with Terminal() as terminal:
            from distal.report.repair import repair as repair_all
            from distal.storage import local_path

            return repair_all(local_path(path, "RUN|POOL"), terminal)

    answer(work, as_json, repair_table)
