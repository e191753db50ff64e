"""Why a sample was chosen or not, and what two selections share: told from storage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distal.assignments import Assignments
from distal.config import Config, ForeignConfig
from distal.errors import RunConflict, UserError
from distal.lists import find
from distal.pool import Pool
from distal.records import STRIPE_SAMPLES, JsonObject, split_blocks
from distal.runs import Cycle, Run
from distal.scores import Scores
from distal.selection import Selection


def explain(path: Path, sample_id: str, *, pool: Path | None = None) -> JsonObject:
    """What became of one sample in every cycle that has been scored.

    Args:
        pool: where the pool of the run is now, if it has moved.

    Returns:
        `{"sample_id", "sample_index", "status", "cycles": [...]}`, a cycle with the class at every checkpoint
        (`labels`, None where not assigned), every score, its rank, and why the sample was chosen or not.

    Raises:
        UserError: the pool has no such sample, or nothing has been scored.
    """
    run = Run.open(path)
    scored = [cycle for cycle in run.begun_cycles() if cycle.marker("score")]
    if not scored or scored[-1].config is None:
        raise RunConflict(f"{path}: no cycle has been scored yet")
    opened = Pool.open(pool or Path(scored[-1].config.pool.path))
    index = int(find(opened, [sample_id])[0])
    if index < 0:
        raise UserError(
            f"{sample_id}: the pool {opened.path} has no such sample; `distal pool info` tells how many it has"
        )
    row = opened.take_samples([index], ["status", "uri"]).to_pylist()[0]
    told = [_told(run, cycle, opened, index) for cycle in scored]
    return {"run": str(run.path), "sample_id": sample_id, "sample_index": index, **row, "cycles": told}


def diff(first: Path, second: Path, *, cycle: int | None = None) -> JsonObject:
    """What the selections of two runs share.

    Args:
        cycle: by default the last one that both have selected in.

    Raises:
        UserError: a run has no such selection.
    """
    runs = [Run.open(first), Run.open(second)]
    selected = [{c.index: c for c in run.begun_cycles() if c.marker("select")} for run in runs]
    common = sorted(set(selected[0]) & set(selected[1]))
    if not common or (cycle is not None and cycle not in common):
        raise RunConflict(f"{first} and {second}: no selection of the same cycle in both; in both are {common}")
    chosen = common[-1] if cycle is None else cycle
    cycles = [each[chosen] for each in selected]
    batches = [each.chosen() for each in cycles]
    ids = [dict(zip(batch.sample_ids, range(len(batch)), strict=True)) for batch in batches]
    shared = [name for name in ids[0] if name in ids[1]]
    configs = [_decisive(each) for each in cycles]
    differing = {
        key: [configs[0].get(key), configs[1].get(key)]
        for key in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(key) != configs[1].get(key)
    }
    return {
        "runs": [str(run.path) for run in runs],
        "cycle": chosen,
        "selected": [len(batch) for batch in batches],
        "shared": len(shared),
        "jaccard": len(shared) / max(1, len(ids[0].keys() | ids[1].keys())),
        "shared_ids": shared,
        "only_in_first": [name for name in ids[0] if name not in ids[1]],
        "only_in_second": [name for name in ids[1] if name not in ids[0]],
        "configuration": differing,
    }


def _told(run: Run, cycle: Cycle, pool: Pool, index: int) -> JsonObject:
    marker, config = cycle.marker("score"), cycle.config
    assert marker is not None
    assert config is not None
    n_rows = marker["n_rows"]
    assignments = Assignments.open(cycle.assignments)
    names = _classes(config, pool)
    votes = assignments.read(index, index + 1, range(n_rows))[:, 0]
    labels = [_name(names, int(vote)) if vote < assignments.n_classes else None for vote in votes]
    told: JsonObject = {
        "cycle": cycle.index,
        "eligible": bool(assignments.eligible(index, index + 1)[0]),
        "labels": labels,
        "changes": int((votes[1:] != votes[:-1]).sum()),
        "scores": {},
    }
    if isinstance(config, Config):
        ledger = run.ledger(before=cycle.index)
        at = np.flatnonzero(ledger.indices == index)
        told["label_before"] = _name(names, int(ledger.labels[at[0]])) if len(at) else None
        told["declined"] = bool(np.isin(index, ledger.declined))
    if cycle.marker("reduce"):
        scores = Scores.open(cycle.scores)
        told["scores"] = {name: _number(scores.read(name, index, index + 1)[0]) for name in scores.measures}
        told |= _rank(scores, config.select.measure, index)
    if cycle.marker("select"):
        batch = cycle.chosen()
        told |= _chosen(batch, index)
        if config.select.max_per_group is not None:
            told |= _group(batch, pool, index, config.select.max_per_group)
            told["short"] = isinstance(config, Config) and told["budget"] < config.loop.budget
    told["why"] = _why(told, config.select.measure)
    return told


def _rank(scores: Scores, measure: str, index: int) -> JsonObject:
    """1 for the largest score; `ties` are the others with the same one."""
    own = scores.read(measure, index, index + 1)[0]
    if np.isnan(own):
        return {"rank": None}
    larger = equal = total = 0
    for stripe in split_blocks(scores.n_samples, STRIPE_SAMPLES):
        values = scores.read(measure, stripe.start, stripe.stop)
        larger += int((values > own).sum())
        equal += int((values == own).sum())
        total += int((~np.isnan(values)).sum())
    return {"rank": larger + 1, "ties": equal - 1, "candidates": total}


def _chosen(batch: Selection, index: int) -> JsonObject:
    at = np.flatnonzero(batch.indices == index)
    row: dict[str, Any] = batch.table.slice(int(at[0]), 1).to_pylist()[0] if len(at) else {}
    last = batch.table.slice(len(batch) - 1, 1).to_pylist()[0] if len(batch) else {}
    return {
        "chosen": bool(len(at)),
        "place": row.get("rank"),
        "decided_by": row.get("decided_by"),
        "budget": len(batch),
        "cut": last.get(last.get("measure", "")),
    }


def _group(batch: Selection, pool: Pool, index: int, most: int) -> JsonObject:
    """Its group, and whether the batch has as many of it as it may have."""
    group_id, *others = pool.take_samples([index, *batch.indices], ["group_id"])["group_id"].to_pylist()
    return {"group_id": group_id, "group_is_full": group_id is not None and others.count(group_id) >= most}


def _why(told: JsonObject, measure: str) -> str:
    if not told["eligible"]:
        if told.get("label_before") is not None:
            return f"labelled already, as {told['label_before']}"
        return (
            "asked already, without a label"
            if told.get("declined")
            else "not eligible: unreadable, or outside pool.limit"
        )
    if "chosen" not in told:
        return "not selected yet"
    if told["chosen"]:
        by = "its score" if told["decided_by"] == "score" else f"the tie-break: {told['decided_by']}"
        return f"chosen at place {told['place'] + 1} of {told['budget']}, by {by}"
    if told.get("rank") is None:
        return f"no {measure}: left out before the last checkpoint (score.eliminate: exact)"
    if told.get("group_is_full") and (told["short"] or told["scores"][measure] >= told["cut"]):
        return f"not chosen: the batch has as many of group {told['group_id']} as select.max_per_group allows"
    if told["scores"][measure] == told["cut"]:
        return f"not chosen: its {measure} is that of the last one chosen, and the tie-break went against it"
    return f"not chosen: its {measure} is smaller than that of the last one chosen, {told['cut']:.4f}"


def _classes(config: Config | ForeignConfig, pool: Pool) -> tuple[str, ...]:
    if isinstance(config, Config) and isinstance(config.pool.classes, tuple):
        return config.pool.classes
    return pool.classes or ()


def _name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _number(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _decisive(cycle: Cycle) -> JsonObject:
    assert cycle.config is not None
    return {key: list(v) if isinstance(v, tuple) else v for key, v in cycle.config.decisive().items()}
