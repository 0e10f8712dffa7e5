"""ReAct: features clipped from above."""

import numpy as np

from oodlib.arrays import Array, by_rows
from oodlib.errors import check_interval
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import register
from oodlib.scores.shaper import Shaper, shaped_bank

_VALUES = 2**27  # activations that the percentile is taken over, at most


def react(features: Array, threshold: float) -> Array:
    r"""Features (N, D) clipped from above, ``min(h, threshold)``: not a score, but input for one.

    References
    ----------
    Sun, Guo, Li, NeurIPS 2021, arXiv 2111.12797

    Examples
    --------
    >>> react(np.array([[0.5, 3.0]]), 1.0)
    array([[0.5, 1. ]])
    """
    return by_rows("react", lambda h: h.clamp(max=threshold), features)


@register(
    key="react",
    title="ReAct: Out-of-distribution Detection With Rectified Activations",
    authors="Sun, Guo, Li",
    year=2021,
    arxiv="2111.12797",
    needs="features",
)
class ReAct(Shaper):
    """Detector of ``then`` behind `react`, clipped at a percentile of all training activations."""

    percentile: float = 90.0

    def _learn(self, bank: FeatureBank) -> None:
        check_interval("react.fit: percentile", self.percentile, "[0, 100]")
        step = -(-bank.features.size // _VALUES)  # evenly spaced rows of larger banks
        self.threshold_ = float(np.percentile(bank.features[::step], self.percentile))

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        return shaped_bank(bank, react(bank.features, self.threshold_))
