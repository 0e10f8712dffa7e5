"""Code lengths of images: what input complexity subtracts from a negative log-likelihood."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError

# Pillow's arguments, fixed because the length depends on them; both codecs are lossless with these
_CODECS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "optimize": True},
    "jpeg2000": {"format": "JPEG2000", "irreversible": False},
}


def compressed_bits(images: NDArray[np.uint8], codec: str = "png") -> NDArray[np.int64]:
    """Length of each image's losslessly compressed file: L(x), in bits.

    Input complexity is S(x) = -log2 p(x) - L(x), larger = more OOD, with both terms in bits of the
    whole image (not per dimension, not nats).

    Parameters
    ----------
    images : (n, c, h, w) uint8, c = 1 (grey) or 3 (RGB)
    codec : "png" (Pillow's strongest compression) or "jpeg2000" (reversible transform)

    Returns
    -------
    (n,) int64, bits of the file with its header, a nearly constant number

    Raises
    ------
    OodlibError : unknown codec, not uint8 of that shape, no image, or a Pillow without JPEG 2000

    References
    ----------
    Serra, Alvarez, Gomez, Slizovskaia, Nunez, Luque, ICLR 2020, arXiv 1909.11480

    Examples
    --------
    >>> flat = np.zeros((1, 1, 28, 28), np.uint8)
    >>> noise = np.random.default_rng(0).integers(0, 256, flat.shape, dtype=np.uint8)
    >>> bool(compressed_bits(flat)[0] < compressed_bits(noise)[0])
    True
    """
    from PIL import Image, features

    if codec not in _CODECS:
        raise OodlibError(
            f"compressed_bits: there is no codec {codec!r}. Choose one of {', '.join(_CODECS)}."
        )
    images = np.asarray(images)
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        raise OodlibError(
            "compressed_bits: at least one image, uint8 of shape (n, 1 or 3, h, w), is needed, "
            f"got {images.dtype} {shape}. Pass the 8-bit images as they were loaded, not the "
            "scaled network input."
        )
    if codec == "jpeg2000" and not features.check("jpg_2000"):
        raise OodlibError(
            "compressed_bits: this Pillow was built without JPEG 2000 (OpenJPEG). Use codec "
            '"png", or install Pillow\'s official wheel.'
        )
    bits = np.empty(len(images), np.int64)
    for i, image in enumerate(images):
        file = io.BytesIO()
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(file, **_CODECS[codec])
        bits[i] = 8 * file.getbuffer().nbytes
    return bits
