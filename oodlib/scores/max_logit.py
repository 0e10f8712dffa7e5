"""Maximum logit."""

from typing import Any

from oodlib.arrays import Array, by_rows
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def max_logit(logits: Array) -> Array:
    r"""Negative maximum logit of (N, C), (N,) float64; larger = more OOD, as in the paper.

    S = -max_c z_c

    References
    ----------
    Hendrycks et al., ICML 2022, arXiv 1911.11132

    Examples
    --------
    >>> max_logit(np.array([[3.0, 1.0], [0.5, 0.2]]))
    array([-3. , -0.5])
    """
    return by_rows("max_logit", lambda z: -z.amax(1), logits)


@register(
    key="max_logit",
    title="Scaling Out-of-Distribution Detection for Real-World Settings",
    authors="Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt, Song",
    year=2022,
    arxiv="1911.11132",
)
class MaxLogit(Detector):
    """Detector of `max_logit`."""

    def _score(self, bank: FeatureBank) -> Any:
        return max_logit(bank.logits)
