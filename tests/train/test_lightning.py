"""The callback, and what Lightning itself saves, with the real package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distal.artifacts import checkpoints
from distal.artifacts.runs import Run
from distal.errors import ModelError
from distal.model.weights import Location
from distal.storage import remove_tree
from distal.train.command import OWNER
from distal.train.folder import FolderCheckpoints
from distal.train.rank import claim

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and loggers


@pytest.fixture(scope="module")
def light() -> ModuleType:
    return importlib.import_module("tests.train.classifier")


def opened(light: ModuleType, folder: Path) -> FolderCheckpoints:
    template = light.SPEC.build().state_dict()
    found = FolderCheckpoints(folder / "checkpoints.json", folder, "*.ckpt", template)
    found.settle()
    return found


def test_the_callback_publishes(light: ModuleType, tmp_path: Path) -> None:
    light.fit(tmp_path, light.PublishCheckpoints(tmp_path / "out", module="net", every_n_epochs=2))
    assert checkpoints.committed(tmp_path / "out") == [0, 1, 2]  # after epochs 2, 4 and the last one
    first, last = (checkpoints.read(tmp_path / "out", index) for index in (0, 2))
    assert checkpoints.load(last).keys() == light.SPEC.build().state_dict().keys()
    assert last.metrics["train_loss"] < first.metrics["train_loss"]
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        light.PublishCheckpoints(tmp_path / "out", every_n_epochs=0)
    with pytest.raises(ValueError, match="Plain has no module 'network'"):
        light.fit(tmp_path, light.PublishCheckpoints(tmp_path / "other", module="network"))


def test_a_training_that_goes_on_keeps_the_checkpoints_of_before(
    light: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script that is started again by `train.command`: every start publishes to a folder of its own."""
    cycle = Run(tmp_path).cycle(0)
    claim(cycle.folder, "me")
    monkeypatch.setenv(OWNER, "me")
    first, second, third = (cycle.begin_attempt() for _ in range(3))
    saves = light.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    light.fit(tmp_path, light.PublishCheckpoints(first, module="net"), saves, epochs=3)
    (last,) = tmp_path.glob("epoch=2-*.ckpt")
    light.fit(tmp_path, light.PublishCheckpoints(second, module="net"), ckpt_path=last)
    found = [checkpoints.read(second, index).sha256 for index in checkpoints.committed(second)]
    assert found[:3] == [checkpoints.read(first, index).sha256 for index in range(3)]
    assert len(found) == light.EPOCHS
    remove_tree(first)
    remove_tree(second)
    with pytest.raises(ValueError, match="goes on after epoch 3, and the 3 checkpoints of before are not there"):
        light.fit(tmp_path, light.PublishCheckpoints(third, module="net"), ckpt_path=last)


def test_its_checkpoints_as_they_are(light: ModuleType, tmp_path: Path) -> None:
    """All of them, `last.ckpt` and a second training into the same directory."""
    every = {"dirpath": tmp_path, "save_top_k": -1, "save_last": True}
    light.fit(tmp_path, light.PublishCheckpoints(tmp_path / "out", module="net"), light.ModelCheckpoint(**every))
    found = opened(light, tmp_path)
    assert [ref.path.name for ref in found.refs] == [f"epoch={i}-step={4 * (i + 1)}.ckpt" for i in range(light.EPOCHS)]
    assert found.repeated == [("last.ckpt", "epoch=4-step=20.ckpt")]
    for ref in found.refs:
        published = checkpoints.load(checkpoints.read(tmp_path / "out", ref.index))
        assert all(torch.equal(value, published[key]) for key, value in checkpoints.load(ref).items())
    light.fit(tmp_path, light.ModelCheckpoint(**every))
    assert (tmp_path / "epoch=4-step=20-v1.ckpt").exists()
    assert len(opened(light, tmp_path).refs) == light.EPOCHS  # the same training gives the same weights


def test_averaged_weights(light: ModuleType, tmp_path: Path) -> None:
    light.fit(tmp_path, light.EMAWeightAveraging(decay=0.5), light.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1))
    template = light.SPEC.build().state_dict()

    averaged = opened(light, tmp_path)
    raw = FolderCheckpoints(tmp_path / "raw.json", tmp_path, "*.ckpt", template, Location("current_model_state"))
    raw.settle()
    assert len(raw.refs) == len(averaged.refs) == light.EPOCHS
    assert not torch.equal(*(checkpoints.load(each.refs[-1])["14.weight"] for each in (raw, averaged)))


def test_hyperparameters_that_are_objects(light: ModuleType, tmp_path: Path) -> None:
    light.fit(tmp_path, light.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1), kind=light.Classifier)
    with pytest.raises(ModelError, match=r"epoch=0-step=4.ckpt: holds an object of pathlib\."):
        opened(light, tmp_path)
