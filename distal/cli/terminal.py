"""Progress for people: bars on a terminal, a line now and then elsewhere; and for programs, a line of JSON each."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from distal.cli.tables import run_state, watch_table, watched, watched_stage
from distal.progress import spoken
from distal.records import JsonObject, Progress

if TYPE_CHECKING:
    from distal.report.status import Look

_LINE_EVERY_S = 10.0
_SHOWN_FAULTS = 5


class JsonLines:
    """Writes everything to stderr for programs: events as they are logged, and what else is said in the same form."""

    def __init__(self) -> None:
        self._pace = _Pace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, state: Progress) -> None:
        """`progress` when the stage changes, and every ten seconds."""
        if self._pace.due((state.cycle, state.stage)):
            self._write("progress", asdict(state))

    def say(self, line: str) -> None:
        """`say`, with the line."""
        self._write("say", {"line": line})

    def event(self, record: JsonObject) -> None:
        """The event."""
        print(json.dumps(record), file=sys.stderr, flush=True)

    def _write(self, name: str, values: Mapping[str, object]) -> None:
        self.event({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **values})


class _Pace:
    """When to show something again: at once when it is about something else, and every ten seconds."""

    def __init__(self) -> None:
        self._at = 0.0
        self._of: object = None

    def due(self, of: object) -> bool:
        """Whether it is time to show what is known `of` something."""
        if of == self._of and time.monotonic() - self._at < _LINE_EVERY_S:
            return False
        self._at, self._of = time.monotonic(), of
        return True


class _Bars(Bars):
    """A bar with a line below it, so that both fit into 80 columns."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(f"  {self.below}", no_wrap=True, overflow="ellipsis")


class Terminal:
    """Shows progress on stderr, or on another console; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._pace = _Pace()
        self._shown: tuple[int, str] | None = None
        self._task: TaskID | None = None
        self._bars = _Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)  # a path may look like markup

    def event(self, record: JsonObject) -> None:
        """Say it if a person should know."""
        if line := spoken(record):
            self.say(line)

    def progress(self, state: Progress) -> None:
        """Redraw the bar; without a terminal, print a line when the stage changes and every ten seconds."""
        if self.console.is_terminal:
            self._draw(state)
            return
        if self._pace.due((state.cycle, state.stage)):
            self.say(f"{_title(state)}  {state.images_scored:,}/{state.images:,}  {_detail(state)}".rstrip())

    def _draw(self, state: Progress) -> None:
        if self._shown != (state.cycle, state.stage):
            self._shown = (state.cycle, state.stage)
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task("", total=None)
        assert self._task is not None
        self._bars.below = _detail(state)
        self._bars.update(
            self._task, description=_title(state), completed=state.images_scored, total=state.images or None
        )


def _title(state: Progress) -> str:
    return f"cycle {state.cycle}  {state.stage}" if state.cycle >= 0 else state.stage


def _detail(state: Progress) -> str:
    parts = []
    if state.epochs:
        parts += [
            f"epoch {state.epoch}/{state.epochs}",
            f"checkpoints {state.rows_scored} scored of {state.published} published",
        ]
    if state.images_per_s:
        parts.append(f"{state.images_per_s:,.0f} images/s")
    if state.seconds_left is not None:
        parts.append(f"{state.seconds_left:.0f} s left")
    if state.epochs and not state.actors:
        parts.append("scoring actors are starting" if state.actors_starting else "scoring waits for a free slot")
    return "  ".join(parts)


class WatchScreen:
    """Shows what a run looks like, again and again: redrawn on a terminal, a line now and then elsewhere.

    It writes to stderr, or to another console; use as a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._pace = _Pace()
        self._faults: deque[str] = deque(maxlen=_SHOWN_FAULTS)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, look: Look) -> None:
        """Show one look."""
        self._faults.extend(look.new_faults)
        if self.console.is_terminal:
            self._live.update(watch_table(look, self._faults), refresh=True)
            return
        for line in look.new_faults:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self._pace.due((look.cycle, look.stage, look.state)):
            line = f"{run_state(look)}  {watched_stage(look)}  {'  '.join(watched(look).values())}"
            self.console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
