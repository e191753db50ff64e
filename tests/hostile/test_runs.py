"""`distal verify` on run directories that want to do harm: an answer, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distal.errors import Damage, UserError
from distal.report.verify import verify
from tests.hostile.runs import CYCLE, cases, names, plugins

CASES = list(cases())
TOGETHER = (
    f"fifo {CYCLE}/score.json", f"zero {CYCLE}/assignments.zarr/assignments/c/1/0", f"endless {CYCLE}/train/state.pt",
    f"loop {CYCLE}/selection.parquet", f"folder {CYCLE}/labels.parquet", f"deep {CYCLE}/train.json", "fifo waiting.json",
    "laughs run.yaml", "bomb", "a weights file that is a device", f"zero {CYCLE}/scores.zarr/zarr.json",
)  # fmt: skip


def copy(small_run: Path, to: Path) -> Path:
    shutil.copytree(small_run, to, copy_function=os.link)  # files are replaced, never written over
    return to


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_case(small_run: Path, tmp_path: Path, step: int) -> None:
    """One after the other in one process: no other error than those that the command makes a line of."""
    wrong = {}
    for i, (name, harm) in enumerate(CASES[::step]):
        run = copy(small_run, tmp_path / str(i))
        harm(run)
        try:
            told = verify(run)
        except (UserError, Damage):
            continue
        except OSError as error:
            if error.filename is None or error.strerror is None:
                wrong[name] = repr(error)
        except Exception as error:
            wrong[name] = repr(error)[:200]
        else:
            if any("\n" in line for line in told.damage if "a\nb" not in line):
                wrong[name] = told.damage
        finally:
            shutil.rmtree(run)
    assert wrong == {}


def test_the_command_on_all_of_it(small_run: Path, tmp_path: Path) -> None:
    run = copy(small_run, tmp_path / "run")
    plugins(run)
    names(run)
    harms = dict(CASES)
    for name in TOGETHER:
        harms[name](run)
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "distal", "verify", ".", *options], cwd=run, capture_output=True, timeout=100
        )
        assert done.returncode == 4, done.stderr
        assert b"Traceback" not in done.stdout + done.stderr
        assert not (run / "ran").exists()


@pytest.mark.parametrize("name", ["bomb", "rows", "many epochs"])
def test_what_a_case_does_is_noticed(small_run: Path, tmp_path: Path, name: str) -> None:
    """That the corpus does harm at all: some of it must not go unseen."""
    run = copy(small_run, tmp_path / "run")
    dict(CASES)[name](run)
    assert verify(run).state == "damaged"
