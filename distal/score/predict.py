"""Images to assignments: pure torch, no Ray, no disk.

Scoring leaves the model alone: evaluation mode, no gradient, batch-norm buffers unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distal.models import Preprocess

Precision = Literal["fp32", "bf16"]


class NotFinite(ArithmeticError):
    """A logit is NaN or infinite; the argument is the position of the first such image."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one checkpoint says of some images.

    Attributes:
        labels: (n,) int64, the most probable class; the smallest index wins a tie.
        margin: (n,) float32 in [0, 1], p1 - p2 of the two most probable classes.
        entropy: (n,) float32 in [0, ln C], in nats.
    """

    labels: NDArray[np.int64]
    margin: NDArray[np.float32]
    entropy: NDArray[np.float32]


class Predictor:
    """A network ready to predict on one device.

    Args:
        net: takes what `preprocess` gives; its weights may be exchanged with `load_state_dict`.
        batch_size: every forward pass has exactly this many images: a short last batch is padded, because
            the size of a batch can change the last bits of a result.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: Preprocess,
        *,
        batch_size: int,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.net = net.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.preprocess = preprocess.to(self.device)
        self.batch_size = batch_size
        self.precision = precision

    def __call__(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict (n, C, H, W) uint8 images.

        Raises:
            NotFinite: of an argmax over NaN nothing may be stored.
        """
        logits = self.logits(images)
        bad = ~torch.isfinite(logits).all(dim=1)
        if bad.any():
            raise NotFinite(int(bad.nonzero()[0]))
        log_p = logits.log_softmax(dim=1)
        top = log_p.exp().topk(2, dim=1).values
        return Prediction(
            labels=logits.argmax(dim=1).numpy(),
            margin=(top[:, 0] - top[:, 1]).numpy(),
            entropy=(-(log_p.exp() * log_p).sum(dim=1)).clamp_min(0).numpy(),
        )

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """The network's output for (n, C, H, W) uint8 images: (n, n_classes) float32 on the CPU."""
        n = len(images)
        outputs = []
        with torch.inference_mode(), self._autocast():
            for start in range(0, n, self.batch_size):
                batch = torch.from_numpy(self._padded(images[start : start + self.batch_size]))
                batch = batch.to(self.device, non_blocking=True)
                outputs.append(self.net(self.preprocess(batch)).float().cpu())
        return torch.cat(outputs)[:n]

    def _padded(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if len(batch) == self.batch_size:
            return batch
        n, channels, height, width = batch.shape
        padded = np.zeros((self.batch_size, height, width, channels), dtype=np.uint8).transpose(0, 3, 1, 2)
        padded[:n] = batch
        return padded

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def fingerprint(device: torch.device, precision: Precision, batch_size: int) -> dict[str, str]:
    """What a prediction's last bits depend on, besides weights and images."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "processor": processor,
        "torch": torch.__version__,
        "precision": precision,
        "batch_size": str(batch_size),
        "threads": str(torch.get_num_threads()),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
