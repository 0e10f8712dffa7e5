"""GEN: generalised entropy of the largest probabilities."""

from typing import Any

from torch import Tensor

from oodlib.arrays import Array, by_rows
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def gen(logits: Array, *, gamma: float = 0.1, top: int = 100) -> Array:
    r"""Generalised entropy; larger = more OOD.

    G = sum of p_c^gamma (1 - p_c)^gamma over the ``top`` largest p_c,   p = softmax(logits)

    Parameters
    ----------
    logits : (N, C)
    gamma : in (0, 1); the smaller, the more the improbable classes count
    top : M >= 1; all classes where there are fewer

    Returns
    -------
    (N,) float64, positive

    References
    ----------
    Liu, Lochman, Zach, CVPR 2023. The paper's score is -G, larger = ID. Here 1 - p of the largest p
    is the sum of the others, in log space: outputs close to certainty do not tie.

    Examples
    --------
    >>> gen(np.log([[9.0, 1.0], [1.0, 1.0]]), gamma=0.5).round(4)
    array([0.6, 1. ])
    """
    if not 0 < gamma < 1 or top < 1:
        raise OodlibError(
            f"gen: gamma must lie between 0 and 1, and top be at least 1, got {gamma} and {top}."
        )

    def score(z: Tensor) -> Tensor:
        log_p = z.log_softmax(1).sort(1, descending=True).values
        log_rest = (-log_p.exp()).log1p()
        log_rest[:, 0] = log_p[:, 1:].logsumexp(1)
        return (gamma * (log_p + log_rest)[:, :top]).exp().sum(1)

    return by_rows("gen", score, logits)


@register(
    key="gen",
    title="GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
    authors="Liu, Lochman, Zach",
    year=2023,
    arxiv="",
    url="https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_"
    "Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
)
class GEN(Detector):
    """Detector of `gen`."""

    gamma: float = 0.1
    top: int = 100

    def _score(self, bank: FeatureBank) -> Any:
        return gen(bank.logits, gamma=self.gamma, top=self.top)
