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


@register(Info("max_logit", "Scaling Out-of-Distribution Detection for Real-World Settings",
               "Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt, Song", 2022, "1911.11132", "ood"))
@dataclass(kw_only=True, eq=False)
class MaxLogit(Detector):
    """Detector of `max_logit`."""

    def _score(self, bank: FeatureBank) -> Any:
        return max_logit(bank.logits)
