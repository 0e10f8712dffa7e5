"""AUROC, FPR at a TPR and average precision of OOD scores, with bootstrap intervals.

Scores: larger = more OOD. Every metric is a fraction in [0, 1]. ``+inf`` (most OOD) and ``-inf``
(least OOD, such as the log of a distance of zero) are legal, because only the order of the scores
counts; NaN and empty arrays are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError

__all__ = [
    "aupr",
    "auroc",
    "bootstrap",
    "fpr_at_tpr",
    "paired_bootstrap",
    "percentile_interval",
    "replicates",
    "replicates_by_set",
    "threshold",
]

Positive = Literal["id", "ood"]
Metric = Callable[..., float]
Interval = tuple[float, float, float]


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Probability that a random OOD sample scores above a random ID sample, ties counted half.

    Parameters
    ----------
    id_scores, ood_scores : (n,) and (m,), arrays or tensors; larger = more OOD

    Raises
    ------
    OodlibError : an array is empty, not one-dimensional, or holds NaN
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
    """
    _check_positive(positive, "aupr")
    return _aupr(*_counts(id_scores, ood_scores, "aupr"), positive=positive)


def threshold(id_scores: Any, *, tpr: float = 0.95) -> float:
    """Smallest ID score t such that at least ``tpr`` of the ID scores are <= t; call an image OOD
    if its score is > t.

    The share of OOD scores <= t is ``fpr_at_tpr(..., positive="id")``.
    """
    scores = np.sort(_clean(id_scores, "threshold", "id_scores"))
    if not 0 < tpr <= 1:
        raise OodlibError(
            f"threshold: tpr must lie in (0, 1], got {tpr}. It is a fraction, not per cent."
        )
    return float(scores[np.argmax(np.arange(1, len(scores) + 1) / len(scores) >= tpr)])


def bootstrap(
    metric: Metric, id_scores: Any, ood_scores: Any, *, n: int = 1000, seed: int = 0
) -> Interval:
    """Value of a metric and its 95 % percentile interval; ID and OOD images are resampled
    separately.

    Parameters
    ----------
    metric : `auroc`, ``partial(fpr_at_tpr, positive="id")`` and the like; any other
        ``f(id_scores, ood_scores) -> float`` works too, only slower
    id_scores : (n_id,)
    ood_scores : (n_ood,), or a list of such arrays: then the unweighted mean over the OOD sets
    n : number of resamples
    seed : of the resamples

    Returns
    -------
    (value, low, high)
    """
    ((value, draws),) = replicates(metric, {"": (id_scores, ood_scores)}, n=n, seed=seed).values()
    return value, *percentile_interval(draws)


def paired_bootstrap(
    metric: Metric, id_a: Any, ood_a: Any, id_b: Any, ood_b: Any, *, n: int = 1000, seed: int = 0
) -> Interval:
    """Metric of method a minus metric of method b, with its 95 % interval, on the same image
    resamples.

    Row i of ``id_a`` and of ``id_b`` must be the same image, and so for OOD. Arguments as in
    `bootstrap`.

    Returns
    -------
    (difference, low, high)
    """
    values = replicates(metric, {"a": (id_a, ood_a), "b": (id_b, ood_b)}, n=n, seed=seed)
    (a, draws_a), (b, draws_b) = values["a"], values["b"]
    return a - b, *percentile_interval(draws_a - draws_b)


def replicates(
    metric: Metric, methods: Mapping[str, tuple[Any, Any]], *, n: int = 1000, seed: int = 0
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """Metric of several methods on the same images, and on the same ``n`` resamples of them.

    What `bootstrap` and `paired_bootstrap` are made of; for statistics such as ``a - max(b, c)``.

    Parameters
    ----------
    methods : name -> (id_scores, ood_scores), as in `bootstrap`; all of the same sizes

    Returns
    -------
    name -> (value, (n,) values on the resamples); averaged over the OOD sets where there are several
    """
    return {
        name: (float(values.mean()), draws.mean(1))
        for name, (values, draws) in replicates_by_set(metric, methods, n=n, seed=seed).items()
    }


def replicates_by_set(
    metric: Metric, methods: Mapping[str, tuple[Any, Any]], *, n: int = 1000, seed: int = 0
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """`replicates` before the average: name -> (values (k,), draws (n, k)) of k OOD sets; ID
    resamples are shared.
    """
    if n < 1:
        raise OodlibError(f"bootstrap: n must be at least 1, got {n}.")
    scores = {
        name: (
            _clean(ids, "bootstrap", "id_scores"),
            [_clean(o, "bootstrap", "ood_scores") for o in _sets(oods)],
        )
        for name, (ids, oods) in methods.items()
    }
    sizes = {(len(ids), *map(len, oods)) for ids, oods in scores.values()}
    if len(sizes) != 1:
        raise OodlibError(
            f"bootstrap: methods compared on the same images need equal sizes (ID, OOD ...), got "
            f"{sorted(sizes)}. Score the same banks with each method."
        )
    (size,) = sizes
    evaluators = {
        name: [_evaluator(metric, ids, ood) for ood in oods] for name, (ids, oods) in scores.items()
    }

    def evaluate(index: list[NDArray]) -> list[list[float]]:
        return [
            [on_set(index[0], i) for on_set, i in zip(sets, index[1:], strict=True)]
            for sets in evaluators.values()
        ]

    values = np.array(evaluate([np.arange(m) for m in size]))
    rng = np.random.default_rng(seed)
    draws = np.array([evaluate([rng.integers(0, m, m) for m in size]) for _ in range(n)])
    return {name: (values[i], draws[:, i]) for i, name in enumerate(evaluators)}


# Every metric is a function of how many ID and OOD samples share each distinct score, scores
# ascending. A resample changes these counts only, so the scores are sorted once.


def _auroc(ids: NDArray, oods: NDArray) -> float:
    below = np.cumsum(ids)
    return float((oods * (2 * below - ids)).sum() / (2 * int(below[-1]) * int(oods.sum())))


def _oriented(ids: NDArray, oods: NDArray, positive: Positive) -> tuple[NDArray, NDArray]:
    """Cumulative counts of positives and negatives, the most positive score first."""
    hits, misses = (ids, oods) if positive == "id" else (oods[::-1], ids[::-1])
    return np.cumsum(hits), np.cumsum(misses)


def _fpr_at_tpr(ids: NDArray, oods: NDArray, *, tpr: float = 0.95, positive: Positive) -> float:
    hits, misses = _oriented(ids, oods, positive)
    return float(misses[np.argmax(hits / hits[-1] >= tpr)] / misses[-1])


def _aupr(ids: NDArray, oods: NDArray, *, positive: Positive) -> float:
    hits, misses = _oriented(ids, oods, positive)
    gained = np.diff(hits, prepend=0)
    return float((gained * (hits / np.maximum(hits + misses, 1))).sum() / hits[-1])


_ON_COUNTS: dict[Any, Callable[..., float]] = {auroc: _auroc, fpr_at_tpr: _fpr_at_tpr, aupr: _aupr}


def _evaluator(metric: Metric, ids: NDArray, oods: NDArray) -> Callable[[NDArray, NDArray], float]:
    """The metric as a function of the chosen image indices."""
    function, options = metric, {}
    if isinstance(metric, partial) and not metric.args:
        function, options = metric.func, metric.keywords
    if function not in _ON_COUNTS:
        return lambda i, o: metric(ids[i], oods[o])
    metric(ids, oods)  # refuses bad options before the fast path
    id_rank, ood_rank, levels = _ranks(ids, oods)
    return lambda i, o: _ON_COUNTS[function](
        np.bincount(id_rank[i], minlength=levels),
        np.bincount(ood_rank[o], minlength=levels),
        **options,
    )


def _ranks(ids: NDArray, oods: NDArray) -> tuple[NDArray, NDArray, int]:
    values, rank = np.unique(np.concatenate([ids, oods]), return_inverse=True)
    return rank[: len(ids)], rank[len(ids) :], len(values)


def _counts(id_scores: Any, ood_scores: Any, name: str) -> tuple[NDArray, NDArray]:
    ids, oods, levels = _ranks(
        _clean(id_scores, name, "id_scores"), _clean(ood_scores, name, "ood_scores")
    )
    return np.bincount(ids, minlength=levels), np.bincount(oods, minlength=levels)


def _clean(scores: Any, name: str, argument: str) -> NDArray:
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


def _sets(ood_scores: Any) -> Sequence[Any]:
    several = (
        isinstance(ood_scores, list | tuple) and len(ood_scores) > 0 and np.ndim(ood_scores[0]) > 0
    )
    return ood_scores if several else [ood_scores]


def _check_positive(positive: Any, name: str) -> None:
    if positive not in ("id", "ood"):
        raise OodlibError(
            f'{name}: positive must be "id" (ODIN, most papers) or "ood" (OpenOOD v1.5), got '
            f"{positive!r}. The value depends on it."
        )


def percentile_interval(draws: Any) -> tuple[float, float]:
    """2.5 % and 97.5 % quantile of bootstrap draws (n,)."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
