"""ReAct: features clipped from above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from oodlib.arrays import by_rows
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Info, register
from oodlib.scores.shaper import Shaper, shaped_bank

_VALUES = 2**27  # activations that the percentile is taken over, at most


def react(features: Any, threshold: float) -> Any:
    r"""Features clipped from above, ``min(h, c)``: not a score, but the features for one.

    Parameters
    ----------
    features : (N, D)
    threshold : c

    Returns
    -------
    (N, D) float64

    References
    ----------
    Sun, Guo, Li, NeurIPS 2021, arXiv 2111.12797
    """
    return by_rows("react", lambda h: h.clamp(max=threshold), features)


@register(
    Info(
        key="react",
        title="ReAct: Out-of-distribution Detection With Rectified Activations",
        authors="Sun, Guo, Li",
        year=2021,
        arxiv="2111.12797",
        paper_larger_means="id",
        needs="features",
    )
)
@dataclass(kw_only=True, eq=False)
class ReAct(Shaper):
    """Detector of ``then`` behind `react`; ``percentile``: of all ID training activations,
    in per cent, whose value is the threshold.
    """

    percentile: float = 90.0

    def _learn(self, bank: FeatureBank) -> None:
        if not 0 <= self.percentile <= 100:
            raise OodlibError(
                f"react.fit: percentile must lie in 0 .. 100 (per cent), got {self.percentile}."
            )
        step = -(
            -bank.features.size // _VALUES
        )  # evenly spaced rows of banks that are larger than that
        self.threshold_ = float(np.percentile(bank.features[::step], self.percentile))

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        return shaped_bank(bank, react(bank.features, self.threshold_))
