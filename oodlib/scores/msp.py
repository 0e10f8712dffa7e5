"""Maximum softmax probability."""

from typing import Any

from oodlib.arrays import Array, by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def msp(logits: Array, *, temperature: float = 1.0) -> Array:
    r"""Negative maximum softmax probability; larger = more OOD.

    S = -max_c p_c,   p = softmax(logits / T)

    Parameters
    ----------
    logits : (N, C)
    temperature : T > 0

    Returns
    -------
    (N,) float64 in [-1, -1/C]; largest logits that lead by more than about 37 T tie at -1

    References
    ----------
    Hendrycks, Gimpel, ICLR 2017, arXiv 1610.02136. The paper's score is -S, larger = ID.

    Examples
    --------
    >>> msp(np.log([[3.0, 1.0], [1.0, 1.0]])).round(4)
    array([-0.75, -0.5 ])
    """
    check_temperature("msp", temperature)
    return by_rows("msp", lambda z: -(z / temperature).softmax(1).amax(1), logits)


@register(
    key="msp",
    title="A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural "
    "Networks",
    authors="Hendrycks, Gimpel",
    year=2017,
    arxiv="1610.02136",
)
class MSP(Detector):
    """Detector of `msp`."""

    temperature: float = 1.0

    def _score(self, bank: FeatureBank) -> Any:
        return msp(bank.logits, temperature=self.temperature)
