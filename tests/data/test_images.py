"""Patch-shuffled images keep their pixels and lose their order."""

import numpy as np
import pytest

from oodlib import OodlibError
from oodlib.data import ImageSet, patch_shuffled


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    return ImageSet("noise", "val", pixels, np.zeros(5, np.int64))


def test_every_patch_is_kept_whole(images):
    mixed = patch_shuffled(images, patches=2).images

    def corners(x):
        return sorted(x[:, i : i + 4, j : j + 4].tobytes() for i in (0, 4) for j in (0, 4))

    assert all(corners(a) == corners(b) for a, b in zip(images.images, mixed, strict=True))
    assert not np.array_equal(images.images, mixed)


def test_one_patch_changes_nothing(images):
    np.testing.assert_array_equal(patch_shuffled(images, patches=1).images, images.images)


def test_patches_must_divide_the_side(images):
    with pytest.raises(OodlibError, match="divisor"):
        patch_shuffled(images, patches=3)
