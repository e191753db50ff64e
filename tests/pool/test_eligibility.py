"""Eligible samples of a pool that is read in several stripes. No images are needed, and no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distal.artifacts.ledger import Ledger
from distal.hashing import mix64, sample_keys
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.pool.images import MANIFEST, OK, SAMPLES, SCHEMA, UNREADABLE
from distal.storage import write_json, write_table

N, STRIPE = 200, 37
BAD = [0, 36, 37, 110, 199]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """The record and the table of a packed pool; five samples are unreadable."""
    ids = [f"s{i:03d}" for i in range(N)]
    columns = {
        "sample_index": range(N),
        "sample_id": ids,
        "sample_key": sample_keys(ids),
        "uri": ids,
        "status": [f"{UNREADABLE}no image" if i in BAD else OK for i in range(N)],
        "label": [i % 4 for i in range(N)],
        "group_id": [None] * N,
    }
    write_table(tmp_path / SAMPLES, pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA))
    record = {
        "source": "", "n_samples": N, "channels": 1, "height": 2, "width": 2, "classes": list("abcd"),
        "class_counts": [50] * 4, "mean": [0.5], "std": [0.5], "content_sha256": "0" * 64, "n_unreadable": len(BAD),
    }  # fmt: skip
    write_json(tmp_path / MANIFEST, record)
    return Pool.open(tmp_path)


@pytest.fixture(autouse=True)
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stripes: by default this pool would be one."""
    monkeypatch.setattr(Eligibility.stripes, "__defaults__", (STRIPE,))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("limit", [1, 60, 193, 194, N - len(BAD)])
def test_a_limit_takes_the_smallest_draws_of_the_whole_pool(pool: Pool, limit: int, seed: int) -> None:
    """In any stripe; unreadable samples take no place."""
    draws = mix64("limit", seed, sample_keys(f"s{i:03d}" for i in range(N)))
    smallest = sorted((i for i in range(N) if i not in BAD), key=lambda i: draws[i])[:limit]
    eligible = Eligibility.of(pool, limit, seed)
    assert np.flatnonzero(eligible.read(0, N)).tolist() == sorted(smallest)
    assert eligible.count() == limit


def test_labelled_and_declined_samples_of_every_stripe(pool: Pool) -> None:
    ledger = Ledger(np.array([1, 36, 38, 150]), np.zeros(4, np.int64), np.array([2, 74, 198]))
    eligible = Eligibility.of(pool, None, seed=0).without(ledger)
    expected = sorted({*BAD, *ledger.indices.tolist(), *ledger.declined.tolist()})
    assert np.flatnonzero(~eligible.read(0, N)).tolist() == expected
    for start, stop, flags in eligible.stripes():
        assert np.flatnonzero(~flags).tolist() == [i - start for i in expected if start <= i < stop]


def test_a_part_is_another_one_for_every_seed_and_cycle(pool: Pool) -> None:
    parts = [
        Eligibility.of(pool, None, seed).within(0.5, cycle).read(0, N)
        for seed, cycle in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    for i, one in enumerate(parts):
        assert 0.3 < one.mean() < 0.7
        assert not any(np.array_equal(one, other) for other in parts[:i])


def test_a_part_has_the_share_it_should(pool: Pool) -> None:
    """Of samples whose draws lie below the share: a larger part has all of a smaller one."""
    shares = [Eligibility.of(pool, None, 0).within(share, 0).read(0, N) for share in (0.1, 0.3, 0.9)]
    assert [0.02 < shares[0].mean() < 0.2, 0.2 < shares[1].mean() < 0.4, shares[2].mean() > 0.8] == [True] * 3
    assert not np.any(shares[0] & ~shares[1])
    assert not np.any(shares[1] & ~shares[2])
