"""Code lengths for input complexity."""

import io

import numpy as np
import pytest
from PIL import Image, features

from oodlib.errors import OodlibError
from oodlib.scores.complexity import _CODECS, compressed_bits

needs_jpeg2000 = pytest.mark.skipif(
    not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000"
)
CODECS = ["png", pytest.param("jpeg2000", marks=needs_jpeg2000)]


def noise(n=3, shape=(3, 32, 32)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def picture(image):
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 9, 5)])
def test_constant_is_shorter_than_weak_noise_than_noise(codec, shape):
    full = noise(1, shape)[0]
    bits = compressed_bits(np.stack([np.full(shape, 90, np.uint8), 90 + full % 4, full]), codec)
    assert bits.dtype == np.int64 and bits[0] < bits[1] < bits[2]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_needs_its_eight_bits_a_value(codec, channels):
    shape = (channels, 32, 32)
    payload = 8 * np.prod(shape)
    bits = compressed_bits(noise(3, shape), codec)
    assert (bits >= payload).all() and (bits < 1.25 * payload + 2400).all()


def test_png_length_is_that_of_pillow_s_file(tmp_path):
    images = noise(2)
    for i, image in enumerate(images):
        picture(image).save(tmp_path / f"{i}.png", optimize=True)
    assert compressed_bits(images).tolist() == [
        8 * (tmp_path / f"{i}.png").stat().st_size for i in range(2)
    ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_codecs_are_lossless(codec, shape):
    image = noise(1, shape)[0]
    file = io.BytesIO()
    picture(image).save(file, **_CODECS[codec])
    decoded = np.asarray(Image.open(file)).reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, image)


def test_rows_are_independent():
    images = noise(4)
    np.testing.assert_array_equal(compressed_bits(images)[::-1], compressed_bits(images[::-1]))


@pytest.mark.parametrize(
    "images",
    [noise().astype(np.float32), noise()[0], noise(2, (2, 8, 8)), noise(0), noise(2, (3, 0, 4))],
)
def test_bad_images_are_refused(images):
    with pytest.raises(OodlibError, match=r"uint8 \(n, 1 or 3, h, w\).*got.*8-bit"):
        compressed_bits(images)


def test_unknown_codec_is_refused():
    with pytest.raises(OodlibError, match=r"codec must be one of png, jpeg2000, got 'gif'"):
        compressed_bits(noise(), "gif")


def test_pillow_without_jpeg2000_is_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(OodlibError, match="without JPEG 2000"):
        compressed_bits(noise(), "jpeg2000")
