from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distal.errors import ModelError
from distal.model.weights import Unreadable, check_fits, deserialize, serialize


def test_equal_weights_give_equal_bytes_in_every_process_and_memory_format() -> None:
    weights = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    channels_last = weights.to(memory_format=torch.channels_last)
    data = serialize({"w": weights, "list": [channels_last], "epoch": 3})
    assert data == serialize({"w": channels_last, "list": [weights], "epoch": 3})
    code = (
        "import torch, sys; from distal.model.weights import serialize\n"
        "w = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)\n"
        "sys.stdout.buffer.write(serialize({'w': w, 'list': [w.clone()], 'epoch': 3}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == data


def test_code_is_never_loaded() -> None:
    with pytest.raises(Unreadable, match="Weights only load failed"):
        deserialize(serialize({"path": Path("x")}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pretrained_weights_may_hold_infinities(dtype: torch.dtype) -> None:
    """The mask of attention is a buffer with them; a checkpoint with them comes from training that diverged."""
    template = {"mask": torch.zeros(2, 2), "weight": torch.zeros(2)}
    state = {"mask": torch.full((2, 2), float("-inf"), dtype=dtype), "weight": torch.ones(2, dtype=dtype)}
    check_fits("model.weights: w.pt", state, template, pretrained=True)
    with pytest.raises(ModelError, match="mask has values that are not finite"):
        check_fits("w.pt", state, template)
