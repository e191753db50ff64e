from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.artifacts.ledger import Ledger
from distal.errors import PoolError
from distal.labels.oracle import choose_initial, label_from_pool
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.eligibility import Eligibility
from tests.helpers import write_source


def labels_of(pool: Pool, indices: np.ndarray) -> list[int]:
    return pool.take_samples(indices, ["label"])["label"].to_pylist()


def test_answers_are_the_pools_labels(pool: Pool, tmp_path: Path) -> None:
    indices = np.array([200, 3, 130])
    label_from_pool(pool, indices, tmp_path / "labels.parquet")
    table = pq.read_table(tmp_path / "labels.parquet")
    assert table["sample_index"].to_pylist() == [200, 3, 130]
    assert table["sample_id"].to_pylist() == ["s1-00200", "s1-00003", "s1-00130"]
    assert table["label"].to_pylist() == labels_of(pool, indices)
    assert set(table["annotator"].to_pylist()) == {"pool"}


def test_an_image_without_a_label(cluster: str, tmp_path: Path) -> None:
    path = write_source(tmp_path / "a.parquet", 20, seed=5)
    table = pq.read_table(path)
    labels = [*table["label"].to_pylist()[:-1], None]
    pq.write_table(table.set_column(2, "label", pa.array(labels)), path)
    pool = build(str(path), tmp_path / "pool")
    with pytest.raises(PoolError, match="sample s5-00019 has no label in the pool"):
        label_from_pool(pool, np.array([1, 19]), tmp_path / "labels.parquet")
    assert not (tmp_path / "labels.parquet").exists()


@pytest.mark.parametrize("n", [4, 24, 30, 100])
def test_the_first_set_is_balanced_seeded_and_readable(pool: Pool, n: int) -> None:
    eligibility = Eligibility.of(pool, None, seed=0)
    chosen = choose_initial(eligibility, n, seed=0)
    assert len(chosen) == len(set(chosen.tolist())) == n
    assert list(chosen) == sorted(chosen)
    assert eligibility.read(0, 240)[chosen].all()
    counts = np.bincount(labels_of(pool, chosen), minlength=4)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(choose_initial(eligibility, n, seed=0), chosen)
    assert not np.array_equal(choose_initial(eligibility, n, seed=1), chosen)


def test_a_class_that_is_short_is_made_up_for(pool: Pool) -> None:
    """All of the rarest class, and the others evenly."""
    eligibility = Eligibility.of(pool, None, seed=0)
    available = np.bincount(np.array(labels_of(pool, np.flatnonzero(eligibility.read(0, 240)))))
    n = 4 * (available.min() + 1)
    counts = np.bincount(labels_of(pool, choose_initial(eligibility, n, seed=0)), minlength=4)
    assert counts.sum() == n
    assert counts[available.argmin()] == available.min()
    assert np.delete(counts, available.argmin()).min() > available.min()


def test_no_more_than_there_are(pool: Pool) -> None:
    assert len(choose_initial(Eligibility.of(pool, None, seed=0), 1000, seed=0)) == 238


class TestEligibility:
    def test_a_limit_is_a_seeded_subset_of_the_readable(self, pool: Pool) -> None:
        flags = Eligibility.of(pool, 100, seed=0).read(0, 240)
        assert flags.sum() == Eligibility.of(pool, 100, seed=0).count() == 100
        assert not flags[[7, 201]].any()
        assert not np.array_equal(flags, Eligibility.of(pool, 100, seed=1).read(0, 240))
        larger = Eligibility.of(pool, 150, seed=0).read(0, 240)
        assert larger[flags].all()

    def test_in_parts_as_in_whole(self, pool: Pool) -> None:
        eligibility = Eligibility.of(pool, 100, seed=0)
        parts = [flags for _, _, flags in eligibility.stripes(37)]
        assert np.array_equal(np.concatenate(parts), eligibility.read(0, 240))

    def test_a_limit_above_the_pool_is_none(self, pool: Pool) -> None:
        assert Eligibility.of(pool, 10_000, seed=0).count() == 238

    def test_labelled_samples_are_not_eligible(self, pool: Pool) -> None:
        ledger = Ledger(np.array([0, 5, 239]), np.array([0, 1, 2]))
        flags = Eligibility.of(pool, None, seed=0).without(ledger).read(0, 240)
        assert np.flatnonzero(~flags).tolist() == [0, 5, 7, 201, 239]
