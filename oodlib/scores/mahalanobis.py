"""Mahalanobis distance to the nearest class mean, and relative to one background Gaussian."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oodlib.arrays import Array, by_rows, tensor64
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register
from oodlib.scores.moments import class_moments


def whitening(covariance: Any, *, rtol: float = 1e-12) -> NDArray[np.float64]:
    """Matrix A (D, rank) with A A^T the pseudo-inverse of a covariance (D, D).

    ||A^T x||^2 is the Mahalanobis form of x. Directions whose variance is below ``rtol`` times the
    largest (dead units) are left out.

    Examples
    --------
    >>> abs(whitening([[4.0, 0.0], [0.0, 0.0]]))
    array([[0.5],
           [0. ]])
    """
    variances, directions = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    large = variances > rtol * variances[-1]
    return np.ascontiguousarray(directions[:, large] / np.sqrt(variances[large]))


def mahalanobis(features: Array, class_means: Any, whitening: Any) -> Array:
    r"""Squared Mahalanobis distance to the nearest class mean; larger = more OOD.

    S = min_c (h - mu_c)^T Sigma^+ (h - mu_c)

    Parameters
    ----------
    features : (N, D)
    class_means : (C, D)
    whitening : (D, r) with Sigma^+ = A A^T, see `whitening`

    Returns
    -------
    (N,) float64

    References
    ----------
    Lee, Lee, Lee, Shin, NeurIPS 2018, arXiv 1807.03888, Eq. 2. The paper's confidence is -S.

    Examples
    --------
    >>> class_means = np.array([[0.0, 0.0], [4.0, 0.0]])
    >>> mahalanobis(np.array([[1.0, 0.0], [4.0, 2.0]]), class_means, np.eye(2))
    array([1., 4.])
    """
    return by_rows("mahalanobis", _nearest(class_means, whitening), features)


def relative_mahalanobis(
    features: Array, class_means: Any, whitening: Any, mean: Any, total_whitening: Any
) -> Array:
    r"""Mahalanobis distance to the nearest class minus that to all data; larger = more OOD.

    S = min_c (h - mu_c)^T Sigma^+ (h - mu_c)  -  (h - mu)^T Sigma_0^+ (h - mu)

    Parameters
    ----------
    features : (N, D)
    class_means, whitening : (C, D) and (D, r), within classes
    mean, total_whitening : (D,) and (D, r0), of all classes together

    Returns
    -------
    (N,) float64

    References
    ----------
    Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan 2021, arXiv 2106.09022. Their confidence is -S.

    Examples
    --------
    >>> means = np.array([[-2.0, 0.0], [2.0, 0.0]])
    >>> relative_mahalanobis(np.array([[2.0, 1.0]]), means, np.eye(2), np.zeros(2), np.eye(2) / 2)
    array([-0.25])
    """
    nearest = _nearest(class_means, whitening)
    background = _nearest(np.asarray(mean)[None], total_whitening)
    return by_rows("relative_mahalanobis", lambda h: nearest(h) - background(h), features)


def _nearest(means: Any, whitening: Any) -> Callable[[Tensor], Tensor]:
    centre = np.asarray(means, dtype=np.float64).mean(0)  # without this shift, distances cancel
    a, centre = tensor64(whitening), tensor64(centre)
    targets = (tensor64(means) - centre) @ a

    def distance(h: Tensor) -> Tensor:
        x = (h.cpu() - centre) @ a
        squared = x.square().sum(1, keepdim=True) - 2 * x @ targets.T + targets.square().sum(1)
        return squared.clamp_min_(0).amin(1).to(h.device)

    return distance


@register(
    key="mahalanobis",
    title="A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial "
    "Attacks",
    authors="Lee, Lee, Lee, Shin",
    year=2018,
    arxiv="1807.03888",
    needs="labels",
    deviations=(
        "last features only, no input perturbation, no layer weights learned on outliers",
        "pseudo-inverse of the covariance, in float64",
    ),
)
class Mahalanobis(Detector):
    """Detector of `mahalanobis`."""

    def _fit(self, bank: FeatureBank) -> None:
        moments = class_moments(bank.features, bank.labels, bank.head.num_classes)
        self.class_means_, self.whitening_ = moments.class_means, whitening(moments.covariance)

    def _score(self, bank: FeatureBank) -> Any:
        return mahalanobis(bank.features, self.class_means_, self.whitening_)


@register(
    key="relative_mahalanobis",
    title="A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
    authors="Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan",
    year=2021,
    arxiv="2106.09022",
    needs="labels",
    deviations=("pseudo-inverse of the covariances, in float64",),
)
class RelativeMahalanobis(Detector):
    """Detector of `relative_mahalanobis`."""

    def _fit(self, bank: FeatureBank) -> None:
        moments = class_moments(bank.features, bank.labels, bank.head.num_classes)
        self.class_means_, self.whitening_ = moments.class_means, whitening(moments.covariance)
        self.mean_, self.total_whitening_ = moments.mean, whitening(moments.total_covariance)

    def _score(self, bank: FeatureBank) -> Any:
        return relative_mahalanobis(
            bank.features, self.class_means_, self.whitening_, self.mean_, self.total_whitening_
        )
