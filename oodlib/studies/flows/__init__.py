"""Flows along their training: specifications, runs, scores, and how mature they are."""

from oodlib.studies.flows.anatomy import Anatomy, dissect, kolmogorov, mean_correlation
from oodlib.studies.flows.figures import SCORE_COLOURS, draw_bits, draw_curves, draw_overlap
from oodlib.studies.flows.loading import load
from oodlib.studies.flows.maturity import Aurocs, Pairs, Study, auroc_along, is_mature
from oodlib.studies.flows.runs import FlowRun, flow_run
from oodlib.studies.flows.score_images import SCORES, VARIANTS
from oodlib.studies.flows.specs import FLOWS, FlowSpec, flow_sets
from oodlib.studies.flows.tables import (
    curves,
    flow_table,
    history,
    overlap_along,
    results,
    short,
)

__all__ = [
    "FLOWS",
    "SCORES",
    "SCORE_COLOURS",
    "VARIANTS",
    "Anatomy",
    "Aurocs",
    "FlowRun",
    "FlowSpec",
    "Pairs",
    "Study",
    "auroc_along",
    "curves",
    "dissect",
    "draw_bits",
    "draw_curves",
    "draw_overlap",
    "flow_run",
    "flow_sets",
    "flow_table",
    "history",
    "is_mature",
    "kolmogorov",
    "load",
    "mean_correlation",
    "overlap_along",
    "results",
    "short",
]
