"""Fonts and glyph masks: which shipped fonts really draw a character, and what it looks like.

The fonts are the text faces that matplotlib ships (DejaVu: Bitstream Vera licence; STIX: its own
free licence; both texts lie beside the font files). Left out, with reasons:

- ``LastResortHE`` draws one placeholder box per Unicode block, for every codepoint;
- ``cmb10 cmex10 cmmi10 cmr10 cmss10 cmsy10 cmti10 cmtt10`` use TeX encodings: cmex and cmsy have
  symbols in place of letters, the others hardly a letter outside ASCII;
- ``STIXNonUni*`` (private-use codepoints), ``STIXSiz*`` and ``DejaVu*Display`` (a few large
  brackets) hold no letters.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError

_OBLIQUE = ("", "-Bold", "-Oblique", "-BoldOblique")
_STYLES = {
    "DejaVuSans": _OBLIQUE,
    "DejaVuSansMono": _OBLIQUE,
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
FONTS: tuple[str, ...] = tuple(
    family + style for family, styles in _STYLES.items() for style in styles
)
INK = 11 / 16  # longer side of the ink over the mask's side; the border leaves room for strokes


def font_path(font: str) -> Path:
    """The font file of the installed matplotlib; OodlibError for a font that is not whitelisted."""
    if font not in FONTS:
        raise OodlibError(f"font_path: font must be one of {', '.join(FONTS)}; got {font!r}.")
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")


@cache
def _outlines(font: str) -> tuple[dict[int, str], dict[str, bytes]]:
    """(codepoint -> glyph name, glyph name -> compiled outline) of a font."""
    from fontTools.ttLib import TTFont

    file = TTFont(font_path(font), lazy=True)  # outlines stay compiled
    outlines = {name: getattr(g, "data", b"") for name, g in file["glyf"].glyphs.items()}
    return file.getBestCmap(), outlines


@cache
def has_real_glyph(font: str, codepoint: int) -> bool:
    """Whether the font draws this codepoint itself: mapped, not empty, not like ``.notdef``."""
    names, outlines = _outlines(font)
    outline = outlines.get(names.get(codepoint, ".notdef"), b"")
    return outline not in (b"", outlines[".notdef"])


@cache
def fonts_with(codepoint: int) -> tuple[str, ...]:
    """The whitelisted fonts with a real glyph for this codepoint, in the order of ``FONTS``."""
    return tuple(font for font in FONTS if has_real_glyph(font, codepoint))


def mask_side(size: int) -> int:
    """Side of the glyph masks for images of a size: twice as large, a power of two in 64..512."""
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
    """(side, side) coverage 0..255 of an upright, centred glyph, its longer side ``INK * side``.

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
    place = (2 - box[0], 2 - box[1])
    ImageDraw.Draw(picture).text(place, chr(codepoint), fill=255, font=face, anchor="ls")
    return centred(picture, side)


def centred(picture: Any, side: int) -> NDArray[np.uint8]:
    """A grey picture cropped to its ink, longer side ``INK * side``, centred; read-only."""
    from PIL import Image

    picture = picture.crop(picture.getbbox())
    ink, longer = round(INK * side), max(picture.size)
    w, h = (max(1, (2 * length * ink + longer) // (2 * longer)) for length in picture.size)
    mask = Image.new("L", (side, side))
    resized = picture.resize((w, h), Image.Resampling.BICUBIC)
    mask.paste(resized, ((side - w) // 2, (side - h) // 2))
    out = np.array(mask)
    out.setflags(write=False)
    return out
