"""Image sets: embedded (no download), real 28- and 32-pixel sets, and folders with image lists."""

from oodlib.data.complexity import compressed_bits
from oodlib.data.embedded import EMBEDDED, embedded, same_fonts
from oodlib.data.image_lists import (
    PAPER_SETS,
    ImageList,
    class_remap,
    describe_paper_sets,
    image_loader,
    open_paper_set,
)
from oodlib.data.images import ImageSet, assert_disjoint
from oodlib.data.outliers import patch_shuffled
from oodlib.data.prepare import data_root, load
from oodlib.data.protocol import Protocol, cifar_protocol, tiny_imagenet_ood
from oodlib.data.published import published
from oodlib.data.registry import SETS, SetInfo
from oodlib.data.unit_tests import UNIT_TESTS, unit_test

__all__ = [
    "EMBEDDED", "PAPER_SETS", "SETS", "UNIT_TESTS", "ImageList", "ImageSet", "Protocol", "SetInfo",
    "assert_disjoint", "cifar_protocol", "class_remap", "compressed_bits", "data_root", "describe_paper_sets",
    "embedded", "image_loader", "load", "open_paper_set", "patch_shuffled", "published", "same_fonts",
    "tiny_imagenet_ood", "unit_test",
]
