from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from distal.config import ModelSection
from distal.errors import ModelError
from distal.model.spec import ModelSpec, seeded_build
from distal.model.weights import serialize


def spec(image_shape: tuple[int, int, int] = (1, 28, 28), n_classes: int = 10, **config: object) -> ModelSpec:
    channels = image_shape[0]
    mean, std = (0.25, 0.5, 0.75)[:channels], (0.5, 0.25, 0.125)[:channels]
    return ModelSpec(ModelSection(**config), n_classes, image_shape, mean, std)  # type: ignore[arg-type]


def mlp(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(image_shape)), num_classes))


def wrong_output(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return mlp(num_classes + 1, image_shape)


def no_module(num_classes: int, image_shape: tuple[int, int, int]) -> object:
    return "net"


class Wrapped(nn.Module):
    """Returns its logits in something."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, inputs: torch.Tensor) -> object:
        logits = self.net(inputs)
        wrapped = {"tuple": (logits, None), "mapping": {"loss": None, "logits": logits}, "own": [None, logits]}
        return wrapped[self.kind]


def wrapped(num_classes: int, image_shape: tuple[int, int, int], kind: str) -> nn.Module:
    return Wrapped(mlp(num_classes, image_shape), kind)


def second(output: list[torch.Tensor]) -> torch.Tensor:
    return output[1]


def fails(output: torch.Tensor) -> torch.Tensor:
    raise ValueError("no")


@pytest.mark.parametrize("kind", ["tuple", "mapping", "own"])
def test_what_networks_return(kind: str) -> None:
    output = f"{__name__}:second" if kind == "own" else None
    s = spec(name=f"{__name__}:wrapped", args={"kind": kind}, output=output)
    s.check()
    images = torch.rand(3, 1, 28, 28)
    net = s.build()
    assert torch.equal(net(images), net.net(images))
    assert deepcopy(net)(images).shape == (3, 10)


def test_arguments_of_the_network() -> None:
    thin = spec((3, 32, 32), name="resnet18", args={"width_per_group": 64, "groups": 1, "zero_init_residual": True})
    assert (thin.build().layer1[0].bn2.weight == 0).all()
    with pytest.raises(ModelError, match=r"model.args: resnet18 cannot be built with {'depth': 3} \(.*depth"):
        spec((3, 32, 32), name="resnet18", args={"depth": 3}).build()
    with pytest.raises(ModelError, match="model.args: num_classes is given by distal; leave it out"):
        spec((3, 32, 32), name="resnet18", args={"num_classes": 3}).build()
    with pytest.raises(ModelError, match=r"model.output: .*:fails does not take what the network returned"):
        spec(name=f"{__name__}:mlp", output=f"{__name__}:fails").check()
    with pytest.raises(ModelError, match=r"model.args: small_cnn takes none, got {'depth': 3}"):
        spec(args={"depth": 3}).build()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 8, 9), (1, 64, 64)])
def test_small_cnn(shape: tuple[int, int, int]) -> None:
    s = spec(shape, n_classes=7)
    s.check()
    n_parameters = sum(p.numel() for p in s.build().parameters())
    assert 80_000 < n_parameters < 120_000


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_resnet20(shape: tuple[int, int, int]) -> None:
    s = spec(shape, name="resnet20")
    s.check()
    assert 270_000 < sum(p.numel() for p in s.build().parameters()) < 280_000  # 0.27 M in the paper


def test_the_small_stem_keeps_the_keys_of_torchvision() -> None:
    net = spec((3, 32, 32), name="resnet18").build()
    standard = torchvision.models.resnet18(num_classes=10)
    assert net.state_dict().keys() == standard.state_dict().keys()
    assert net.conv1.kernel_size == (3, 3)
    assert net.conv1.stride == (1, 1)
    assert net.conv1.padding == (1, 1)
    assert net.conv1.bias is None
    assert isinstance(net.maxpool, nn.Identity)


@pytest.mark.parametrize(
    ("shape", "stem", "kernel"),
    [((3, 32, 32), "auto", 3), ((3, 64, 64), "auto", 7), ((3, 32, 32), "standard", 7), ((3, 96, 96), "small", 3)],
)
def test_which_stem(shape: tuple[int, int, int], stem: str, kernel: int) -> None:
    assert spec(shape, name="resnet18", stem=stem).build().conv1.kernel_size == (kernel, kernel)


def test_grey_images_are_repeated_for_torchvision() -> None:
    s = spec((1, 32, 32), name="resnet18")
    s.check()
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    inputs = s.preprocess()(images)
    assert inputs.shape == (2, 3, 32, 32)
    assert torch.equal(inputs[:, 0], inputs[:, 2])


def test_normalization_is_torchvisions() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for s, mean, std in [
        (spec((3, 8, 8)), (0.25, 0.5, 0.75), (0.5, 0.25, 0.125)),
        (spec((3, 8, 8), normalize="imagenet"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]:
        expected = torchvision.transforms.functional.normalize(images / 255, mean, std)
        torch.testing.assert_close(s.preprocess()(images), expected, rtol=1e-5, atol=1e-6)


def test_a_function_of_ones_own() -> None:
    s = spec(name="tests.model.test_spec:mlp")
    s.check()
    assert isinstance(s.build()[1], nn.Linear)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet19"}, "'resnet19' is unknown; give small_cnn, .* such as resnet101, resnet152, resnet18"),
        ({"name": "tests.nowhere:f"}, "module 'tests.nowhere' cannot be imported"),
        ({"name": "tests.model.test_spec:f"}, "module 'tests.model.test_spec' has no function or class 'f'"),
        ({"name": "tests.model.test_spec:no_module"}, "returned str; a torch.nn.Module is needed"),
        ({"name": "tests.model.test_spec:wrong_output"}, r"returned \(2, 11\) for 2 images; a tensor \(2, 10\)"),
        ({"name": "vgg11", "stem": "small"}, "small is known for ResNets only, not for vgg11"),
        ({"name": "vit_b_16"}, r"vit_b_16 does not take images of shape \(1, 28, 28\)"),
        ({"normalize": "imagenet"}, "3 values of mean and std, and the images have 1 channel; give one for each"),
        ({"name": "resnet18", "weights": "NO_SUCH"}, "torchvision has no weights 'NO_SUCH' for resnet18"),
        ({"weights": "/no/such/file.pt"}, "no such file"),
    ],
)
def test_mistakes(config: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec(**config).check()
    assert "\n" not in str(caught.value)


def test_initial_weights_depend_on_seed_and_cycle_alone() -> None:
    torch.manual_seed(5)
    one = seeded_build(spec(), seed=3, cycle=1).state_dict()
    torch.manual_seed(6)
    same = seeded_build(spec(), seed=3, cycle=1).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    for seed, cycle in [(3, 2), (4, 1)]:
        other = seeded_build(spec(), seed, cycle).state_dict()
        assert not torch.equal(one["0.weight"], other["0.weight"])


class TestPretrained:
    def save(self, path: Path, state: object) -> str:
        path.write_bytes(serialize(state))
        return str(path)

    def test_the_same_network(self, tmp_path: Path) -> None:
        state = spec().build().state_dict()
        loaded = spec(weights=self.save(tmp_path / "w.pt", state)).build().state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)

    def test_a_head_for_other_classes_is_left_out(self, tmp_path: Path) -> None:
        state = spec(n_classes=100).build().state_dict()
        loaded = spec(weights=self.save(tmp_path / "w.pt", state)).build().state_dict()
        body = [key for key in state if loaded[key].shape == state[key].shape]
        assert set(state) - set(body) == {"14.weight", "14.bias"}
        assert all(torch.equal(loaded[key], state[key]) for key in body)

    def test_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        state = spec().build().state_dict()
        cases = [
            ({k: v for k, v in state.items() if k != "4.weight"}, "missing 4.weight"),
            (state | {"module.x": torch.zeros(1)}, "unexpected module.x"),
            (state | {"4.weight": torch.zeros(1, 2)}, r"4.weight has shape \(1, 2\), the network needs \(64, 16"),
            ({"model": state}, "not a state_dict"),
        ]
        for changed, message in cases:
            with pytest.raises(ModelError, match=message):
                spec(weights=self.save(tmp_path / "w.pt", changed)).build()
        (tmp_path / "w.pt").write_bytes(b"junk")
        with pytest.raises(ModelError, match="is not a file of plain tensors"):
            spec(weights=str(tmp_path / "w.pt")).build()

    def test_a_standard_stem_for_a_small_one(self, tmp_path: Path) -> None:
        weights = self.save(tmp_path / "w.pt", torchvision.models.resnet18().state_dict())
        with pytest.raises(ModelError, match="conv1.weight has shape .*; set model.stem=standard"):
            spec((3, 32, 32), name="resnet18", weights=weights).build()
        assert spec((3, 32, 32), name="resnet18", weights=weights, stem="standard").build() is not None
