"""Maximum softmax probability, and ODIN without its perturbation: the same at T = 1000."""

from typing import Any

from oodlib.arrays import Array, by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def msp(logits: Array, *, temperature: float = 1.0) -> Array:
    r"""Negative maximum softmax probability of logits (N, C), (N,) float64; larger = more OOD.

    S = -max_c p_c in [-1, -1/C],   p = softmax(logits / T),   temperature T > 0

    Largest logits that lead by more than about 37 T tie at -1.

    Hendrycks, Gimpel, ICLR 2017, arXiv 1610.02136. The paper's score is -S, larger = ID.

    Examples
    --------
    >>> msp(np.log([[3.0, 1.0], [1.0, 1.0]])).round(4)
    array([-0.75, -0.5 ])
    """
    check_temperature("msp", temperature)
    return by_rows("msp", lambda z: -(z / temperature).softmax(1).amax(1), logits)


def odin(logits: Array, *, temperature: float = 1000.0) -> Array:
    r"""`msp` at a high temperature, **no input perturbation**; larger = more OOD.

    Liang, Li, Srikant, ICLR 2018, arXiv 1706.02690; epsilon = 0 as in GradNorm's released code.
    The paper's score is -S, larger = ID.

    Examples
    --------
    >>> odin(np.array([[8.0, 0.0], [2.0, 0.0]])).round(4)
    array([-0.502 , -0.5005])
    """
    check_temperature("odin", temperature)
    return by_rows("odin", lambda z: -(z / temperature).softmax(1).amax(1), logits)


@register("msp")
class MSP(Detector):
    """Detector of `msp`."""

    temperature: float = 1.0

    def _score(self, bank: FeatureBank) -> Any:
        return msp(bank.logits, temperature=self.temperature)


@register("odin")
class ODIN(Detector):
    """Detector of `odin`."""

    temperature: float = 1000.0

    def _score(self, bank: FeatureBank) -> Any:
        return odin(bank.logits, temperature=self.temperature)
