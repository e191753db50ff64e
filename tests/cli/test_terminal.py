from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from distal.cli.tables import pool_table
from distal.cli.terminal import Terminal
from distal.pool.images import PoolInfo
from distal.records import Progress

STATE = Progress(
    cycle=0,
    stage="train + score",
    epoch=15,
    epochs=15,
    published=15,
    rows_scored=3,
    images_scored=56_013,
    images=145_500,
    images_per_s=8_219.0,
    actors=2,
)


POOL = PoolInfo(
    path=Path("pool"),
    source="cats",
    n_samples=1200,
    n_labeled=1200,
    n_unreadable=0,
    unreadable=None,
    image_shape=(1, 8, 8),
    classes={"cat": 1200},
    mean=(0.28689,),
    std=(0.5,),
    bytes_decoded=65_536,
    samples_per_chunk=128,
    content_sha256="7" * 64,
)


def shown(*states: Progress, terminal: bool) -> list[str]:
    """The lines that come out, at 80 columns."""
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, legacy_windows=False, _environ={"TERM": "xterm"})
    with Terminal(console) as display:
        for state in states:
            display.progress(state)
        display._bars.refresh()
    return [Text.from_ansi(line).plain for line in out.getvalue().replace("\x1b[2K", "\n").splitlines()]


def test_a_bar_and_everything_a_person_asks_fit_into_80_columns() -> None:
    lines = shown(STATE, terminal=True)
    assert any("cycle 0  train + score" in line and "56013/145500" in line for line in lines)
    assert "  epoch 15/15  checkpoints 3 scored of 15 published  8,219 images/s  11 s left" in lines
    assert max(map(len, lines)) <= 80


def test_without_a_terminal_a_line_now_and_then() -> None:
    lines = shown(STATE, STATE, STATE, Progress(0, "reduce", images_scored=5, images=10), terminal=False)
    assert [line.partition("  ")[2].partition("  ")[0] for line in lines] == ["train + score", "reduce"]


def test_why_nothing_is_scored() -> None:
    (waiting,) = shown(Progress(0, "train + score", epochs=3), terminal=False)
    assert waiting.endswith("scoring waits for a free slot")
    (starting,) = shown(Progress(0, "train + score", epochs=3, actors_starting=1), terminal=False)
    assert starting.endswith("scoring actors are starting")


def test_a_pool_in_words() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(pool_table(POOL))
    words = out.getvalue().split()
    assert words[words.index("classes") :][:4] == ["classes", "cat", "(1,200)", "mean"]
    assert "0.2869" in out.getvalue()
    assert out.getvalue().count("7") == 64


def test_what_is_said_is_text_and_not_markup() -> None:
    """An error from C++ may end with the path of a source file in brackets."""
    out = io.StringIO()
    with Terminal(Console(file=out, width=80)) as display:
        display.say("connection reset [/src/pair.cc:545] [bold]")
    assert out.getvalue() == "connection reset [/src/pair.cc:545] [bold]\n"
