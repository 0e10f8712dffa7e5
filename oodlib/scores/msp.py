"""Maximum softmax probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oodlib.arrays import by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register


def msp(logits: Any, *, temperature: float = 1.0) -> Any:
    r"""Negative maximum softmax probability; larger = more OOD.

    S = -max_c p_c,   p = softmax(logits / T)

    Parameters
    ----------
    logits : (N, C)
    temperature : T > 0

    Returns
    -------
    (N,) float64 in [-1, -1/C]

    References
    ----------
    Hendrycks, Gimpel, ICLR 2017, arXiv 1610.02136

    Notes
    -----
    Two images whose largest logit leads by more than about 37 T tie at -1, even in float64.
    """
    check_temperature("msp", temperature)
    return by_rows("msp", lambda z: -(z / temperature).softmax(1).amax(1), logits)


@register(
    Info(
        key="msp",
        title="A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
        authors="Hendrycks, Gimpel",
        year=2017,
        arxiv="1610.02136",
        paper_larger_means="id",
    )
)
@dataclass(kw_only=True, eq=False)
class MSP(Detector):
    """Detector of `msp`."""

    temperature: float = 1.0

    def _score(self, bank: FeatureBank) -> Any:
        return msp(bank.logits, temperature=self.temperature)
