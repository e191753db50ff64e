"""Names to networks: distal's own for small images, torchvision's classifiers, functions of the user."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from distal import plugins
from distal.config import Architecture
from distal.errors import ModelError, one_line

_SMALL_SIDE = 64  # pixels; below it the first layers of a ResNet throw away most of the image


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


class _ResNet20(nn.Sequential):
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


_OWN: dict[str, type[nn.Module]] = {"small_cnn": SmallCNN, "resnet20": _ResNet20}
"""Networks for small images, of any number of channels."""


def is_torchvision(name: str) -> bool:
    """Whether `model.name` is that of a torchvision classifier."""
    return name not in _OWN and ":" not in name


def build(config: Architecture, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network with random weights from torch's default generator.

    Args:
        image_shape: (C, H, W) of the pool.

    Raises:
        ModelError: an unknown name, or arguments it does not take.
    """
    if config.name in _OWN:
        if config.args:
            raise ModelError(f"model.args: {config.name} takes none, got {config.args}")
        return _OWN[config.name](n_classes, image_shape[0])
    if ":" in config.name:
        function = plugins.load(config.name, "model.name")
        net = _called(partial(function, num_classes=n_classes, image_shape=image_shape), config)
        if not isinstance(net, nn.Module):
            raise ModelError(f"model.name: {config.name} returned {type(net).__name__}; a torch.nn.Module is needed")
        return net
    net = _torchvision(config, n_classes)
    small = min(image_shape[1:]) < _SMALL_SIDE
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
            f"model.name: {name!r} is unknown; give {', '.join(_OWN)}, package.module:function, or a torchvision "
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
