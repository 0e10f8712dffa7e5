"""Metrics of detection and calibration on arrays of scores, and the statistics built on them."""

from oodlib.metrics.board import Board, Scores
from oodlib.metrics.calibration import (
    Reliability,
    brier,
    confidence,
    ece,
    fit_temperature,
    nll,
    reliability,
    simulated_null,
)
from oodlib.metrics.detection import aupr, auroc, fpr_at_tpr, threshold
from oodlib.metrics.estimate import Estimate, percentile_interval
from oodlib.metrics.resample import bootstrap, paired_bootstrap, replicates, replicates_by_set
from oodlib.metrics.statistics import magnitude, overlap, shared_half, spearman_along
from oodlib.metrics.wide import AVERAGE, METRICS, wide_table

__all__ = [
    "AVERAGE",
    "METRICS",
    "Board",
    "Estimate",
    "Reliability",
    "Scores",
    "aupr",
    "auroc",
    "bootstrap",
    "brier",
    "confidence",
    "ece",
    "fit_temperature",
    "fpr_at_tpr",
    "magnitude",
    "nll",
    "overlap",
    "paired_bootstrap",
    "percentile_interval",
    "reliability",
    "replicates",
    "replicates_by_set",
    "shared_half",
    "simulated_null",
    "spearman_along",
    "threshold",
    "wide_table",
]
