"""AUROC, FPR at a TPR and average precision of OOD scores.

Scores: larger = more OOD. Every metric is a fraction in [0, 1]. ``+inf`` (most OOD) and ``-inf``
(least OOD, such as the log of a distance of zero) are legal, because only the order of the scores
counts; NaN and empty arrays are refused.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError

Positive = Literal["id", "ood"]
Array = NDArray[Any]
Counts = NDArray[np.int64]


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Probability that a random OOD sample scores above a random ID sample, ties counted half.

    Parameters
    ----------
    id_scores, ood_scores : (n,) and (m,), arrays or tensors; larger = more OOD

    Raises
    ------
    OodlibError : an array is empty, not one-dimensional, or holds NaN

    Examples
    --------
    >>> auroc([0.0, 1.0, 2.0], [1.0, 3.0])
    0.75
    """
    return _auroc(*_counts(id_scores, ood_scores, "auroc"))


def fpr_at_tpr(id_scores: Any, ood_scores: Any, *, tpr: float = 0.95, positive: Positive) -> float:
    """False-positive rate at the first ROC point whose true-positive rate is at least ``tpr``.

    Parameters
    ----------
    id_scores, ood_scores : (n,) and (m,), larger = more OOD
    tpr : in (0, 1]
    positive : "id": share of OOD accepted when 95 % of ID is accepted (ODIN and most papers);
        "ood": share of ID flagged when 95 % of OOD is caught (OpenOOD v1.5). No default, since the
        two differ widely.

    Raises
    ------
    OodlibError : unknown ``positive``, ``tpr`` outside (0, 1], or scores as in `auroc`

    Examples
    --------
    >>> ids, oods = [0.0, 0.1, 0.2, 0.9], [0.15, 0.8, 1.0, 1.0, 1.0]
    >>> fpr_at_tpr(ids, oods, positive="id"), fpr_at_tpr(ids, oods, positive="ood")
    (0.4, 0.5)
    """
    _check_positive(positive, "fpr_at_tpr")
    if not 0 < tpr <= 1:
        raise OodlibError(
            f"fpr_at_tpr: tpr must lie in (0, 1], got {tpr}. It is a fraction, not per cent."
        )
    return _fpr_at_tpr(*_counts(id_scores, ood_scores, "fpr_at_tpr"), tpr=tpr, positive=positive)


def aupr(id_scores: Any, ood_scores: Any, *, positive: Positive) -> float:
    """Area under the precision-recall curve as average precision, ``sum_k (R_k - R_(k-1)) P_k``.

    Depends on the sizes of the two sets. OpenOOD v1.5 prints the trapezoidal area instead.

    Parameters
    ----------
    id_scores, ood_scores : (n,) and (m,), larger = more OOD
    positive : "id" (AUPR-in) or "ood" (AUPR-out)

    Raises
    ------
    OodlibError : unknown ``positive``, or scores as in `auroc`

    Examples
    --------
    >>> aupr([0.0, 1.0], [2.0, 3.0], positive="ood")
    1.0
    """
    _check_positive(positive, "aupr")
    return _aupr(*_counts(id_scores, ood_scores, "aupr"), positive=positive)


def threshold(id_scores: Any, *, tpr: float = 0.95) -> float:
    """Smallest ID score t such that at least ``tpr`` of the ID scores are <= t.

    Call an image OOD if its score is > t. The share of OOD scores <= t is
    ``fpr_at_tpr(..., positive="id")``.

    Examples
    --------
    >>> threshold([0.0, 1.0, 2.0, 3.0], tpr=0.75)
    2.0
    """
    scores = np.sort(clean(id_scores, "threshold", "id_scores"))
    if not 0 < tpr <= 1:
        raise OodlibError(
            f"threshold: tpr must lie in (0, 1], got {tpr}. It is a fraction, not per cent."
        )
    return float(scores[np.argmax(np.arange(1, len(scores) + 1) / len(scores) >= tpr)])


# Every metric is a function of how many ID and OOD samples share each distinct score, scores
# ascending. A resample changes these counts only.


def _auroc(ids: Counts, oods: Counts) -> float:
    below = np.cumsum(ids)
    return float((oods * (2 * below - ids)).sum() / (2 * int(below[-1]) * int(oods.sum())))


def _oriented(ids: Counts, oods: Counts, positive: Positive) -> tuple[Counts, Counts]:
    """Cumulative counts of positives and negatives, the most positive score first."""
    hits, misses = (ids, oods) if positive == "id" else (oods[::-1], ids[::-1])
    return np.cumsum(hits), np.cumsum(misses)


def _fpr_at_tpr(ids: Counts, oods: Counts, *, tpr: float = 0.95, positive: Positive) -> float:
    hits, misses = _oriented(ids, oods, positive)
    return float(misses[np.argmax(hits / hits[-1] >= tpr)] / misses[-1])


def _aupr(ids: Counts, oods: Counts, *, positive: Positive) -> float:
    hits, misses = _oriented(ids, oods, positive)
    gained = np.diff(hits, prepend=0)
    return float((gained * (hits / np.maximum(hits + misses, 1))).sum() / hits[-1])


def _ranks(ids: Array, oods: Array) -> tuple[Counts, Counts, int]:
    values, rank = np.unique(np.concatenate([ids, oods]), return_inverse=True)
    return rank[: len(ids)], rank[len(ids) :], len(values)


def _counts(id_scores: Any, ood_scores: Any, name: str) -> tuple[Counts, Counts]:
    ids, oods, levels = _ranks(
        clean(id_scores, name, "id_scores"), clean(ood_scores, name, "ood_scores")
    )
    return np.bincount(ids, minlength=levels), np.bincount(oods, minlength=levels)


def clean(scores: Any, name: str, argument: str) -> Array:
    """Scores (n,) as an array, or an OodlibError that names the caller and the argument."""
    array = to_numpy(scores)
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise OodlibError(
            f"{name}: {argument} must be one number per image, (n,), got {array.dtype} "
            f"{array.shape}."
        )
    if len(array) == 0:
        raise OodlibError(f"{name}: {argument} is empty. Check the data set and its filter.")
    if np.isnan(array).any():
        raise OodlibError(
            f"{name}: {argument} holds {int(np.isnan(array).sum())} NaN of {len(array)}. Find "
            "their cause; a score that overflowed must be +inf (most OOD), never dropped."
        )
    return array


def _check_positive(positive: Any, name: str) -> None:
    if positive not in ("id", "ood"):
        raise OodlibError(
            f'{name}: positive must be "id" (ODIN, most papers) or "ood" (OpenOOD v1.5), got '
            f"{positive!r}. The value depends on it."
        )
