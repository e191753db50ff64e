"""A training script of the user's own inside the loop: real processes, and a real run around them."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from distal import checkpoints, driver
from distal.errors import ConfigError, ModelError, RunConflict, Superseded, TrainingFailed
from distal.pool import Pool
from distal.runs import Run
from distal.train.command import OWNER, check_command, publish_checkpoint
from distal.train.loop import claim
from tests.helpers import small_config

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
    assert [cycle["n_labeled"] for cycle in summary["cycles"]] == [24, 40]
    cycle = Run.open(tmp_path / "run").cycle(1)
    assert checkpoints.committed(cycle.checkpoints) == [0, 1, 2]
    ref = checkpoints.read(cycle.checkpoints, 2)
    assert ref.metrics["train_loss"] < checkpoints.read(cycle.checkpoints, 0).metrics["train_loss"]
    assert driver.run(made)["state"] == "complete"


@pytest.mark.slow
def test_a_script_that_fails_is_quoted_and_run_again(pool: Pool, tmp_path: Path) -> None:
    broken = SCRIPT + "\nprint('first line', file=sys.stderr)\nsys.exit('no more money')\n"
    with pytest.raises(TrainingFailed, match=r"ended with 1 in cycle 0; .*stderr.log ends with:(.|\n)*no more money"):
        driver.run(config(tmp_path / "run", pool, tmp_path, broken))
    assert driver.run(config(tmp_path / "run", pool, tmp_path))["state"] == "complete"


def test_a_script_that_publishes_too_little(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="published 0 checkpoints in cycle 0, and train.epochs .* say 3"):
        driver.run(config(tmp_path / "run", pool, tmp_path, "pass"))


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
    with pytest.raises(RunConflict, match="checkpoint 0 is published already, with other weights; give another folder"):
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
