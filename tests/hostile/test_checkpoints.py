"""What a stranger may have left in a directory of checkpoints is refused in one line, quickly, in little memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distal.config import ModelSection
from distal.errors import Damage, ModelError
from distal.model.spec import ModelSpec, seeded_build
from distal.pool import Pool
from distal.train.folder import FolderCheckpoints
from tests.helpers import write_checkpoints
from tests.hostile import checkpoints as corpus

SPEC = ModelSpec(ModelSection(), 4, (1, 12, 12), (0.5,), (0.5,))
STATE = seeded_build(SPEC, 0, 0).state_dict()
MOST_BYTES = 2**28  # that a file may add to what the process has


def look(folder: Path) -> list[str]:
    """Names of the checkpoints that count."""
    found = FolderCheckpoints(folder.with_suffix(".json"), folder, "*.*", STATE)
    found.settle()
    found.keep()
    return [ref.path.name for ref in found.refs]


@pytest.mark.parametrize("name", corpus.CASES, ids=ascii)
@pytest.mark.timeout(60)
def test_each_is_refused_in_one_line_or_read(tmp_path: Path, name: str) -> None:
    expected = corpus.write(tmp_path / "ck", name, STATE)
    if expected == corpus.SOUND:
        assert look(tmp_path / "ck") == ([] if name == "0010" else [name])
        return
    with pytest.raises((ModelError, Damage), match=expected) as raised:
        look(tmp_path / "ck")
    assert len(str(raised.value)) < 2000
    assert isinstance(raised.value, Damage) == name.isdigit()
    assert not Path("/tmp/distal-hostile").exists()


def test_what_is_read_stays_small(tmp_path: Path) -> None:
    """One process reads all that could become large, each in a folder of its own."""
    for number, name in enumerate(corpus.LARGE):
        corpus.write(tmp_path / str(number) / "ck", name, STATE)
    code = """
import sys
from pathlib import Path
from distal.errors import DistalError
from tests.hostile.test_checkpoints import look
from distal.score.actor import peak_rss_bytes
def size():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, refused = size(), 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        look(folder / "ck")
    except DistalError:
        refused += 1
print(refused, peak_rss_bytes() - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    refused, grown = map(int, told.stdout.split())
    assert refused == len(corpus.LARGE)
    assert grown < MOST_BYTES


@pytest.mark.parametrize("good", [False, True])
def test_the_command_says_one_line(pool: Pool, tmp_path: Path, good: bool) -> None:
    """On a folder of all of them, or of some among sound ones; before it starts Ray, or writes checkpoints down."""
    names = ["fifo.pt", "deflated.pt", "expanded-1e13.pt", "code.pt", "a1²3.pt"] if good else corpus.CASES
    for name in names:
        corpus.write(tmp_path / "ck", name, STATE)
    if good:
        write_checkpoints(tmp_path / "ck", pool, range(3))
    config = {
        "run": str(tmp_path / "run"),
        "device": "cpu",
        "pool": {"path": str(pool.path)},
        "model": {"num_classes": 4, "normalize": "pool"},
        "checkpoints": {"path": str(tmp_path / "ck"), "pattern": "*.*"},
        "score": {"budget": 5, "precision": "fp32", "batch_size": 32},
    }
    (tmp_path / "score.yaml").write_text(yaml.safe_dump(config))
    told = subprocess.run(
        [sys.executable, "-m", "distal", "score", str(tmp_path / "score.yaml")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)),
    )
    assert told.returncode in (2, 4), told.stderr
    (line,) = [line for line in told.stderr.splitlines() if line.startswith("distal: ")]
    assert told.stderr.splitlines()[-1] == line
    assert "Traceback" not in told.stderr
    assert line.isprintable()
    assert not (tmp_path / "run" / "run.yaml").exists()
