"""Random changes of images that leave their class alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad


def crop_flip(images: Tensor, draws: NDArray[np.uint64]) -> Tensor:
    """Random crop after padding by an eighth of the side (at least one pixel), and a horizontal flip.

    Args:
        images: (B, C, H, W) uint8.
        draws: (B,) uniform 64-bit integers, one per image: they alone decide what happens to it.

    Returns:
        (B, C, H, W) uint8; channels-last in memory.
    """
    _, _, height, width = images.shape
    border_y, border_x = max(1, height // 8), max(1, width // 8)
    padded = pad(images, (border_x, border_x, border_y, border_y))
    bits = draws.copy()
    offsets = []
    for choices in (2 * border_y + 1, 2 * border_x + 1, 2):
        bits, drawn = bits // np.uint64(choices), bits % np.uint64(choices)
        offsets.append(torch.from_numpy(drawn.astype(np.int64)))
    dy, dx, flip = offsets
    rows = dy[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(len(images), -1)
    columns = dx[:, None] + torch.where(flip[:, None] == 1, columns.flip(1), columns)
    batch = torch.arange(len(images))
    cropped = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
