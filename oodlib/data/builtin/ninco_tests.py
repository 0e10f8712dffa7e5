r"""The 17 synthetic OOD "unit tests" of NINCO (Bitterwolf, Mueller, Hein, arXiv 2306.00826), drawn
anew with a seed.

**Scale.** A picture is drawn on a canvas with the original's parameters and then shrunk, because
noise drawn directly at 32 pixels has 1.9 times the original's contrast. Original: canvas about 375
x 500, shrunk to 248 (ratio 0.66). Here: a square canvas of 1.5 times ``size`` (48 for 32), shrunk
by an antialiased bicubic filter. With h the canvas's shorter side, ``low_freq*`` multiply their
blur widths by h / 375 (the structures keep their size relative to the picture), and the stripe
counts n are those with floor(h / n) >= 3 pixels (no 20 at h = 48); all else is used as it is.
**Native use**: ``size=None, canvas=(375, 500)`` returns the canvases with every parameter as
published, for the network's own transform.

Values are clipped to [0, 1], multiplied by 255 and truncated. Gaussian blurs wrap around and reach
4 sigma. The original stores every second picture as JPEG; here none is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["NEEDS_ID_IMAGES", "UNIT_TESTS", "draw", "unit_test"]

Float = NDArray[np.float64]
Maker = Callable[[np.random.Generator, int, int, "Float | None"], Float]

PIXEL_PERM_SIGMA = (1, 1.5, 2, 3, 4, 6, 8)
LOW_FREQ_SIGMA = (10, 15, 25, 40, 60, 85)
BLOB_SIGMA = (1.5, 2, 2.5, 3, 3.5, 4)
GAUSSIAN_SIGMA = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
STRIPES = (4, 5, 7, 10, 15, 20)


def _pick(rng: np.random.Generator, values: tuple[float, ...]) -> float:
    return values[int(rng.random() * len(values))]


def _blur(image: Float, sigma: float) -> Float:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, sigma=(sigma, sigma, 0), mode="wrap", truncate=4.0)


def _constant(colour: Float | float, h: int, w: int) -> Float:
    return np.broadcast_to(np.asarray(colour, dtype=np.float64), (h, w, 3))


def _uni(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return rng.random((h, w, 3))


def _gaussian(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return 0.5 + _pick(rng, GAUSSIAN_SIGMA) * rng.standard_normal((h, w, 3))


def _rademacher(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return (rng.random((h, w, 3)) < 0.5).astype(np.float64)


def _pixel_perm(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    assert source is not None  # unit_test has checked it
    order = np.argsort(rng.random(h * w), kind="stable")
    return source.reshape(h * w, 3)[order].reshape(h, w, 3)


def _low_freq_pixel_perm(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _blur(_pixel_perm(rng, h, w, source), _pick(rng, PIXEL_PERM_SIGMA))


def _white(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _constant(1, h, w)


def _black(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _constant(0, h, w)


def _grey(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _constant(rng.random(), h, w)


def _monochrome(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _constant(rng.random(3), h, w)


def _bands(colours: Float, h: int, w: int, *, across: bool) -> Float:
    """Stripes of floor(length / n) pixels, one per colour; what remains takes the last colour."""
    length = w if across else h
    index = np.minimum(np.arange(length) // (length // len(colours)), len(colours) - 1)
    line = colours[index]  # (length, 3)
    return np.broadcast_to(line[None] if across else line[:, None], (h, w, 3))


def _tricolour(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _bands(rng.random((3, 3)), h, w, across=rng.random() < 0.5)


def _tricolour_primary(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _bands((rng.random((3, 3)) < 0.5).astype(np.float64), h, w, across=rng.random() < 0.5)


def _stripes(rng: np.random.Generator, h: int, w: int, *, across: bool) -> Float:
    n = _pick(rng, tuple(n for n in STRIPES if min(h, w) // n >= 3))
    return _bands(rng.random((int(n), 3)), h, w, across=across)


def _horizontal_stripes(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _stripes(rng, h, w, across=False)


def _vertical_stripes(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    return _stripes(rng, h, w, across=True)


def _smooth(rng: np.random.Generator, h: int, w: int) -> Float:
    return _blur(rng.random((h, w, 3)), _pick(rng, LOW_FREQ_SIGMA) * min(h, w) / 375)


def _low_freq(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    x = _smooth(rng, h, w)
    return (x - x.min()) / (x.max() - x.min())


def _low_freq_channelfullscale(
    rng: np.random.Generator, h: int, w: int, source: Float | None
) -> Float:
    x = _smooth(rng, h, w)
    low, high = x.min((0, 1)), x.max((0, 1))
    return (x - low) / (high - low)


def _low_freq_colorrange(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    x = _smooth(rng, h, w)
    x = x - np.quantile(x, 0.025, axis=(0, 1))
    x = x / np.quantile(x, 0.975, axis=(0, 1))
    centre, deviation = rng.random(3), 0.1 + 0.2 * rng.random()
    return 2 * deviation * x + centre  # spans centre .. centre + 2 deviation, as the original does


def _blobs(rng: np.random.Generator, h: int, w: int, source: Float | None) -> Float:
    x = _blur((rng.random((h, w, 3)) < 0.7).astype(np.float64), _pick(rng, BLOB_SIGMA))
    return np.where(x < 0.75, 0.0, x)


_MAKERS: dict[str, Maker] = {
    "uni": _uni,
    "Gaussian": _gaussian,
    "Rademacher": _rademacher,
    "pixel_perm": _pixel_perm,
    "low_freq_pixel_perm": _low_freq_pixel_perm,
    "white": _white,
    "black": _black,
    "grey": _grey,
    "monochrome": _monochrome,
    "tricolour": _tricolour,
    "tricolour_primary": _tricolour_primary,
    "horizontal_stripes": _horizontal_stripes,
    "vertical_stripes": _vertical_stripes,
    "low_freq": _low_freq,
    "low_freq_channelfullscale": _low_freq_channelfullscale,
    "low_freq_colorrange": _low_freq_colorrange,
    "blobs": _blobs,
}
UNIT_TESTS: tuple[str, ...] = tuple(_MAKERS)
NEEDS_ID_IMAGES: tuple[str, ...] = ("pixel_perm", "low_freq_pixel_perm")


def draw(
    name: str,
    index: int,
    canvas: tuple[int, int],
    *,
    seed: int = 0,
    split: str = "test",
    source: Image.Image | None = None,
) -> NDArray[np.uint8]:
    """Picture ``index`` of a test as it is drawn, (h, w, 3); ``source`` is the image for
    ``NEEDS_ID_IMAGES``.
    """
    from PIL import Image

    h, w = canvas
    rng = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence((seed, crc32(f"{name}/{split}".encode()), index)))
    )
    pixels = (
        None
        if source is None
        else np.asarray(source.resize((w, h), Image.Resampling.BICUBIC)) / 255
    )
    return (np.clip(_MAKERS[name](rng, h, w, pixels), 0, 1) * 255).astype(np.uint8)


def unit_test(
    name: str,
    *,
    n: int = 400,
    seed: int = 0,
    size: int | None = 32,
    canvas: tuple[int, int] | None = None,
    id_images: ImageSet | None = None,
    split: str = "test",
) -> ImageSet:
    """One of the 17 unit tests as an image set; labels are -1.

    Parameters
    ----------
    name : one of ``UNIT_TESTS``
    n : how many pictures (the original: 400); the first n of a longer set with the same seed
    size : side of the pictures in pixels; None keeps the canvas as it is
    canvas : (height, width) in pixels; by default 1.5 times ``size``, square
    id_images : in-distribution test images for ``NEEDS_ID_IMAGES``; picture i shuffles the pixels of image i, resized
        (bicubic) to the canvas, so hand them over in random order

    Raises
    ------
    OodlibError : unknown name, no size and no canvas, a canvas under 12 pixels, no or too few ``id_images``

    References
    ----------
    Bitterwolf, Mueller, Hein, ICML 2023, arXiv 2306.00826 (generators read in the authors' code, MIT licence)
    """
    from PIL import Image

    if name not in _MAKERS:
        raise OodlibError(f"unit_test: unknown name {name!r}; the 17 are {', '.join(UNIT_TESTS)}.")
    if canvas is None:
        if size is None:
            raise OodlibError(
                "unit_test: give size, or canvas=(height, width), or both; got neither."
            )
        canvas = ((3 * size + 1) // 2,) * 2
    h, w = canvas
    if n < 1 or min(h, w) < 12:
        raise OodlibError(
            f"unit_test: need n >= 1 and a canvas of at least 12 x 12 pixels, "
            f"got n={n}, canvas {h} x {w}."
        )
    shuffles = name in NEEDS_ID_IMAGES
    if shuffles and (id_images is None or len(id_images) < n):
        raise OodlibError(
            f"unit_test: {name} shuffles in-distribution test images: give id_images with at least "
            f"{n} images, got {0 if id_images is None else len(id_images)}."
        )
    shape = (h, w) if size is None else (size, size)
    images = np.empty((n, 3, *shape), dtype=np.uint8)
    for i in range(n):
        source = None
        if shuffles and id_images is not None:
            source = Image.fromarray(
                np.broadcast_to(id_images.images[i], (3, *id_images.images.shape[2:]))
                .transpose(1, 2, 0)
                .copy()
            )
        drawn = draw(name, i, canvas, seed=seed, split=split, source=source)
        if drawn.shape[:2] != shape:
            drawn = np.asarray(Image.fromarray(drawn).resize(shape[::-1], Image.Resampling.BICUBIC))
        images[i] = drawn.transpose(2, 0, 1)
    return ImageSet(name, split, images, np.full(n, -1, dtype=np.int64))
