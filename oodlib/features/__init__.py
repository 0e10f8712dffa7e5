"""One forward pass over a data set, and the FeatureBank it leaves in memory or on disk."""

from oodlib.features.extract import batches, extract, stream
from oodlib.features.feature_bank import FeatureBank, Head

__all__ = ["FeatureBank", "Head", "batches", "extract", "stream"]
