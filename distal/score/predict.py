"""Images to assignments: pure torch, no Ray, no disk.

Scoring leaves the model alone: evaluation mode, no gradient, batch-norm buffers unchanged.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distal.errors import ModelError

if TYPE_CHECKING:
    from distal.model.weights import StateDict

Precision = Literal["fp32", "bf16"]

_PAD_STEP = 16  # a short last batch is padded to a multiple of it: fewer than ten images can change the last bits
_BATCH_SIZES = {"cpu": (32, 64, 128), "cuda": (128, 256, 512, 1024)}
_PROBE_S = 5.0


class NotFinite(ArithmeticError):
    """A logit is NaN or infinite; the argument is the position of the first such image."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one checkpoint says of some images.

    Attributes:
        labels: (n,) int64, the most probable class; the smallest index wins a tie.
        logits: (n, n_classes) float32.
    """

    labels: NDArray[np.int64]
    logits: Tensor

    def probabilities(self) -> NDArray[np.float32]:
        """Of each class: (n, n_classes) float32, rows sum to 1."""
        return self.logits.softmax(dim=1).numpy()

    def margin(self) -> NDArray[np.float32]:
        """p1 - p2 of the two most probable classes: (n,) float32 in [0, 1]."""
        top = self.logits.softmax(dim=1).topk(2, dim=1).values
        return (top[:, 0] - top[:, 1]).numpy()

    def entropy(self) -> NDArray[np.float32]:
        """Of the class probabilities, in nats: (n,) float32 in [0, ln C]."""
        log_p = self.logits.log_softmax(dim=1)
        return (-(log_p.exp() * log_p).sum(dim=1)).clamp_min(0).numpy()

    def least_confidence(self) -> NDArray[np.float32]:
        """1 - the largest class probability: (n,) float32 in [0, 1 - 1 / C]."""
        return (1 - self.logits.softmax(dim=1).amax(dim=1)).numpy()


class Predictor:
    """A network ready to predict on one device.

    Args:
        net: takes what `preprocess` gives; `load` exchanges its weights.
        batch_size: images of a forward pass. A short last one is padded, so what an image is predicted to be depends
            on nothing but how many images its block has.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: nn.Module,
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
        self.n_batches = 0  # predicted so far: a sign of life
        if precision == "bf16":  # what autocast would do again in every forward pass
            for module in self.net.modules():
                if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                    module.to(torch.bfloat16)

    def load(self, state: StateDict) -> None:
        """Exchange the weights; those of convolutions and linear layers are rounded to the precision."""
        self.net.load_state_dict(state)

    def __call__(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict (n, C, H, W) uint8 images.

        Raises:
            NotFinite: of an argmax over NaN nothing may be stored.
        """
        logits = self.logits(images)
        finite = torch.isfinite(logits)
        if not finite.all():
            raise NotFinite(int((~finite.all(dim=1)).nonzero()[0]))
        return Prediction(logits.argmax(dim=1).numpy(), logits)

    def embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the last linear layer that ran was given for each of (n, C, H, W) uint8 images: (n, d) float32.

        Raises:
            ModelError: the network has no linear layer.
        """
        given: list[Tensor] = []
        last: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            last[:] = [inputs[0].flatten(1)]

        def end(*_: object) -> None:
            given.extend(tensor.float().cpu() for tensor in last)

        layers = [module for module in self.net.modules() if isinstance(module, nn.Linear)]
        handles = [layer.register_forward_pre_hook(keep) for layer in layers]
        handles.append(self.net.register_forward_hook(end))
        try:
            self.logits(images)
        finally:
            for handle in handles:
                handle.remove()
        if not given:
            raise ModelError(
                "model.name: the network has no linear layer, so there are no embeddings; use another select.batch"
            )
        return torch.cat(given)[: len(images)].numpy()

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """The network's output for (n, C, H, W) uint8 images: (n, n_classes) float32 on the CPU."""
        n = len(images)
        outputs = []
        with torch.inference_mode(), self._autocast():
            for start in range(0, n, self.batch_size):
                batch = torch.from_numpy(self._padded(images[start : start + self.batch_size]))
                if self.device.type == "cuda":
                    batch = batch.pin_memory().to(self.device, non_blocking=True)
                outputs.append(self.net(self.preprocess(batch)).float())
                self.n_batches += 1
            return torch.cat(outputs)[:n].cpu()

    def _padded(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        n, channels, height, width = batch.shape
        wanted = min(self.batch_size, -(-n // _PAD_STEP) * _PAD_STEP)
        if n == wanted:
            return batch
        padded = np.zeros((wanted, height, width, channels), dtype=np.uint8).transpose(0, 3, 1, 2)
        padded[:n] = batch
        return padded

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def best_precision(device: torch.device) -> Precision:
    """bf16 where the processor multiplies it in hardware, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def quickest_batch_size(predictor: Predictor, image_shape: tuple[int, int, int], n_images: int) -> int:
    """The batch size at which a block of `n_images` takes the shortest time, tried for a few seconds on blank images.

    The larger one wins when they are within a hundredth of each other. A size that memory does not hold ends the
    trial; where the smallest one does not fit, it is halved until one does.

    Raises:
        ModelError: memory does not hold a single image.
    """
    sizes = _BATCH_SIZES[predictor.device.type]
    best, best_s = 0, float("inf")
    started = time.monotonic()
    for size in sizes:
        if best and (size >= 2 * n_images or time.monotonic() - started > _PROBE_S / 2):
            break
        seconds = _seconds(predictor, image_shape, size)
        if seconds is None:
            break
        whole, rest = divmod(n_images, size)
        block_s = seconds * (whole + min(size, -(-rest // _PAD_STEP) * _PAD_STEP) / size)
        if block_s < 1.01 * best_s:
            best, best_s = size, min(block_s, best_s)
    size = sizes[0]
    while not best:
        size //= 2
        if not size:
            shape = "x".join(map(str, image_shape))
            raise ModelError(
                f"score.batch_size: auto: the memory of {predictor.device} does not hold this network and one image of "
                f"{shape}; use a smaller model.name, smaller images, or a device with more memory"
            )
        if _seconds(predictor, image_shape, size) is not None:
            best = size
    return best


def _seconds(predictor: Predictor, image_shape: tuple[int, int, int], size: int) -> float | None:
    """The shortest time of a batch of blank images; None where memory does not hold it."""
    channels, height, width = image_shape
    predictor.batch_size = size
    try:
        images = np.zeros((size, height, width, channels), np.uint8).transpose(0, 3, 1, 2)
        predictor.logits(images)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            predictor.logits(images)
            times.append(time.perf_counter() - started)
        return min(times)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    if predictor.device.type == "cuda":
        torch.cuda.empty_cache()  # only here: the exception would keep the tensors of its frames
    return None


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On a CPU torch raises a plain RuntimeError, in words that depend on the platform."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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


def difference(begun: Mapping[str, str], found: Mapping[str, str]) -> str:
    """In what a fingerprint differs from the one that was begun with, and what to do."""
    name = next(name for name in begun if begun[name] != found.get(name))
    return (
        f"begun with {name} {begun[name]!r}, this actor has {found.get(name)!r}, which can change the answer; use the "
        "same kind of machine, or set score.mixed_hardware=allow"
    )


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    """Whether there are bf16 instructions. On a processor without, oneDNN emulates them, slower than fp32."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())  # x86; ARM
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpuinfo(name: str) -> str:
    """A line of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
    except OSError:
        return ""
