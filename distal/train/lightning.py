"""A callback for Lightning users: `Trainer(callbacks=[PublishCheckpoints(folder)])`. Needs the `lightning` package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from distal.train.command import publish_checkpoint, resume_checkpoints


class PublishCheckpoints(Callback):
    """Publish the weights after every training epoch; see `publish_checkpoint`.

    Args:
        folder: the value of `{checkpoints}` in `train.command`, or any folder, for `distal score`.
        module: name of the attribute of the LightningModule that is the network of `model.name`; None: it is itself.
        every_n_epochs: as `train.checkpoint_every`; the last epoch always gives one.
    """

    def __init__(self, folder: str | Path, module: str | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"PublishCheckpoints: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.folder, self.every_n_epochs = Path(folder), every_n_epochs
        self.prefix = "" if module is None else f"{module}."
        self.epochs = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """See `lightning.pytorch.Callback`. With `fit(ckpt_path=...)` training goes on, and so do its checkpoints."""
        n_before = trainer.current_epoch // self.every_n_epochs
        if trainer.is_global_zero and n_before and len(resume_checkpoints(self.folder, n_before)) < n_before:
            raise ValueError(
                f"PublishCheckpoints: training goes on after epoch {trainer.current_epoch}, and the {n_before} "
                "checkpoints of before are not there; start again without ckpt_path"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`."""
        self.epochs = trainer.current_epoch + 1
        if self.epochs % self.every_n_epochs == 0:
            self._publish(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.pytorch.Callback`. Only now is it known which epoch was the last."""
        if self.epochs % self.every_n_epochs:
            self._publish(trainer, pl_module)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights: dict[str, Any] = trainer.strategy.lightning_module_state_dict()  # every rank has its share in it
        state = {key.replace("_orig_mod.", ""): value for key, value in weights.items()}  # of torch.compile
        if not trainer.is_global_zero:
            return
        mine = {key.removeprefix(self.prefix): value for key, value in state.items() if key.startswith(self.prefix)}
        if not mine:
            raise ValueError(f"PublishCheckpoints: {type(pl_module).__name__} has no module {self.prefix[:-1]!r}")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if torch.isfinite(value)}
        publish_checkpoint(self.folder, mine, math.ceil(self.epochs / self.every_n_epochs) - 1, metrics=metrics)
