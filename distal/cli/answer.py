"""How every command ends: its result as a table or JSON, an error as one line, the exit code, signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import typer

from distal.errors import Damage, DistalError, UserError, one_line
from distal.records import Result

if TYPE_CHECKING:
    from rich.table import Table

_AnyResult = TypeVar("_AnyResult", bound=Result)
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the process of a job


@dataclass(frozen=True)
class Written(Result):
    """The file that a command wrote."""

    path: Path


def answer(
    work: Callable[[], _AnyResult],
    as_json: bool,
    render: Callable[[_AnyResult], Table | str],
    if_stopped: Callable[[], str] = str,
) -> None:
    """Run a command's work and print what it returns; every exit code is decided here.

    Args:
        if_stopped: the end of the line when a signal stops it.
    """
    _stop_on_signals(as_json, if_stopped)
    try:
        result = work()
    except DistalError as error:
        raise _refuse(one_line(error), error.exit_code, as_json) from None
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        line = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}; give a path that can be used"
        raise _refuse(line, UserError.exit_code, as_json) from None
    except Exception as error:
        if as_json:
            print(json.dumps({"state": "error", "error": one_line(error), "exit_code": 1}))
        raise
    record = result.to_record()
    if as_json:
        print(json.dumps(record))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(render(result), markup=False, highlight=False)
    if record.get("state") == "damaged":
        raise typer.Exit(Damage.exit_code)
    if record.get("exit_code"):
        raise typer.Exit(record["exit_code"])


def _refuse(line: str, exit_code: int, as_json: bool) -> typer.Exit:
    """Print an error as one line, without control characters: file names may hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"distal: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"state": "error", "error": line, "exit_code": exit_code}))
    return typer.Exit(exit_code)


def same_command() -> str:
    """How to go on after a signal stopped a command."""
    if _IN_A_JOB in os.environ:  # there the command names a file that ends with the job
        return "; submit it again to go on"
    return f"; continue with: distal {shlex.join(sys.argv[1:])}"


def _stop_on_signals(as_json: bool, if_stopped: Callable[[], str]) -> None:
    """Leave at once on SIGINT and SIGTERM, with one line that says how to continue.

    There is nothing to clean up: what is committed stays valid, a stopped run is resumed like a killed one, and Ray
    ends its processes with their driver.
    """

    def stop(number: int, _: FrameType | None) -> None:
        line = f"stopped by {signal.Signals(number).name}{if_stopped()}"
        # os.write: the signal may have come in the middle of a print. A progress bar stays and had hidden the cursor.
        bar = "\n\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{bar}distal: {line}\n".encode())
        if as_json:
            os.write(1, json.dumps({"state": "stopped", "error": line, "exit_code": 128 + number}).encode() + b"\n")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
