"""The built-in image sets: no download, and the same bytes for the same seed.

The task is ``latin`` (26 capitals); unseen scripts are near-OOD; handwritten digits, textures and
the 17 unit tests are far-OOD; ``unicode`` (hundreds of letters, the OOD scripts and their
look-alikes left out) is for pretraining.

Bytes depend on what draws the glyphs: FreeType inside Pillow, the font files inside matplotlib, the
digits inside scikit-learn, the blur of SciPy, and NumPy's normal and quantile routines for two unit
tests. A test compares them with ``data/manifests/embedded.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin import alphabets, glyphs, render, textures
from oodlib.data.builtin.ninco_tests import NEEDS_ID_IMAGES, UNIT_TESTS, unit_test
from oodlib.data.images import ImageSet
from oodlib.data.records import read_records
from oodlib.errors import OodlibError

SPLITS = ("train", "val", "test")
COLOUR_FIRST = render.JITTER_COLUMNS + 1  # raw columns: font or drawing, jitter, colours
COLUMNS = COLOUR_FIRST + render.COLOUR_COLUMNS
CHUNK = 256
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class EmbeddedInfo:
    """One built-in set, as ``sets.yaml`` describes it.

    Attributes
    ----------
    kind : id, near, far, unit_test, pretraining, or validation (OOD for choices, never tested)
    default_n : images per split where the caller does not say
    """

    name: str
    kind: str
    title: str
    default_n: dict[str, int]
    licence: str = "Apache-2.0"
    citation: str = ""

    @property
    def classes(self) -> int:
        """Number of classes; 0 where labels have no meaning. Glyph sets compute it on first use."""
        return len(_class_names(self.name))


EMBEDDED: dict[str, EmbeddedInfo] = read_records(__name__, EmbeddedInfo)
_UNIT_TEST = EMBEDDED.pop("unit_test")
EMBEDDED.update((name, replace(_UNIT_TEST, name=name)) for name in UNIT_TESTS)


def embedded(
    name: str,
    split: str = "test",
    *,
    n: int | None = None,
    seed: int = 0,
    style: render.Style = "colour",
    size: int = 32,
) -> ImageSet:
    """Draw a built-in set; a smaller n gives the first images of a larger one.

    Splits differ in their random numbers. Classes come in turn, in an order shuffled anew each
    round, so that any n is balanced to within one per class. Turn, shift, scale, stroke and colours
    do not depend on ``style`` and ``size`` (the same pictures, drawn otherwise). Each split has
    handwritten digits of its own (train 1/8, val 1/8, test 3/4), reused with other jitter once all
    were used.

    Parameters
    ----------
    name : one of ``EMBEDDED``
    split : "train", "val" or "test"
    n : images; by default the record's ``default_n``
    seed : of all random numbers of the set
    style : "plain" (light on dark) or "colour" (any colours, see `render.compose`); unit tests have
        no style
    size : side in pixels, 16 to 512

    Returns
    -------
    ImageSet with RGB images (n, 3, size, size); ``meta["font"]`` and ``meta["codepoint"]`` for
    glyphs, ``meta["source"]`` (index of the drawing) for digits

    Raises
    ------
    OodlibError : an unknown name, split or style, n < 1, a size out of range
    """
    if name not in EMBEDDED:
        raise OodlibError(f"embedded: unknown set {name!r}; known: {', '.join(EMBEDDED)}.")
    if split not in SPLITS:
        raise OodlibError(f"embedded: split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if style not in ("plain", "colour"):
        raise OodlibError(f'embedded: style must be "plain" or "colour", got {style!r}.')
    n = EMBEDDED[name].default_n[split] if n is None else n
    if n < 1 or not 16 <= size <= 512:
        raise OodlibError(
            f"embedded: need n >= 1 and a size of 16 to 512 pixels, got n={n}, size={size}."
        )
    if EMBEDDED[name].kind == "unit_test":
        return _unit_tests(name, split, n, seed, style, size)
    # each use of random numbers has a key of its own
    class_names = _class_names(name)
    key = (seed, crc32(f"{name}/{split}".encode()))
    labels = _balanced(n, len(class_names), (*key, 0))
    raw = render.raw_stream((n, COLUMNS), (*key, 1))
    if name == "textures":
        images, meta = _textures(np.array(class_names)[labels], raw, (*key, 2), style, size), {}
    elif name in ("digits", "digits_all"):
        source = _drawings(split, labels, class_names, (*key, 3))
        images, meta = _digits(source, raw, style, size), {"source": source}
    else:
        codepoints = np.array(_codepoints(name))[labels]
        fonts = _fonts(codepoints, raw[:, 0])
        images = _glyphs(fonts, codepoints, raw, style, size)
        meta = {"font": np.array(fonts), "codepoint": codepoints}
    return ImageSet(name, split, images, labels, class_names, meta)


def _balanced(n: int, classes: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    rounds = render.raw_stream((-(-n // classes), classes), key)
    return np.argsort(rounds, axis=1, kind="stable").ravel()[:n].astype(np.int64)


@cache
def _codepoints(name: str) -> tuple[int, ...]:
    if name == "unicode_with_ood":
        return sum(map(alphabets.alphabet, ("unicode", *alphabets.OOD_SCRIPTS)), ())
    return alphabets.alphabet(name)


@cache
def _class_names(name: str) -> tuple[str, ...]:
    if EMBEDDED[name].kind == "unit_test":
        return UNIT_TESTS if name == "unit_tests" else ()
    if name == "textures":
        return tuple(textures.TEXTURES)
    if name == "digits_all":
        return tuple("0123456789")
    return tuple(map(chr, _codepoints("digits_rendered" if name == "digits" else name)))


def _draw(
    mask: Callable[[int], Pixels], raw: NDArray[np.uint64], style: render.Style, size: int
) -> Pixels:
    """Warp and colour ``mask(i)`` for every row i of ``raw``, in chunks; from 20,000 with a bar."""
    from tqdm import tqdm

    n = len(raw)
    chunk = max(8, CHUNK * 1024 // size**2)
    out = np.empty((n, 3, size, size), dtype=np.uint8)
    for start in tqdm(range(0, n, chunk), desc="drawing", disable=None if n >= 20000 else True):
        part = raw[start : start + chunk]
        masks = np.stack([mask(i) for i in range(start, start + len(part))])
        cover = render.warp(masks, part[:, 1:COLOUR_FIRST], size)
        out[start : start + chunk] = render.compose(cover, part[:, COLOUR_FIRST:], style)
    return out


def _fonts(codepoints: NDArray[np.int64], raw: NDArray[np.uint64]) -> list[str]:
    """One of the fonts that draw each character."""
    fonts = [glyphs.fonts_with(int(c)) for c in codepoints]
    chosen = render.below(raw, np.array([len(f) for f in fonts]))
    return [f[int(i)] for f, i in zip(fonts, chosen, strict=True)]


def _glyphs(
    fonts: list[str],
    codepoints: NDArray[np.int64],
    raw: NDArray[np.uint64],
    style: render.Style,
    size: int,
) -> Pixels:
    side = glyphs.mask_side(size)
    return _draw(lambda i: glyphs.glyph_mask(fonts[i], int(codepoints[i]), side), raw, style, size)


@cache
def _handwriting() -> tuple[Pixels, NDArray[np.int64]]:
    """scikit-learn's 1,797 drawings, (n, 8, 8) uint8 0..255, and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 255 // 16).astype(np.uint8), data.target.astype(np.int64)


def _drawings(
    split: str, labels: NDArray[np.int64], class_names: tuple[str, ...], key: tuple[int, ...]
) -> NDArray[np.int64]:
    """Index of a drawing for each label: every drawing of the split once, then again."""
    targets = _handwriting()[1]
    eighths = {"train": (0,), "val": (1,), "test": (2, 3, 4, 5, 6, 7)}[split]
    source = np.empty(len(labels), dtype=np.int64)
    for label, digit in enumerate(class_names):
        mine = np.flatnonzero(targets == int(digit))
        mine = mine[np.isin(np.arange(len(mine)) % 8, eighths)]
        order = np.argsort(render.raw_stream((1, len(mine)), (*key, label))[0], kind="stable")
        where = np.flatnonzero(labels == label)
        source[where] = mine[order[np.arange(len(where)) % len(mine)]]
    return source


def _digits(
    source: NDArray[np.int64], raw: NDArray[np.uint64], style: render.Style, size: int
) -> Pixels:
    from PIL import Image

    side = glyphs.mask_side(size)

    @cache
    def mask(index: int) -> Pixels:
        picture = Image.fromarray(_handwriting()[0][index])
        return glyphs.centred(picture.resize((side, side), Image.Resampling.BICUBIC), side)

    return _draw(lambda i: mask(int(source[i])), raw, style, size)


def _textures(
    families: NDArray[np.str_],
    raw: NDArray[np.uint64],
    key: tuple[int, ...],
    style: render.Style,
    size: int,
) -> Pixels:
    numbers = render.raw_stream((len(families), textures.NUMBERS), key)
    uniform = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    out = np.empty((len(families), 3, size, size), dtype=np.uint8)
    for start in range(0, len(families), CHUNK):
        part = slice(start, start + CHUNK)
        pairs = zip(families[part], uniform[part], strict=True)
        fields = np.stack([textures.texture(family, u, 2 * size) for family, u in pairs])
        out[part] = render.compose(render.halve(fields), raw[part, COLOUR_FIRST:], style)
    return out


def _unit_tests(
    name: str, split: str, n: int, seed: int, style: render.Style, size: int
) -> ImageSet:
    """One unit test, or all in turn; the source of shuffles is ``latin`` of that split and seed."""
    names = UNIT_TESTS if name == "unit_tests" else (name,)
    each = [len(range(i, n, len(names))) for i in range(len(names))]
    latin = None
    if set(names) & set(NEEDS_ID_IMAGES):
        latin = embedded("latin", split, n=max(each), seed=seed, style=style, size=size)
    parts = {
        test: unit_test(test, n=count, seed=seed, size=size, id_images=latin, split=split)
        for test, count in zip(names, each, strict=True)
        if count
    }
    if name != "unit_tests":
        return parts[name]
    labels = np.arange(n) % len(names)
    images = np.stack([parts[names[i % len(names)]].images[i // len(names)] for i in range(n)])
    return ImageSet(name, split, images, labels.astype(np.int64), names)
