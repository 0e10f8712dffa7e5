"""A user's own network and images: load, check, score."""

from oodlib.apply.class_order import ClassCheck, check_classes
from oodlib.apply.inputs import FeatureFile, open_images
from oodlib.apply.network import load_network

__all__ = ["ClassCheck", "FeatureFile", "check_classes", "load_network", "open_images"]
