"""The 17 synthetic OOD "unit tests" of NINCO (arXiv 2306.00826), drawn anew with a seed.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from PIL import Image


Float = NDArray[np.float64]

PIXEL_PERM_SIGMA = (1, 1.5, 2, 3, 4, 6, 8)
LOW_FREQ_SIGMA = (10, 15, 25, 40, 60, 85)
BLOB_SIGMA = (1.5, 2, 2.5, 3, 3.5, 4)
GAUSSIAN_SIGMA = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
STRIPES = (4, 5, 7, 10, 15, 20)


@dataclass(frozen=True)
class Canvas:
    """Where one picture is drawn: random numbers, height, width, and an image to shuffle."""

    rng: np.random.Generator
    h: int
    w: int
    source: Float | None

    def uniform(self) -> Float:
        return self.rng.random((self.h, self.w, 3))

    def pick(self, values: tuple[float, ...]) -> float:
        return values[int(self.rng.random() * len(values))]

    def fill(self, colour: Float | float) -> Float:
        return np.broadcast_to(np.asarray(colour, dtype=np.float64), (self.h, self.w, 3))

    def bands(self, colours: Float, *, across: bool) -> Float:
        """Stripes of floor(length / n) pixels, one per colour; the rest takes the last colour."""
        length = self.w if across else self.h
        index = np.minimum(np.arange(length) // (length // len(colours)), len(colours) - 1)
        line = colours[index]  # (length, 3)
        return self.fill(line[None] if across else line[:, None])

    def stripes(self, *, across: bool) -> Float:
        n = self.pick(tuple(n for n in STRIPES if min(self.h, self.w) // n >= 3))
        return self.bands(self.rng.random((int(n), 3)), across=across)

    def smooth(self) -> Float:
        noise = self.uniform()
        return _blur(noise, self.pick(LOW_FREQ_SIGMA) * min(self.h, self.w) / 375)


def _blur(image: Float, sigma: float) -> Float:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, sigma=(sigma, sigma, 0), mode="wrap", truncate=4.0)


def _gaussian(canvas: Canvas) -> Float:
    sigma = canvas.pick(GAUSSIAN_SIGMA)
    return 0.5 + sigma * canvas.rng.standard_normal((canvas.h, canvas.w, 3))


def _pixel_perm(canvas: Canvas) -> Float:
    assert canvas.source is not None  # unit_test has checked it
    order = np.argsort(canvas.rng.random(canvas.h * canvas.w), kind="stable")
    return canvas.source.reshape(-1, 3)[order].reshape(canvas.h, canvas.w, 3)


def _low_freq_pixel_perm(canvas: Canvas) -> Float:
    shuffled = _pixel_perm(canvas)
    return _blur(shuffled, canvas.pick(PIXEL_PERM_SIGMA))


def _tricolour(canvas: Canvas, *, primary: bool = False) -> Float:
    colours = canvas.rng.random((3, 3))
    if primary:
        colours = (colours < 0.5).astype(np.float64)
    return canvas.bands(colours, across=canvas.rng.random() < 0.5)


def _low_freq(canvas: Canvas, axes: tuple[int, ...] | None = None) -> Float:
    x = canvas.smooth()
    low, high = x.min(axes), x.max(axes)
    return (x - low) / (high - low)


def _low_freq_colorrange(canvas: Canvas) -> Float:
    x = canvas.smooth()
    x = x - np.quantile(x, 0.025, axis=(0, 1))
    x = x / np.quantile(x, 0.975, axis=(0, 1))
    centre, deviation = canvas.rng.random(3), 0.1 + 0.2 * canvas.rng.random()
    return 2 * deviation * x + centre  # spans centre .. centre + 2 deviation, as the original does


def _blobs(canvas: Canvas) -> Float:
    dots = (canvas.uniform() < 0.7).astype(np.float64)
    x = _blur(dots, canvas.pick(BLOB_SIGMA))
    return np.where(x < 0.75, 0.0, x)


_MAKERS: dict[str, Callable[[Canvas], Float]] = {
    "uni": Canvas.uniform,
    "Gaussian": _gaussian,
    "Rademacher": lambda canvas: (canvas.uniform() < 0.5).astype(np.float64),
    "pixel_perm": _pixel_perm,
    "low_freq_pixel_perm": _low_freq_pixel_perm,
    "white": lambda canvas: canvas.fill(1),
    "black": lambda canvas: canvas.fill(0),
    "grey": lambda canvas: canvas.fill(canvas.rng.random()),
    "monochrome": lambda canvas: canvas.fill(canvas.rng.random(3)),
    "tricolour": _tricolour,
    "tricolour_primary": lambda canvas: _tricolour(canvas, primary=True),
    "horizontal_stripes": lambda canvas: canvas.stripes(across=False),
    "vertical_stripes": lambda canvas: canvas.stripes(across=True),
    "low_freq": _low_freq,
    "low_freq_channelfullscale": lambda canvas: _low_freq(canvas, (0, 1)),
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
    """Picture ``index`` of a test as drawn, (h, w, 3); ``NEEDS_ID_IMAGES`` shuffle ``source``."""
    from PIL import Image

    h, w = canvas
    key = (seed, crc32(f"{name}/{split}".encode()), index)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    pixels = None
    if source is not None:
        pixels = np.asarray(source.resize((w, h), Image.Resampling.BICUBIC)) / 255
    return (np.clip(_MAKERS[name](Canvas(rng, h, w, pixels)), 0, 1) * 255).astype(np.uint8)


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
    id_images : in-distribution test images for ``NEEDS_ID_IMAGES``, in random order; picture i
        shuffles the pixels of image i, resized (bicubic) to the canvas

    Raises
    ------
    OodlibError : unknown name, no size and no canvas, a canvas under 12 pixels, no or too few
        ``id_images``

    References
    ----------
    Bitterwolf, Mueller, Hein, ICML 2023, arXiv 2306.00826 (generators read in the authors' code,
    MIT licence)
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
            rgb = np.broadcast_to(id_images.images[i], (3, *id_images.images.shape[2:]))
            source = Image.fromarray(rgb.transpose(1, 2, 0).copy())
        drawn = draw(name, i, canvas, seed=seed, split=split, source=source)
        if drawn.shape[:2] != shape:
            drawn = np.asarray(Image.fromarray(drawn).resize(shape[::-1], Image.Resampling.BICUBIC))
        images[i] = drawn.transpose(2, 0, 1)
    return ImageSet(name, split, images, np.full(n, -1, dtype=np.int64))
