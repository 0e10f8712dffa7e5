"""Synthetic outliers made of ID images, for choosing hyper-parameters without any test OOD set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError

__all__ = ["patch_shuffled"]


def patch_shuffled(image_set: ImageSet, *, patches: int = 4, seed: int = 0) -> ImageSet:
    """Cut each image into ``patches`` x ``patches`` squares and put them together in a random order.

    Colours and local texture stay, the object goes.

    Raises
    ------
    OodlibError : the side is not divisible by ``patches``
    """
    n, c, h, w = image_set.images.shape
    if h % patches or w % patches:
        raise OodlibError(f"patch_shuffled: {h} x {w} pixels cannot be cut into {patches} x {patches} equal patches. "
                          "Choose a divisor of the side.")
    side = (h // patches, w // patches)
    tiles = image_set.images.reshape(n, c, patches, side[0], patches, side[1]).transpose(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, patches**2, c, *side)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(patches**2), (n, 1)), axis=1)
    mixed = np.take_along_axis(tiles, order[:, :, None, None, None], 1).reshape(n, patches, patches, c, *side)
    mixed = np.ascontiguousarray(mixed.transpose(0, 3, 1, 4, 2, 5).reshape(n, c, h, w))
    return replace(image_set, name=f"{image_set.name}-shuffled", images=mixed)
