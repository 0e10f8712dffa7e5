"""ODIN without its input perturbation: maximum softmax probability at T = 1000."""

from typing import Any

from oodlib.arrays import Array, by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def odin(logits: Array, *, temperature: float = 1000.0) -> Array:
    r"""`msp` at a high temperature, **no input perturbation**; larger = more OOD.

    S = -max_c p_c,   p = softmax(logits / T)

    Parameters
    ----------
    logits : (N, C)
    temperature : T > 0

    Returns
    -------
    (N,) float64

    References
    ----------
    Liang, Li, Srikant, ICLR 2018, arXiv 1706.02690; epsilon = 0 as in GradNorm's released code.
    The paper's score is -S, larger = ID.

    Examples
    --------
    >>> odin(np.array([[8.0, 0.0], [2.0, 0.0]])).round(4)
    array([-0.502 , -0.5005])
    """
    check_temperature("odin", temperature)
    return by_rows("odin", lambda z: -(z / temperature).softmax(1).amax(1), logits)


@register(
    key="odin",
    title="Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks",
    authors="Liang, Li, Srikant",
    year=2018,
    arxiv="1706.02690",
    deviations=("no input perturbation (epsilon 0), as GradNorm's released code runs it",),
)
class ODIN(Detector):
    """Detector of `odin`."""

    temperature: float = 1000.0

    def _score(self, bank: FeatureBank) -> Any:
        return odin(bank.logits, temperature=self.temperature)
