"""Image sets: embedded (no download), real 28- and 32-pixel sets, and folders with image lists."""

from oodlib.data.images import ImageSet, assert_disjoint

__all__ = ["ImageSet", "assert_disjoint"]
