"""Change decisive lines one at a time, and see whether the tests notice.

    python -m tests.mutants                     all of `tests.mutants.table`
    python -m tests.mutants --only topk         those whose file or name contains a word
    python -m tests.mutants --list

Exit 0 when every mutant is killed or named equivalent, else 1. A mutant that no longer applies, and tests that fail
without a mutant, are failures of the table.

Not mutmut or cosmic-ray: they generate thousands of mutants of single operators, and mutmut skips decorated functions,
thus every numba kernel; a changed order of writes or a dropped part of a seed is none of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import psutil

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PARALLEL = 2
TEST_TIMEOUT_S = 60  # of one test; pytest-timeout fails it, and the fixtures clean up
RUN_TIMEOUT_S = 300  # of all tests of a mutant
KILLED, SURVIVED, EQUIVALENT, BROKEN = "killed", "survived", "equivalent", "broken"


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant.

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
        environment = os.environ | {
            "PYTHONPATH": str(self._path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(self._folder / kernels),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}", "--hypothesis-profile=ci"]
        command = [sys.executable, "-m", "pytest", *options, f"--basetemp={self._folder / 'basetemp'}", *files]
        with (self._folder / "output").open("w+") as output:
            process = subprocess.Popen(
                command, cwd=self._path, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = -1
                _end(process)
            output.seek(0)
            return code, output.read()

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
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if code != 1 or failed is None:
            return outcome(BROKEN, f"pytest ended with {code}: {output[-600:]}")
        if mutant.equivalent:
            return outcome(BROKEN, f"named equivalent, and {failed[1]} fails")
        return outcome(KILLED, failed[1], timed_out="from pytest-timeout" in output)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all it started."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in everyone:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def run(mutants: Sequence[Mutant], parallel: int) -> Iterator[Outcome]:
    """Try mutants in copies of the working tree; the tests must pass without any first."""
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        free: SimpleQueue[Tree] = SimpleQueue()
        trees = [Tree(Path(folder, str(i))) for i in range(min(parallel, len(mutants)))]
        for tree in trees:
            free.put(tree)
        trees[0].require_own()
        killers = sorted({file for mutant in mutants for file in mutant.killers})
        code, output = trees[0].test(killers, timeout_s=10 * RUN_TIMEOUT_S)
        if code:
            raise RuntimeError(f"the tests fail without a mutant\n{output}")

        def try_out(mutant: Mutant) -> Outcome:
            tree = free.get()
            try:
                return tree.try_out(mutant)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(len(trees)) as threads:
            yield from threads.map(try_out, mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="in the file or the name")
    parser.add_argument("--list", action="store_true", help="name the mutants, and try none")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="mutants tried at a time")
    arguments = parser.parse_args()
    words = arguments.only or [""]
    mutants = [each for each in MUTANTS if any(word in f"{each.file} {each.name}" for word in words)]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(words)} in its file or name; --list names them")
    if arguments.list:
        print("\n".join(f"{each.name:40} {each.file}" for each in mutants))
        return 0

    began, outcomes = time.monotonic(), []
    for outcome in run(mutants, arguments.parallel):
        outcomes.append(outcome)
        verdict = f"{outcome.verdict}{', timed out' if outcome.timed_out else ''}"
        line = f"{len(outcomes)}/{len(mutants)} {outcome.name}: {verdict} ({outcome.seconds:.0f} s) {outcome.by}"
        print(line, file=sys.stderr, flush=True)
    counts = {
        verdict: sum(o.verdict == verdict for o in outcomes) for verdict in (KILLED, SURVIVED, EQUIVALENT, BROKEN)
    }
    seconds = round(time.monotonic() - began)
    if arguments.json:
        print(json.dumps({"seconds": seconds, **counts, "mutants": [asdict(outcome) for outcome in outcomes]}))
    else:
        print(f"{len(outcomes)} mutants in {seconds} s: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}")
    return 1 if counts[SURVIVED] or counts[BROKEN] else 0


if __name__ == "__main__":
    sys.exit(main())
