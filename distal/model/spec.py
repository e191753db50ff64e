"""The network of a run: built from the configuration, with its input made from uint8 images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from distal import plugins
from distal.config import ChannelStats, FolderModel, ModelSection
from distal.errors import ModelError, one_line
from distal.hashing import seed_for
from distal.model import networks
from distal.model.weights import load_pretrained
from distal.pool import Pool

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a network is and what it sees; picklable.

    Attributes:
        config: the `model` section, of either kind of configuration.
        n_classes: length of its output.
        image_shape: (C, H, W) of the pool.
        mean, std: per channel of the pool, of pixels scaled to [0, 1].
    """

    config: ModelSection | FolderModel
    n_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: ModelSection | FolderModel, pool: Pool) -> Self:
        """The network for the images of a pool, and its classes unless the configuration says how many there are."""
        n_classes = config.num_classes
        if n_classes is None:
            assert pool.classes is not None
            n_classes = len(pool.classes)
        return cls(config, n_classes, pool.image_shape, pool.mean, pool.std)

    def build(self, *, pretrained: bool = True) -> nn.Module:
        """The network with its initial weights: in (B, C, H, W) float32, out (B, n_classes).

        Random initial weights come from torch's default generator, which the caller seeds.

        Args:
            pretrained: whether to load `model.weights`; not needed when other weights are loaded next.

        Raises:
            ModelError: unknown name, or weights that do not fit.
        """
        net = networks.build(self.config, self.n_classes, self.image_shape)
        net.register_forward_hook(_Logits(self.config.output))
        if pretrained and self.config.weights is not None:
            load_pretrained(net, self.config)
        return net.to(memory_format=torch.channels_last)

    def preprocess(self) -> nn.Module:
        """The module that turns uint8 images of the pool into the network's input.

        Raises:
            ModelError: `model.normalize` does not fit the pool's channels.
        """
        normalize, channels = self.config.normalize, self.image_shape[0]
        if isinstance(normalize, str) and ":" in normalize:
            return _Function(normalize)
        network_channels = 3 if networks.is_torchvision(self.config.name) else channels
        if isinstance(normalize, ChannelStats):
            mean, std = normalize.mean, normalize.std
        elif normalize == "imagenet":
            mean, std = _IMAGENET_MEAN, _IMAGENET_STD
        else:
            mean, std = self.mean, self.std
        if len(mean) not in (channels, network_channels):
            raise ModelError(
                f"model.normalize: {len(mean)} values of mean and std, and the images have {channels} channel"
                f"{'s' if channels > 1 else ''}; give one for each"
            )
        return _Preprocess(mean, std, network_channels)

    def check(self) -> None:
        """Build the network once and push two images through it, in both modes.

        Raises:
            ModelError: the network cannot be built, or does not take the pool's images, or its output is
                not one row of `n_classes` logits per image.
        """
        torch.manual_seed(0)
        net, preprocess = self.build(), self.preprocess()
        images = torch.zeros((2, *self.image_shape), dtype=torch.uint8)
        for mode in (False, True):
            try:
                with torch.no_grad():
                    output = net.train(mode)(preprocess(images))
            except Exception as error:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(
                    f"model.name: {self.config.name} does not take images of shape {self.image_shape} "
                    f"({one_line(error)})"
                ) from error
            if not isinstance(output, Tensor) or output.shape != (2, self.n_classes):
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ModelError(
                    f"model.name: {self.config.name} returned {got} for 2 images; "
                    f"a tensor (2, {self.n_classes}) of logits is needed; model.output names a function for it"
                )


class _Preprocess(nn.Module):
    """uint8 (B, C, H, W) to normalised float32 (B, C', H, W), keeping the memory format.

    Grey images are repeated to three channels when the network wants three.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        """Scale and shift; see the class."""
        inputs = (images.float() - self.mean) / self.std
        if inputs.shape[1] == 1 and self.channels > 1:
            inputs = inputs.expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)
        return inputs


class _Function(nn.Module):
    """A user's function in place of `_Preprocess`; picklable by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        """Call it."""
        inputs: Tensor = plugins.load(self.name, "model.normalize")(images)
        return inputs


class _Logits:
    """What a network returns to logits: a hook, so that the network keeps its keys."""

    def __init__(self, function: str | None) -> None:
        self.function = function

    def __call__(self, _net: nn.Module, _inputs: object, output: object) -> object:
        if self.function is not None:
            function = plugins.load(self.function, "model.output")
            try:
                return function(output)
            except Exception as error:
                raise ModelError(
                    f"model.output: {self.function} does not take what the network returned ({one_line(error)})"
                ) from error
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
        if isinstance(output, tuple) and output:
            return output[0]
        return output


def be_deterministic(device: torch.device) -> None:
    """Have a GPU give the same bits for the same input. A CPU does so with the same number of threads."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32


def seeded_build(spec: ModelSpec, seed: int, cycle: int) -> nn.Module:
    """The network as a cycle starts from scratch: initial weights are a function of (seed, cycle)."""
    torch.manual_seed(seed_for("init", seed, cycle))
    return spec.build()
