"""Counter-based randomness: every draw is a pure function of what it is for.

Nothing in distal keeps a running random state. A draw depends on (purpose, seed, cycle, sample ...) alone,
so it is the same for any number of actors, in any order, and after any restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UInt64 = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def sample_key(sample_id: str) -> int:
    """The 64-bit key of a sample: BLAKE2b-64 of its UTF-8 `sample_id`. Stable across pools and machines."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")


def sample_keys(sample_ids: Iterable[str]) -> _UInt64:
    """`sample_key` of each id: (n,) uint64."""
    return np.fromiter((sample_key(sample_id) for sample_id in sample_ids), dtype=np.uint64)


def mix64(purpose: str, *parts: int | NDArray[np.integer[Any]]) -> _UInt64:
    """Hash `parts` under a named purpose to uniform 64-bit integers.

    Each part is absorbed with the finaliser of SplitMix64 (Steele, Lea and Flood 2014). Different purposes
    give independent draws from the same numbers.

    Args:
        purpose: what the draw is for, such as "tie" or "augment".
        parts: integers or integer arrays, broadcast against each other. Negative ones wrap to uint64.

    Returns:
        uint64 of the broadcast shape of `parts`.
    """
    with np.errstate(over="ignore"):  # wrapping is the arithmetic of a hash
        state: _UInt64 = np.asarray(sample_key(purpose), dtype=np.uint64)
        for part in parts:
            if isinstance(part, int):
                part = np.asarray(part & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
            state = _splitmix(state ^ part.astype(np.uint64, copy=False))
    return state


def _splitmix(x: _UInt64) -> _UInt64:
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_for(purpose: str, *parts: int) -> int:
    """A seed for a library's generator, in [0, 2^63)."""
    return int(mix64(purpose, *parts)) >> 1


def digest(value: object) -> str:
    """sha256 (hex) of a JSON-able value; equal values give equal digests whatever their key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
