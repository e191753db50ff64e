"""Names to networks, and uint8 images to their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from distal import plugins
from distal.artifacts.checkpoints import ANY_SIZE, Unreadable, deserialize, oddity
from distal.config import Architecture, ChannelStats, FolderModel, ModelSection
from distal.errors import ModelError, one_line
from distal.hashing import seed_for
from distal.pool import Pool
from distal.storage import read_regular

SMALL_CNN = "small_cnn"
SMALL_SIDE = 64  # pixels; below it the first layers of a ResNet throw away most of the image

StateDict = dict[str, Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
        net = _build(self.config, self.n_classes, self.image_shape)
        net.register_forward_hook(_Logits(self.config.output))
        if pretrained and self.config.weights is not None:
            load_pretrained(net, _weights(self.config), self.config.weights)
        return net.to(memory_format=torch.channels_last)

    def preprocess(self) -> nn.Module:
        """The module that turns uint8 images of the pool into the network's input.

        Raises:
            ModelError: `model.normalize` does not fit the pool's channels.
        """
        normalize, channels = self.config.normalize, self.image_shape[0]
        if isinstance(normalize, str) and ":" in normalize:
            return _Function(normalize)
        network_channels = 3 if _is_torchvision(self.config.name) else channels
        if isinstance(normalize, ChannelStats):
            mean, std = normalize.mean, normalize.std
        elif normalize == "imagenet":
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        else:
            mean, std = self.mean, self.std
        if len(mean) not in (channels, network_channels):
            raise ModelError(
                f"model.normalize: {len(mean)} values of mean and std, and the images have {channels} channel"
                f"{'s' if channels > 1 else ''}; give one for each"
            )
        return Preprocess(mean, std, network_channels)

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


class Preprocess(nn.Module):
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
    """A user's function in place of `Preprocess`; picklable by its name."""

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


class SmallCNN(nn.Sequential):
    """Three convolutions with batch norm and global average pooling: 0.1 M parameters.

    Pooling comes before batch norm, which then has a quarter of the values to work on. Made for images of 28
    to 64 pixels; any size of at least 8 pixels and any number of channels work.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        layers: list[nn.Module] = []
        for width in (16, 64, 128):
            layers += [
                nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


class ResNet20(nn.Sequential):
    """The ResNet-20 for small images (He et al. 2016, section 4.2): 0.27 M parameters, three stages of three blocks."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        from torchvision.models.resnet import BasicBlock

        layers: list[nn.Module] = [_conv(in_channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
        channels = 16
        for width in (16, 32, 64):
            for _ in range(3):
                shortcut = None
                if width != channels:
                    shortcut = nn.Sequential(_conv(channels, width, 1, stride=2), nn.BatchNorm2d(width))
                layers.append(BasicBlock(channels, width, stride=width // channels, downsample=shortcut))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride=stride, padding=size // 2, bias=False)


OWN: dict[str, type[nn.Module]] = {SMALL_CNN: SmallCNN, "resnet20": ResNet20}
"""Networks for small images, of any number of channels."""


def _is_torchvision(name: str) -> bool:
    return name not in OWN and ":" not in name


def _build(config: Architecture, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    if config.name in OWN:
        if config.args:
            raise ModelError(f"model.args: {config.name} takes none, got {config.args}")
        return OWN[config.name](n_classes, image_shape[0])
    if ":" in config.name:
        build = partial(plugins.load(config.name, "model.name"), num_classes=n_classes, image_shape=image_shape)
        net = _called(build, config)
        if not isinstance(net, nn.Module):
            raise ModelError(f"model.name: {config.name} returned {type(net).__name__}; a torch.nn.Module is needed")
        return net
    net = _torchvision(config, n_classes)
    small = min(image_shape[1:]) < SMALL_SIDE
    if config.stem == "small" or (config.stem == "auto" and small and _has_resnet_stem(net)):
        _shrink_stem(net, config.name)
    return net


def _called(build: Callable[..., nn.Module], config: Architecture) -> nn.Module:
    if own := sorted({"num_classes", "image_shape", "weights"} & config.args.keys()):
        raise ModelError(f"model.args: {own[0]} is given by distal; leave it out")
    try:
        return build(**config.args)
    except Exception as error:
        if not config.args:
            raise
        raise ModelError(f"model.args: {config.name} cannot be built with {config.args} ({one_line(error)})") from error


def _torchvision(config: Architecture, n_classes: int) -> nn.Module:
    import torchvision

    name = config.name

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        near = [known for known in classifiers if known[:4] == name[:4]] or classifiers
        raise ModelError(
            f"model.name: {name!r} is unknown; give {', '.join(OWN)}, package.module:function, or a torchvision "
            f"classifier such as {', '.join(near[:8])}"
        )
    return _called(partial(torchvision.models.get_model, name, weights=None, num_classes=n_classes), config)


def _has_resnet_stem(net: nn.Module) -> bool:
    return isinstance(getattr(net, "conv1", None), nn.Conv2d) and hasattr(net, "maxpool") and hasattr(net, "layer1")


def _shrink_stem(net: nn.Module, name: str) -> None:
    """The CIFAR stem: a 3x3 convolution of stride 1 and no max-pool; all keys stay as in torchvision."""
    if not _has_resnet_stem(net):
        raise ModelError(f"model.stem: small is known for ResNets only, not for {name}; set model.stem=standard")
    conv = nn.Conv2d(3, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)  # type: ignore[union-attr,arg-type]
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = conv, nn.Identity()


def _weights(config: ModelSection | FolderModel) -> StateDict:
    """Read pretrained weights from a file, or from torchvision's collection."""
    assert config.weights is not None
    path = Path(config.weights)
    if path.is_absolute():
        try:
            state = deserialize(read_regular(path, ANY_SIZE))
        except FileNotFoundError:
            raise ModelError(f"model.weights: {path}: no such file") from None
        except (OSError, Unreadable) as error:
            raise ModelError(f"model.weights: {path} is not a file of plain tensors ({one_line(error)})") from error
        if not isinstance(state, dict) or any(map(oddity, state.values())):
            raise ModelError(f"model.weights: {path} is not a state_dict; save model.state_dict() alone")
        return state

    import torchvision

    try:
        weights = torchvision.models.get_model_weights(config.name)[config.weights]
    except (KeyError, ValueError):
        raise ModelError(
            f"model.weights: torchvision has no weights {config.weights!r} for {config.name}; "
            "give one of its names, such as DEFAULT, or a path"
        ) from None
    try:
        return dict(weights.get_state_dict(progress=False))
    except OSError as error:
        raise ModelError(f"model.weights: {config.weights} cannot be downloaded ({error}); give a path") from error


def load_pretrained(net: nn.Module, state: StateDict, name: str) -> None:
    """Load weights of the same network, leaving out a head that was made for other classes.

    The head is what differs in shape and comes last; everything else must fit, name by name.

    Raises:
        ModelError: naming the first key that is missing, unexpected or of another shape.
    """
    own = net.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        found = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise ModelError(f"model.weights: {name} does not fit the network: {found}")
    other_shape = [key for key in own if own[key].shape != state[key].shape]
    head = set(list(own)[-2:])
    for key in other_shape:
        if key not in head or own[key].shape[1:] != state[key].shape[1:]:
            hint = "; set model.stem=standard" if key.startswith("conv1.") else ""
            raise ModelError(
                f"model.weights: {name}: {key} has shape {tuple(state[key].shape)}, "
                f"the network needs {tuple(own[key].shape)}{hint}"
            )
    net.load_state_dict({key: value for key, value in state.items() if key not in other_shape}, strict=False)


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
