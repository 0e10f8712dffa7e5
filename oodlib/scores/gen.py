"""GEN: generalised entropy of the largest probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oodlib.arrays import by_rows
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register


def gen(logits: Any, *, gamma: float = 0.1, top: int = 100) -> Any:
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
    Liu, Lochman, Zach, CVPR 2023. The paper's score is -G, larger = ID.
    Here 1 - p of the largest p is the sum of the others, in log space: outputs close to certainty do not tie.
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
    Info(
        key="gen",
        title="GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
        authors="Liu, Lochman, Zach",
        year=2023,
        arxiv="",
        paper_larger_means="id",
        url="https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_"
        "Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
    )
)
@dataclass(kw_only=True, eq=False)
class GEN(Detector):
    """Detector of `gen`."""

    gamma: float = 0.1
    top: int = 100

    def _score(self, bank: FeatureBank) -> Any:
        return gen(bank.logits, gamma=self.gamma, top=self.top)
