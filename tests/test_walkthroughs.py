"""The walk-throughs of the documentation, typed as they are there, by a user in an empty folder."""

from __future__ import annotations

import csv
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distal.artifacts.checkpoints import committed
from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.config import commented_yaml, load
from distal.pool import Pool
from tests.helpers import distal

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return found


def shell(folder: Path, command: str) -> str:
    """What a command says; its whole session is ended when it fails or hangs."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{command}: {process.returncode}\n{told}"
    return told


def test_your_images_configures_a_run_of_its_own(tmp_path: Path) -> None:
    """The commands fit the file that `distal init` writes: nothing of the quickstart's data is left."""
    page = "\n".join(re.findall(r"```\n(.*?)```", (DOCS / "your-images.md").read_text(), flags=re.DOTALL))
    typed = [shlex.split(line, comments=True)[1:] for line in page.splitlines() if line.startswith("distal ")]
    pools = [str(Path(words[3]).absolute()) for words in typed if words[:2] == ["pool", "build"]]
    (watched,) = [str(Path(words[1]).absolute()) for words in typed if words[0] == "status"]
    (tmp_path / "my.yaml").write_text(commented_yaml())
    configured = [words for words in typed if words[0] in ("plan", "run")]
    assert [words[:2] for words in configured] == [["plan", "my.yaml"], ["run", "my.yaml"]]
    for _, file, *overrides in configured:
        config = load(tmp_path / file, overrides)
        assert config.pool.path in pools
        assert (config.run, config.pool.source, config.eval.test, config.eval.val) == (watched, None, None, None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_training(tmp_path: Path) -> None:
    script = next(block for block in blocks("your-training.md", "python") if "argparse" in block)
    assert len([line for line in script.splitlines() if line.strip()]) <= 42
    (tmp_path / "train.py").write_text(script)
    loop, scored = blocks("your-training.md", "yaml")
    (tmp_path / "loop.yaml").write_text(loop)
    (tmp_path / "loop-score.yaml").write_text(scored)
    inside, beside = blocks("your-training.md", "sh")
    shell(tmp_path, inside)
    run = Run.open(tmp_path / yaml.safe_load(loop)["run"])
    assert len(run.ledger(before=1)) == 300
    assert committed(run.cycle(1).checkpoints) == list(range(6))
    shell(tmp_path, beside)
    (selection,) = (tmp_path / yaml.safe_load(scored)["run"]).glob("cycles/000/analyses/*/selection-100.parquet")
    assert len(Selection.read(selection)) == 100
    assert committed(tmp_path / "out") == list(range(8))


def say(folder: Path, command: str) -> str:
    """What a command that needs no Ray says in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        program, *arguments = shlex.split(command, comments=True)
        assert program == "distal"
        done = distal(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def play(folder: Path, pool: Pool, cycle: int, files: int) -> None:
    """Two annotators answer what was exported: most of it, some skipped, some not to tell, some in dispute."""
    truth = dict(
        zip(*(pool.samples(0, pool.n_samples)[name].to_pylist() for name in ("sample_id", "label")), strict=True)
    )
    with (folder / "batch.csv").open() as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: row["sample_id"])
    said = []
    for number, row in enumerate(rows):
        label = truth[row["sample_id"]]
        kind = (number + cycle) % 10
        said.append((row["sample_id"], {3: "", 6: "cannot tell"}.get(kind, pool.classes[label]), "ann"))
        if kind == 8:  # in dispute, until a third one has looked
            said.append((row["sample_id"], pool.classes[(label + 1) % len(pool.classes)], "bob"))
            said.append((row["sample_id"], pool.classes[label], "cy"))
    if files > 1:  # several files, of which one comes twice; the order of annotators stays
        size = -(-len(said) // files)
        parts = [said[start : start + size] for start in range(0, len(said), size)]
        random.Random(cycle).shuffle(parts)
        parts.append(parts[0])
    else:
        parts = [said]
    for number, part in enumerate(parts):
        with (folder / "answers.csv").open("w") as out:
            csv.writer(out).writerows([("sample_id", "label", "annotator"), *part])
        told = (say if files > 1 else shell)(folder, IMPORT)
        if number == 0 and files > 1:  # a part is not enough, and the run says so
            assert "waiting for labels" in shell(folder, RUN), told


RUN, EXPORT, IMPORT = blocks("labeling.md", "sh")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_labels_from_people(tmp_path: Path) -> None:
    """Four cycles; the ledger is the same whether answers come in one file or in many, once or twice.

    Everything is typed in one of the folders; in the other one what needs no Ray runs in this process.
    """
    ledgers = {}
    (text,) = blocks("labeling.md", "yaml")
    config = yaml.safe_load(text)
    cycles = config["loop"]["cycles"]
    assert cycles == 4
    for name, files in (("one", 1), ("many", 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.yaml").write_text(text)
        for cycle in range(-1, cycles - 1):
            assert "waiting for labels" in shell(folder, RUN)
            (say if files > 1 else shell)(folder, EXPORT)
            play(folder, Pool.open(folder / config["pool"]["path"]), cycle, files)
        assert "waiting" not in shell(folder, RUN)
        run = Run.open(folder / config["run"])
        ledgers[name] = [run.ledger(before=cycle).sha256 for cycle in range(cycles)]
        last = run.ledger(before=cycles - 1)
        assert len(last.declined) > 0
        assert len(set(last.indices.tolist()) & set(last.declined.tolist())) == 0
    assert ledgers["one"] == ledgers["many"]
