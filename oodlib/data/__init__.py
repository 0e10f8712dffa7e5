"""Image sets: built in (no download), real 28- and 32-pixel sets, and folders with image lists."""

from oodlib.data.builtin.ninco_tests import UNIT_TESTS, unit_test
from oodlib.data.builtin.sets import EMBEDDED, embedded
from oodlib.data.cifar import Protocol, cifar_protocol, tiny_imagenet_ood
from oodlib.data.folders import ImageList, image_loader
from oodlib.data.imagenet import PAPER_SETS, class_remap, describe_paper_sets, open_paper_set
from oodlib.data.images import ImageSet, assert_disjoint, patch_shuffled
from oodlib.data.public.prepare import DatasetNotFound, load
from oodlib.data.public.registry import SETS, SetInfo
from oodlib.data.published import published
from oodlib.workspace import data_root

__all__ = [
    "EMBEDDED",
    "PAPER_SETS",
    "SETS",
    "UNIT_TESTS",
    "DatasetNotFound",
    "ImageList",
    "ImageSet",
    "Protocol",
    "SetInfo",
    "assert_disjoint",
    "cifar_protocol",
    "class_remap",
    "data_root",
    "describe_paper_sets",
    "embedded",
    "image_loader",
    "load",
    "open_paper_set",
    "patch_shuffled",
    "published",
    "tiny_imagenet_ood",
    "unit_test",
]
