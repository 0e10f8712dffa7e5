"""Which characters make up each glyph set, and the rule that removes look-alikes and duplicates.

**Rule.** A candidate character is removed from an out-of-distribution script if it is (1) a listed
confusable of a basic Latin letter (``CONFUSABLE``, after Unicode's confusables and by eye), or (2)
a look-alike: in any whitelisted font that draws both, its similarity to one of A-Z or a-z reaches
``LOOKALIKE``. Similarity is the largest Pearson correlation of the two masks (centred, equal
extent, 16x16 block means) over turns of the Latin letter by -12 to 12 degrees and shifts by up to
1/32 of the mask. Lower case counts although the task has capitals only: a Cyrillic "a" is no unseen
character. 0.90 is where different capitals begin to resemble each other (E/F and O/D reach 0.95,
C/G 0.90). Then (3) a duplicate is removed: correlation at least ``DUPLICATE`` with an earlier
character of the same set, without turns or shifts, in any font (A-Z themselves always stay).
Accented characters (with a canonical decomposition) are never candidates.

The pretraining set ``unicode`` leaves out the OOD scripts' blocks and whatever looks like one of
their characters. ``removed(name)`` lists every removed character with its reason.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin.glyphs import FONTS, fonts_with, glyph_mask, has_real_glyph
from oodlib.errors import OodlibError

__all__ = [
    "CONFUSABLE",
    "DUPLICATE",
    "LATIN",
    "LOOKALIKE",
    "OOD_SCRIPTS",
    "alphabet",
    "removed",
    "similarity",
]

LOOKALIKE = 0.90
DUPLICATE = 0.95

LATIN: tuple[int, ...] = tuple(range(ord("A"), ord("Z") + 1))
_BASIC_LATIN = (*LATIN, *range(ord("a"), ord("z") + 1))

_BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {  # candidates, both ends included
    "greek": ((0x391, 0x3A9), (0x3B1, 0x3C9)),
    "cyrillic": ((0x402, 0x45F),),
    "armenian": ((0x531, 0x556), (0x561, 0x586)),
    "georgian": ((0x10A0, 0x10C5), (0x10D0, 0x10F0)),
    "hebrew": ((0x5D0, 0x5EA),),
    "math": ((0x2200, 0x22FF),),
    "arabic": ((0x621, 0x64A), (0x671, 0x6D5)),
    "digits_rendered": ((ord("0"), ord("9")),),
    "unicode": (
        (0x41, 0x2AF),
        (0x621, 0x6D5),
        (0x7CA, 0x7EA),
        (0xE81, 0xEC4),
        (0x1401, 0x1676),
        (0x1681, 0x169A),
        (0x1D00, 0x1DBF),
        (0x2C60, 0x2C7F),
        (0x2D30, 0x2D65),
        (0xA4D0, 0xA4F7),
        (0xA720, 0xA7FF),
    ),
}
OOD_SCRIPTS: tuple[str, ...] = ("greek", "cyrillic", "armenian", "georgian", "hebrew", "math")

CONFUSABLE: dict[
    str, str
] = {  # listed whatever the rendering says; letter -> the basic Latin letter
    "greek": "ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX αa γy ιi κk νv οo ρp σo τt υu χx ωw",
    "cyrillic": "АA ВB ЕE КK МM НH ОO РP СC ТT ХX УY ЅS ІI ЈJ аa еe оo рp сc уy хx ѕs іi јj ьb Ьb вb кk мm нh тt гr бb",
    "armenian": "ՕO ՍU Տs օo սu ոn հh ցg զq գq յj լl Իh",
    "georgian": "ႽS Ⴝs Ⴙh Ⴌh",
    "hebrew": "סo ןl וl יI ץY",
    "math": "∣l ∨v ∪u ⋁V ⋃U ⊤T ∘o ∈E ∊E ⊂C ∆A ⋀A ⋂n ⊍u ⋿E",
    "arabic": "اl ٱl هo ہo ەo",
    "digits_rendered": "0O 1l",
}


@cache
def _features(codepoints: tuple[int, ...], font: str, variants: bool) -> NDArray[np.int32]:
    """(n, k, 256) mean-free integers: block means of each mask; k = 45 turned and shifted copies,
    or 1.
    """
    from PIL import Image

    turns, shifts = ((-12, -6, 0, 6, 12), (-1, 0, 1)) if variants else ((0,), (0,))
    masks = [glyph_mask(font, codepoint) for codepoint in codepoints]
    if variants:
        pictures = [Image.fromarray(mask) for mask in masks]
        masks = [
            np.asarray(p.rotate(turn, Image.Resampling.BILINEAR))
            for p in pictures
            for turn in turns
        ]
    half = (
        np.stack(masks).reshape(-1, 32, 2, 32, 2).sum((2, 4), dtype=np.float64)
    )  # shifts are half a block
    moved = np.stack([np.roll(half, (dy, dx), (1, 2)) for dx in shifts for dy in shifts], 1)
    blocks = (
        moved.reshape(len(codepoints), -1, 16, 2, 16, 2)
        .sum((3, 5))
        .reshape(len(codepoints), -1, 256)
    )
    return (256 * blocks - blocks.sum(2, keepdims=True)).astype(np.int32)


def similarity(
    font: str, codepoints: tuple[int, ...], references: tuple[int, ...], *, variants: bool = True
) -> NDArray[np.float64]:
    """Glyph similarity in one font, (n, r): the largest Pearson correlation, in [-1, 1].

    ``variants`` turns and shifts the references (45 copies). All characters need a real glyph in
    the font.
    """
    a = _features(codepoints, font, False)[:, 0].astype(
        np.float64
    )  # whole numbers: every sum below is exact
    copies = _features(references, font, variants)
    best = np.full((len(a), len(copies)), -1.0)
    length = np.sqrt((a * a).sum(1))
    for k in range(copies.shape[1]):
        b = copies[:, k].astype(np.float64)
        best = np.maximum(best, a @ b.T / (length[:, None] * np.sqrt((b * b).sum(1))))
    return best


def _like(
    codepoints: tuple[int, ...], references: tuple[int, ...], what: str, *, variants: bool
) -> dict[int, str]:
    """codepoint -> reason, for the codepoints that look like a reference in some font."""
    found: dict[int, tuple[float, str]] = {}
    for font in FONTS:
        mine = tuple(c for c in codepoints if has_real_glyph(font, c))
        theirs = tuple(c for c in references if has_real_glyph(font, c))
        if not mine or not theirs:
            continue
        table = similarity(font, mine, theirs, variants=variants)
        for codepoint, row in zip(mine, table, strict=True):
            value = float(row.max())
            if value >= LOOKALIKE and value > found.get(codepoint, (0.0, ""))[0]:
                found[codepoint] = (
                    value,
                    f"{what} {chr(theirs[int(row.argmax())])} in {font} ({value:.2f})",
                )
    return {codepoint: reason for codepoint, (_, reason) in found.items()}


def _duplicates(codepoints: tuple[int, ...]) -> dict[int, str]:
    """codepoint -> reason, for the codepoints that repeat an earlier one that is kept."""
    earlier: dict[int, dict[int, str]] = {c: {} for c in codepoints}
    for font in FONTS:
        mine = tuple(c for c in codepoints if has_real_glyph(font, c))
        if mine:
            table = np.triu(similarity(font, mine, mine, variants=False), 1)
            for i, j in zip(*np.nonzero(table >= DUPLICATE), strict=True):
                earlier[mine[j]].setdefault(
                    mine[i], f"repeats {chr(mine[i])} in {font} ({table[i, j]:.2f})"
                )
    out: dict[int, str] = {}
    for codepoint in codepoints:
        if codepoint in LATIN:
            continue
        kept = [reason for other, reason in earlier[codepoint].items() if other not in out]
        if kept:
            out[codepoint] = kept[0]
    return out


@cache
def _split(name: str) -> tuple[tuple[int, ...], dict[int, str]]:
    """(kept codepoints, removed codepoint -> reason) of a script."""
    if name not in _BLOCKS:
        raise OodlibError(f"alphabet: unknown script {name!r}; known: latin, {', '.join(_BLOCKS)}.")
    wanted = {"L", "N", "S"} - ({"N", "S"} if name == "unicode" else set())
    candidates = tuple(
        c
        for first, last in _BLOCKS[name]
        for c in range(first, last + 1)
        if fonts_with(c)
        and not unicodedata.decomposition(chr(c))
        and unicodedata.category(chr(c))[0] in wanted
        and unicodedata.category(chr(c)) != "Lm"
    )
    if name == "unicode":
        others = tuple(c for script in OOD_SCRIPTS for c in alphabet(script))
        dropped = _like(
            tuple(c for c in candidates if c not in _BASIC_LATIN),
            others,
            "looks like",
            variants=False,
        )
    else:
        dropped = _like(candidates, _BASIC_LATIN, "looks like Latin", variants=True)
        dropped |= {
            ord(pair[0]): f"listed confusable of Latin {pair[1]}"
            for pair in CONFUSABLE[name].split()
            if ord(pair[0]) in candidates and ord(pair[0]) not in dropped
        }
    dropped |= _duplicates(tuple(c for c in candidates if c not in dropped))
    return tuple(c for c in candidates if c not in dropped), dropped


def alphabet(name: str) -> tuple[int, ...]:
    """The codepoints of ``latin``, of an OOD script, of ``digits_rendered`` or of ``unicode``,
    look-alikes removed.
    """
    return LATIN if name == "latin" else _split(name)[0]


def removed(name: str) -> dict[str, str]:
    """What the rule took out of a set, and why: character -> reason, in codepoint order (empty for
    ``latin``).
    """
    return (
        {} if name == "latin" else {chr(c): reason for c, reason in sorted(_split(name)[1].items())}
    )
