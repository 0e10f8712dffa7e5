"""Rank correlation along training, overlap of two samples, and others of the flow study."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodlib.errors import OodlibError
from oodlib.metrics.estimate import percentile_interval


def overlap(a: ArrayLike, b: ArrayLike, *, bandwidth: float = 0.1, resolution: int = 20) -> float:
    """Overlap coefficient of two samples, the integral of min(p, q), in [0, 1].

    p and q are Gaussian kernel density estimates of one bandwidth, in the unit of the samples, on
    bins of a twentieth of it. Infinite values lie beyond every finite one and overlap with each
    other alone.

    a (n,), b (m,)

    Raises
    ------
    OodlibError : a sample is empty or holds NaN, or the bandwidth is not positive

    Examples
    --------
    >>> round(overlap([0.0, 0.1, 0.2], [0.1, 0.2, 0.3]), 2), overlap([0.0], [9.0])
    (0.71, 0.0)
    """
    from scipy.ndimage import gaussian_filter1d

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if any(v.ndim != 1 or not len(v) or np.isnan(v).any() for v in (a, b)):
        raise OodlibError(
            f"overlap: needs samples (n,) and (m,) without NaN, got {a.shape} and {b.shape}."
        )
    if not 0 < bandwidth < math.inf:
        raise OodlibError(f"overlap: bandwidth must be positive and finite, got {bandwidth}.")
    infinite = min(float(np.isinf(a).mean()), float(np.isinf(b).mean()))
    samples = [v[np.isfinite(v)] for v in (a, b)]
    if not all(map(len, samples)):
        return infinite
    step, margin = bandwidth / resolution, 6 * resolution
    # only where both have mass; a stray value far away in both must not ask for endless bins
    low, high = max(v.min() for v in samples), min(v.max() for v in samples)
    size = 2 * margin + int(np.clip((high - low) / step, 0, 2**20))
    densities = []
    for sample, whole in zip(samples, (a, b), strict=True):
        place = np.round((sample - low) / step) + margin
        counts = np.bincount(
            place[(place >= 0) & (place < size)].astype(int), minlength=size
        ).astype(np.float64)
        densities.append(
            gaussian_filter1d(counts, resolution, mode="constant", truncate=5) / len(whole)
        )
    return infinite + float(np.minimum(*densities).sum())


def spearman_along(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Spearman correlation of a and b along the first axis, (steps, ...) each -> (...).

    It is 0 where one of the two is constant.

    >>> a = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    >>> spearman_along(a, np.array([[3.0, 5.0], [5.0, 5.0], [9.0, 5.0]])).tolist()
    [1.0, 0.0]
    """
    from scipy.stats import rankdata

    x, y = (rankdata(v, axis=0) for v in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    rho: NDArray[np.float64] = np.zeros_like(norm)
    np.divide((x * y).sum(0), norm, out=rho, where=norm > 0)
    return rho


def magnitude(value: float, draws: ArrayLike) -> tuple[float, list[float]]:
    """|difference|, and the ends of its 95 % interval from the signed bootstrap draws (n_boot,).

    The lower end is 0 where the signed interval holds 0; quantiles of absolute draws never reach
    it. ``Estimate.of(*magnitude(value, draws), level=0)`` is the estimate.

    >>> magnitude(-0.5, [-0.6] * 50 + [-0.4] * 50)
    (0.5, [0.4, 0.6])
    """
    low, high = percentile_interval(draws)
    ends = sorted([abs(low), abs(high)])
    return abs(value), [0.0 if low <= 0 <= high else ends[0], ends[1]]


def shared_half(
    first: ArrayLike, second: ArrayLike, *, n_boot: int = 1000, seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """Share of the lower half of ``first`` (n,) that is in the lower half of ``second`` (n,) too.

    Of negative log-likelihoods under two models: do they agree on where the density is high? Chance
    gives 1/2.

    Returns
    -------
    the share, and its (n_boot,) bootstrap draws

    >>> shared_half([0.0, 1.0, 2.0, 3.0], [0.1, 9.0, 0.2, 9.0], n_boot=10)[0]
    0.5
    """
    a, b = (v <= np.median(v) for v in (np.asarray(first), np.asarray(second)))
    index = np.random.default_rng(seed).integers(0, len(a), (n_boot, len(a)))
    return float((a & b).sum() / a.sum()), (a & b)[index].sum(1) / np.maximum(a[index].sum(1), 1)
