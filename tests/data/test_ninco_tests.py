"""The 17 unit tests: what each picture must look like, the scale rule, and the native use."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from oodlib.data import embedded
from oodlib.data.builtin.ninco_tests import NEEDS_ID_IMAGES, UNIT_TESTS, unit_test
from oodlib.errors import OodlibError


@pytest.fixture(scope="module")
def latin():
    return embedded("latin", n=40)


def canvas(name, n=40, shape=(48, 48), latin=None):
    """Undiluted canvases as (n, h, w, 3) uint8."""
    return unit_test(name, n=n, size=None, canvas=shape, id_images=latin).images.transpose(
        0, 2, 3, 1
    )


def test_there_are_seventeen():
    assert len(UNIT_TESTS) == 17


@pytest.mark.parametrize("name", UNIT_TESTS)
def test_prefix_and_seed(name, latin):
    few, more = (unit_test(name, n=n, id_images=latin) for n in (3, 6))
    assert few.images.shape == (3, 3, 32, 32)
    assert np.array_equal(few.images, more.images[:3])
    other = unit_test(name, n=6, seed=1, id_images=latin)
    assert np.array_equal(more.images, other.images) == (name in ("white", "black"))


def test_constants():
    assert (canvas("white") == 255).all() and (canvas("black") == 0).all()
    for name, colours in {"grey": 1, "monochrome": 3}.items():
        images = canvas(name)
        assert (images == images[:, :1, :1]).all()
        assert max(len(set(image[0, 0])) for image in images) == colours


def test_noise_distributions():
    uniform = canvas("uni")
    assert abs(uniform.mean() - 127) < 1 and abs(uniform.std() - 255 / 12**0.5) < 1
    assert (
        set(np.unique(canvas("Rademacher"))) == {0, 255}
        and abs((canvas("Rademacher") > 0).mean() - 0.5) < 0.01
    )
    deviation = canvas("Gaussian", n=200).std((1, 2, 3)) / 255
    allowed = np.array([0.05, 0.075, 0.1, 0.15, 0.2])
    unclipped = deviation[deviation < 0.22]
    assert np.abs(unclipped[:, None] - allowed).min(1).max() < 0.012
    assert len(set(np.abs(unclipped[:, None] - allowed).argmin(1))) == 5


def test_pixel_perm_keeps_the_pixels(latin):
    from PIL import Image

    shuffled = canvas("pixel_perm", n=5, latin=latin)
    for image, source in zip(shuffled, latin.images, strict=False):
        resized = np.asarray(
            Image.fromarray(source.transpose(1, 2, 0)).resize((48, 48), Image.Resampling.BICUBIC)
        )
        got, want = (np.sort(x.reshape(-1, 3).astype(int), axis=0) for x in (image, resized))
        assert np.abs(got - want).max() <= 1  # value/255*255, truncated


def test_low_freq_pixel_perm_is_smoother(latin):
    sharp, smooth = canvas("pixel_perm", latin=latin), canvas("low_freq_pixel_perm", latin=latin)
    assert (smooth.std((1, 2)).mean(1) < sharp.std((1, 2)).mean(1)).mean() == 1


@pytest.mark.parametrize("name", ["tricolour", "tricolour_primary"])
def test_tricolour(name):
    images = canvas(name)
    horizontal = (images == images[:, :, :1]).all((1, 2, 3))
    vertical = (images == images[:, :1]).all((1, 2, 3))
    assert (horizontal | vertical).all() and 0 < horizontal.mean() < 1
    for image in images:
        assert (image[:16, :16] == image[0, 0]).all() and (image[-16:, -16:] == image[-1, -1]).all()
    assert name == "tricolour" or set(np.unique(images)) == {0, 255}


@pytest.mark.parametrize(("name", "axis"), [("horizontal_stripes", 0), ("vertical_stripes", 1)])
@pytest.mark.parametrize(
    ("shape", "counts"),
    [((48, 48), {4, 5, 7, 10, 15}), ((42, 42), {4, 5, 7, 10}), ((375, 500), {4, 5, 7, 10, 15, 20})],
)
def test_stripe_counts(name, axis, shape, counts):
    seen = set()
    for image in canvas(name, n=60, shape=shape):
        line = image[:, 0] if axis == 0 else image[0]
        changes = np.flatnonzero((line[1:] != line[:-1]).any(1)) + 1
        seen.add(len(changes) + 1)
        assert set(np.diff(changes)) <= {shape[axis] // (len(changes) + 1)}
    assert seen == counts


def test_low_freq_scales():
    joint, channelwise = canvas("low_freq"), canvas("low_freq_channelfullscale")
    assert (joint.min((1, 2, 3)) == 0).all() and (joint.max((1, 2, 3)) == 255).all()
    assert (channelwise.min((1, 2)) == 0).all() and (channelwise.max((1, 2)) == 255).all()
    assert (joint.max((1, 2)) < 255).any()


def test_low_freq_blur_wraps_and_follows_the_canvas():
    """Neighbours are as alike across the border as inside; structures scale with the picture."""
    for shape in ((48, 48), (96, 96)):
        images = canvas("low_freq", n=60, shape=shape).astype(float)
        inside = np.abs(images[:, 1:] - images[:, :-1]).mean()
        assert abs(np.abs(images[:, 0] - images[:, -1]).mean() / inside - 1) < 0.1
        step = shape[0] // 16
        alike = [
            np.corrcoef(i[:, ::step].ravel(), np.roll(i, step, 1)[:, ::step].ravel())[0, 1]
            for i in images
        ]
        assert 0.6 < np.mean(alike) < 0.9


def test_low_freq_colorrange_spans_at_most_its_range():
    images = canvas("low_freq_colorrange", n=100) / 255
    spread = np.quantile(images, 0.975, axis=(1, 2)) - np.quantile(images, 0.025, axis=(1, 2))
    assert spread.max() < 0.65 and spread.mean() > 0.15


def test_blobs_are_black_or_bright():
    images = canvas("blobs")
    assert ((images == 0) | (images >= int(0.75 * 255))).all()
    assert 0.05 < (images > 0).mean() < 0.5


def test_contrast_after_shrinking_is_that_of_the_note(latin):
    """Deviations native / 48 -> 32: uni .155 / .157, Rademacher .254 / .258."""
    assert abs(unit_test("uni", n=50).images.std() / 255 - 0.157) < 0.003
    assert abs(unit_test("Rademacher", n=50).images.std() / 255 - 0.258) < 0.005


def test_blur_reaches_four_sigma():
    spike = np.zeros((48, 48, 3))
    spike[24, 24] = 1
    from oodlib.data.builtin.ninco_tests import _blur

    blurred = _blur(spike, 2)
    assert blurred[24, 16, 0] > 0 == blurred[24, 15, 0]
    np.testing.assert_allclose(
        blurred[..., 1], gaussian_filter(spike[..., 1], 2, mode="wrap", truncate=4)
    )


@pytest.mark.parametrize("size", [28, 64])
def test_other_sizes(size, latin):
    assert unit_test("low_freq", n=2, size=size).images.shape == (2, 3, size, size)
    assert unit_test("pixel_perm", n=2, size=size, id_images=latin).images.shape == (
        2,
        3,
        size,
        size,
    )


def test_native_canvas():
    assert unit_test("low_freq", n=1, size=None, canvas=(375, 500)).images.shape == (1, 3, 375, 500)


def test_pooled_set_takes_the_tests_in_turn():
    pooled = embedded("unit_tests", n=34)
    assert pooled.class_names == UNIT_TESTS
    assert np.array_equal(pooled.labels, np.arange(34) % 17)
    for name in ("blobs", "pixel_perm"):
        assert np.array_equal(
            pooled.images[pooled.labels == UNIT_TESTS.index(name)], embedded(name, n=2).images
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "plasma"}, "got 'plasma'"),
        ({"name": "uni", "size": None}, "give size, or canvas"),
        ({"name": "uni", "n": 0}, "n >= 1"),
        ({"name": "uni", "size": 4}, "12 x 12 pixels"),
        *(
            ({"name": name}, "at least 400 ID test images .id_images., got 0")
            for name in NEEDS_ID_IMAGES
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OodlibError, match=message):
        unit_test(**arguments)
