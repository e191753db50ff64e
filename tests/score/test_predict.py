from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from distal.config import ModelSection
from distal.errors import ModelError
from distal.model.spec import ModelSpec
from distal.score.predict import NotFinite, Predictor, _is_out_of_memory, fingerprint, quickest_batch_size

SPEC = ModelSpec(ModelSection(), 5, (1, 12, 12), (0.4,), (0.2,))


def images(n: int, seed: int = 0) -> np.ndarray:
    """(n, 1, 12, 12) as a pool gives them: channels last in memory."""
    return np.random.default_rng(seed).integers(0, 256, (n, 12, 12, 1)).astype(np.uint8).transpose(0, 3, 1, 2)


def predictor(batch_size: int = 16, precision: str = "fp32") -> Predictor:
    torch.manual_seed(0)
    net = SPEC.build()
    for module in net.modules():  # batch norm as after training, not the identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Predictor(net, SPEC.preprocess(), batch_size=batch_size, precision=precision)  # type: ignore[arg-type]


def test_labels_margin_and_entropy() -> None:
    predict = predictor()
    prediction = predict(images(40))
    with torch.no_grad():
        logits = predict.net((torch.from_numpy(images(40)) / 255 - 0.4) / 0.2)
    p = softmax(logits.double(), dim=1).numpy()
    top = np.sort(p, axis=1)[:, ::-1]
    assert np.array_equal(prediction.labels, logits.argmax(1).numpy())
    np.testing.assert_allclose(prediction.margin(), top[:, 0] - top[:, 1], atol=1e-5)
    np.testing.assert_allclose(prediction.entropy(), -(p * np.log(p)).sum(1), atol=1e-5)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33])
def test_padding_and_company_do_not_matter(n: int) -> None:
    """A sample gets the same bits whatever stands beside it in its batch, and however large that is."""
    predict = predictor(batch_size=32)
    whole = predict.logits(images(40))
    assert torch.equal(predict.logits(images(40)[:n]), whole[:n])
    assert torch.equal(predict.logits(images(40)[40 - n :]), whole[40 - n :])


def test_scoring_leaves_the_model_alone() -> None:
    predict = predictor()
    before = {key: value.clone() for key, value in predict.net.state_dict().items()}
    predict(images(40))
    after = predict.net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not predict.net.training


def test_the_smallest_class_wins_a_tie() -> None:
    predict = predictor()
    nn.init.zeros_(predict.net[-1].weight)
    nn.init.zeros_(predict.net[-1].bias)
    prediction = predict(images(3))
    assert prediction.labels.tolist() == [0, 0, 0]
    assert prediction.margin().tolist() == [0, 0, 0]
    np.testing.assert_allclose(prediction.entropy(), math.log(5), rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_argmax_of_what_is_not_finite(value: float) -> None:
    predict = predictor()
    with torch.no_grad():
        predict.net[-1].bias[2] = value
    with pytest.raises(NotFinite):
        predict(images(3))


def test_bf16_agrees_with_fp32_on_most_labels() -> None:
    fp32, bf16 = (predictor(precision=precision)(images(400)).labels for precision in ("fp32", "bf16"))
    assert np.mean(fp32 == bf16) > 0.95


def test_bf16_keeps_batch_norm_in_fp32_and_takes_new_weights() -> None:
    fp32, bf16 = predictor(), predictor(precision="bf16")
    kinds = {type(module): {p.dtype for p in module.parameters(recurse=False)} for module in bf16.net.modules()}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == {torch.bfloat16}
    assert kinds[nn.BatchNorm2d] == {torch.float32}
    state = {name: value * 0.5 for name, value in fp32.net.state_dict().items()}
    before = bf16.logits(images(20))
    bf16.load(state)
    fp32.load(state)
    assert not torch.equal(bf16.logits(images(20)), before)
    torch.testing.assert_close(bf16.logits(images(20)), fp32.logits(images(20)), rtol=0.1, atol=0.05)


def test_the_probe_takes_a_size_that_pads_little() -> None:
    """A block of 40 images: 64 at once would compute 8 in vain, and 128 are more than twice as many as there are."""
    assert quickest_batch_size(predictor(), (1, 12, 12), 40) in (32, 64)
    assert quickest_batch_size(predictor(), (1, 12, 12), 5) == 32


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    MemoryError(),
]


def limited(most: int, error: Exception) -> tuple[Predictor, list[int]]:
    """A network that takes at most so many images at once, and how many it was given."""
    predict, seen = predictor(), []

    def refuse(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))
        if seen[-1] > most:
            raise error

    predict.net.register_forward_pre_hook(refuse)
    return predict, seen


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [100, 63, 32, 31, 16, 15, 3, 1])
def test_the_probe_takes_what_memory_holds(most: int, error: Exception) -> None:
    predict, seen = limited(most, error)
    size = quickest_batch_size(predict, (1, 12, 12), 10_000)
    assert size <= most
    assert size in (32, 64) if most >= 64 else size == 2 ** (most.bit_length() - 1)
    assert sum(n > most for n in seen) == len({n for n in seen if n > most}), "a size that does not fit is tried once"


def test_the_probe_says_so_when_not_one_image_fits() -> None:
    with pytest.raises(ModelError, match=r"score\.batch_size: auto: the memory of cpu does not hold .* 1x12x12; use a"):
        quickest_batch_size(limited(0, OUT_OF_MEMORY[0])[0], (1, 12, 12), 40)


def test_the_probe_hides_no_other_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        quickest_batch_size(limited(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))[0], (1, 12, 12), 40)


def test_memory_that_torch_cannot_have_is_recognised() -> None:
    """By what this version of torch says of it."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert _is_out_of_memory(raised.value)


def test_fingerprint_names_what_the_bits_depend_on() -> None:
    found = fingerprint(torch.device("cpu"), "fp32", 128)
    assert found.keys() == {"processor", "torch", "precision", "batch_size", "threads"}
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.gpu
def test_the_same_path_on_a_gpu() -> None:
    torch.manual_seed(0)
    cpu = Predictor(SPEC.build(), SPEC.preprocess(), batch_size=16)
    gpu = Predictor(SPEC.build(), SPEC.preprocess(), batch_size=16, device="cuda")
    gpu.net.load_state_dict(cpu.net.state_dict())
    torch.testing.assert_close(cpu.logits(images(40)), gpu.logits(images(40)), rtol=1e-3, atol=1e-3)
