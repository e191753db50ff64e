from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distal.hashing import digest, mix64, sample_key, sample_keys, seed_for


def test_known_values() -> None:
    """Draws decide selections: they must never change between versions or machines."""
    assert sample_key("fashion-mnist/train/00000") == 2805588425241292252
    assert int(mix64("tie", 0, 0, np.uint64(1))) == 4297066044748744834
    assert seed_for("init", 0, 0) == 2428958407690467154


def reference(purpose: str, *parts: int) -> int:
    """SplitMix64 in plain integers, after the published C code."""
    mask = 2**64 - 1
    state = sample_key(purpose)
    for part in parts:
        z = ((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state


@given(st.text(max_size=5), st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4))
def test_mix64_is_splitmix64(purpose: str, parts: list[int]) -> None:
    assert int(mix64(purpose, *parts)) == reference(purpose, *parts)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_arrays_and_scalars_agree(seed: int, keys: list[int]) -> None:
    drawn = mix64("tie", seed, np.array(keys, dtype=np.uint64))
    assert drawn.tolist() == [int(mix64("tie", seed, key)) for key in keys]


def test_purpose_and_every_part_matter() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    draws = [mix64("tie", 0, 0, keys), mix64("tie", 0, 1, keys), mix64("tie", 1, 0, keys), mix64("limit", 0, 0, keys)]
    for i, one in enumerate(draws):
        assert len(np.unique(one)) == len(keys)
        for other in draws[:i]:
            assert not np.any(one == other)


def test_draws_are_uniform() -> None:
    draws = mix64("test", 3, np.arange(100_000, dtype=np.uint64))
    counts = np.bincount((draws >> np.uint64(60)).astype(int), minlength=16)
    assert counts.min() > 6250 - 5 * np.sqrt(6250)
    assert counts.max() < 6250 + 5 * np.sqrt(6250)


def test_sample_keys() -> None:
    assert sample_keys(["a", "b"]).tolist() == [sample_key("a"), sample_key("b")]
    assert sample_keys([]).dtype == np.uint64


def test_digest_ignores_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


@pytest.mark.parametrize("seed", range(5))
def test_seeds_suit_torch(seed: int) -> None:
    assert 0 <= seed_for("epoch", seed, 1, 2, 3) < 2**63
