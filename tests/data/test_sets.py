"""The built-in sets: real glyphs, no look-alikes, disjoint splits, the same bytes per seed."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import PIL.features
import pytest
import scipy
import sklearn

from oodlib.data import EMBEDDED, assert_disjoint, embedded
from oodlib.data.builtin.alphabets import (
    LATIN,
    LOOKALIKE,
    OOD_SCRIPTS,
    SCRIPTS,
    alphabet,
    removed,
    similarity,
)
from oodlib.data.builtin.glyphs import FONTS, fonts_with, glyph_mask, has_real_glyph
from oodlib.data.builtin.ninco_tests import UNIT_TESTS
from oodlib.data.builtin.render import MIN_CONTRAST, _colours, luminance, raw_stream
from oodlib.data.builtin.textures import TEXTURES
from oodlib.errors import OodlibError

MANIFEST = Path(__file__).parents[2] / "data" / "manifests" / "embedded.json"
DRAWN = [name for name in EMBEDDED if name not in UNIT_TESTS]
BASIC_LATIN = tuple(map(ord, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))


def library_versions():
    """What the bytes of the built-in sets depend on."""
    return {
        "pillow": PIL.__version__,
        "freetype": str(PIL.features.version("freetype2")),
        "matplotlib": matplotlib.__version__,
        "scikit-learn": sklearn.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
    }


def fingerprints():
    """SHA-256 of a small sample (34 test images, seed 0) of every set in both styles."""
    return {
        f"{name}/{style}": embedded(name, n=34, style=style).fingerprint
        for name in EMBEDDED
        for style in ("colour", "plain")
        if style == "colour" or name not in UNIT_TESTS
    }


def test_bytes_are_those_stored():
    """Differing bytes with the stored versions mean that the code changed."""
    stored, now = json.loads(MANIFEST.read_text()), library_versions()
    changed = {k: (stored["versions"].get(k), v) for k, v in now.items()}
    changed = {k: pair for k, pair in changed.items() if pair[0] != pair[1]}
    assert fingerprints() == stored["sets"], f"libraries, stored and now: {changed or 'the same'}"


@pytest.mark.parametrize("name", ["latin", *OOD_SCRIPTS, "arabic", "unicode"])
def test_every_font_draws_every_character_differently(name):
    for font in FONTS:
        drawn = [glyph_mask(font, c).tobytes() for c in alphabet(name) if has_real_glyph(font, c)]
        assert len(set(drawn)) == len(drawn), f"{font} repeats a glyph of {name}"


def test_placeholders_are_no_glyphs():
    assert not has_real_glyph("STIXGeneral", ord("א"))  # not in the font
    assert not has_real_glyph("DejaVuSans", ord(" "))  # mapped, but empty
    assert fonts_with(0xE0FFF) == ()
    with pytest.raises(OodlibError, match="no real glyph for U\\+05D0; fonts that do: DejaVuSans"):
        glyph_mask("STIXGeneral", ord("א"))
    with pytest.raises(OodlibError, match="font must be one of"):
        has_real_glyph("LastResortHE-Regular", ord("A"))


def test_font_counts():
    assert all(len(fonts_with(c)) == len(FONTS) for c in LATIN)
    assert {len(fonts_with(c)) for c in alphabet("hebrew")} == {4}


@pytest.mark.parametrize("name", [*OOD_SCRIPTS, "arabic"])
def test_no_look_alike_of_a_latin_letter_is_left(name):
    for font in FONTS:
        left = tuple(c for c in alphabet(name) if has_real_glyph(font, c))
        if left:
            assert similarity(font, left, BASIC_LATIN).max() < LOOKALIKE
    assert not {pair[0] for pair in SCRIPTS[name].confusable.split()} & set(
        map(chr, alphabet(name))
    )


def test_the_rendering_rule_finds_the_obvious_ones_by_itself():
    for name, characters in {
        "greek": "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο",
        "cyrillic": "АВЕКМНОРСТХаеорсух",
        "math": "∣∨∪",
    }.items():
        reasons = removed(name)
        assert all(reasons[c].startswith("looks like Latin") for c in characters)
    assert {"0", "1"} <= set(removed("digits_rendered"))


def test_scripts_keep_enough_classes():
    least = {
        "greek": 10,
        "cyrillic": 15,
        "armenian": 30,
        "georgian": 50,
        "hebrew": 15,
        "math": 150,
        "arabic": 50,
        "unicode": 600,
    }
    assert {name: EMBEDDED[name].classes >= n for name, n in least.items()} == dict.fromkeys(
        least, True
    )


def test_pretraining_set_holds_no_ood_character_and_every_id_class():
    pretraining, ood = set(alphabet("unicode")), {c for name in OOD_SCRIPTS for c in alphabet(name)}
    assert not pretraining & ood
    assert set(LATIN) <= pretraining
    assert EMBEDDED["unicode_with_ood"].classes == len(pretraining) + len(ood)
    letters = tuple(c for c in pretraining - set(BASIC_LATIN) if has_real_glyph("DejaVuSans", c))
    others = tuple(c for c in ood if has_real_glyph("DejaVuSans", c))
    assert similarity("DejaVuSans", letters, others, variants=False).max() < LOOKALIKE


def test_splits_and_seeds_share_no_image():
    assert_disjoint(*(embedded("latin", split, n=600) for split in ("train", "val", "test")))
    a, b = embedded("latin", n=300, style="plain"), embedded("latin", n=300, seed=1, style="plain")
    assert not set(a.image_hashes()) & set(b.image_hashes())


def test_digit_drawings_belong_to_one_split():
    sources = [
        set(embedded("digits_all", split, n=2000).meta["source"])
        for split in ("train", "val", "test")
    ]
    assert len(set.union(*sources)) == sum(map(len, sources)) == 1797
    assert set(embedded("digits", n=40).class_names) == set(map(chr, alphabet("digits_rendered")))


@pytest.mark.parametrize("name", [*DRAWN, "blobs", "pixel_perm"])
def test_a_prefix_is_a_prefix(name):
    short, long = embedded(name, n=40), embedded(name, n=300)
    assert np.array_equal(short.images, long.images[:40])
    assert np.array_equal(short.labels, long.labels[:40])


@pytest.mark.parametrize("size", [28, 32, 64])
def test_sizes_show_the_same_picture(size):
    small, large = embedded("latin", n=26, size=size), embedded("latin", n=26, size=128)
    assert small.images.shape == (26, 3, size, size)
    difference = small.images.astype(float) - large.resized(size).images
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("name", ["latin", "math", "textures", "digits"])
def test_labels_are_balanced(name):
    counts = np.bincount(embedded(name, n=500).labels)
    assert counts.max() - counts.min() <= 1


def test_glyph_meta_is_true():
    images = embedded("hebrew", n=100)
    assert all(
        has_real_glyph(f, int(c))
        for f, c in zip(images.meta["font"], images.meta["codepoint"], strict=True)
    )
    assert all(
        images.class_names[label] == chr(c)
        for label, c in zip(images.labels, images.meta["codepoint"], strict=True)
    )


@pytest.mark.parametrize("style", ["plain", "colour"])
def test_contrast_is_guaranteed(style):
    front, ends = _colours(raw_stream((20000, 10), (7,)), style)
    contrast = luminance(ends) - luminance(front)[:, None]
    assert np.abs(contrast).min() >= MIN_CONTRAST
    assert (np.sign(contrast[:, 0]) == np.sign(contrast[:, 1])).all()
    assert min(front.min(), ends.min()) >= 0 and max(front.max(), ends.max()) <= 255


def test_plain_is_light_on_dark():
    images = embedded("latin", n=200, style="plain").images
    assert images[:, :, 0, 0].max() < 128 < images.max((1, 2, 3)).min()


def test_textures_vary():
    images = embedded("textures", n=120)
    assert images.class_names == tuple(TEXTURES) and len(TEXTURES) >= 8
    assert len(set(images.image_hashes())) == 120
    assert images.images.std((1, 2, 3)).min() > 4


def test_records_are_complete():
    for name, info in EMBEDDED.items():
        assert info.name == name and info.licence and (info.citation or name == "textures")
        assert info.kind in {"id", "near", "far", "unit_test", "pretraining", "validation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "klingon"}, "one of latin, .* got 'klingon'"),
        ({"split": "dev"}, "split must be one of train"),
        ({"style": "neon"}, "style must be"),
        ({"n": 0}, "n >= 1"),
        ({"size": 4}, r"16 \.\. 512"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OodlibError, match=message):
        embedded(**{"name": "latin", **arguments})
