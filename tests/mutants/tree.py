"""A copy of the working tree in which mutants are tried, each by the tests that should notice it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.mutants.table import Mutant

ROOT = Path(__file__).parents[2]
TEST_TIMEOUT_S = 60  # of one test; pytest-timeout fails it, and the fixtures clean up
RUN_TIMEOUT_S = 300  # of all tests of a mutant
FORKS = multiprocessing.get_context("forkserver")  # importing these takes longer than most tests
FORKS.set_forkserver_preload(
    [
        "torch",
        "torchvision.models",
        "ray.train.torch",
        "pyarrow.parquet",
        "numba",
        "scipy.special",
        "sklearn.metrics",
    ]
)
KILLED, SURVIVED, EQUIVALENT, BROKEN = "killed", "survived", "equivalent", "broken"


@dataclass(frozen=True)
class Outcome:
    """The result for one mutant.

    Attributes:
        verdict: KILLED, SURVIVED, EQUIVALENT, or BROKEN when it could not be tried.
        by: the test that failed, or why the mutant is broken or equivalent.
        timed_out: whether the test failed by its time limit.
    """

    name: str
    file: str
    verdict: str
    by: str
    timed_out: bool
    seconds: float


class Tree:
    """A copy of the working tree in which mutants are tried one after the other.

    It stays at one place, so that numba reuses kernels that are not mutated. Python and numba recognise a source file
    by its time and size, which a mutant may share with the original: no bytecode is kept, and a mutant gets a numba
    cache of its own when kernels can be changed by it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self._path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._path / name)

    def test(self, files: Sequence[str], kernels: str = "kernels", timeout_s: float = RUN_TIMEOUT_S) -> tuple[int, str]:
        """Run test files up to the first failure: exit code of pytest, -1 for a time-out, and its output."""
        output = self._folder / "output"
        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}"]
        arguments = [*options, f"--basetemp={self._folder / 'basetemp'}", *files]
        process = FORKS.Process(target=_pytest, args=(self._path, self._folder / kernels, output, arguments))
        process.start()
        process.join(timeout_s)
        code = -1 if process.exitcode is None else process.exitcode
        if process.exitcode is None:
            _end(process)
        return code, output.read_text()

    def require_own(self) -> None:
        """Raise RuntimeError unless the copy is what is imported."""
        environment = os.environ | {"PYTHONPATH": str(self._path)}
        command = [sys.executable, "-c", "import distal; print(distal.__file__)"]
        found = subprocess.run(
            command, cwd=self._path, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_relative_to(self._path):
            raise RuntimeError(f"the tests would import {found}, not the copy in {self._path}")

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """With a mutant in place of the original."""
        file = self._path / mutant.file
        original = file.read_text()
        file.write_text(mutant.apply(original))
        try:
            yield
        finally:
            file.write_text(original)

    def try_out(self, mutant: Mutant) -> Outcome:
        """Whether a test notices a mutant."""
        began = time.monotonic()

        def outcome(verdict: str, by: str, timed_out: bool = False) -> Outcome:
            return Outcome(mutant.name, mutant.file, verdict, by, timed_out, round(time.monotonic() - began, 1))

        own = f"kernels-{mutant.name}"
        try:
            with self.mutated(mutant):
                code, output = self.test(mutant.killers, own if mutant.file.endswith("kernels.py") else "kernels")
        except ValueError as error:
            return outcome(BROKEN, str(error))
        finally:
            shutil.rmtree(self._folder / own, ignore_errors=True)
            shutil.rmtree(self._folder / "basetemp", ignore_errors=True)
        if code == 0:
            return outcome(*((EQUIVALENT, mutant.equivalent) if mutant.equivalent else (SURVIVED, "")))
        if code == -1:
            return outcome(KILLED, f"no end after {RUN_TIMEOUT_S} s", timed_out=True)
        failed = re.search(
            r"^(?:FAILED|ERROR) .+?(?= - |$)", output, re.MULTILINE
        )  # an error in a fixture shows as such
        if code != 1 or failed is None:
            return outcome(BROKEN, f"pytest ended with {code}: {output[-600:]}")
        if mutant.equivalent:
            return outcome(BROKEN, f"named equivalent, and {failed[0]} fails")
        return outcome(KILLED, failed[0], timed_out="from pytest-timeout" in output)


def _pytest(tree: Path, kernels: Path, output: Path, arguments: list[str]) -> None:
    """Run pytest in a copy; other packages may be imported already, distal is not."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if Path(place).resolve() not in (ROOT, ROOT.parent))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "distal", "__mp_main__")]:
        del sys.modules[name]
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(kernels)}
    sys.dont_write_bytecode = True

    import numba
    import pytest

    numba.config.CACHE_DIR = str(kernels)
    sys.exit(pytest.main(arguments, plugins=[_Examples()]))


class _Examples:
    """Makes Hypothesis draw the same examples in every run, and skip the shrinking of counterexamples."""

    def pytest_configure(self) -> None:
        from hypothesis import HealthCheck, Phase, settings

        settings.register_profile(
            "mutants",
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=[HealthCheck.too_slow],
        )
        settings.load_profile("mutants")


def _end(process: BaseProcess) -> None:
    """Kill a process and all it started."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for child in everyone:
        with suppress(psutil.NoSuchProcess):
            child.kill()
