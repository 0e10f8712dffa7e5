"""A network with its ID and OOD sets, the scores of every detector on it, and plots of them."""

from oodlib.experiments.beds import Beds, load, score
from oodlib.experiments.evaluate import font_control, mean_metric
from oodlib.experiments.openood import near_and_far, openood_departures, openood_published
from oodlib.experiments.plots import histograms, image_rows, interval_dots
from oodlib.experiments.protocols import OPENOOD_SETS, ImageNetFiles
from oodlib.experiments.testbed import Testbed, testbed, validation_banks
from oodlib.metrics import AVERAGE, METRICS, Scores, wide_table

__all__ = [
    "AVERAGE",
    "METRICS",
    "OPENOOD_SETS",
    "Beds",
    "ImageNetFiles",
    "Scores",
    "Testbed",
    "font_control",
    "histograms",
    "image_rows",
    "interval_dots",
    "load",
    "mean_metric",
    "near_and_far",
    "openood_departures",
    "openood_published",
    "score",
    "testbed",
    "validation_banks",
    "wide_table",
]
