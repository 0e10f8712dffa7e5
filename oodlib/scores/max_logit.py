"""Maximum logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oodlib.arrays import by_rows
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register


def max_logit(logits: Any) -> Any:
    r"""Negative maximum logit; larger = more OOD.

    S = -max_c z_c

    Parameters
    ----------
    logits : (N, C)

    Returns
    -------
    (N,) float64

    References
    ----------
    Hendrycks et al., ICML 2022, arXiv 1911.11132
    """
    return by_rows("max_logit", lambda z: -z.amax(1), logits)


@register(
    Info(
        key="max_logit",
        title="Scaling Out-of-Distribution Detection for Real-World Settings",
        authors="Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt, Song",
        year=2022,
        arxiv="1911.11132",
        paper_larger_means="ood",
    )
)
@dataclass(kw_only=True, eq=False)
class MaxLogit(Detector):
    """Detector of `max_logit`."""

    def _score(self, bank: FeatureBank) -> Any:
        return max_logit(bank.logits)
