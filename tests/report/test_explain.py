from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.acquire.batch import listed_batch, select
from distal.acquire.strategy import Shown
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.stages import ReduceOutputs, ScoreOutputs, SelectOutputs
from distal.config.needs import scored_epochs
from distal.driver import run as driver
from distal.errors import RunConflict, UserError
from distal.hashing import mix64
from distal.labels.oracle import label_from_pool
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.eligibility import Eligibility
from distal.records import split_blocks
from distal.reduce.measures import measures_of
from distal.reduce.stream import Reduction, reduce
from distal.report.explain import diff, explain
from tests.helpers import small_config, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture(scope="module")
def run(small_run: Path) -> Path:
    return small_run


def test_the_timeline_of_every_sample(run: Path, pool: Pool) -> None:
    """Against the arrays themselves: labels, scores, rank, and whether it was chosen."""
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    cycle = Run.open(run).cycle(0)
    votes = Assignments.open(cycle.assignments).read(0, 240)
    scores = Scores.open(cycle.scores).read("dispersion", 0, 240)
    chosen = set(cycle.chosen().sample_ids)
    reasons = set()
    for index in (*cycle.chosen().indices[:2].tolist(), *range(0, 240, 17), 7):
        told = explain(run, ids[index]).cycles[0]
        assert told.labels == [None if v == 255 else pool.classes[v] for v in votes[:, index]]  # type: ignore[index]
        assert told.choice.chosen == (ids[index] in chosen)
        if not np.isnan(scores[index]):
            assert told.scores["dispersion"] == scores[index]
            assert told.rank.rank == 1 + int((scores > scores[index]).sum())
            assert told.rank.ties == int((scores == scores[index]).sum()) - 1
        reasons.add(told.why.partition(":")[0].partition(" at ")[0].partition(",")[0])
    assert {"chosen", "not chosen", "not eligible"} <= reasons


def test_a_chosen_sample_is_labelled_in_the_next_cycle(run: Path) -> None:
    first = Run.open(run).cycle(0).chosen().sample_ids[0]
    told = explain(run, first).cycles[1]
    assert told.why.startswith("labelled already, as ")
    assert told.labels == [None] * 3


def test_what_two_selections_share(run: Path, pool: Pool, tmp_path: Path) -> None:
    driver.run(small_config(tmp_path / "other", pool, None, "select.measure=margin", "loop.cycles=1"))
    told = diff(run, tmp_path / "other")
    batches = [set(Run.open(path).cycle(0).chosen().sample_ids) for path in (run, tmp_path / "other")]
    assert told.cycle == 0
    assert told.shared == len(batches[0] & batches[1])
    assert set(told.only_in_first) == batches[0] - batches[1]
    assert set(told.only_in_second) == batches[1] - batches[0]
    assert told.configuration["select.measure"] == ["dispersion", "margin"]
    assert diff(run, run).jaccard == 1


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody: the pool .* has no sample of this name"):
        explain(run, "nobody")
    with pytest.raises(RunConflict, match="no selection of the same cycle in both; in both are"):
        diff(run, run, cycle=7)


class First:
    """A strategy of the user's own: every third candidate."""

    needs = frozenset({"all"})

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> np.ndarray:
        return np.arange(len(candidates))[np.argsort(np.arange(len(candidates)) % 3, kind="stable")][:budget]


N_ROWS, BUDGET = 6, 20


@pytest.fixture(scope="module")
def grouped(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """240 samples in groups of one to twenty; every tenth has none, and two are unreadable."""
    folder = tmp_path_factory.mktemp("grouped")
    groups = [None if i % 10 == 0 else f"g{int((i * 7919 % 240) ** 0.5)}" for i in range(240)]
    source = write_source(folder / "a.parquet", 240, seed=1, group_id=groups)
    table = pq.read_table(source)
    images = table["image"].to_pylist()
    images[7] = images[201] = b"not an image"
    pq.write_table(table.set_column(1, "image", pa.array(images)), source)
    return build(str(source), folder / "pool")


def selected(folder: Path, pool: Pool, *overrides: str) -> Run:
    """A cycle that is scored with votes at random, and reduced and selected for real."""
    config = small_config(folder, pool, None, f"train.epochs={N_ROWS}", f"loop.budget={BUDGET}", *overrides)
    config = config.with_values({"pool.classes": pool.classes})
    run = Run(folder)
    run.begin({}, {})
    cycle = run.cycle(0)
    cycle.begin(config)
    label_from_pool(pool, np.arange(20, 40), run.initial)
    eligible = Eligibility.of(pool, config.pool.limit, config.seed).without(run.ledger(before=0))
    if config.select.subpool is not None:
        eligible = eligible.within(config.select.subpool, 0)
    n_rows = len(scored_epochs(config))
    assignments = Assignments.create(
        cycle.assignments,
        n_rows=n_rows,
        n_samples=240,
        block_size=64,
        n_classes=4,
        eligible=(eligible.read(block.start, block.stop) for block in split_blocks(240, 64)),
        recorded=config.score.record,
    )
    rng = np.random.default_rng(3)
    remaining = []
    for block in assignments.blocks:
        flags = assignments.eligible(block.start, block.stop)
        votes = np.where(rng.random((n_rows, len(block))) < 0.7, rng.integers(0, 4, len(block)), rng.integers(0, 4))
        for row in range(n_rows):
            if config.score.eliminate == "exact" and row >= 4:
                flags = flags & (votes[:4] != votes[0]).any(axis=0)
            recorded = {
                name: np.where(flags, rng.integers(0, 9, len(block)) / 8, np.nan).astype(np.float16)
                for name in config.score.record
            }
            assignments.write(row, block, np.where(flags, votes[row], 255).astype(np.uint8), recorded)
        remaining.append(int(flags.sum()))
    n = eligible.count()
    outputs = ScoreOutputs(n_rows=n_rows, n_eligible=n, images_scored=n_rows * n, left_out=0)
    cycle.complete("score", {}, outputs, 0.0)
    measures = measures_of(config)
    kept = tuple(remaining) if config.score.eliminate == "exact" else None
    reduction = Reduction(assignments, pool, measures, range(n_rows), remaining=kept, seed=config.seed, cycle=0)
    scores = reduce(reduction, cycle.scores)
    cycle.complete("reduce", {}, ReduceOutputs(measures=tuple(measures)), 0.0)
    if config.select.from_ is not None:
        batch = listed_batch(pool, eligible, Path(config.select.from_), cycle.selection)
    else:
        batch = select(
            scores,
            assignments,
            pool,
            config.select,
            cycle.selection,
            budget=BUDGET,
            seed=config.seed,
            cycle=0,
            last_row=n_rows - 1,
            outputs=lambda indices, names: {
                name: np.random.default_rng(5).random((240, 3), np.float32)[indices] for name in names
            },
        )
    cycle.complete("select", {}, SelectOutputs.of(batch), 0.0)
    return run


OWN = "select.batch=tests.report.test_explain:First"
RUNS = [
    (),
    ("select.tie_break=hash",),
    ("select.max_per_group=1",),
    ("select.max_per_group=2", "select.tie_break=hash"),
    ("select.measure=random", "select.max_per_group=1"),
    ("select.measure=random",),
    ("select.measure=margin",),
    ("select.measure=entropy", "score.record=[margin,entropy]", "select.max_per_group=1"),
    ("select.measure=least_confidence", "score.record=[margin,least_confidence]"),
    ("select.measure=dispersion@last=0.5",),
    ("select.measure=flips", "select.subpool=0.4"),
    ("select.measure=vote_entropy", "pool.limit=150"),
    ("select.measure=gini", "select.subpool=0.5", "pool.limit=180"),
    ("score.eliminate=exact",),
    ("select.batch=power",),
    ("select.batch=power", "select.beta=4", "select.max_per_group=1"),
    ("select.batch=power", "select.measure=margin"),
    ("select.batch=k_center", "select.candidate_factor=2"),
    ("select.batch=k_center", "select.candidate_factor=1.5", "select.max_per_group=1"),
    ("select.batch=k_center", "select.measure=margin", "select.candidate_factor=20"),
    (OWN, "select.candidate_factor=2"),
    (OWN, "select.candidate_factor=3", "select.max_per_group=2", "select.measure=flips", "select.tie_break=hash"),
    (OWN, "select.measure=random", "select.candidate_factor=2"),
]


class Facts:
    """What is true of a selection, worked out anew from the arrays, sample by sample."""

    def __init__(self, run: Run, pool: Pool) -> None:
        cycle = run.cycle(0)
        self.config = cycle.config
        self.how = how = cycle.config.select  # type: ignore[union-attr]
        self.batch = cycle.chosen().indices.tolist()
        samples = pool.samples(0, 240)
        self.group, self.status = samples["group_id"].to_pylist(), samples["status"].to_pylist()
        self.keys = samples["sample_key"].to_numpy()
        self.score = Scores.open(cycle.scores).read(how.measure, 0, 240) if how.from_ is None else None
        assignments = Assignments.open(cycle.assignments)
        self.eligible = assignments.eligible(0, 240)
        margin = np.zeros(240, np.float16)
        if how.tie_break == "margin" and how.measure != "random" and how.from_ is None:
            margin = assignments.read_recorded("margin", assignments.n_rows - 1, 0, 240)
        self.value = self.score
        if how.batch == "power":
            uniform = (np.floor(mix64("power", 0, 0, self.keys) / 2.0**11) + 0.5) / 2.0**53
            with np.errstate(divide="ignore"):
                value = how.beta * np.log(self.score.astype(float)) - np.log(-np.log(uniform))
            self.value = np.where(self.score > 0, value, np.nan).astype(np.float32)
        ties = mix64("tie", 0, 0, self.keys)
        if self.value is not None:
            self.order = sorted(
                np.flatnonzero(~np.isnan(self.value)).tolist(),
                key=lambda i: (-self.value[i], margin[i], int(ties[i]), i),
            )
            factor = how.candidate_factor if how.batch not in ("top_k", "power") else 1
            self.first: list[int] = []
            for i in self.order:
                in_group = sum(self.group[i] == self.group[j] for j in self.first) if self.group[i] else 0
                if len(self.first) < int(np.ceil(factor * BUDGET)) and in_group < (how.max_per_group or 999):
                    self.first.append(i)
            if how.batch in ("top_k", "power"):
                assert self.first == self.batch

    def check(self, i: int, why: str) -> str:
        """Whether a sentence is true of a sample; returns its kind."""
        how, batch = self.how, self.batch
        kinds = {
            r"chosen at place (\d+) of (\d+), (.+)": self.chosen,
            r"not chosen: its (.+) is smaller than that of the last one chosen, ([\d.]+)": self.smaller,
            r"not chosen: its (.+) is that of (the last .+), and the tie-break went against it": self.tie,
            r"not chosen: the (batch has|candidates have) as many of group (.+) as select.max_per_group allows": self.full,
            r"not chosen: its draw, by power: at random, in proportion to (\S+)\^([\d.]+), is smaller than that of the "
            "last one chosen": self.drawn,
            r"not chosen: its (.+) is 0, and power draws from larger ones only": self.zero,
            r"not chosen: it is one of the (\d+) candidates, of which (\S+) chose others": self.candidate,
            r"not chosen: its (.+) is smaller than that of the last of the (\d+) candidates of (\S+), ([\d.]+)": self.below,
            r"not chosen: no dispersion: left out before the last checkpoint \(score.eliminate: exact\)": self.left_out,
            r"not chosen: select.from does not name it": self.unnamed,
            r"labelled already, as (\w+)": self.labelled,
            r"not eligible: (.+)": self.barred,
        }
        (kind,) = [kind for kind in kinds if re.fullmatch(kind, why)]
        assert (i in batch) == why.startswith("chosen")
        assert self.eligible[i] == why.startswith(("chosen", "not chosen"))
        words = re.fullmatch(kind, why).groups()  # type: ignore[union-attr]
        if kind.startswith("not chosen") and how.from_ is None and i in self.first:
            assert kinds[kind] == self.candidate
        kinds[kind](i, *words)  # type: ignore[operator]
        return kind

    def what(self) -> str:
        return "draw" if self.how.measure == "random" else self.how.measure

    def chosen(self, i: int, place: str, n: str, by: str) -> None:
        assert self.batch[int(place) - 1] == i
        assert int(n) == len(self.batch)
        how = self.how
        if how.from_ is not None:
            assert by == "as select.from names it"
        elif how.batch not in ("top_k", "power"):
            assert by == f"by {how.batch}, from the candidates with the largest {how.measure}"
            assert i in self.first
        elif how.batch == "power":
            assert by == f"by power: at random, in proportion to {how.measure}^{how.beta:g}"
        else:
            out = [j for j in self.order if j not in self.batch and self.score[j] == self.score[i]]
            able = [j for j in out if how.max_per_group is None or self.in_batch(j) < how.max_per_group]
            assert able or by == f"by its {'draw' if how.measure == 'random' else 'score'}"
            assert not able or by in ("by the tie-break: margin", "by the tie-break: hash")

    def in_batch(self, i: int) -> int:
        return sum(self.group[i] == self.group[j] for j in self.first) if self.group[i] else 0

    def smaller(self, i: int, what: str, cut: str) -> None:
        assert what == self.what()
        assert self.how.batch == "top_k"
        assert self.score[i] < self.score[self.batch[-1]]
        assert cut == f"{self.score[self.batch[-1]]:.4f}"

    def tie(self, i: int, what: str, last: str) -> None:
        assert what == self.what()
        assert self.value[i] == self.value[self.first[-1]]
        assert self.order.index(i) > self.order.index(self.first[-1])

    def full(self, i: int, taken: str, group: str) -> None:
        assert self.group[i] == group
        assert self.in_batch(i) == self.how.max_per_group
        assert (taken == "batch has") == (self.how.batch in ("top_k", "power"))

    def drawn(self, i: int, measure: str, beta: str) -> None:
        assert (measure, float(beta)) == (self.how.measure, self.how.beta)
        assert self.value[i] < self.value[self.batch[-1]]

    def zero(self, i: int, measure: str) -> None:
        assert self.score[i] == 0

    def candidate(self, i: int, n: str, name: str) -> None:
        assert name == self.how.batch
        assert int(n) == len(self.first)
        assert i in self.first

    def below(self, i: int, what: str, n: str, name: str, cut: str) -> None:
        assert (what, int(n), name) == (self.what(), len(self.first), self.how.batch)
        assert self.score[i] < self.score[self.first[-1]]
        assert cut == f"{self.score[self.first[-1]]:.4f}"

    def left_out(self, i: int) -> None:
        assert np.isnan(self.score[i])
        assert self.config.score.eliminate == "exact"

    def unnamed(self, i: int) -> None:
        assert self.how.from_ is not None

    def labelled(self, i: int, name: str) -> None:
        assert 20 <= i < 40

    def barred(self, i: int, reason: str) -> None:
        outside = mix64("subpool", 0, 0, self.keys[i]) / 2.0**64 >= (self.how.subpool or 1)
        if reason == "unreadable":
            assert self.status[i] != "ok"
        elif reason.startswith("not in the part of the pool that was drawn for this cycle (select.subpool: "):
            assert outside
        else:
            assert reason == "outside pool.limit"
            assert self.status[i] == "ok"
            assert not outside


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_every_sentence_is_true_of_every_sample(grouped: Pool, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = selected(tmp_path / "run", grouped, *overrides)
    facts = Facts(run, grouped)
    ids = grouped.samples(0, 240)["sample_id"].to_pylist()
    after = [i for i in facts.order if i not in facts.batch]
    near = {*facts.batch[:3], *facts.batch[-3:], *after[:20], *after[-2:], 7, 20, *range(0, 240, 16)}
    kinds = {facts.check(i, explain(run.path, ids[i]).cycles[0].why) for i in sorted(near)}
    assert len(kinds) >= 3


def test_of_a_list_that_was_chosen_elsewhere(grouped: Pool, tmp_path: Path) -> None:
    ids = grouped.samples(0, 240)["sample_id"].to_pylist()
    (tmp_path / "ids.txt").write_text("\n".join(ids[i] for i in (50, 41, 99)))
    run = selected(tmp_path / "run", grouped, f"select.from={tmp_path / 'ids.txt'}")
    facts = Facts(run, grouped)
    assert {facts.check(i, explain(run.path, ids[i]).cycles[0].why) for i in (7, 20, 41, 42, 50, 99)}
    assert explain(run.path, ids[41]).cycles[0].why == "chosen at place 2 of 3, as select.from names it"
