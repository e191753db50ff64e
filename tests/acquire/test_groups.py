"""Samples that belong together: a batch has few of them, a first set and a test set all or none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distal.acquire.batch import select
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.config import SelectSection
from distal.driver import checks
from distal.driver import run as driver
from distal.driver.score_folder import score_directory
from distal.errors import ConfigError, PoolError
from distal.labels.oracle import choose_at_random, choose_initial
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.eligibility import Eligibility
from distal.records import split_blocks
from distal.report.explain import explain
from tests.helpers import CLASSES, foreign_config, small_config, write_checkpoints, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")

N, BLOCK = 240, 64


def group_of(index: int) -> str | None:
    """Groups of 1 to 20 that lie scattered; every tenth sample has none."""
    return None if index % 10 == 0 else f"g{int((index * 7919 % N) ** 0.5) * 3 // 2}"


@pytest.fixture(scope="module")
def grouped(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("grouped")
    source = write_source(folder / "a.parquet", N, seed=1, group_id=[group_of(i) for i in range(N)])
    return build(str(source), folder / "pool")


@pytest.mark.parametrize(("budget", "most"), [(30, 1), (60, 2), (60, 100), (200, 3)])
def test_a_batch_against_going_down_the_list(grouped: Pool, tmp_path: Path, budget: int, most: int) -> None:
    score = np.random.default_rng(0).integers(0, 5, N).astype(np.float32)
    score[150:] = 9 * (score[150:] > 0)  # the best ones are of few groups
    assignments = Assignments.create(
        tmp_path / "a.zarr", n_rows=1, n_samples=N, block_size=BLOCK, n_classes=4,
        eligible=(np.ones(len(block), bool) for block in split_blocks(N, BLOCK)), recorded=(),
    )  # fmt: skip
    scores = Scores.create(tmp_path / "scores.zarr", ["dispersion"], N, BLOCK)
    for block in assignments.blocks:
        scores.write(block, {"dispersion": score[block.start : block.stop]})

    def chosen(n: int, cap: int | None) -> list[int]:
        config = SelectSection(tie_break="hash", max_per_group=cap)
        return select(
            scores, assignments, grouped, config, tmp_path / "s", last_row=0, budget=n, seed=0, cycle=0
        ).indices.tolist()

    taken: Counter[str | None] = Counter()
    expected = []
    for index in chosen(N, None):
        group = group_of(index)
        if group is None or taken[group] < most:
            taken[group] += 1
            expected.append(index)
    assert chosen(budget, most) == expected[:budget]


@pytest.mark.parametrize("n", [24, 60, 100])
def test_a_first_set_has_whole_groups(grouped: Pool, n: int) -> None:
    eligibility = Eligibility.of(grouped, None, seed=0)
    of_group = Counter(group_of(i) for i in range(N))
    for choose in (choose_initial, choose_at_random):
        found = choose(eligibility, n, 0).tolist()
        assert n // 2 <= len(found) <= n
        assert found == sorted(set(found))
        mine = Counter(group_of(i) for i in found)
        assert all(group is None or count == of_group[group] for group, count in mine.items())
        assert choose(eligibility, n, 1).tolist() != found


def test_whole_groups_of_one_class_are_balanced(cluster: str, tmp_path: Path) -> None:
    """Patients with one disease each: every class gets a group before any gets a second one."""
    labels = [i % 4 for i in range(N)]
    groups = [f"{i % 4}-{i // 24}" for i in range(N)]  # six samples each
    columns = {"label": labels, "class_name": [CLASSES[label] for label in labels], "group_id": groups}
    pool = build(str(write_source(tmp_path / "a.parquet", N, seed=1, **columns)), tmp_path / "pool")
    found = choose_initial(Eligibility.of(pool, None, seed=0), 50, 0)
    assert Counter(int(i) % 4 for i in found) == {0: 12, 1: 12, 2: 12, 3: 12}


def test_a_run_with_groups(grouped: Pool, tmp_path: Path) -> None:
    made = small_config(tmp_path / "run", grouped, None, "select.max_per_group=1", "loop.initial=30", "loop.cycles=1")
    driver.run(made)
    run = Run.open(tmp_path / "run")
    batch = run.cycle(0).chosen()
    groups = [group_of(i) for i in batch.indices.tolist() if group_of(i) is not None]
    assert len(groups) == len(set(groups))
    told = [explain(tmp_path / "run", name).cycles[0] for name in grouped.samples(0, 40)["sample_id"].to_pylist()]
    full = [each for each in told if "as many of group" in each.why]
    assert full
    assert all(each.standing.group_id in groups and not each.choice.chosen for each in full)


def test_mistakes(grouped: Pool, pool: Pool, cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="select.max_per_group: 2, and the images of .* have no group_id; pack them"):
        driver.run(small_config(tmp_path / "run", pool, None, "select.max_per_group=2"))
    with pytest.raises(ConfigError, match="a cap may choose samples that score.eliminate: exact has left out"):
        driver.run(small_config(tmp_path / "run", grouped, None, "select.max_per_group=2", "score.eliminate=exact"))
    write_checkpoints(tmp_path / "ck", pool, range(2))
    with pytest.raises(ConfigError, match="have no group_id"):
        score_directory(foreign_config(tmp_path / "run", pool, tmp_path / "ck", "select.max_per_group=2"))
    all_one = write_source(tmp_path / "one.parquet", N, seed=1, group_id=["a"] * N)
    one = build(str(all_one), tmp_path / "one")
    with pytest.raises(ConfigError, match="groups are never cut, and whole ones of 0 samples fit"):
        driver.run(small_config(tmp_path / "run", one, None))
    source = write_source(tmp_path / "b.parquet", 60, seed=2, group_id=[group_of(i) for i in range(60)])
    test = build(str(source), tmp_path / "test")
    shared = sorted({group_of(i) for i in range(60)} - {None})
    with pytest.raises(
        PoolError,
        match=f"eval.test: {len(shared)} of its groups are in the pool as well, such as {', '.join(shared[:3])};",
    ):
        driver.run(small_config(tmp_path / "run", grouped, test))
    apart = write_source(tmp_path / "c.parquet", 60, seed=3, group_id=[f"t{i}" for i in range(60)])
    checks.check(
        small_config(tmp_path / "run", grouped, None), grouped, {"test": build(str(apart), tmp_path / "apart")}
    )
