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

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.table import MUTANTS, Mutant
from tests.mutants.tree import BROKEN, EQUIVALENT, KILLED, RUN_TIMEOUT_S, SURVIVED, Outcome, Tree

PARALLEL = 2


def run(mutants: Sequence[Mutant], parallel: int) -> Iterator[Outcome]:
    """Try mutants in copies of the working tree; the tests must pass without any first."""
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        free: SimpleQueue[Tree] = SimpleQueue()
        trees = [Tree(Path(folder, str(i))) for i in range(min(parallel, len(mutants)))]
        for tree in trees:
            free.put(tree)
        trees[0].require_own()
        killers = sorted({each.partition("::")[0] for mutant in mutants for each in mutant.killers})
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
