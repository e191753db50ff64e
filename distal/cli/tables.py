"""Results as tables and lines for a terminal: one function for each command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from distal.records import JsonObject

if TYPE_CHECKING:
    from distal.driver.reanalyse import ReduceResult, SelectResult
    from distal.driver.run import RunResult
    from distal.driver.score_folder import ScoreResult
    from distal.driver.submit import SubmitResult
    from distal.labels.waiting import ExportResult, ImportResult, WaitingResult
    from distal.pool.images import PoolInfo
    from distal.report.explain import DiffResult, ExplainResult
    from distal.report.plan import PlanResult
    from distal.report.repair import PoolRepair, RunRepair
    from distal.report.status import Look, Status
    from distal.report.verify import VerifyResult


def watch_table(look: Look, faults: Iterable[str]) -> Table:
    """A look at a run, with its last faults."""
    counts = ", ".join(f"{name.replace('_', ' ')} ({n})" for name, n in look.faults.items())
    facts = {"run": look.run, "state": run_state(look), "stage": watched_stage(look)}
    table = _facts({**facts, **watched(look)})
    table.add_row("faults", counts or "none")
    for line in faults:
        table.add_row("", Text(line))
    return table


def run_state(status: Status | Look) -> str:
    """The state of a run; when its driver has stopped, with that process."""
    driver = status.driver
    if status.state != "stopped" or driver is None:
        return status.state
    since = timedelta(seconds=round(driver.silent_s))
    return f"stopped (process {driver.pid} on {driver.host}, no sign of life for {since})"


def watched_stage(look: Look) -> str:
    """The stage at work, and its cycle."""
    return look.stage if look.cycle is None else f"cycle {look.cycle}  {look.stage}"


def watched(look: Look) -> dict[str, str]:
    """How far a stage is: name and text of each figure."""
    if look.cycle is None:
        return {}
    figures = {
        "checkpoints": f"{look.scored} scored of {look.published} published of {look.checkpoints} checkpoints",
        "blocks": f"{look.blocks_scored:,}/{look.blocks:,} blocks",
        "images": f"{look.images_scored:,}/{look.images:,} images",
    }
    if look.images_per_s:
        figures["rate"] = f"{look.images_per_s:,.0f} images/s"
        figures["left"] = f"{timedelta(seconds=round(look.seconds_left or 0))} left"
    return figures


def run_table(result: RunResult | WaitingResult) -> Table | str:
    """The summary of a run, or the batch that people are to label."""
    from distal.driver.run import RunResult

    return summary_table(result) if isinstance(result, RunResult) else waiting_table(result)


def waiting_table(waiting: WaitingResult) -> str:
    """The batch that people are to label."""
    conflicts = waiting.conflicts
    disagreed = f"\nannotators disagree on {', '.join(conflicts[:5])}; asked again" if conflicts else ""
    if waiting.short:
        disagreed += (
            f"\nnot enough to begin with: {waiting.short}; declined samples are exported again, and "
            "`distal labels import --allow-unasked` takes labels of others"
        )
    run = waiting.run
    return (
        f"{run}: waiting for labels: {waiting.answered} of {waiting.asked} answered, {waiting.needed} needed"
        f"{disagreed}\nnext: distal labels export {run} --format csv --out batch.csv\n"
        f"      distal labels import {run} batch.csv, and the same command again"
    )


def export_table(result: ExportResult) -> Table:
    """The files for annotators."""
    facts: dict[str, object] = {"samples": result.samples, "format": result.format, "images": result.images}
    files = {f"file {number}": path for number, path in enumerate(result.files, start=1)}
    return _facts({name: value for name, value in facts.items() if value} | files)


def import_table(result: ImportResult) -> str:
    """The answers that were kept."""
    disagreed = f"; annotators disagree on {', '.join(result.conflicts[:5])}" if result.conflicts else ""
    notes = ""
    if result.changed:
        notes = f"\nchanged by the annotator who answered before: {', '.join(result.changed[:5])}"
        notes += "; import the file of another person with --annotator NAME"
    if result.too_late:
        late = ", ".join(result.too_late[:5])
        notes += f"\ntoo late (a trained cycle uses another label), stored and not used: {late}"
    return (
        f"{result.answers} answers, {result.new} new; {result.answered} of the batch are settled, "
        f"{result.needed} needed{disagreed}{notes}"
    )


def summary_table(summary: RunResult) -> Table:
    """The closing table of a run: a row per cycle."""
    cycles = summary.cycles
    stages = list(dict.fromkeys(stage for cycle in cycles for stage in cycle.seconds))
    validated = any(cycle.n_val for cycle in cycles)
    evaluated = _evaluated([(cycle.test, cycle.val) for cycle in cycles])
    notes = [f"{', '.join(stages)}: seconds. ties: share of the batch that a tie-break decided."]
    if validated:
        notes.append("labelled: what the network was trained on. paid: these and the labels to validate on.")
    reasons = dict.fromkeys(f"{name}: {reason}." for cycle in cycles for name, reason in cycle.undefined.items())
    table = Table(
        title=f"{summary.run}: {summary.state}",
        caption="\n".join([*notes, *reasons]),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    paid = ["paid"] if validated else []
    figures = [metric if name == "test" else f"{name} {metric}" for name, metric in evaluated]
    for heading in ("cycle", "labelled", *paid, *figures, *stages, "scored", "batch", "ties"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cycle in cycles:
        table.add_row(
            str(cycle.cycle),
            _count(cycle.n_labeled),
            *(_count(cycle.n_paid) for _ in paid),
            *(_value(getattr(cycle, name), metric) for name, metric in evaluated),
            *(f"{cycle.seconds[s]:.1f}" if s in cycle.seconds else "-" for s in stages),
            f"{cycle.images_scored:,}",
            f"{cycle.n_selected:,}",
            f"{cycle.tie_share:.0%}",
        )
    return table


def submit_table(result: SubmitResult) -> str:
    """A job, and what to type for it."""
    fitting = result.commands.values() if result.state == "submitted" else ()
    commands = "".join(f"\n  {command}" for command in fitting)
    return f"{result.job}: {result.state} ({result.run}){commands}"


def status_table(status: Status) -> Table:
    """How far each cycle is."""
    cycles = status.cycles
    table = Table(
        title=f"{status.run}: {run_state(status)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    paid = ["paid"] if any(cycle.n_val for cycle in cycles) else []
    evaluated = _evaluated([(cycle.test, cycle.val) for cycle in cycles])
    figures = [f"{name} {metric}" for name, metric in evaluated]
    for heading in ("cycle", "complete", "next", "checkpoints", "blocks scored", "labelled", *paid, *figures):
        table.add_column(heading)
    for cycle in cycles:
        values = {"test": cycle.test, "val": cycle.val}
        table.add_row(
            str(cycle.cycle),
            " ".join(cycle.complete) or "-",
            cycle.next or "-",
            f"{cycle.checkpoints_published}/{cycle.checkpoints}",
            f"{cycle.blocks_scored:,}/{cycle.blocks:,}",
            _count(cycle.n_labeled),
            *(_count(cycle.n_paid) for _ in paid),
            *(_value(values[name], metric) for name, metric in evaluated),
        )
    return table


def _evaluated(
    cycles: Iterable[tuple[Mapping[str, object] | None, Mapping[str, object] | None]],
) -> list[tuple[str, str]]:
    """The figures of all cycles, of their `test` and `val`, in order: ("test", "accuracy"), ..."""
    named = [zip(("test", "val"), figures, strict=True) for figures in cycles]
    pairs = [(name, metric) for each in named for name, values in each for metric in values or ()]
    return sorted(dict.fromkeys(pairs), key=lambda pair: pair[0] == "val")


def _value(values: Mapping[str, float | None] | None, metric: str) -> str:
    value = (values or {}).get(metric)
    return "-" if value is None else f"{value:.4f}"


def _count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


def score_table(result: ScoreResult) -> Table:
    """The figures of `distal score`."""
    record = result.to_record()
    names = ("run", "checkpoints", "images_scored", "images_left_out", "seconds", "images_per_s", "precision")
    chosen = ("measure", "selection", "n_selected", "tie_share", "selection_sha256")
    return _facts({name: record[name] for name in (*names, "batch_size", "accuracy", *chosen) if name in record})


def reduce_table(result: ReduceResult) -> Table:
    """The measures that `distal reduce` wrote."""
    table = Table(title=f"{result.run}, cycle {result.cycle}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for heading in ("measure", "window", "checkpoints", "seconds", "scores"):
        table.add_column(heading, overflow="fold")
    for row in result.analyses:
        window = row.window[1:] or "all"
        table.add_row(row.measure, window, str(row.checkpoints), f"{row.seconds:.2f}", str(row.scores))
    return table


def select_table(result: SelectResult) -> Table:
    """The selection of `distal select`."""
    record = result.to_record()
    return _facts({name: value for name, value in record.items() if name != "state" and value != ""})


def comparison_table(result: JsonObject) -> Table:
    """The closing table of a comparison."""
    table = Table(
        title=f"{result['run']}: {result['state']}",
        caption="\n".join(f"{t['strategy']} against {t['reference']}: {t['verdict']}" for t in result["tests"]["each"])
        + f"\nreport: {result['out']}/report.md",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for heading in ("strategy", f"AUBC of {result['metric']}", f"{1 - result['level']:.0%} interval", "seeds"):
        table.add_column(heading, no_wrap=True)
    for row in result["aubc"]:
        mean, low, high = (None if row[name] is None else f"{row[name]:.4f}" for name in ("mean", "low", "high"))
        table.add_row(row["strategy"], mean or "-", f"{low} to {high}" if low else "-", str(row["n"]))
    return table


def informativeness_table(result: JsonObject) -> Table:
    """Error on the most uncertain part, measure by measure."""
    from distal.compare.informativeness import figure_texts, share_names

    table = Table(title=f"{len(result['runs'])} runs, 95% intervals", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for heading in ("measure", "checkpoints", *share_names(result), "rho, error", "rho, dispersion", "overlap"):
        table.add_column(heading, overflow="fold")
    for row in result["measures"]:
        table.add_row(row["measure"], str(row["checkpoints"]), *figure_texts(row))
    return table


def plan_table(plan: PlanResult) -> Table:
    """The cost of a run."""
    facts: dict[str, object] = {
        "samples": plan.samples,
        "candidates": plan.candidates,
        "checkpoints": plan.checkpoints,
        "cycles": plan.cycles,
        "blocks": plan.blocks,
        "block_size": plan.block_size,
        "forwards, first cycle": plan.forwards,
        "objects, first cycle": plan.objects["total"],
        "disk, first cycle": f"up to {_bytes(plan.disk_bytes['total'])} before compression",
    }
    facts |= {f"memory, {role}": _bytes(size) for role, size in plan.memory_bytes.items()}
    for way in plan.alternatives:
        saving = f"{way.forwards:,} forwards, {way.saves:.0%} less"
        facts[f"cheaper: {way.how}"] = f"{way.what}: {saving}"
    facts |= {f"warning {number}": line for number, line in enumerate(plan.warnings, start=1)}
    return _facts(facts)


def explain_table(result: ExplainResult) -> str:
    """What became of a sample."""
    lines = [f"{result.sample_id} (sample {result.sample_index}, {result.status}) {result.uri}"]
    for cycle in result.cycles:
        timeline = " ".join(label or "-" for label in cycle.labels)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in cycle.scores.items() if value is not None)
        place, rank = cycle.rank, ""
        if place is not None and place.rank is not None:
            rank = f"; rank {place.rank:,} of {place.candidates:,}, {place.ties:,} ties"
        lines += [f"cycle {cycle.cycle}: {cycle.why}", f"  {timeline}", f"  {scores}{rank}" if scores else ""]
    return "\n".join(line for line in lines if line)


def diff_table(result: DiffResult) -> str:
    """What two selections share."""
    first, second = result.selected
    lines = [
        f"cycle {result.cycle}: {result.shared} of {first} and {second} are in both (Jaccard {result.jaccard:.3f})"
    ]
    for run, only in zip(result.runs, (result.only_in_first, result.only_in_second), strict=True):
        lines.append(f"only in {run}: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}")
    lines += [f"{key}: {before} -> {after}" for key, (before, after) in result.configuration.items()]
    return "\n".join(lines)


def verify_table(result: VerifyResult) -> str:
    """The damage."""
    lines = [f"damaged: {line}" for line in result.damage]
    n = len(lines)
    end = f"{n} damaged; `distal repair {result.path}` deletes what can be made again" if n else "sound"
    return "\n".join([*lines, f"{result.path}: {result.files:,} files read: {end}"])


def repair_table(result: RunRepair | PoolRepair) -> str:
    """What was done about the damage."""
    from distal.report.repair import RunRepair

    if isinstance(result, RunRepair):
        lines = [f"deleted: {path}" for path in result.deleted]
        lines += [f"done again by the next run: {stage}" for stage in result.redone]
        lines += [f"mended: {line}" for line in result.mended]
    else:
        lines = [f"packed again: {line}" for line in result.packed_again]
    lines += [f"cannot be made again: {line}" for line in result.left]
    lines.append(f"{result.path}: {result.state}{'; next: ' if result.next else ''}{result.next}")
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def pool_table(pool: PoolInfo) -> Table:
    """A pool."""
    return _facts(pool.to_record())


def _facts(facts: Mapping[str, object]) -> Table:
    """A name and a value a line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = [f"{key} ({count:,})" for key, count in value.items()]
        text = ", ".join(map(_number, value)) if isinstance(value, list) else _number(value)
        table.add_row(name, text)
    return table


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
