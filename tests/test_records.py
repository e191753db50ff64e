from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distal.records import Block, Window, auto_block_size, split_blocks


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (0, 4, []),
        (1, 4, [(0, 1)]),
        (4, 4, [(0, 4)]),
        (5, 4, [(0, 4), (4, 5)]),  # ragged last block
        (8, 4, [(0, 4), (4, 8)]),
    ],
)
def test_blocks_cover_everything_once(n: int, size: int, expected: list[tuple[int, int]]) -> None:
    blocks = split_blocks(n, size)
    assert [(block.start, block.stop) for block in blocks] == expected
    assert [block.index for block in blocks] == list(range(len(expected)))
    assert sum(map(len, blocks)) == n


@pytest.mark.parametrize(
    ("n", "size"),
    [
        (1, 128),
        (8_192, 128),
        (10_000, 128),
        (50_000, 1024),
        (1_000_000, 16_384),
        (10_000_000, 65_536),
        (10**9, 65_536),
    ],
)
def test_auto_block_size(n: int, size: int) -> None:
    assert auto_block_size(n) == size


def test_block_is_a_value() -> None:
    assert Block(0, 0, 3) == Block(0, 0, 3)
    assert len(Block(1, 3, 5)) == 2


LASTS = st.none() | st.integers(1, 10**6).map(float) | st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.integers(0, 9), LASTS, st.integers(1, 4))
def test_a_window_is_its_name(first: int, last: float | None, every: int) -> None:
    window = Window(first, last, every)
    assert Window.of_name(f"flips{window}") == ("flips", window)


@given(st.decimals("1e-14", "0.99999999999999", places=14), st.integers(1, 5000), st.integers(0, 20), st.integers(1, 5))
def test_a_share_is_the_decimal_number_that_is_written(share: Decimal, n_rows: int, first: int, every: int) -> None:
    _, window = Window.of_name(f"dispersion@from={first},last={share},every={every}")
    rows = list(range(first, n_rows))
    keep = math.ceil(Fraction(str(share)) * len(rows))
    assert window.rows(n_rows) == [row for row in rows[len(rows) - keep :] if (n_rows - 1 - row) % every == 0]


def test_shares_of_two_places_of_any_number_of_rows() -> None:
    for percent, n_rows in itertools.product(range(1, 100), (1, 2, 3, 7, 40, 50, 100, 200, 1000)):
        window = Window(last=percent / 100)
        assert len(window.rows(n_rows)) == -(-percent * n_rows // 100), (percent, n_rows)


@pytest.mark.parametrize("last", ["nan", "inf", "-inf", "0", "-0.5", "-3", "1.5", "1e400", "1.0000001"])
def test_a_window_that_is_none(last: str) -> None:
    with pytest.raises(
        ValueError, match=r"^last=\S+: must be a whole number of checkpoints, or a share of them above 0"
    ):
        Window.of_name(f"dispersion@last={last}")
    with pytest.raises(ValueError, match=r"^last=\S+: must be"):
        Window(last=float(last))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("from=-1", "from=-1: must be at least 0"),
        ("every=0", "every=0: must be at least 1"),
        ("every=2.5", "'every=2.5' is not a whole number"),
        ("last=half", "'last=half' is not a number"),
        ("last=", "'last=' is not a number"),
        ("last=3,last=4", "'last=3,last=4' has last twice"),
        ("first=3", "'first=3' is no part of a window"),
    ],
)
def test_names_that_are_no_window(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Window.of_name(f"dispersion@{name}")
