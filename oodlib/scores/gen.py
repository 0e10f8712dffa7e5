"""GEN: generalised entropy of the largest probabilities."""

from typing import Any

from torch import Tensor

from oodlib.arrays import Array, by_rows
from oodlib.errors import check_interval
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def gen(logits: Array, *, gamma: float = 0.1, top: int = 100) -> Array:
    r"""Generalised entropy of logits (N, C), (N,) float64, positive; larger = more OOD.

    G = sum of p_c^gamma (1 - p_c)^gamma over the ``top`` largest p_c,   p = softmax(logits)

    gamma in (0, 1): the smaller, the more the improbable classes count; top >= 1: all if fewer

    Liu, Lochman, Zach, CVPR 2023. The paper's score is -G, larger = ID. Here 1 - max p is the sum
    of the others, in log space: outputs close to certainty do not tie.

    Examples
    --------
    >>> gen(np.log([[9.0, 1.0], [1.0, 1.0]]), gamma=0.5).round(4)
    array([0.6, 1. ])
    """
    check_interval("gen: gamma", gamma, "(0, 1)")
    check_interval("gen: top", top, "[1, inf]")

    def score(z: Tensor) -> Tensor:
        log_p = z.log_softmax(1).sort(1, descending=True).values
        log_rest = (-log_p.exp()).log1p()
        log_rest[:, 0] = log_p[:, 1:].logsumexp(1)
        return (gamma * (log_p + log_rest)[:, :top]).exp().sum(1)

    return by_rows("gen", score, logits)


@register("gen")
class GEN(Detector):
    """Detector of `gen`."""

    gamma: float = 0.1
    top: int = 100

    def _score(self, bank: FeatureBank) -> Any:
        return gen(bank.logits, gamma=self.gamma, top=self.top)
