"""A network that Lightning trains. Only `tests/train/test_lightning.py` imports this, when its tests run: importing
Lightning takes seconds."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from distal.config import ModelSection
from distal.model.spec import ModelSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from distal.train.lightning import PublishCheckpoints

__all__ = ["EPOCHS", "SPEC", "Classifier", "EMAWeightAveraging", "ModelCheckpoint", "PublishCheckpoints", "fit"]

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
