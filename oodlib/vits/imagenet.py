"""What ImageNet models are judged on: the sets of the paper profile by split, and the unit tests at native size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from oodlib.data.image_lists import ImageList, image_loader, open_paper_set
from oodlib.data.unit_tests import NEEDS_ID_IMAGES, UNIT_TESTS, draw
from oodlib.errors import OodlibError

__all__ = ["NATIVE", "SPLITS", "UnitTests", "imagenet_loaders", "imagenet_split", "ood_classes", "unit_test_loader"]

Transform = Callable[[Any], Any]
# split -> name of the set in `oodlib.data.image_lists.PAPER_SETS`
_SETS = {"fit": "imagenet-1k-train", "id": "imagenet-1k", "ninco": "ninco", "ssb-hard": "ssb-hard",
         "inaturalist": "inaturalist", "textures": "textures", "openimage-o": "openimage-o"}
SPLITS = (*_SETS, "unit_tests")
NATIVE = (375, 500)                                # height and width of most ImageNet images, hence of the unit tests


def ood_classes(images: ImageList) -> NDArray[np.int64]:
    """Class of each OOD image, (n,): the rank of its folder among the folders of the set; never -1.

    A set read from its folder has these labels already. OpenOOD's lists say -1 for every OOD image, so for them the
    class is taken from the path; images that share one folder are one class.
    """
    if (images.labels >= 0).all():
        return images.labels
    folders = [Path(path).parent.as_posix() for path in images.paths]
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


class UnitTests(ImageList):
    """The 17 unit tests as their authors draw them, before the network's transform; one picture a row, test by test.

    Parameters
    ----------
    id_images : ImageNet's validation images; ``n`` of them, drawn without replacement, have their pixels shuffled
    transform : of PIL images
    n : pictures per test (the original: 400)
    seed : of the drawing; every picture depends on it and on its own number alone
    canvas : height and width in pixels

    Attributes
    ----------
    labels : (17 n,), index in `UNIT_TESTS`; ``paths`` names the validation image that a row may use

    Raises
    ------
    OodlibError : fewer than ``n`` validation images
    """

    def __init__(self, id_images: ImageList, *, transform: Transform | None = None, n: int = 400, seed: int = 0,
                 canvas: tuple[int, int] = NATIVE):
        if not 1 <= n <= len(id_images):
            raise OodlibError(f"UnitTests: n must lie in 1 .. {len(id_images)}, the number of images of "
                              f"{id_images.name} whose pixels are shuffled, got {n}.")
        chosen = np.random.default_rng(seed).permutation(len(id_images))[:n]
        rows = [(id_images.paths[i], test) for test in range(len(UNIT_TESTS)) for i in chosen]
        super().__init__(id_images.root, rows, transform=transform, name="unit_tests")
        self.n, self.seed, self.canvas = n, seed, canvas

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal): as of an `ImageList`, with the seed and the canvas."""
        return hashlib.sha256(f"{super().fingerprint} {self.seed} {self.canvas}".encode()).hexdigest()

    def picture(self, index: int) -> Any:
        from PIL import Image

        name = UNIT_TESTS[int(self.labels[index])]
        source = super().picture(index) if name in NEEDS_ID_IMAGES else None
        return Image.fromarray(draw(name, index % self.n, self.canvas, seed=self.seed, source=source))


def unit_test_loader(transform: Transform, id_images: ImageList, *, n: int = 400, batch_size: int = 64,
                     workers: int | None = None) -> DataLoader:
    """Batches of `UnitTests`; labels number the tests. Drawing takes about four minutes of one core for n = 400."""
    return image_loader(UnitTests(id_images, transform=transform, n=n), batch_size=batch_size, workers=workers)


def imagenet_split(split: str, data_root: str | Path, transform: Transform | None = None, *, n: int | None = None,
                   seed: int = 0) -> ImageList:
    """One of `SPLITS` below ``data_root``, in the trees that ``oodlib data --profile paper`` describes.

    Labels are ImageNet's classes for "fit" and "id", those of `ood_classes` for the OOD sets, the test's number for
    "unit_tests".

    Parameters
    ----------
    n : at most so many images, drawn with ``seed``; of the unit tests, pictures per test (without it 400, or as many as
        there are ID images)

    Raises
    ------
    OodlibError : unknown split, or its images are not there
    """
    if split not in SPLITS:
        raise OodlibError(f"There is no split {split!r} of the ImageNet models. Known: {', '.join(SPLITS)}.")
    if split == "unit_tests":
        ids = open_paper_set("imagenet-1k", data_root)
        return UnitTests(ids, transform=transform, n=min(400, len(ids)) if n is None else n, seed=seed)
    images = open_paper_set(_SETS[split], data_root, transform=transform)
    images.labels = ood_classes(images)
    if n is not None and n < len(images):
        kept = np.sort(np.random.default_rng(seed).permutation(len(images))[:n])
        rows = [(images.paths[i], int(images.labels[i])) for i in kept]
        images = ImageList(images.root, rows, transform=transform, name=images.name)
    return images


def imagenet_loaders(data_root: str | Path, transform: Transform, *, splits: Sequence[str] = SPLITS,
                     n: Mapping[str, int] | None = None, batch_size: int = 64, workers: int | None = None,
                     ) -> dict[str, DataLoader]:
    """Batches of every split through a network's transform; each loader's ``dataset`` has a ``fingerprint``.

    ``n`` : how many images of a split, as in `imagenet_split`; other arguments and errors as there and in
    `oodlib.data.image_lists.image_loader`.
    """
    sizes = n or {}
    return {split: image_loader(imagenet_split(split, data_root, transform, n=sizes.get(split)), batch_size=batch_size,
                                workers=workers) for split in splits}
