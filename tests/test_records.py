from __future__ import annotations

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


@given(st.integers(0, 9), st.sampled_from([None, 3.0, 0.25]), st.integers(1, 4))
def test_a_window_is_its_name(first: int, last: float | None, every: int) -> None:
    window = Window(first, last, every)
    assert Window.of_name(f"flips{window}") == ("flips", window)
