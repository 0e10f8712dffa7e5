"""Which characters make up each glyph set, and the rule that removes look-alikes and duplicates.

**Rule.** A candidate character is removed from an out-of-distribution script if it is (1) a listed
confusable of a basic Latin letter (in ``alphabets.yaml``, after Unicode's confusables and by eye),
or (2) a look-alike: in any whitelisted font that draws both, its similarity to one of A-Z or a-z
reaches ``LOOKALIKE``. Similarity is the largest Pearson correlation of the two masks (centred,
equal extent, 16x16 block means) over turns of the Latin letter by -12 to 12 degrees and shifts by
up to 1/32 of the mask. Lower case counts although the task has capitals only: a Cyrillic "a" is not
an unseen character. 0.90 is where different capitals begin to resemble each other (E/F and O/D
reach 0.95, C/G 0.90). Then (3) a duplicate is removed: correlation at least ``DUPLICATE`` with an
earlier character of the same set, without turns or shifts, in any font (A-Z themselves always
stay). Accented characters (with a canonical decomposition) are never candidates.

The pretraining set ``unicode`` leaves out the OOD scripts' blocks and whatever looks like one of
their characters. ``removed(name)`` lists every removed character with its reason.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin.glyphs import FONTS, fonts_with, glyph_mask, has_real_glyph
from oodlib.data.records import read_records
from oodlib.errors import OodlibError

LOOKALIKE = 0.90
DUPLICATE = 0.95

LATIN: tuple[int, ...] = tuple(range(ord("A"), ord("Z") + 1))
_BASIC_LATIN = (*LATIN, *range(ord("a"), ord("z") + 1))

OOD_SCRIPTS: tuple[str, ...] = ("greek", "cyrillic", "armenian", "georgian", "hebrew", "math")


@dataclass(frozen=True, kw_only=True)
class Script:
    """Candidates of a glyph set, as ``alphabets.yaml`` lists them.

    Attributes
    ----------
    blocks : ranges of codepoints, both ends included
    confusable : pairs of a character and the basic Latin letter that it is listed to look like
    """

    name: str
    blocks: tuple[tuple[int, int], ...]
    confusable: str = ""


SCRIPTS: dict[str, Script] = read_records(__name__, Script)


@cache
def _features(codepoints: tuple[int, ...], font: str, variants: bool) -> NDArray[np.int32]:
    """(n, k, 256) mean-free integers, block means of k = 45 turned and shifted masks, or of 1."""
    from PIL import Image

    turns, shifts = ((-12, -6, 0, 6, 12), (-1, 0, 1)) if variants else ((0,), (0,))
    masks = [glyph_mask(font, codepoint) for codepoint in codepoints]
    if variants:
        pictures = [Image.fromarray(mask) for mask in masks]
        bilinear = Image.Resampling.BILINEAR
        masks = [np.asarray(p.rotate(turn, bilinear)) for p in pictures for turn in turns]
    # a shift is half a block
    half = np.stack(masks).reshape(-1, 32, 2, 32, 2).sum((2, 4), dtype=np.float64)
    moved = np.stack([np.roll(half, (dy, dx), (1, 2)) for dx in shifts for dy in shifts], 1)
    blocks = moved.reshape(len(codepoints), -1, 16, 2, 16, 2).sum((3, 5))
    blocks = blocks.reshape(len(codepoints), -1, 256)
    return (256 * blocks - blocks.sum(2, keepdims=True)).astype(np.int32)


def similarity(
    font: str, codepoints: tuple[int, ...], references: tuple[int, ...], *, variants: bool = True
) -> NDArray[np.float64]:
    """Glyph similarity in one font, (n, r): the largest Pearson correlation, in [-1, 1].

    ``variants`` turns and shifts the references (45 copies). All characters need a real glyph in
    the font.
    """
    # whole numbers: every sum below is exact
    a = _features(codepoints, font, False)[:, 0].astype(np.float64)
    copies = _features(references, font, variants)
    best = np.full((len(a), len(copies)), -1.0)
    length = np.sqrt((a * a).sum(1))
    for k in range(copies.shape[1]):
        b = copies[:, k].astype(np.float64)
        best = np.maximum(best, a @ b.T / (length[:, None] * np.sqrt((b * b).sum(1))))
    return best


def _drawn(font: str, codepoints: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c for c in codepoints if has_real_glyph(font, c))


def _like(
    codepoints: tuple[int, ...], references: tuple[int, ...], what: str, *, variants: bool
) -> dict[int, str]:
    """codepoint -> reason, for the codepoints that look like a reference in some font."""
    found: dict[int, tuple[float, str]] = {}
    for font in FONTS:
        mine, theirs = _drawn(font, codepoints), _drawn(font, references)
        if not mine or not theirs:
            continue
        table = similarity(font, mine, theirs, variants=variants)
        for codepoint, row in zip(mine, table, strict=True):
            value, like = float(row.max()), chr(theirs[int(row.argmax())])
            if value >= LOOKALIKE and value > found.get(codepoint, (0.0, ""))[0]:
                found[codepoint] = value, f"{what} {like} in {font} ({value:.2f})"
    return {codepoint: reason for codepoint, (_, reason) in found.items()}


def _duplicates(codepoints: tuple[int, ...]) -> dict[int, str]:
    """codepoint -> reason, for the codepoints that repeat an earlier one that stays."""
    earlier: dict[int, dict[int, str]] = {c: {} for c in codepoints}
    for font in FONTS:
        if mine := _drawn(font, codepoints):
            table = np.triu(similarity(font, mine, mine, variants=False), 1)
            for i, j in zip(*np.nonzero(table >= DUPLICATE), strict=True):
                reason = f"repeats {chr(mine[i])} in {font} ({table[i, j]:.2f})"
                earlier[mine[j]].setdefault(mine[i], reason)
    out: dict[int, str] = {}
    for codepoint in codepoints:
        reasons = [reason for other, reason in earlier[codepoint].items() if other not in out]
        if reasons and codepoint not in LATIN:
            out[codepoint] = reasons[0]
    return out


@cache
def _split(name: str) -> tuple[tuple[int, ...], dict[int, str]]:
    """(codepoints that stay, removed codepoint -> reason) of a script."""
    if name not in SCRIPTS:
        raise OodlibError(f"alphabet: unknown script {name!r}; known: latin, {', '.join(SCRIPTS)}.")
    wanted = "L" if name == "unicode" else "LNS"
    candidates = tuple(
        c
        for first, last in SCRIPTS[name].blocks
        for c in range(first, last + 1)
        if fonts_with(c)
        and not unicodedata.decomposition(chr(c))
        and unicodedata.category(chr(c))[0] in wanted
        and unicodedata.category(chr(c)) != "Lm"
    )
    if name == "unicode":
        others = tuple(c for script in OOD_SCRIPTS for c in alphabet(script))
        own = tuple(c for c in candidates if c not in _BASIC_LATIN)
        dropped = _like(own, others, "looks like", variants=False)
    else:
        dropped = _like(candidates, _BASIC_LATIN, "looks like Latin", variants=True)
        listed = {ord(pair[0]): pair[1] for pair in SCRIPTS[name].confusable.split()}
        for codepoint in listed.keys() & set(candidates):
            dropped.setdefault(codepoint, f"listed confusable of Latin {listed[codepoint]}")
    dropped |= _duplicates(tuple(c for c in candidates if c not in dropped))
    return tuple(c for c in candidates if c not in dropped), dropped


def alphabet(name: str) -> tuple[int, ...]:
    """The codepoints of ``latin`` or of one of ``SCRIPTS``, look-alikes removed."""
    return LATIN if name == "latin" else _split(name)[0]


def removed(name: str) -> dict[str, str]:
    """What the rule removed from a set: character -> reason, by codepoint (empty for ``latin``)."""
    dropped = {} if name == "latin" else _split(name)[1]
    return {chr(c): reason for c, reason in sorted(dropped.items())}
