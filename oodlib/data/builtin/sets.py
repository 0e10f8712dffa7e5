"""The embedded corpus: image sets that need no download, the same bytes for the same seed.

The task is ``latin`` (26 capitals); unseen scripts are near-OOD; handwritten digits, textures and
the 17 unit tests are far-OOD; ``unicode`` (hundreds of letters, the OOD scripts and their
look-alikes left out) is for pretraining.

Bytes depend on what draws the glyphs: FreeType inside Pillow, the font files inside matplotlib, the
digits inside scikit-learn, the blur of SciPy, and NumPy's normal and quantile routines for two unit
tests. ``check_bytes`` compares with stored hashes and names the versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin import alphabets, glyphs, render, textures
from oodlib.data.builtin.ninco_tests import NEEDS_ID_IMAGES, UNIT_TESTS, unit_test
from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError

__all__ = [
    "EMBEDDED",
    "EmbeddedInfo",
    "check_bytes",
    "embedded",
    "embedded_fingerprints",
    "library_versions",
    "same_fonts",
]

SPLITS = ("train", "val", "test")
COLOUR_FIRST = render.JITTER_COLUMNS + 1  # raw columns: font or drawing, jitter, colours
COLUMNS = COLOUR_FIRST + render.COLOUR_COLUMNS
CHUNK = 256
FONT_TERMS = "fonts: Bitstream Vera licence (DejaVu), STIX Fonts licence; pictures: Apache-2.0"
FONT_SOURCE = "DejaVu and STIX fonts as shipped in matplotlib"
NINCO = "Bitterwolf, Mueller, Hein, ICML 2023, arXiv 2306.00826"
DIGITS_SOURCE = (
    "Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (test part), as shipped "
    "in scikit-learn"
)


@dataclass(frozen=True, kw_only=True)
class EmbeddedInfo:
    """Facts about one embedded set; a table of docs/data.md is made from these.

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


def _records() -> dict[str, EmbeddedInfo]:
    ood = {"train": 2000, "val": 1000, "test": 2000}
    titles = {
        "greek": "Greek letters",
        "cyrillic": "Cyrillic letters",
        "armenian": "Armenian letters",
        "georgian": "Georgian letters (Asomtavruli and Mkhedruli)",
        "hebrew": "Hebrew letters",
        "math": "mathematical operators",
        "arabic": "Arabic letters (isolated forms)",
    }
    out = [
        EmbeddedInfo(
            name="latin",
            kind="id",
            title="26 Latin capitals",
            default_n={"train": 12000, "val": 1000, "test": 2000},
            licence=FONT_TERMS,
            citation=FONT_SOURCE,
        )
    ]
    out += [
        EmbeddedInfo(
            name=name,
            kind="validation" if name == "arabic" else "near",
            title=f"{title}, look-alikes of Latin letters removed",
            default_n=ood,
            licence=FONT_TERMS,
            citation=FONT_SOURCE,
        )
        for name, title in titles.items()
    ]
    out += [
        EmbeddedInfo(
            name="digits",
            kind="far",
            title="handwritten digits whose printed form is no look-alike of a Latin letter",
            default_n=ood,
            licence="CC BY 4.0",
            citation=DIGITS_SOURCE,
        ),
        EmbeddedInfo(
            name="digits_all",
            kind="far",
            title="all ten handwritten digits: a lesson in unclean OOD sets",
            default_n=ood,
            licence="CC BY 4.0",
            citation=DIGITS_SOURCE,
        ),
        EmbeddedInfo(
            name="digits_rendered",
            kind="near",
            title="printed digits that are no look-alikes",
            default_n=ood,
            licence=FONT_TERMS,
            citation=FONT_SOURCE,
        ),
        EmbeddedInfo(
            name="textures",
            kind="far",
            title=f"{len(textures.TEXTURES)} families of procedural textures",
            default_n=ood,
        ),
        EmbeddedInfo(
            name="unicode",
            kind="pretraining",
            title="Unicode letters, OOD scripts and their look-alikes left out",
            default_n={"train": 40000, "val": 2000, "test": 2000},
            licence=FONT_TERMS,
            citation=FONT_SOURCE,
        ),
        EmbeddedInfo(
            name="unicode_with_ood",
            kind="pretraining",
            title="the same with the OOD scripts' characters as classes",
            default_n={"train": 40000, "val": 2000, "test": 2000},
            licence=FONT_TERMS,
            citation=FONT_SOURCE,
        ),
        EmbeddedInfo(
            name="unit_tests",
            kind="unit_test",
            title="the 17 unit tests in turn, labelled by test",
            default_n=dict.fromkeys(SPLITS, 17 * 100),
            licence="Apache-2.0",
            citation=NINCO,
        ),
    ]
    out += [
        EmbeddedInfo(
            name=name,
            kind="unit_test",
            title="synthetic unit test",
            default_n=dict.fromkeys(SPLITS, 400),
            licence="Apache-2.0",
            citation=NINCO,
        )
        for name in UNIT_TESTS
    ]
    return {info.name: info for info in out}


EMBEDDED: dict[str, EmbeddedInfo] = _records()


def embedded(
    name: str,
    split: str = "test",
    *,
    n: int | None = None,
    seed: int = 0,
    style: render.Style = "colour",
    size: int = 32,
) -> ImageSet:
    """Draw an embedded set. The first n images of a longer set are the same; splits differ in their
    random numbers.

    Classes come in turn, in an order shuffled anew each round, so that any n is balanced to within
    one per class. Turn, shift, scale, stroke and colours do not depend on ``style`` and ``size``
    (the same pictures, drawn otherwise). Handwritten digits: each split has its own drawings (train
    1/8, val 1/8, test 3/4), used again with other jitter once all were used.

    Parameters
    ----------
    name : one of ``EMBEDDED``
    split : "train", "val" or "test"
    n : images; by default the record's ``default_n``
    seed : of all random numbers of the set
    style : "plain" (light on dark) or "colour" (any colours, see ``render.compose``); unit tests have no style
    size : side in pixels, 16 to 512

    Returns
    -------
    ImageSet with RGB images (n, 3, size, size); ``meta["font"]`` and ``meta["codepoint"]`` for glyphs,
    ``meta["source"]`` (index of the drawing) for digits

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
    class_names = _class_names(name)
    key = (seed, crc32(f"{name}/{split}".encode()))
    labels = _balanced(n, len(class_names), (*key, 0))
    raw = render.raw_stream((n, COLUMNS), (*key, 1))
    if name == "textures":
        return _textures(split, labels, raw, (*key, 2), class_names, style, size)
    if name in ("digits", "digits_all"):
        return _digits(name, split, labels, raw, (*key, 3), class_names, style, size)
    return _glyphs(name, split, labels, raw, class_names, style, size)


def _balanced(n: int, classes: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    rounds = render.raw_stream((-(-n // classes), classes), key)
    return np.argsort(rounds, axis=1, kind="stable").ravel()[:n].astype(np.int64)


@cache
def _codepoints(name: str) -> tuple[int, ...]:
    if name == "unicode_with_ood":
        return alphabets.alphabet("unicode") + tuple(
            c for s in alphabets.OOD_SCRIPTS for c in alphabets.alphabet(s)
        )
    return alphabets.alphabet(name)


@cache
def _class_names(name: str) -> tuple[str, ...]:
    if name == "unit_tests":
        return UNIT_TESTS
    if name in UNIT_TESTS:
        return ()
    if name == "textures":
        return tuple(textures.TEXTURES)
    if name == "digits_all":
        return tuple("0123456789")
    return tuple(map(chr, _codepoints("digits_rendered" if name == "digits" else name)))


def _draw(
    masks: Callable[[int], NDArray[np.uint8]],
    raw: NDArray[np.uint64],
    style: render.Style,
    size: int,
) -> NDArray[np.uint8]:
    """Warp and colour ``masks(i)`` for every row of ``raw``, in chunks; a progress bar from 20,000
    images on.
    """
    from tqdm import tqdm

    n = len(raw)
    chunk = max(8, CHUNK * 1024 // size**2)
    out = np.empty((n, 3, size, size), dtype=np.uint8)
    for start in tqdm(range(0, n, chunk), desc="drawing", disable=None if n >= 20000 else True):
        part = raw[start : start + chunk]
        block = np.stack([masks(i) for i in range(start, start + len(part))])
        cover = render.warp(block, part[:, 1:COLOUR_FIRST], size)
        out[start : start + chunk] = render.compose(cover, part[:, COLOUR_FIRST:], style)
    return out


def _glyphs(
    name: str,
    split: str,
    labels: NDArray[np.int64],
    raw: NDArray[np.uint64],
    class_names: tuple[str, ...],
    style: render.Style,
    size: int,
) -> ImageSet:
    codepoints = np.array(_codepoints(name))[labels]
    fonts = [glyphs.fonts_with(int(c)) for c in codepoints]
    chosen = render.below(raw[:, 0], np.array([len(f) for f in fonts]))
    font = [f[int(i)] for f, i in zip(fonts, chosen, strict=True)]
    side = glyphs.mask_side(size)
    images = _draw(lambda i: glyphs.glyph_mask(font[i], int(codepoints[i]), side), raw, style, size)
    return ImageSet(
        name, split, images, labels, class_names, {"font": np.array(font), "codepoint": codepoints}
    )


@cache
def _handwriting() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 drawings, (n, 8, 8) uint8 0..255, and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 255 // 16).astype(np.uint8), data.target.astype(np.int64)


def _digits(
    name: str,
    split: str,
    labels: NDArray[np.int64],
    raw: NDArray[np.uint64],
    key: tuple[int, ...],
    class_names: tuple[str, ...],
    style: render.Style,
    size: int,
) -> ImageSet:
    from PIL import Image

    drawings, targets = _handwriting()
    eighths = {"train": (0,), "val": (1,), "test": (2, 3, 4, 5, 6, 7)}[split]
    side = glyphs.mask_side(size)
    source = np.empty(len(labels), dtype=np.int64)
    for label, digit in enumerate(class_names):
        mine = np.flatnonzero(targets == int(digit))
        mine = mine[np.isin(np.arange(len(mine)) % 8, eighths)]
        order = np.argsort(render.raw_stream((1, len(mine)), (*key, label))[0], kind="stable")
        where = np.flatnonzero(labels == label)
        source[where] = mine[
            order[np.arange(len(where)) % len(mine)]
        ]  # every drawing once, then again

    @cache
    def mask(index: int) -> NDArray[np.uint8]:
        picture = Image.fromarray(drawings[index]).resize((side, side), Image.Resampling.BICUBIC)
        return glyphs.centred(picture, side)

    images = _draw(lambda i: mask(int(source[i])), raw, style, size)
    return ImageSet(name, split, images, labels, class_names, {"source": source})


def _textures(
    split: str,
    labels: NDArray[np.int64],
    raw: NDArray[np.uint64],
    key: tuple[int, ...],
    class_names: tuple[str, ...],
    style: render.Style,
    size: int,
) -> ImageSet:
    numbers = render.raw_stream((len(labels), textures.NUMBERS), key)
    uniform = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    out = np.empty((len(labels), 3, size, size), dtype=np.uint8)
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        field = np.stack(
            [
                textures.texture(class_names[label], u, 2 * size)
                for label, u in zip(labels[part], uniform[part], strict=True)
            ]
        )
        out[part] = render.compose(render.halve(field), raw[part, COLOUR_FIRST:], style)
    return ImageSet("textures", split, out, labels, class_names)


def _unit_tests(
    name: str, split: str, n: int, seed: int, style: render.Style, size: int
) -> ImageSet:
    """One unit test, or all of them in turn; ``pixel_perm`` shuffles ``latin`` images of the same
    split and seed.
    """
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


def same_fonts(id_set: ImageSet, ood_set: ImageSet) -> ImageSet:
    """The ID images drawn in fonts that the OOD set uses, so that the typeface cannot give the
    answer away.

    OodlibError if a set has no ``meta["font"]`` (digits, textures, unit tests) or no image is left.
    """
    for image_set in (id_set, ood_set):
        if "font" not in image_set.meta:
            raise OodlibError(
                f"same_fonts: {image_set.name} has no meta 'font'; only glyph sets can be compared "
                "so."
            )
    keep = np.isin(id_set.meta["font"], np.unique(ood_set.meta["font"]))
    return id_set.subset(keep, name=f"{id_set.name}@{ood_set.name}-fonts")


def library_versions() -> dict[str, str]:
    """The versions that the bytes of the embedded corpus depend on."""
    import matplotlib
    import PIL
    import scipy
    import sklearn
    from PIL import features

    return {
        "pillow": PIL.__version__,
        "freetype": str(features.version("freetype2")),
        "matplotlib": matplotlib.__version__,
        "scikit-learn": sklearn.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
    }


def embedded_fingerprints() -> dict[str, str]:
    """SHA-256 of a small sample (34 test images, seed 0) of every set in both styles: what
    ``check_bytes`` compares.
    """
    return {
        f"{name}/{style}": embedded(name, n=34, style=style).fingerprint
        for name in EMBEDDED
        for style in ("colour", "plain")
        if style == "colour" or name not in UNIT_TESTS
    }


def check_bytes(manifest: str | Path) -> None:
    """Compare this machine's bytes with a stored manifest; OodlibError names what differs and the
    versions.

    The manifest is JSON: ``{"versions": library_versions(), "sets": embedded_fingerprints()}``.
    """
    stored = json.loads(Path(manifest).read_text(encoding="utf-8"))
    found = embedded_fingerprints()
    differ = sorted(
        k for k in stored["sets"].keys() | found.keys() if stored["sets"].get(k) != found.get(k)
    )
    if differ:
        now = library_versions()
        changed = [
            f"{k} {v} (stored: {stored['versions'].get(k)})"
            for k, v in now.items()
            if v != stored["versions"].get(k)
        ]
        raise OodlibError(
            f"check_bytes: {len(differ)} embedded sets differ from {Path(manifest).name}: "
            f"{', '.join(differ[:6])}. "
            + (
                f"Changed libraries: {', '.join(changed)}. Install the locked versions."
                if changed
                else "The libraries are those of the manifest, so the code changed: store new hashes with the reason."
            )
        )
