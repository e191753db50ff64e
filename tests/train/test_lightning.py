"""The callback, and what Lightning itself saves, with the real package."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from distal.artifacts import checkpoints
from distal.artifacts.runs import Run
from distal.config import ModelSection
from distal.errors import ModelError
from distal.model.spec import ModelSpec
from distal.model.weights import Location
from distal.storage import remove_tree
from distal.train.command import OWNER
from distal.train.folder import FolderCheckpoints
from distal.train.rank import claim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from distal.train.lightning import PublishCheckpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and loggers

SPEC = ModelSpec(ModelSection(), 4, (1, 8, 8), (0.5,), (0.5,))
EPOCHS = 5


class Classifier(lightning.LightningModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.save_hyperparameters()  # a Path: what weights_only refuses
        self.net = SPEC.build()
        self.register_buffer("scale", torch.ones(1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(Classifier):
    def save_hyperparameters(self, *_: object) -> None:
        pass


def fit(
    folder: Path,
    *callbacks: lightning.Callback,
    kind: type[Classifier] = Plain,
    epochs: int = EPOCHS,
    ckpt_path: Path | None = None,
) -> None:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 4), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False if not any(
            isinstance(each, ModelCheckpoint) for each in callbacks) else None,
    )  # fmt: skip
    trainer.fit(kind(folder), data, ckpt_path=ckpt_path)
    long_ago = time.time() - 3600
    for path in folder.rglob("*.ckpt"):
        os.utime(path, (long_ago, long_ago))


def opened(folder: Path) -> FolderCheckpoints:
    template = SPEC.build().state_dict()
    found = FolderCheckpoints(folder / "checkpoints.json", folder, "*.ckpt", template)
    found.settle()
    return found


def test_the_callback_publishes(tmp_path: Path) -> None:
    fit(tmp_path, PublishCheckpoints(tmp_path / "out", module="net", every_n_epochs=2))
    assert checkpoints.committed(tmp_path / "out") == [0, 1, 2]  # after epochs 2, 4 and the last one
    first, last = (checkpoints.read(tmp_path / "out", index) for index in (0, 2))
    assert checkpoints.load(last).keys() == SPEC.build().state_dict().keys()
    assert last.metrics["train_loss"] < first.metrics["train_loss"]
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        PublishCheckpoints(tmp_path / "out", every_n_epochs=0)
    with pytest.raises(ValueError, match="Plain has no module 'network'"):
        fit(tmp_path, PublishCheckpoints(tmp_path / "other", module="network"))


def test_a_training_that_goes_on_keeps_the_checkpoints_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script that is started again by `train.command`: every start publishes to a folder of its own."""
    cycle = Run(tmp_path).cycle(0)
    claim(cycle.folder, "me")
    monkeypatch.setenv(OWNER, "me")
    first, second, third = (cycle.begin_attempt() for _ in range(3))
    saves = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    fit(tmp_path, PublishCheckpoints(first, module="net"), saves, epochs=3)
    (last,) = tmp_path.glob("epoch=2-*.ckpt")
    fit(tmp_path, PublishCheckpoints(second, module="net"), ckpt_path=last)
    found = [checkpoints.read(second, index).sha256 for index in checkpoints.committed(second)]
    assert found[:3] == [checkpoints.read(first, index).sha256 for index in range(3)]
    assert len(found) == EPOCHS
    remove_tree(first)
    remove_tree(second)
    with pytest.raises(ValueError, match="goes on after epoch 3, and the 3 checkpoints of before are not there"):
        fit(tmp_path, PublishCheckpoints(third, module="net"), ckpt_path=last)


def test_its_checkpoints_as_they_are(tmp_path: Path) -> None:
    """All of them, `last.ckpt` and a second training into the same directory."""
    every = {"dirpath": tmp_path, "save_top_k": -1, "save_last": True}
    fit(tmp_path, PublishCheckpoints(tmp_path / "out", module="net"), ModelCheckpoint(**every))
    found = opened(tmp_path)
    assert [ref.path.name for ref in found.refs] == [f"epoch={i}-step={4 * (i + 1)}.ckpt" for i in range(EPOCHS)]
    assert found.repeated == [("last.ckpt", "epoch=4-step=20.ckpt")]
    for ref in found.refs:
        published = checkpoints.load(checkpoints.read(tmp_path / "out", ref.index))
        assert all(torch.equal(value, published[key]) for key, value in checkpoints.load(ref).items())
    fit(tmp_path, ModelCheckpoint(**every))
    assert (tmp_path / "epoch=4-step=20-v1.ckpt").exists()
    assert len(opened(tmp_path).refs) == EPOCHS  # the same training gives the same weights


def test_averaged_weights(tmp_path: Path) -> None:
    fit(tmp_path, EMAWeightAveraging(decay=0.5), ModelCheckpoint(dirpath=tmp_path, save_top_k=-1))
    template = SPEC.build().state_dict()

    averaged = opened(tmp_path)
    raw = FolderCheckpoints(tmp_path / "raw.json", tmp_path, "*.ckpt", template, Location("current_model_state"))
    raw.settle()
    assert len(raw.refs) == len(averaged.refs) == EPOCHS
    assert not torch.equal(*(checkpoints.load(each.refs[-1])["14.weight"] for each in (raw, averaged)))


def test_hyperparameters_that_are_objects(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(dirpath=tmp_path, save_top_k=-1), kind=Classifier)
    with pytest.raises(ModelError, match=r"epoch=0-step=4.ckpt: holds an object of pathlib\."):
        opened(tmp_path)
