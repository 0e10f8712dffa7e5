"""The container every image set comes in, and the few operations all sets share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size in memory (or memory-mapped), with labels.

    Attributes
    ----------
    name, split : for example "cifar10", "test"
    images : (n, c, h, w) uint8; c is 1 or 3
    labels : (n,) int64, -1 where a class has no meaning
    class_names : one name per label
    meta : named per-image arrays of length n, for example "font"
    """

    name: str
    split: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] = ()
    meta: Mapping[str, NDArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.images)
        where, kind, shape = f"{self.name}/{self.split}", self.images.dtype, self.images.shape
        if len(shape) != 4 or kind != np.uint8 or shape[1] not in (1, 3):
            raise OodlibError(
                f"ImageSet {where}: images must be uint8 of shape (n, 1 or 3, h, w), got {kind} "
                f"{shape}."
            )
        if n == 0:
            raise OodlibError(f"ImageSet {where}: the set is empty. Check the split or the filter.")
        for key, value in {"labels": self.labels, **self.meta}.items():
            if len(value) != n:
                raise OodlibError(f"ImageSet {where}: {n} images but {len(value)} {key}.")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        what = f"{len(self)} images {'x'.join(map(str, self.images.shape[1:]))}"
        return f"ImageSet({self.name}/{self.split}: {what}, {len(self.class_names)} classes)"

    def subset(
        self, index: NDArray | slice, *, name: str | None = None, split: str | None = None
    ) -> ImageSet:
        """The chosen images (integer or boolean index, or a slice), in that order."""
        return replace(
            self,
            name=name or self.name,
            split=split or self.split,
            images=self.images[index],
            labels=self.labels[index],
            meta={k: v[index] for k, v in self.meta.items()},
        )

    def sample(self, n: int, *, seed: int, stratified: bool = False) -> ImageSet:
        """``n`` images (at most all) without replacement, in a seeded order.

        ``stratified`` takes as equal a number per label as possible.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        if stratified:
            labels = self.labels[order]
            rank = np.empty(len(order), dtype=np.int64)  # how many of the same label came before
            for label in np.unique(labels):
                where = np.flatnonzero(labels == label)
                rank[where] = np.arange(len(where))
            order = order[np.argsort(rank, kind="stable")]
        return self.subset(order[:n])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of shape, pixels and labels, for caches and provenance."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        for start in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self.images[start : start + 4096]).tobytes())
        digest.update(np.asarray(self.labels, dtype="<i8").tobytes())
        return digest.hexdigest()

    def image_hashes(self) -> list[str]:
        """One hash per image, of its pixels alone."""
        return [
            hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()
            for image in self.images
        ]

    def resized(self, size: int, *, channels: int = 3) -> ImageSet:
        """RGB (or grey), shorter side to ``size`` bilinearly, centre crop: an ID set's transform.

        Pillow's antialiased bilinear filter, as torchvision's ``Resize`` uses on PIL images.
        """
        from PIL import Image

        if self.images.shape[1:] == (channels, size, size):
            return self
        mode = "RGB" if channels == 3 else "L"
        out = np.empty((len(self), channels, size, size), dtype=np.uint8)
        h, w = self.images.shape[2:]
        scale = size / min(h, w)
        new_h, new_w = max(size, int(h * scale)), max(size, int(w * scale))
        top, left = round((new_h - size) / 2), round((new_w - size) / 2)
        for i, image in enumerate(self.images):
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            picture = Image.fromarray(pixels).convert(mode)
            picture = picture.resize((new_w, new_h), Image.Resampling.BILINEAR)
            picture = picture.crop((left, top, left + size, top + size))
            out[i] = np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)
        return replace(self, images=out)

    def pooled(self, size: int, *, channels: int = 3) -> ImageSet:
        """Square images averaged over the area of each new pixel: RGB, or grey (Pillow's weights).

        A new pixel is the mean of what it covers, parts of pixels counted by their area, rounded
        half up; in integers, so the same on every machine. 32 to 16 pixels: means of 2 x 2; 28 to
        16: of 1.75 x 1.75. Grey (.299, .587, .114) before averaging.
        """
        n, c, h, w = self.images.shape
        if h != w or not 1 <= size <= h:
            raise OodlibError(
                f"ImageSet.pooled: needs square images of at least {size} pixels, got {h} x {w} of "
                f"{self.name}/{self.split}. Crop them first, or use resized."
            )
        # share (size, h): how much of each old pixel lies in each new one
        new, old = np.arange(size)[:, None], np.arange(h)
        ends = np.minimum((new + 1) * h, (old + 1) * size)
        share = np.maximum(ends - np.maximum(new * h, old * size), 0)
        out = np.empty((n, channels, size, size), np.uint8)
        for start in range(0, n, 4096):
            part = self.images[start : start + 4096].astype(np.int64)
            if c == 3 and channels == 1:
                red, green, blue = part[:, :1], part[:, 1:2], part[:, 2:]
                part = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
            total = np.einsum("ih,nchw,jw->ncij", share, part, share, optimize=True)
            # one channel fills three
            out[start : start + 4096] = (2 * total + h * h) // (2 * h * h)
        return replace(self, images=out)


def assert_disjoint(*sets: ImageSet) -> None:
    """OodlibError if two sets share an image (the same pixels); fitting and test data must not."""
    owner: dict[str, int] = {}
    for i, image_set in enumerate(sets):
        hashes = set(image_set.image_hashes())
        shared = sorted(hashes & owner.keys())
        if shared:
            other = sets[owner[shared[0]]]
            raise OodlibError(
                f"assert_disjoint: {len(shared)} images of {image_set.name}/{image_set.split} are "
                f"also in {other.name}/{other.split}. Remove them from one side before fitting or "
                "testing."
            )
        owner.update(dict.fromkeys(hashes, i))


def patch_shuffled(image_set: ImageSet, *, patches: int = 4, seed: int = 0) -> ImageSet:
    """Cut each image into ``patches`` x ``patches`` tiles and shuffle them.

    Colours and local texture stay, the object goes.

    Raises
    ------
    OodlibError : the side is not divisible by ``patches``
    """
    n, c, h, w = image_set.images.shape
    if h % patches or w % patches:
        raise OodlibError(
            f"patch_shuffled: {h} x {w} pixels cannot be cut into {patches} x {patches} equal "
            "patches. Choose a divisor of the side."
        )
    side = (h // patches, w // patches)
    tiles = image_set.images.reshape(n, c, patches, side[0], patches, side[1])
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(n, patches**2, c, *side)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(patches**2), (n, 1)), axis=1)
    mixed = np.take_along_axis(tiles, order[:, :, None, None, None], 1)
    mixed = mixed.reshape(n, patches, patches, c, *side).transpose(0, 3, 1, 4, 2, 5)
    mixed = np.ascontiguousarray(mixed.reshape(n, c, h, w))
    return replace(image_set, name=f"{image_set.name}-shuffled", images=mixed)
