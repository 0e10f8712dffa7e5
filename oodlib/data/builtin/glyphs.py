"""Fonts and glyph masks: which shipped fonts really draw a character, and what the character looks
like.

The fonts are the text faces that matplotlib ships (DejaVu: Bitstream Vera licence; STIX: its own
free licence; both texts lie beside the font files). Left out, with reasons:

- ``LastResortHE`` draws one placeholder box per Unicode block, for every codepoint;
- ``cmb10 cmex10 cmmi10 cmr10 cmss10 cmsy10 cmti10 cmtt10`` use TeX encodings: cmex and cmsy have symbols where the
  letters should be, the others have hardly a letter outside ASCII;
- ``STIXNonUni*`` (private-use codepoints), ``STIXSiz*`` and ``DejaVu*Display`` (a few large brackets) hold no letters.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError

__all__ = ["FONTS", "INK", "fonts_with", "glyph_mask", "has_real_glyph", "mask_side"]

FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
INK = (
    11 / 16
)  # the longer side of the ink, as a fraction of the mask's side; the border leaves room for strokes


def font_path(font: str) -> Path:
    """The font file inside the installed matplotlib; OodlibError for a font that is not in the
    whitelist.
    """
    if font not in FONTS:
        raise OodlibError(f"font_path: font must be one of {', '.join(FONTS)}; got {font!r}.")
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")


@cache
def _outlines(font: str) -> tuple[dict[int, str], dict[str, bytes]]:
    """(codepoint -> glyph name, glyph name -> compiled outline) of a font."""
    from fontTools.ttLib import TTFont

    file = TTFont(font_path(font), lazy=True)  # outlines stay compiled
    return file.getBestCmap(), {
        name: getattr(g, "data", b"") for name, g in file["glyf"].glyphs.items()
    }


@cache
def has_real_glyph(font: str, codepoint: int) -> bool:
    """Whether the font draws this codepoint itself: mapped, not empty, and not the outline of
    ``.notdef``.
    """
    names, outlines = _outlines(font)
    outline = outlines.get(names.get(codepoint, ".notdef"), b"")
    return outline not in (b"", outlines[".notdef"])


@cache
def fonts_with(codepoint: int) -> tuple[str, ...]:
    """The whitelisted fonts with a real glyph for this codepoint, in the order of ``FONTS``."""
    return tuple(font for font in FONTS if has_real_glyph(font, codepoint))


def mask_side(size: int) -> int:
    """Side of the glyph masks used for images of this size: twice the size, in powers of two from
    64 to 512.
    """
    side = 64
    while side < min(2 * size, 512):
        side *= 2
    return side


@cache
def _freetype(font: str, em: int) -> Any:
    from PIL import ImageFont

    # the basic layout engine: the other one (raqm) is not in every build of Pillow
    return ImageFont.truetype(str(font_path(font)), em, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph_mask(font: str, codepoint: int, side: int = 64) -> NDArray[np.uint8]:
    """(side, side) coverage 0..255 of an upright glyph, centred, its longer side scaled to ``INK *
    side``.

    All glyphs get the same extent, so that size (small letters, large operators) is no cue for the
    script. Read-only, cached. OodlibError if the font has no real glyph for the codepoint.
    """
    from PIL import Image, ImageDraw

    if not has_real_glyph(font, codepoint):
        raise OodlibError(
            f"glyph_mask: {font} has no real glyph for U+{codepoint:04X}; "
            f"fonts that do: {', '.join(fonts_with(codepoint)) or 'none'}."
        )
    face = _freetype(font, side * 3 // 2)
    box = face.getbbox(chr(codepoint), anchor="ls")
    picture = Image.new("L", (box[2] - box[0] + 4, box[3] - box[1] + 4))
    ImageDraw.Draw(picture).text(
        (2 - box[0], 2 - box[1]), chr(codepoint), fill=255, font=face, anchor="ls"
    )
    return centred(picture, side)


def centred(picture: Any, side: int) -> NDArray[np.uint8]:
    """Crop a grey Pillow picture to its ink, scale the longer side to ``INK * side`` and centre it;
    read-only.
    """
    from PIL import Image

    picture = picture.crop(picture.getbbox())
    width, height = picture.size
    ink = round(INK * side)
    longer = max(width, height)
    size = (
        max(1, (2 * width * ink + longer) // (2 * longer)),
        max(1, (2 * height * ink + longer) // (2 * longer)),
    )
    mask = Image.new("L", (side, side))
    mask.paste(
        picture.resize(size, Image.Resampling.BICUBIC),
        ((side - size[0]) // 2, (side - size[1]) // 2),
    )
    out = np.array(mask)
    out.setflags(write=False)
    return out
