"""Why a sample was chosen or not, and what two selections share, from storage alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distal.acquire.batch import Order
from distal.acquire.strategy import by_scores
from distal.acquire.topk import Candidates
from distal.artifacts.assignments import Assignments
from distal.artifacts.cycles import Cycle
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.config import Root, SelectSection
from distal.config.needs import K_CENTER
from distal.errors import RunConflict, UserError
from distal.hashing import digest, mix64
from distal.pool import Pool
from distal.pool.images import OK, SAMPLES
from distal.pool.sample_files import find
from distal.records import OPTIONAL, STRIPE_SAMPLES, JsonObject, Result, Window, split_blocks


@dataclass(frozen=True)
class LabelBefore(Result):
    """The label of a sample when a cycle began.

    Attributes:
        declined: whether it was asked for before, without a label.
    """

    label_before: str | None
    declined: bool


@dataclass(frozen=True)
class Rank(Result):
    """The place of a sample among all scores.

    Attributes:
        rank: 1 for the largest score; None without a score.
        ties: others with the same score.
    """

    rank: int | None
    ties: int | None = field(default=None, metadata=OPTIONAL)
    candidates: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Choice(Result):
    """Whether a batch has a sample.

    Attributes:
        place: in the batch, from 0.
        decided_by: see `Selection.table`.
        selected: samples in the batch.
    """

    chosen: bool
    place: int | None
    decided_by: str | None
    budget: int
    selected: int


@dataclass(frozen=True)
class Standing(Result):
    """A sample that was not chosen, against the last of the first samples in the order.

    Attributes:
        is_candidate: whether it is one of the first.
        against: what decides between it and the last of the first: "score" or "tie" where that one
            is better, "group" where it is not and the sample's group is full, None without a score.
        first: size of the batch, or of its candidates.
        cut: the score of the last of them.
        group_id: the group that is full.
    """

    is_candidate: bool = False
    against: Literal["score", "tie", "group"] | None = None
    first: int | None = field(default=None, metadata=OPTIONAL)
    cut: float | None = field(default=None, metadata=OPTIONAL)
    group_id: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class CycleExplanation(Result):
    """What became of a sample in one cycle. The JSON has the keys of its parts beside its own.

    Attributes:
        labels: the class at every checkpoint; None where not assigned.
        changes: from one checkpoint to the next.
        scores: by measure.
        before: None in a run of `distal score`.
        rank: None without scores.
        choice: None before the cycle has selected.
        standing: None unless the sample could have been chosen, and was not.
        why: in words.
    """

    cycle: int
    eligible: bool
    labels: list[str | None]
    changes: int
    scores: dict[str, float | None]
    before: LabelBefore | None
    rank: Rank | None
    choice: Choice | None
    standing: Standing | None
    why: str

    def to_record(self) -> JsonObject:
        """See `Result.to_record`."""
        record = super().to_record()
        parts = [record.pop(name) or {} for name in ("before", "rank", "choice", "standing")]
        return record | parts[0] | parts[1] | parts[2] | parts[3]


@dataclass(frozen=True)
class ExplainResult(Result):
    """What became of one sample in every cycle that has been scored."""

    run: Path
    sample_id: str
    sample_index: int
    status: str
    uri: str
    cycles: list[CycleExplanation]


@dataclass(frozen=True)
class DiffResult(Result):
    """What the selections of two runs share.

    Attributes:
        selected: size of each.
        configuration: the two values of each key that differs.
    """

    runs: list[Path]
    cycle: int
    selected: list[int]
    shared: int
    jaccard: float
    shared_ids: list[str]
    only_in_first: list[str]
    only_in_second: list[str]
    configuration: dict[str, list[object]]


def explain(path: Path, sample_id: str, *, pool: Path | None = None) -> ExplainResult:
    """Explain a sample in every cycle that has been scored.

    Args:
        pool: where the pool of the run is now, if it has moved.

    Raises:
        UserError: the pool has no such sample, or nothing has been scored.
    """
    run = Run.open(path)
    scored = [cycle for cycle in run.begun_cycles() if cycle.is_complete("score")]
    if not scored:
        raise RunConflict(f"{path}: no cycle has been scored yet")
    opened = Pool.open(pool or Path(scored[-1].config.pool.path))
    index = int(find(opened, [sample_id])[0])
    if index < 0:
        raise UserError(
            f"{sample_id}: the pool {opened.path} has no sample of this name; the names are in the "
            f"column sample_id of {opened.path / SAMPLES}"
        )
    row = opened.take_samples([index], ["status", "uri"]).to_pylist()[0]
    return ExplainResult(
        run=run.path,
        sample_id=sample_id,
        sample_index=index,
        **row,
        cycles=[_explain(run, cycle, opened, index) for cycle in scored],
    )


def diff(first: Path, second: Path, *, cycle: int | None = None) -> DiffResult:
    """Compare the selections of two runs.

    Args:
        cycle: by default the last one that both have selected in.

    Raises:
        UserError: a run has no such selection.
    """
    runs = [Run.open(first), Run.open(second)]
    selected = [{c.index: c for c in run.begun_cycles() if c.is_complete("select")} for run in runs]
    common = sorted(set(selected[0]) & set(selected[1]))
    if not common or (cycle is not None and cycle not in common):
        raise RunConflict(f"{first} and {second}: no selection of the same cycle in both; in both are {common}")
    chosen = common[-1] if cycle is None else cycle
    cycles = [by_index[chosen] for by_index in selected]
    batches = [cycle.chosen() for cycle in cycles]
    ids = [dict.fromkeys(batch.sample_ids) for batch in batches]
    shared = [name for name in ids[0] if name in ids[1]]
    a, b = (_result_keys(cycle) for cycle in cycles)
    return DiffResult(
        runs=[run.path for run in runs],
        cycle=chosen,
        selected=[len(batch) for batch in batches],
        shared=len(shared),
        jaccard=len(shared) / max(1, len(ids[0].keys() | ids[1].keys())),
        shared_ids=shared,
        only_in_first=[name for name in ids[0] if name not in ids[1]],
        only_in_second=[name for name in ids[1] if name not in ids[0]],
        configuration={
            key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
        },
    )


@dataclass(frozen=True)
class _Made:
    """The scores of a cycle, and its batch; None where they are not there yet.

    Attributes:
        how: the batch was, or will be, selected.
    """

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
    scores = Scores.open(analysis.scores) if analysis.reduced else None
    selected = analysis.selected(f"select-{budget}")
    same = selected is not None and selected.inputs["select"] == digest(how.model_dump(mode="json"))
    return _Made(how, budget, scores, Selection.read(analysis.selection(budget)) if same else None)


def _explain(run: Run, cycle: Cycle, pool: Pool, index: int) -> CycleExplanation:
    marker, config = cycle.marker("score"), cycle.config
    assert marker is not None
    n_rows = marker.outputs.n_rows
    assignments = Assignments.open(cycle.assignments)
    names = config.class_names or pool.classes or ()
    votes = np.empty(0, assignments.dtype)
    if n_rows:
        votes = assignments.read(index, index + 1, range(n_rows))[:, 0]
    made = _made(cycle, config, n_rows)
    scores, by_measure = made.scores, made.how.from_ is None
    before = None
    if config.trains:
        ledger = run.ledger(before=cycle.index)
        at = np.flatnonzero(ledger.indices == index)
        label = _name(names, int(ledger.labels[at[0]])) if len(at) else None
        before = LabelBefore(label, bool(np.isin(index, ledger.declined)))
    eligible = bool(assignments.eligible(index, index + 1)[0])
    choice = _choice(made.batch, made.budget, index) if made.batch is not None else None
    values = {}
    if scores is not None:
        values = {name: _number(scores.read(name, index, index + 1)[0]) for name in scores.measures}
    standing = None
    if not eligible:
        why = _why_not_eligible(before, cycle, pool, index)
    elif choice is None:
        why = "not selected yet"
        if not config.trains:
            why += ", or by another select section than the run began with: see its analyses"
    elif choice.place is not None:
        by = _chosen_by(made.how, choice.decided_by)
        why = f"chosen at place {choice.place + 1} of {choice.selected}, {by}"
    elif not by_measure:
        why = "not chosen: select.from does not name it"
    else:
        assert scores is not None
        order = Order(scores, assignments, pool, made.how, config.seed, cycle.index, n_rows - 1)
        standing = _standing(order, made, index)
        why = f"not chosen: {_why_not(order, standing, values)}"
    return CycleExplanation(
        cycle=cycle.index,
        eligible=eligible,
        labels=[_name(names, int(vote)) if vote < assignments.n_classes else None for vote in votes],
        changes=int((votes[1:] != votes[:-1]).sum()),
        scores=values,
        before=before,
        rank=_rank(scores, made.how.measure, index) if scores is not None and by_measure else None,
        choice=choice,
        standing=standing,
        why=why,
    )


def _rank(scores: Scores, measure: str, index: int) -> Rank:
    own = scores.read(measure, index, index + 1)[0]
    if np.isnan(own):
        return Rank(None)
    larger = equal = total = 0
    for stripe in split_blocks(scores.n_samples, STRIPE_SAMPLES):
        values = scores.read(measure, stripe.start, stripe.stop)
        larger += int((values > own).sum())
        equal += int((values == own).sum())
        total += int((~np.isnan(values)).sum())
    return Rank(larger + 1, equal - 1, total)


def _choice(batch: Selection, budget: int, index: int) -> Choice:
    at = np.flatnonzero(batch.indices == index)
    row: dict[str, Any] = batch.table.slice(int(at[0]), 1).to_pylist()[0] if len(at) else {}
    return Choice(
        chosen=bool(len(at)),
        place=row.get("rank"),
        decided_by=row.get("decided_by"),
        budget=budget,
        selected=len(batch),
    )


def _chosen_by(how: SelectSection, decided_by: str | None) -> str:
    if decided_by == "file":
        return "as select.from names it"
    if decided_by in (K_CENTER, "strategy"):
        return f"by {how.batch}, from the candidates with the largest {how.measure}"
    if how.batch == "power":
        return _by_power(how)
    what = "draw" if how.measure == "random" else "score"
    return f"by its {what}" if decided_by == "score" else f"by the tie-break: {decided_by}"


def _standing(order: Order, made: _Made, index: int) -> Standing:
    assert made.batch is not None
    mine = order.of(index, index + 1)
    if np.isnan(mine.score[0]):
        return Standing()
    is_candidate = False
    if order.composed:
        first, _ = order.first(made.budget)
        n_first, last = len(first), first.at(slice(len(first) - 1, None))
        is_candidate = bool(np.isin(index, first.index))
    else:
        n_first, last_index = len(made.batch), int(made.batch.indices[-1])
        last = order.of(last_index, last_index + 1)
    cut = _number(order.scores.read(order.config.measure, *_span(last))[0])
    comes_before = mine.joined(last).ranked().index[0] == index
    if comes_before or n_first < order.n_first(made.budget):
        (group,) = order.pool.take_samples([index], ["group_id"])["group_id"].to_pylist()
        return Standing(is_candidate, "group", n_first, cut, group)
    against: Literal["score", "tie"] = "score" if mine.score[0] < last.score[0] else "tie"
    return Standing(is_candidate, against, n_first, cut)


def _why_not(order: Order, standing: Standing, scores: dict[str, float | None]) -> str:
    """Why a sample with a place in the order was not chosen, by what its strategy did."""
    how = order.config
    if standing.is_candidate:
        return f"it is one of the {standing.first:,} candidates, of which {how.batch} chose others"
    if standing.against is None and scores[how.measure] is not None:
        return f"its {how.measure} is 0, and power draws from larger ones only"
    if standing.against is None:
        return f"no {how.measure}: left out before the last checkpoint (score.eliminate: exact)"
    taken, last = "the batch has", "the last one chosen"
    if order.composed:
        taken = "the candidates have"
        last = f"the last of the {standing.first:,} candidates of {how.batch}"
    if standing.against == "group":
        return f"{taken} as many of group {standing.group_id} as select.max_per_group allows"
    what = "draw" if how.measure == "random" or how.batch == "power" else how.measure
    if standing.against == "tie":
        return f"its {what} is that of {last}, and the tie-break went against it"
    if how.batch == "power":
        return f"its draw, {_by_power(how)}, is smaller than that of {last}"
    return f"its {what} is smaller than that of {last}, {standing.cut:.4f}"


def _by_power(how: SelectSection) -> str:
    return f"by power: at random, in proportion to {how.measure}^{how.beta:g}"


def _why_not_eligible(before: LabelBefore | None, cycle: Cycle, pool: Pool, index: int) -> str:
    config = cycle.config
    if before is not None and before.label_before is not None:
        return f"labelled already, as {before.label_before}"
    if before is not None and before.declined:
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


def _name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _number(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _result_keys(cycle: Cycle) -> dict[str, object]:
    keys = cycle.config.result_keys()
    return {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items()}
