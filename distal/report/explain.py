"""Why a sample was chosen or not, and what two selections share: told from storage alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distal.acquire.batch import Order
from distal.acquire.strategy import by_scores
from distal.acquire.topk import Candidates
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Cycle, Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.config import Root, SelectSection
from distal.config.needs import K_CENTER
from distal.errors import RunConflict, UserError
from distal.hashing import digest, mix64
from distal.pool import Pool
from distal.pool.images import OK, SAMPLES
from distal.pool.sample_files import find
from distal.records import STRIPE_SAMPLES, JsonObject, Window, split_blocks


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
            f"{sample_id}: the pool {opened.path} has no sample of this name; the names are in the column sample_id of "
            f"{opened.path / SAMPLES}"
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


@dataclass(frozen=True)
class _Made:
    """What a cycle was reduced to, and what was selected from it; None where that is not done."""

    how: SelectSection
    budget: int
    scores: Scores | None
    batch: Selection | None


def _made(cycle: Cycle, config: Root, n_rows: int) -> _Made:
    if config.trains:
        scores = Scores.open(cycle.scores) if cycle.marker("reduce") else None
        return _Made(config.select, config.budget, scores, cycle.chosen() if cycle.marker("select") else None)
    measure, window = Window.of_name(config.select.measure)
    how, budget = by_scores(config.select, measure), config.budget
    analysis = cycle.analysis(f"{measure}@rows={n_rows}{window}")
    scores = Scores.open(analysis.scores) if analysis.marker("reduce") else None
    selected = analysis.marker(f"select-{budget}")
    same = selected is not None and selected["inputs"]["select"] == digest(how.model_dump(mode="json"))
    return _Made(how, budget, scores, Selection.read(analysis.selection(budget)) if same else None)


def _told(run: Run, cycle: Cycle, pool: Pool, index: int) -> JsonObject:
    marker, config = cycle.marker("score"), cycle.config
    assert marker is not None
    assert config is not None
    n_rows = marker["n_rows"]
    assignments = Assignments.open(cycle.assignments)
    names = _classes(config, pool)
    votes = assignments.read(index, index + 1, range(n_rows))[:, 0] if n_rows else np.empty(0, assignments.dtype)
    labels = [_name(names, int(vote)) if vote < assignments.n_classes else None for vote in votes]
    made = _made(cycle, config, n_rows)
    told: JsonObject = {
        "cycle": cycle.index,
        "eligible": bool(assignments.eligible(index, index + 1)[0]),
        "labels": labels,
        "changes": int((votes[1:] != votes[:-1]).sum()),
        "scores": {},
    }
    if config.trains:
        ledger = run.ledger(before=cycle.index)
        at = np.flatnonzero(ledger.indices == index)
        told["label_before"] = _name(names, int(ledger.labels[at[0]])) if len(at) else None
        told["declined"] = bool(np.isin(index, ledger.declined))
    if made.scores is not None:
        told["scores"] = {name: _number(made.scores.read(name, index, index + 1)[0]) for name in made.scores.measures}
        if made.how.from_ is None:
            told |= _rank(made.scores, made.how.measure, index)
    if made.batch is not None:
        told |= _chosen(made, index)
    if not told["eligible"]:
        told["why"] = _why_not_eligible(told, cycle, config, pool, index)
    elif made.batch is None:
        told["why"] = "not selected yet"
        if not config.trains:
            told["why"] += ", or by another select section than the run began with: see its analyses"
    elif told["chosen"]:
        told["why"] = f"chosen at place {told['place'] + 1} of {told['selected']}, {_chosen_by(made.how, told)}"
    elif made.how.from_ is not None:
        told["why"] = "not chosen: select.from does not name it"
    else:
        assert made.scores is not None
        order = Order(made.scores, assignments, pool, made.how, config.seed, cycle.index, n_rows - 1)
        told |= _standing(order, made, index)
        told["why"] = f"not chosen: {_why_not(order, told)}"
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


def _chosen(made: _Made, index: int) -> JsonObject:
    assert made.batch is not None
    at = np.flatnonzero(made.batch.indices == index)
    row: dict[str, Any] = made.batch.table.slice(int(at[0]), 1).to_pylist()[0] if len(at) else {}
    return {
        "chosen": bool(len(at)),
        "place": row.get("rank"),
        "decided_by": row.get("decided_by"),
        "budget": made.budget,
        "selected": len(made.batch),
    }


def _chosen_by(how: SelectSection, told: JsonObject) -> str:
    decided_by = told["decided_by"]
    if decided_by == "file":
        return "as select.from names it"
    if decided_by in (K_CENTER, "strategy"):
        return f"by {how.batch}, from the candidates with the largest {how.measure}"
    if how.batch == "power":
        return _by_power(how)
    what = "draw" if how.measure == "random" else "score"
    return f"by its {what}" if decided_by == "score" else f"by the tie-break: {decided_by}"


def _standing(order: Order, made: _Made, index: int) -> JsonObject:
    """Where a sample that was not chosen stands against the last of those that came first.

    Returns:
        `first`, how many those are: the batch, or its candidates; `is_candidate`, whether it is one of them; `against`,
        what decides between it and the last of them: "score" or "tie" where that is better, "group" where it is not and
        its group is full, None where it has no score.
    """
    assert made.batch is not None
    mine = order.of(index, index + 1)
    told: JsonObject = {"is_candidate": False, "against": None}
    if np.isnan(mine.score[0]):
        return told
    if order.composed:
        first, _ = order.first(made.budget)
        n_first, last = len(first), first.at(slice(len(first) - 1, None))
        told["is_candidate"] = bool(np.isin(index, first.index))
    else:
        n_first, last_index = len(made.batch), int(made.batch.indices[-1])
        last = order.of(last_index, last_index + 1)
    told |= {"first": n_first, "cut": _number(order.scores.read(order.config.measure, *_span(last))[0])}
    comes_before = mine.joined(last).ranked().index[0] == index
    if comes_before or n_first < order.n_first(made.budget):
        (group,) = order.pool.take_samples([index], ["group_id"])["group_id"].to_pylist()
        return told | {"against": "group", "group_id": group}
    return told | {"against": "score" if mine.score[0] < last.score[0] else "tie"}


def _why_not(order: Order, told: JsonObject) -> str:
    """Why a sample with a place in the order was not chosen, by what its strategy did."""
    how = order.config
    if told["is_candidate"]:
        return f"it is one of the {told['first']:,} candidates, of which {how.batch} chose others"
    if told["against"] is None and told["scores"][how.measure] is not None:
        return f"its {how.measure} is 0, and power draws from larger ones only"
    if told["against"] is None:
        return f"no {how.measure}: left out before the last checkpoint (score.eliminate: exact)"
    taken, last = "the batch has", "the last one chosen"
    if order.composed:
        taken, last = "the candidates have", f"the last of the {told['first']:,} candidates of {how.batch}"
    if told["against"] == "group":
        return f"{taken} as many of group {told['group_id']} as select.max_per_group allows"
    what = "draw" if how.measure == "random" or how.batch == "power" else how.measure
    if told["against"] == "tie":
        return f"its {what} is that of {last}, and the tie-break went against it"
    if how.batch == "power":
        return f"its draw, {_by_power(how)}, is smaller than that of {last}"
    return f"its {what} is smaller than that of {last}, {told['cut']:.4f}"


def _by_power(how: SelectSection) -> str:
    return f"by power: at random, in proportion to {how.measure}^{how.beta:g}"


def _why_not_eligible(told: JsonObject, cycle: Cycle, config: Root, pool: Pool, index: int) -> str:
    if told.get("label_before") is not None:
        return f"labelled already, as {told['label_before']}"
    if told.get("declined"):
        return "asked already, without a label"
    status, key = pool.columns(index, index + 1, "status", "sample_key")
    if status[0] != OK:
        return "not eligible: unreadable"
    share = config.select.subpool
    if share is not None and mix64("subpool", config.seed, cycle.index, key)[0] >= share * 2.0**64:
        return f"not eligible: not in the part of the pool that was drawn for this cycle (select.subpool: {share})"
    reasons = ["outside pool.limit"] if config.pool.limit is not None else []
    if not config.trains and config.labelled:
        reasons.append("in pool.exclude")
    return f"not eligible: {' or '.join(reasons)}"


def _span(one: Candidates) -> tuple[int, int]:
    return int(one.index[0]), int(one.index[0]) + 1


def _classes(config: Root, pool: Pool) -> tuple[str, ...]:
    return config.class_names or pool.classes or ()


def _name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _number(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _decisive(cycle: Cycle) -> JsonObject:
    assert cycle.config is not None
    return {key: list(v) if isinstance(v, tuple) else v for key, v in cycle.config.result_keys().items()}
