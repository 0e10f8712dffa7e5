"""A network with its ID and OOD sets, the scores of every detector on it, and plots of them."""

from oodlib.experiments.evaluate import (
    AVERAGE,
    METRICS,
    Scores,
    font_control,
    interval,
    judge_each,
    judged,
    mean_metric,
    record,
    score,
    wide_table,
)
from oodlib.experiments.plots import histograms, image_rows, interval_dots
from oodlib.experiments.testbed import (
    OPENOOD_SETS,
    ImageNetFiles,
    Testbed,
    testbed,
    validation_banks,
)

__all__ = [
    "AVERAGE",
    "METRICS",
    "OPENOOD_SETS",
    "ImageNetFiles",
    "Scores",
    "Testbed",
    "font_control",
    "histograms",
    "image_rows",
    "interval",
    "interval_dots",
    "judge_each",
    "judged",
    "mean_metric",
    "record",
    "score",
    "testbed",
    "validation_banks",
    "wide_table",
]
