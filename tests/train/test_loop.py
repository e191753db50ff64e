from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from distal.augment import crop_flip
from distal.config import TrainConfig
from distal.hashing import mix64
from distal.train.loop import batches, learning_rate


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [
        (TrainConfig(epochs=10, lr=0.3), lambda o: CosineAnnealingLR(o, T_max=10)),
        (
            TrainConfig(epochs=10, lr=0.3, schedule="milestones", milestones=(3, 7), gamma=0.1),
            lambda o: MultiStepLR(o, milestones=[3, 7], gamma=0.1),
        ),
        (TrainConfig(epochs=10, lr=0.3, schedule="constant"), lambda o: MultiStepLR(o, milestones=[])),
    ],
)
def test_learning_rates_are_those_of_torch(config: TrainConfig, scheduler) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    reference = scheduler(optimizer)
    for epoch in range(1, config.epochs + 1):
        assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


def numbered(n: int, height: int, width: int) -> torch.Tensor:
    """Images whose every pixel is different and not zero."""
    image = torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, 1, height, width)
    return image.expand(n, -1, -1, -1).clone()


def test_crop_flip_shifts_and_mirrors() -> None:
    """Every output is the padded image at some offset, mirrored or not; all offsets occur."""
    height, width, n = 8, 16, 400
    images = numbered(n, height, width)
    out = crop_flip(images, mix64("augment", 0, np.arange(n)))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 1, 1))
    possible = {}
    for dy in range(3):
        for dx in range(5):
            crop = padded[dy : dy + height, dx : dx + width]
            for flip in (False, True):
                possible[(crop.flip(1) if flip else crop).numpy().tobytes()] = (dy, dx, flip)
    found = {possible[image[0].contiguous().numpy().tobytes()] for image in out}
    assert len(found) == 3 * 5 * 2


def test_what_happens_to_an_image_depends_on_its_draw_alone() -> None:
    images = torch.randint(0, 256, (20, 3, 9, 7), dtype=torch.uint8)
    draws = mix64("augment", 0, np.arange(20))
    whole = crop_flip(images, draws)
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(crop_flip(images[order], draws[order]), whole[order])
    assert torch.equal(crop_flip(images[3:5], draws[3:5]), whole[3:5])


@pytest.mark.parametrize("n", [2, 12, 41, 97, 300])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_share_every_batch(n: int, world_size: int) -> None:
    """Together they train on the batches of a single rank, in the same order; only the end of an epoch differs."""
    batch_size = 12
    shares = [batches(n, batch_size, rank, world_size, seed=7) for rank in range(world_size)]
    alone = batches(n, batch_size, 0, 1, seed=7)
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1  # all ranks step together
    assert set(np.concatenate([batch for share in shares for batch in share])) == set(range(n))
    for step in range(n // batch_size - 1):
        together = np.concatenate([share[step] for share in shares])
        assert np.array_equal(np.sort(together), np.sort(alone[step]))
        assert len(together) == batch_size
    repeated = sum(len(batch) for share in shares for batch in share) - n
    assert 0 <= repeated < world_size


@pytest.mark.parametrize("n", range(2, 60))
def test_no_batch_has_one_image(n: int) -> None:
    """Batch norm cannot learn from it."""
    assert min(map(len, batches(n, 12, 0, 1, seed=0))) > 1


def test_every_epoch_has_its_own_order() -> None:
    first, again, other = (np.concatenate(batches(50, 12, 0, 1, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
