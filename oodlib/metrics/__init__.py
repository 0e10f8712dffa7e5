"""Metrics of detection and calibration on arrays of scores, and the statistics built on them."""

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
from oodlib.metrics.detection import (
    aupr,
    auroc,
    bootstrap,
    fpr_at_tpr,
    paired_bootstrap,
    percentile_interval,
    replicates,
    replicates_by_set,
    threshold,
)
from oodlib.metrics.statistics import magnitude, overlap, shared_half, spearman_along

__all__ = [
    "Reliability",
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
]
