"""Are the probabilities right? Calibration error and its null, proper scores, temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError

Bins = Literal["width", "mass"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of images by confidence; bins without an image are left out.

    low, high, confidence, accuracy : (b,) edges, mean confidence and share of right answers
    count : (b,) images
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Mean distance of confidence and accuracy, bins weighted by their images."""
        return float(
            (self.count * np.abs(self.confidence - self.accuracy)).sum() / self.count.sum()
        )


def confidence(
    logits: Any, labels: Any, *, temperature: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Largest softmax probability of each image, and whether that class is the label.

    Parameters
    ----------
    logits : (N, C)
    labels : (N,) integers 0 .. C - 1

    Returns
    -------
    (N,) float64 and (N,) bool

    Raises
    ------
    OodlibError : shapes that do not fit, a label outside 0 .. C - 1

    >>> sure, right = confidence(np.log([[0.75, 0.25], [0.5, 0.5]]), [0, 1])
    >>> sure.round(2).tolist(), right.tolist()
    ([0.75, 0.5], [True, False])
    """
    log_p, y = _log_softmax(logits, labels, temperature)
    return np.exp(log_p.max(1)), log_p.argmax(1) == y


def reliability(
    confidences: Any, correct: Any, *, bins: int = 15, equal: Bins = "width"
) -> Reliability:
    """Accuracy beside mean confidence in bins of equal width over [0, 1], or of equal counts.

    Parameters
    ----------
    confidences, correct : (N,), as `confidence` returns them
    equal : "width", (low, high]; or "mass", where equal confidences may fall into different bins

    Raises
    ------
    OodlibError : no image, unequal lengths, a confidence outside [0, 1], fewer than one bin

    >>> reliability([0.6, 0.8, 0.9], [True, False, True], bins=2).accuracy.round(3).tolist()
    [0.667]
    """
    c, right = to_numpy(confidences).astype(np.float64), to_numpy(correct).astype(np.float64)
    in_range = ((c >= 0) & (c <= 1 + 1e-9)).all()
    if c.ndim != 1 or c.shape != right.shape or not len(c) or not in_range:
        raise OodlibError(
            "reliability: needs confidences in [0, 1] and right or wrong of the same images, (N,) "
            f"each, got {c.shape} and {right.shape}. Give probabilities, not logits."
        )
    if bins < 1 or equal not in ("width", "mass"):
        raise OodlibError(
            f'reliability: bins must be at least 1 and equal "width" or "mass", got {bins}, '
            f"{equal!r}."
        )
    if equal == "width":
        edges = np.linspace(0, 1, bins + 1)
        which = np.clip(np.searchsorted(edges, c, side="left") - 1, 0, bins - 1)
    else:
        bins = min(bins, len(c))
        which = np.empty(len(c), np.int64)
        which[np.argsort(c, kind="stable")] = np.arange(len(c)) * bins // len(c)
        edges = np.r_[[c[which == b].min() for b in range(bins)], c.max()]
    count = np.bincount(which, minlength=bins)
    some = count > 0
    mean, accuracy = (
        np.bincount(which, weights=v, minlength=bins)[some] / count[some] for v in (c, right)
    )
    return Reliability(edges[:-1][some], edges[1:][some], mean, accuracy, count[some])


def ece(confidences: Any, correct: Any, *, bins: int = 15, equal: Bins = "width") -> float:
    """Expected calibration error, in [0, 1]; biased upwards: see `simulated_null`.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599, Eq. 3 (bins of equal width)

    >>> ece([0.75, 0.75, 0.75, 0.75], [True, True, False, False])
    0.25
    """
    return reliability(confidences, correct, bins=bins, equal=equal).ece


def simulated_null(
    confidences: Any, *, n: int = 200, seed: int = 0, bins: int = 15, equal: Bins = "width"
) -> NDArray[np.float64]:
    """(n,) calibration errors of a network that is right as often as it says.

    Labels drawn from the predicted probabilities make the arg-max right with probability
    ``confidence``: what ECE is when nothing is wrong.

    >>> bool(simulated_null([0.75] * 40, n=20).mean() > 0)
    True
    """
    c, rng = to_numpy(confidences).astype(np.float64), np.random.default_rng(seed)
    return np.array([ece(c, rng.random(len(c)) < c, bins=bins, equal=equal) for _ in range(n)])


def nll(logits: Any, labels: Any, *, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, in nats.

    >>> round(nll([[0.0, 0.0]], [1]), 4)
    0.6931
    """
    log_p, y = _log_softmax(logits, labels, temperature)
    return float(-log_p[np.arange(len(y)), y].mean())


def brier(logits: Any, labels: Any, *, temperature: float = 1.0) -> float:
    """Mean over images of ``sum_j (p_j - [j = y])^2``, in [0, 2].

    >>> brier([[0.0, 0.0]], [1])
    0.5
    """
    log_p, y = _log_softmax(logits, labels, temperature)
    p = np.exp(log_p)
    p[np.arange(len(y)), y] -= 1
    return float(np.square(p).sum(1).mean())


def fit_temperature(logits: Any, labels: Any) -> float:
    """Temperature scaling: the temperature in [0.01, 100] that minimises `nll` on these images.

    Take validation images.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599

    >>> logits = np.log([[0.9, 0.1]] * 4)  # too sure: right in three of four
    >>> round(fit_temperature(logits, [0, 0, 0, 1]), 2)
    2.0
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda t: nll(logits, labels, temperature=float(np.exp(t))),
        method="bounded",
        bounds=(np.log(0.01), np.log(100)),
        options={"xatol": 1e-5},
    )
    return float(np.exp(found.x))


def _log_softmax(
    logits: Any, labels: Any, temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    z, y = to_numpy(logits), to_numpy(labels)
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y):
        raise OodlibError(
            f"calibration: needs logits (N, C) and labels (N,), got {z.shape} and {y.shape}."
        )
    if not np.isfinite(z).all():
        raise OodlibError(
            "calibration: logits hold NaN or infinity. Check the transform and the weights."
        )
    if not np.isin(y, np.arange(z.shape[1])).all():
        raise OodlibError(
            f"calibration: labels must lie in 0 .. {z.shape[1] - 1}, got {y.min()} .. "
            f"{y.max()}. They are whole numbers; images without a label cannot be used here."
        )
    if not temperature > 0:
        raise OodlibError(f"calibration: temperature must be positive, got {temperature}.")
    z = z.astype(np.float64) / temperature
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True)), y.astype(np.int64)
