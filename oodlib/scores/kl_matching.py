"""KL matching: the softmax output against the mean output of each predicted class."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from oodlib.arrays import Array, by_rows, tensor64
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def kl_matching(logits: Array, *, log_templates: Any) -> Array:
    r"""Divergence from the nearest template; larger = more OOD, as in the paper.

    S = min_k KL(p || d_k),   p = softmax(logits)

    Parameters
    ----------
    logits : (N, C)
    log_templates : (K, C), logarithms of the mean outputs d_k of ID images predicted as class k

    Returns
    -------
    (N,) float64, nats

    References
    ----------
    Hendrycks et al., ICML 2022, arXiv 1911.11132

    Examples
    --------
    >>> templates = np.log([[0.9, 0.1], [0.1, 0.9]])
    >>> kl_matching(np.log([[9.0, 1.0], [1.0, 1.0]]), log_templates=templates).round(4) + 0.0
    array([0.    , 0.5108])
    """
    log_d = tensor64(log_templates)
    if log_d.ndim != 2 or log_d.shape[1] != np.shape(logits)[-1]:
        raise OodlibError(
            f"kl_matching: logits (N, C) and log_templates (K, C) need the same C, got "
            f"{tuple(np.shape(logits))} and {tuple(log_d.shape)}."
        )

    def score(z: Tensor) -> Tensor:
        log_p, p = z.log_softmax(1), z.softmax(1)
        return ((p * log_p).sum(1, keepdim=True) - p @ log_d.T.to(p.device)).amin(1)

    return by_rows("kl_matching", score, logits)


@register(
    key="kl_matching",
    title="Scaling Out-of-Distribution Detection for Real-World Settings",
    authors="Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt, Song",
    year=2022,
    arxiv="1911.11132",
    needs="features",
    deviations=(
        "templates from the bank that it is fitted on; the paper takes ID validation images",
    ),
)
class KLMatching(Detector):
    """Detector of `kl_matching`; a class that is predicted for no image has no template."""

    def _fit(self, bank: FeatureBank) -> None:
        predicted = np.asarray(bank.logits).argmax(1)
        rows = [tensor64(bank.logits[predicted == k]).log_softmax(1) for k in np.unique(predicted)]
        self.log_templates_ = np.stack(
            [(log_p.logsumexp(0) - math.log(len(log_p))).numpy() for log_p in rows]
        )

    def _score(self, bank: FeatureBank) -> Any:
        return kl_matching(bank.logits, log_templates=self.log_templates_)
