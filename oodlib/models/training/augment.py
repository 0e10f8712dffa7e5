"""Normalisation and augmentation of image batches on the device they lie on."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (n, c, h, w) -> float32, ``(images / 255 - mean) / std`` per channel."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - mean.view(shape)) / std.view(shape)


class _Augmentation(Protocol):
    @property
    def flip(self) -> str: ...
    @property
    def shift(self) -> int: ...


def augment(
    x: Tensor, recipe: _Augmentation, epoch: int, keys: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Flip and shift each image of a batch (n, c, h, w) by ``recipe.flip`` and ``recipe.shift``.

    ``keys`` (n,) decides which images the alternating flip starts with; other flips need none.
    """
    n = len(x)
    if recipe.flip == "random":
        flipped = torch.rand(n, generator=generator) < 0.5
    elif recipe.flip == "alternating":  # every image is seen in both orientations in turn
        assert keys is not None
        flipped = (keys + epoch) % 2 == 1
    else:
        flipped = torch.zeros(n, dtype=torch.bool)
    x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)
    if recipe.shift:
        r = recipe.shift
        padded = nn.functional.pad(x, (r, r, r, r), mode="reflect")
        dy, dx = torch.randint(0, 2 * r + 1, (2, n), generator=generator)
        rows = dy.view(-1, 1, 1) + torch.arange(x.shape[2])[:, None]  # (n, h, 1)
        columns = dx.view(-1, 1, 1) + torch.arange(x.shape[3])  # (n, 1, w)
        x = padded.permute(0, 2, 3, 1)[torch.arange(n).view(-1, 1, 1), rows, columns]
        x = x.permute(0, 3, 1, 2)
    return x


def hash_seed(*numbers: int) -> int:
    """A reproducible seed for each combination of numbers, such as seed, purpose and step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded(*numbers: int) -> torch.Generator:
    """A generator seeded by `hash_seed`."""
    return torch.Generator().manual_seed(hash_seed(*numbers))
