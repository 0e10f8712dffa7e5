"""From a mask to a picture: seeded turn, shift, scale, stroke and colours, in integer arithmetic.

All random numbers are raw outputs of PCG64 (whose stream NumPy guarantees), all pixel arithmetic is
on integers: the same seed gives the same bytes on every machine, as far as the masks themselves are
the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin.glyphs import INK
from oodlib.errors import OodlibError

Style = Literal["plain", "colour"]
MIN_CONTRAST = 64  # least luminance difference between glyph and background, of 255
JITTER_COLUMNS = 5
COLOUR_COLUMNS = 10


def raw_stream(shape: tuple[int, int], key: tuple[int, ...]) -> NDArray[np.uint64]:
    """Raw 64-bit numbers; the rows of a shorter stream are the first rows of a longer one."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(shape)


def below(raw: NDArray[np.uint64], limit: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers in [0, limit) from raw 64-bit numbers, exactly."""
    half = np.uint64(32)
    scaled = (raw >> half) * np.asarray(limit, dtype=np.uint64)
    return (scaled >> half).astype(np.int64)


def _stroke(masks: NDArray[np.uint8], weight: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Blend masks with their dilation (weight > 0, in 1/256) or erosion (< 0) by side/64 pixels."""
    thin, amount = weight[:, None, None] < 0, np.abs(weight)[:, None, None].astype(np.int32)
    grown = np.where(thin, 255 - masks, masks)
    start = grown.astype(np.int32)
    for _ in range(masks.shape[-1] // 64):
        for axis in (1, 2):
            grown = np.maximum(np.maximum(grown, np.roll(grown, 1, axis)), np.roll(grown, -1, axis))
    thick = start + ((grown - start) * amount >> 8)
    return np.where(thin, 255 - thick, thick).astype(np.uint8)


def warp(masks: NDArray[np.uint8], raw: NDArray[np.uint64], size: int) -> NDArray[np.int32]:
    """Place masks in pictures: seeded stroke, turn, scale and shift.

    Turn within +-20 degrees; the ink's longer side is 0.53 to 0.72 of the picture; the centre moves
    by up to 0.06 of the picture each way; stroke from 0.4 of an erosion to a full dilation by 1/64
    of the mask's side. Bilinear samples at twice the resolution, averaged 2x2.

    Parameters
    ----------
    masks : (n, m, m) uint8, the ink away from the border
    raw : (n, 5) raw random numbers
    size : side of the pictures in pixels

    Returns
    -------
    (n, size, size) int32 coverage 0..255
    """
    n, side = masks.shape[:2]
    masks = _stroke(masks, below(raw[:, 0], 360) - 104)
    angle = (below(raw[:, 1], 4001) - 2000) * (np.pi / 18000)
    extent = 0.53 + below(raw[:, 2], 1901) / 10000
    shift_x, shift_y = ((below(raw[:, c], 1201) - 600) / 10000 * 2 * size for c in (3, 4))
    step = INK * side / (extent * 2 * size)  # mask pixels per sample
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    # half samples from the centre
    grid = (2 * np.arange(2 * size) - (2 * size - 1)).astype(np.int64)

    def fixed(value: NDArray[np.float64]) -> NDArray[np.int64]:
        """16 fractional bits: no trace of the float's last bit."""
        return np.rint(value * 65536).astype(np.int64)[:, None, None]

    # where each sample lies in the mask
    centre, limit = (side - 1) / 2, ((side - 1) << 16) - 1
    gx, gy = grid[None, None, :], grid[None, :, None]
    a, b = fixed(cos / 2), fixed(sin / 2)
    x = a * gx + b * gy + fixed(centre - cos * shift_x - sin * shift_y)
    y = a * gy - b * gx + fixed(centre + sin * shift_x - cos * shift_y)
    x, y = np.clip(x, 0, limit), np.clip(y, 0, limit)
    # bilinear samples
    index = (y >> 16) * side + (x >> 16) + (np.arange(n) * side * side)[:, None, None]
    fx, fy = ((x >> 8) & 255).astype(np.int32), ((y >> 8) & 255).astype(np.int32)
    flat = masks.ravel()
    nw, ne, sw, se = (flat.take(index + by).astype(np.int32) for by in (0, 1, side, side + 1))
    top, bottom = nw * 256 + (ne - nw) * fx, sw * 256 + (se - sw) * fx
    samples = (top * 256 + (bottom - top) * fy + 32768) >> 16
    return halve(samples)


def halve(samples: NDArray[np.int32]) -> NDArray[np.int32]:
    """(n, 2s, 2s) -> (n, s, s): rounded means of 2x2 samples."""
    rows = samples[:, ::2] + samples[:, 1::2]
    return (rows[..., ::2] + rows[..., 1::2] + 2) >> 2


def luminance(colour: NDArray[np.int64]) -> NDArray[np.int64]:
    """(..., 3) RGB -> (...) luminance 0..255 (0.30, 0.59, 0.11 in 1/256)."""
    return (77 * colour[..., 0] + 150 * colour[..., 1] + 29 * colour[..., 2]) >> 8


def _colours(raw: NDArray[np.uint64], style: Style) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Foreground (n, 3) and the two ends of the background's gradient (n, 2, 3), 0..255."""
    if style == "plain":
        back = below(raw[:, 3:6], 49)
        return 176 + below(raw[:, 0:3], 80), np.stack([back, back], 1)
    if style != "colour":
        raise OodlibError(f'embedded: style must be "plain" or "colour", got {style!r}.')
    front, back = below(raw[:, 0:3], 256), below(raw[:, 3:6], 256)
    ends = np.stack([back, np.clip(back + below(raw[:, 6:9], 129) - 64, 0, 255)], 1)
    bright = luminance(front)
    target = np.where(bright >= 128, 0, 255)[:, None, None]  # the side with room for the contrast
    original = ends
    for push in range(1, 17):
        contrast = luminance(ends) - bright[:, None]
        crossing = np.sign(contrast[:, 0]) != np.sign(contrast[:, 1])
        weak = crossing | (np.abs(contrast).min(1) < MIN_CONTRAST)
        if not weak.any():
            break
        pushed = (original * (16 - push) + target * push) // 16
        ends = np.where(weak[:, None, None], pushed, ends)
    return front, ends


def compose(
    coverage: NDArray[np.int32], raw: NDArray[np.uint64], style: Style
) -> NDArray[np.uint8]:
    """Colour grey coverage: foreground over background, (n, s, s) 0..255 -> (n, 3, s, s) uint8.

    ``plain``: a light foreground (channels 176..255) on a dark, slightly tinted background (0..48).
    ``colour``: any foreground on any linear background gradient, luminances at least
    ``MIN_CONTRAST`` apart everywhere; where the draw is too close, the background is moved towards
    black or white, whichever is further away. ``raw``: (n, 10) raw random numbers.
    """
    front, ends = _colours(raw, style)
    size = coverage.shape[-1]
    angle = below(raw[:, 9], 3600) * (np.pi / 1800)
    cos, sin = (np.rint(f(angle) * 256).astype(np.int64)[:, None, None] for f in (np.cos, np.sin))
    grid = 2 * np.arange(size) - (size - 1)
    ramp = 128 + (cos * grid[None, None, :] + sin * grid[None, :, None]) // (2 * size)
    ramp = np.clip(ramp, 0, 256).astype(np.int32)
    cover = coverage.astype(np.int32)
    out = np.empty((len(coverage), 3, size, size), dtype=np.uint8)
    for channel in range(3):
        colours = (ends[:, 0], ends[:, 1], front)
        first, last, ink = (c[:, channel].astype(np.int32)[:, None, None] for c in colours)
        ground = first + ((last - first) * ramp >> 8)
        out[:, channel] = (ground * (255 - cover) + ink * cover + 127) // 255
    return out
