"""A training script of the user's own inside the loop: real processes, and a real run around them."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.runs import Run
from distal.config import ModelSection
from distal.driver import run as driver
from distal.errors import ConfigError, Damage, ModelError, RunConflict, Superseded, TrainingFailed
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.report.verify import verify
from distal.score.predict import Predictor
from distal.train.command import OWNER, check_command, publish_checkpoint, resume_checkpoints, run_command
from distal.train.rank import claim
from tests.helpers import flip, small_config
from tests.train.test_launch import job

pytestmark = pytest.mark.usefixtures("stand_ins")  # the scripts are real

SCRIPT = """
import argparse, sys
import pyarrow.parquet as pq
import torch
import distal

options = argparse.ArgumentParser()
for name in ("labels", "out", "pool"):
    options.add_argument("--" + name)
for name in ("seed", "epochs"):
    options.add_argument("--" + name, type=int)
options = options.parse_args()

torch.set_num_threads(1)
torch.manual_seed(options.seed)
table = pq.read_table(options.labels)
pool = distal.Pool.open(options.pool)
images = torch.from_numpy(pool.take(table["sample_index"].to_numpy())).float() / 255
labels = torch.from_numpy(table["label"].to_numpy().copy())
assert set(table.column_names) == {"sample_index", "sample_id", "uri", "label", "class_name"}
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(options.epochs):
    loss = torch.nn.functional.cross_entropy(net(images), labels)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    distal.publish_checkpoint(options.out, net.state_dict(), epoch, metrics={"train_loss": loss.item()})
"""


def linear(num_classes: int, image_shape: tuple[int, int, int]) -> torch.nn.Module:
    channels, height, width = image_shape
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, num_classes))


def scale(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


def config(run: Path, pool: Pool, tmp_path: Path, script: str = SCRIPT, *overrides: str):
    (tmp_path / "train.py").write_text(textwrap.dedent(script))
    command = (
        f"{sys.executable} {tmp_path / 'train.py'} --labels {{labels}} --out {{checkpoints}} --seed {{seed}} "
        f"--epochs {{epochs}} --pool {pool.path}"
    )
    model = ("model.name=tests.train.test_command:linear", "model.normalize=tests.train.test_command:scale")
    return small_config(run, pool, None, f"train.command='{command}'", *model, *overrides)


def test_a_script_trains_and_its_checkpoints_are_scored(pool: Pool, tmp_path: Path) -> None:
    made = config(tmp_path / "run", pool, tmp_path)
    summary = driver.run(made)
    assert [cycle.n_labeled for cycle in summary.cycles] == [24, 40]
    cycle = Run.open(tmp_path / "run").cycle(1)
    assert checkpoints.committed(cycle.checkpoints) == [0, 1, 2]
    ref = checkpoints.read(cycle.checkpoints, 2)
    assert ref.metrics["train_loss"] < checkpoints.read(cycle.checkpoints, 0).metrics["train_loss"]
    assert driver.run(made).state == "complete"


@pytest.mark.slow
def test_a_script_that_fails_is_quoted_and_run_again(pool: Pool, tmp_path: Path) -> None:
    broken = SCRIPT + "\nprint('first line', file=sys.stderr)\nsys.exit('no more money')\n"
    with pytest.raises(TrainingFailed, match=r"ended with 1 in cycle 0; .*stderr.log ends with:(.|\n)*no more money"):
        driver.run(config(tmp_path / "run", pool, tmp_path, broken))
    assert driver.run(config(tmp_path / "run", pool, tmp_path)).state == "complete"


@pytest.mark.slow
def test_weights_of_another_network(pool: Pool, tmp_path: Path) -> None:
    other = SCRIPT.replace("torch.nn.Linear(images[0].numel(), 4)", "torch.nn.Linear(images[0].numel(), 5)")
    other += "\nimport time; time.sleep(60)\n"
    with pytest.raises(ModelError, match=r"1.weight has shape \(5, 144\), the network needs \(4, 144\)"):
        driver.run(config(tmp_path / "run", pool, tmp_path, other.replace("labels.copy()", "labels")))
    assert not [p for p in psutil.Process().children(recursive=True) if "train.py" in " ".join(p.cmdline())]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python train.py --out {checkpoint}", r"unknown placeholder {checkpoint}; known: {labels}, {images}"),
        ("python train.py --labels {labels}", "does not say {checkpoints}, the folder to publish to"),
        ("python 'train.py", "cannot be split into words"),
        ("/no/such/program {checkpoints}", None),
    ],
)
def test_commands_that_cannot_be_run(pool: Pool, tmp_path: Path, command: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(ConfigError, match="train.command: /no/such/program: No such file or directory"):
            driver.run(small_config(tmp_path / "run", pool, None).with_values({"train.command": command}))
    else:
        with pytest.raises(ConfigError, match=message):
            check_command(command)


def test_a_script_that_was_superseded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "mine")
    claim(tmp_path, "another")
    monkeypatch.setenv(OWNER, "mine")
    with pytest.raises(Superseded, match="another attempt has taken over training"):
        publish_checkpoint(tmp_path / "checkpoints", {"a": torch.zeros(1)}, 0)
    monkeypatch.delenv(OWNER)
    publish_checkpoint(tmp_path / "checkpoints", {"a": torch.zeros(1)}, 0)
    assert checkpoints.committed(tmp_path / "checkpoints") == [0]
    publish_checkpoint(tmp_path / "checkpoints", {"a": torch.zeros(1)}, 0)
    with pytest.raises(RunConflict, match="checkpoint 0 is published already, with other weights; publish each index"):
        publish_checkpoint(tmp_path / "checkpoints", {"a": torch.ones(1)}, 0)
    assert checkpoints.load(checkpoints.read(tmp_path / "checkpoints", 0))["a"].item() == 0


def test_the_script_ends_with_its_driver(pool: Pool, tmp_path: Path) -> None:
    """A killed driver leaves nothing at work."""
    import subprocess

    waits = "import os, time; open(os.environ['PIDFILE'], 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nfrom distal.train.command import _die_with_parent\n"
        f"subprocess.Popen([sys.executable, '-c', {waits!r}], preexec_fn=_die_with_parent).wait()\n"
    )
    environment = {**os.environ, "PIDFILE": str(tmp_path / "pid")}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10)


RESTARTED = """
import os, pathlib, subprocess, sys, time
import torch
import distal

out, here, kind = sys.argv[1:]
out, here = pathlib.Path(out), pathlib.Path(here)
second = (here / "started").exists()
(here / "started").touch()
done = distal.resume_checkpoints(out) if kind == "goes on" else []
for index in range(len(done), 4):
    seed = 7 + index if kind == "gives the same" else int.from_bytes(os.urandom(4), "little")
    generator = torch.Generator().manual_seed(seed)
    state = {"1.weight": torch.randn(4, 144, generator=generator), "1.bias": torch.zeros(4)}
    distal.publish_checkpoint(out, state, index)
    if index == 1 and not second:
        row = out.parent / "assignments.zarr" / "assignments" / "c" / "1"
        while len(list(row.glob("*"))) < 4:
            time.sleep(0.05)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        del environment["DISTAL_OWNER"]  # it does not even look whether it may still write
        late = (
            "import distal, os, pathlib, sys, time, torch\\n"
            "out, here = map(pathlib.Path, sys.argv[1:])\\n"
            "deadline = time.time() + 120\\n"
            "while not (out.parent / 'checkpoints-1' / '0002').exists() and time.time() < deadline: time.sleep(0.02)\\n"
            "for index in (2, 3): distal.publish_checkpoint(out, {'1.weight': torch.ones(4, 144),"
            " '1.bias': torch.zeros(4)}, index)\\n"
            "(here / 'late').touch()\\n"
        )
        subprocess.Popen([sys.executable, "-c", late, str(out), str(here)], env=environment, start_new_session=True)
        sys.exit(3)
while second and not (here / "late").exists():
    time.sleep(0.05)
"""


def restarted(folder: Path, pool: Pool, kind: str, *, disturbed: bool = True) -> tuple[Run, list[str]]:
    """A run whose script stops after 2 of 4 checkpoints, which are scored; its own child goes on publishing.

    Returns:
        The run after its second start, and the weights that the first one published.
    """
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(RESTARTED)
    command = f"{sys.executable} {folder / 'train.py'} {{checkpoints}} {folder} '{kind}'"
    names = ("model.name=tests.train.test_command:linear", "model.normalize=tests.train.test_command:scale")
    overrides = ("train.epochs=4", "loop.cycles=1", *names)
    made = small_config(folder / "run", pool, None, *overrides).with_values({"train.command": command})
    first = []
    if disturbed:
        with pytest.raises(TrainingFailed, match="train.command ended with 3"):
            driver.run(made)
        first = weights_in(Run.open(folder / "run").cycle(0).checkpoints)
        assert len(first) == 2
    else:
        (folder / "started").touch()
        (folder / "late").touch()
    assert driver.run(made).state == "complete"
    return Run.open(folder / "run"), first


def weights_in(folder: Path) -> list[str]:
    return [checkpoints.read(folder, index).sha256 for index in checkpoints.committed(folder)]


def of_one_training(run: Run, pool: Pool) -> None:
    """Every row has what the checkpoint of its index predicts."""
    cycle = run.cycle(0)
    assignments = Assignments.open(cycle.assignments)
    stored, eligible = assignments.read(0, pool.n_samples), assignments.eligible(0, pool.n_samples)
    assert assignments.weights == dict(enumerate(weights_in(cycle.checkpoints)))
    spec = ModelSpec.of(cycle.config.model, pool)  # type: ignore[union-attr]
    for row in range(4):
        predictor = Predictor(spec.build(), spec.preprocess(), batch_size=32)
        predictor.load(checkpoints.load(checkpoints.read(cycle.checkpoints, row)))
        predicted = predictor(pool.take(np.flatnonzero(eligible))).labels
        assert np.array_equal(stored[row, eligible], predicted)
    assert verify(run.path).state == "sound"


def events(run: Run) -> list[str]:
    return [event["event"] for event in run.new_events({})]


def test_a_restarted_script_that_gives_other_weights_is_scored_anew(pool: Pool, tmp_path: Path) -> None:
    """All rows are of one training, although a process of the first start goes on publishing."""
    run, _ = restarted(tmp_path, pool, "trains anew")
    cycle = run.cycle(0)
    assert cycle.checkpoints.name == "checkpoints-1"
    assert checkpoints.committed(cycle.folder / "checkpoints") == [0, 1, 2, 3]  # two of them late
    assert not set(weights_in(cycle.checkpoints)) & set(weights_in(cycle.folder / "checkpoints"))
    of_one_training(run, pool)
    assert events(run).count("training_anew") == events(run).count("other_weights") == 1


def test_a_restarted_script_that_gives_the_same_weights_loses_nothing(pool: Pool, tmp_path: Path) -> None:
    run, first = restarted(tmp_path / "cut", pool, "gives the same")
    cycle = run.cycle(0)
    assert weights_in(cycle.checkpoints)[:2] == first
    of_one_training(run, pool)
    assert events(run).count("training_anew") == 1
    assert "other_weights" not in events(run)
    scored_before, now = (Assignments.open(path) for path in (*cycle.earlier_assignments(), cycle.assignments))
    for block in now.blocks:  # the very files, not written again
        assert scored_before.chunk("assignments", 1, block).samefile(now.chunk("assignments", 1, block))

    whole, _ = restarted(tmp_path / "whole", pool, "gives the same", disturbed=False)
    assert weights_in(whole.cycle(0).checkpoints) == weights_in(cycle.checkpoints)
    expected = Assignments.open(whole.cycle(0).assignments)
    for row in range(4):
        for block in now.blocks:
            for name in ("assignments", *now.recorded):
                mine, other = now.chunk(name, row, block), expected.chunk(name, row, block)
                assert mine.exists() == other.exists()
                assert not mine.exists() or mine.read_bytes() == other.read_bytes()
    assert whole.cycle(0).chosen().table.equals(cycle.chosen().table)


@pytest.mark.slow
def test_a_restarted_script_may_go_on(pool: Pool, tmp_path: Path) -> None:
    run, first = restarted(tmp_path, pool, "goes on")
    assert weights_in(run.cycle(0).checkpoints)[:2] == first
    of_one_training(run, pool)
    assert "other_weights" not in events(run)


def test_what_a_restarted_script_goes_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of the last start that has some, up to a gap; those taken over count for the next one."""
    cycle = Run(tmp_path).cycle(0)
    claim(cycle.folder, "me")
    monkeypatch.setenv(OWNER, "me")
    starts = [cycle.begin_attempt() for _ in range(4)]
    assert [start.name for start in starts] == ["checkpoints", "checkpoints-1", "checkpoints-2", "checkpoints-3"]
    assert resume_checkpoints(starts[3]) == []
    for start, indices in ((0, (0, 1, 2)), (1, (0, 1, 3))):
        for index in indices:
            publish_checkpoint(starts[start], {"a": torch.full((1,), 10.0 * start + index)}, index)
    found = resume_checkpoints(str(starts[3]))
    assert [torch.load(path)["a"].item() for path in found] == [10, 11]
    assert checkpoints.committed(starts[3]) == [0, 1]
    assert resume_checkpoints(starts[3], 1) == found[:1]
    last = cycle.begin_attempt()
    assert len(resume_checkpoints(last, 1)) == 1
    flip(checkpoints.read(starts[0], 1).path)
    with pytest.raises(Damage, match="the bytes of checkpoint 1 have changed"):
        checkpoints.take_over(checkpoints.read(starts[0], 1), last)
    claim(cycle.folder, "another")
    with pytest.raises(Superseded):
        resume_checkpoints(last)
    monkeypatch.delenv(OWNER)
    assert len(resume_checkpoints(starts[1])) == 2  # any folder goes on from itself


def test_a_start_that_was_cut_off_while_it_took_checkpoints_over_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the first ones of an earlier start, which has more; those of another training are never mixed in."""
    cycle = Run(tmp_path).cycle(0)
    claim(cycle.folder, "me")
    monkeypatch.setenv(OWNER, "me")
    other, first, cut_off, third, fourth, last = (cycle.begin_attempt() for _ in range(6))
    for index in range(8):
        publish_checkpoint(other, {"a": torch.full((1,), 100.0 + index)}, index)
    for index in range(5):
        publish_checkpoint(first, {"a": torch.full((1,), float(index))}, index)
    for index in range(2):
        checkpoints.take_over(checkpoints.read(first, index), cut_off)
    assert [torch.load(path)["a"].item() for path in resume_checkpoints(third, 3)] == [0, 1, 2]
    assert [torch.load(path)["a"].item() for path in resume_checkpoints(fourth)] == [0, 1, 2, 3, 4]
    publish_checkpoint(third, {"a": torch.full((1,), 33.0)}, 3)  # late
    publish_checkpoint(fourth, {"a": torch.full((1,), 5.0)}, 5)
    assert [torch.load(path)["a"].item() for path in resume_checkpoints(last)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (range(2), "published 2 checkpoints, with the indices 0 to 1, in cycle 0, .* say 3, with the indices 0 to 2;"),
        (
            range(6),
            r"published \d checkpoints, with the indices 0 to [345], in cycle 0, .* say 3, with the indices 0 to 2",
        ),
        ((0, 1, 5), "published 3 checkpoints, with the indices 0 to 1, 5, in cycle 0"),
        ((1, 2), "published 2 checkpoints, with the indices 1 to 2, in cycle 0"),
        (
            (),
            "published 0 checkpoints in cycle 0, and train.epochs and checkpoint_every say 3, with the indices 0 to 2",
        ),
    ],
)
def test_other_checkpoints_than_those_that_are_wanted(
    pool: Pool, tmp_path: Path, indices: Sequence[int], message: str
) -> None:
    (tmp_path / "train.py").write_text(
        "import sys, torch, distal\n"
        f"for index in {tuple(indices)}:\n"
        "    state = {'1.weight': torch.full((4, 144), float(index)), '1.bias': torch.zeros(4)}\n"
        "    distal.publish_checkpoint(sys.argv[1], state, index)\n"
    )
    spec = ModelSpec(ModelSection(name=f"{__name__}:linear"), 4, pool.image_shape, pool.mean, pool.std)
    made = replace(job(tmp_path, pool), model=spec)
    command = f"{sys.executable} {tmp_path / 'train.py'} {{checkpoints}}"
    dest = Run(tmp_path).cycle(0).begin_attempt()
    with pytest.raises(ModelError, match=message) as raised:
        run_command(command, replace(made, folder=dest.parent), pool, dest, threading.Event(), threading.Event())
    assert "\n" not in str(raised.value)


WEIGHTS = {"a": torch.zeros(1)}


@pytest.mark.parametrize(
    ("state", "index", "message"),
    [
        (WEIGHTS, -1, "index must be an integer from 0, got -1"),
        (WEIGHTS, True, "index must be an integer from 0, got True"),
        (WEIGHTS, 1.0, "index must be an integer from 0, got 1.0"),
        (WEIGHTS, "1", "index must be an integer from 0, got '1'"),
        (WEIGHTS, np.float64(1), "index must be an integer from 0"),
        (WEIGHTS, np.bool_(True), "index must be an integer from 0"),
        ({}, 0, "state_dict must map names to tensors, got an empty one"),
        ([torch.zeros(1)], 0, "state_dict must map names to tensors, got a list"),
        ({"a": 1.0}, 0, "state_dict must map names to tensors, and 'a' is a float"),
        ({0: torch.zeros(1)}, 0, "state_dict must map names to tensors, and 0 is a Tensor"),
    ],
)
def test_what_is_no_checkpoint_is_refused_at_once(tmp_path: Path, state: object, index: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^publish_checkpoint: {message}"):
        publish_checkpoint(tmp_path / "out", state, index)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    publish_checkpoint(tmp_path / "out", WEIGHTS, np.int64(3))  # type: ignore[arg-type]
    assert checkpoints.committed(tmp_path / "out") == [3]
