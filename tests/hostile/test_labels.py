"""Every hostile label file ends in its one line: nothing is imported, nothing hangs, and memory has a limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distal.artifacts.runs import Run
from distal.errors import UserError
from distal.labels.answers import read
from distal.labels.waiting import import_labels
from distal.pool import Pool
from tests.hostile.labels import write_corpus
from tests.labels.waiting import waiting_run

MOST_MEMORY = 1.5 * 2**30

Corpus = tuple[Path, dict[str, str | int]]
Start = Callable[[Path], Run]


@pytest.fixture(scope="module")
def corpus(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("hostile")
    samples = pool.samples(0, pool.n_samples)
    names = samples["sample_id"].to_pylist()
    return folder, write_corpus(folder, names[:3], names[7])


@pytest.fixture(scope="module")
def start(pool: Pool) -> Start:
    """Begins a run that asks for three samples and for one that is unreadable."""
    return lambda path: waiting_run(path, pool, [0, 1, 2, 7])


def test_every_file_ends_in_its_line(corpus: Corpus, start: Start, tmp_path: Path) -> None:
    folder, expected = corpus
    wrong = {}
    for number, (name, expectation) in enumerate(expected.items()):
        run = start(tmp_path / str(number))
        if isinstance(expectation, int):
            assert import_labels(run.path, folder / name).new == expectation, name
            assert import_labels(run.path, folder / name).new == 0, name
            continue
        with pytest.raises(UserError) as caught:
            import_labels(run.path, folder / name)
        line = str(caught.value)
        if not re.search(expectation, line) or not line.isprintable() or len(line) > 600 or str(folder) not in line:
            wrong[name] = line
        assert not run.answers.exists(), name
    assert wrong == {}


COMMAND = """
import json, re, sys
from pathlib import Path
from typer.main import get_command

from distal.cli.app import app

command, codes = get_command(app), {}
for file in sys.argv[2:]:
    try:
        command(["labels", "import", sys.argv[1], file], prog_name="distal")
    except SystemExit as end:
        codes[file] = end.code
# Not ru_maxrss: it has the memory of the process that started this one, from before exec.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps([codes, int(peak[1]) * 1024]))
"""


def test_the_command(corpus: Corpus, start: Start, tmp_path: Path) -> None:
    """All of them through one process: exit codes 0 and 2, a line each, no traceback, and not too much memory."""
    folder, expected = corpus
    run = start(tmp_path / "run")
    files = {str(folder / name): expectation for name, expectation in expected.items()}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(run.path), *files], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    codes, memory = json.loads(done.stdout.splitlines()[-1])
    assert codes == {file: 0 if isinstance(expectation, int) else 2 for file, expectation in files.items()}
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == sum(isinstance(expectation, str) for expectation in files.values())
    print(f"{memory / 2**30:.2f} GiB")
    assert memory < MOST_MEMORY
    assert read(run.answers)
