"""k-center greedy: a batch that covers the candidates, each sample the farthest from those chosen before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-12  # of squared distances, relative to the squared lengths they are computed from


def k_center(points: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Farthest-first traversal by Euclidean distance (Gonzalez 1985; for core sets Sener and Savarese 2018).

    The first point is chosen first; of points as far from all chosen ones the first is taken. Points that equal one
    chosen come after all others, in their order. O(n k d) time, O(n d) memory, float64.

    Args:
        points: (n, d), in order of preference.
        k: in [0, n].

    Returns:
        Positions, (k,) int64, in the order of choice.
    """
    x = points.astype(np.float64)
    lengths = np.einsum("ij,ij->i", x, x)
    nearest = np.full(len(x), np.inf)
    chosen = np.zeros(k, np.int64)
    for place in range(k):
        chosen[place] = best = int(np.argmax(nearest))
        scale = lengths + lengths[best]
        distance = scale - 2 * (x @ x[best])
        distance[distance <= _ROUNDING * scale] = 0
        np.minimum(nearest, distance, out=nearest)
        nearest[chosen[: place + 1]] = -1
    return chosen
