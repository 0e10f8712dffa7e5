"""Bootstrap of a metric: ID and OOD images are resampled, the same ones for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError
from oodlib.metrics.detection import Positive, _aupr, _ranks, aupr, auroc, clean, fpr_at_tpr
from oodlib.metrics.estimate import Estimate

Metric = Callable[..., float]
Floats = NDArray[np.float64]
Indices = list[list[NDArray[np.int64]]]  # resample -> set (ID first) -> chosen images
Counts = list[NDArray[np.int64]]  # set -> (images, resamples) how often each image was chosen
Evaluator = Callable[[Indices, Counts], Floats]  # -> (resamples, OOD sets)
BLOCK = 50  # resamples at a time: counts of 2,000 images stay in the processor's cache


def bootstrap(
    metric: Metric, id_scores: Any, ood_scores: Any, *, n: int = 1000, seed: int = 0
) -> Estimate:
    """A metric with its 95 % percentile interval; ID and OOD images are resampled separately.

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
    (value, low, high), an `Estimate`

    Examples
    --------
    >>> from oodlib.metrics import auroc
    >>> value, low, high = bootstrap(auroc, [0.0, 1.0, 2.0], [1.5, 2.5, 3.0], n=100)
    >>> round(value, 3), low <= value <= high
    (0.889, True)
    """
    ((value, draws),) = replicates(metric, {"": (id_scores, ood_scores)}, n=n, seed=seed).values()
    return Estimate.of(value, draws, n=_smallest(id_scores, ood_scores))


def paired_bootstrap(
    metric: Metric, id_a: Any, ood_a: Any, id_b: Any, ood_b: Any, *, n: int = 1000, seed: int = 0
) -> Estimate:
    """Metric of method a minus metric of method b, on the same resamples, with its 95 % interval.

    Row i of ``id_a`` and of ``id_b`` must be the same image, and so for OOD. Arguments as in
    `bootstrap`.

    Returns
    -------
    (difference, low, high), an `Estimate`

    Examples
    --------
    >>> from oodlib.metrics import auroc
    >>> ids, oods = [0.0, 1.0, 2.0], [1.5, 2.5, 3.0]
    >>> print(paired_bootstrap(auroc, ids, oods, ids, oods, n=10))
    0.000 [0.000, 0.000]
    """
    values = replicates(metric, {"a": (id_a, ood_a), "b": (id_b, ood_b)}, n=n, seed=seed)
    (a, draws_a), (b, draws_b) = values["a"], values["b"]
    return Estimate.of(a - b, draws_a - draws_b, n=_smallest(id_a, ood_a))


def replicates(
    metric: Metric, methods: Mapping[str, tuple[Any, Any]], *, n: int = 1000, seed: int = 0
) -> dict[str, tuple[float, Floats]]:
    """Metric of several methods on the same images, and on the same ``n`` resamples of them.

    What `bootstrap` and `paired_bootstrap` are made of; for statistics such as ``a - max(b, c)``.

    Parameters
    ----------
    methods : name -> (id_scores, ood_scores), as in `bootstrap`; all of the same sizes

    Returns
    -------
    name -> (value, (n,) values on the resamples); means over the OOD sets where there are several

    Examples
    --------
    >>> from oodlib.metrics import auroc
    >>> found = replicates(auroc, {"msp": ([0.0, 1.0], [1.0, 2.0])}, n=5)
    >>> found["msp"][0], found["msp"][1].shape
    (0.875, (5,))
    """
    return {
        name: (float(values.mean()), draws.mean(1))
        for name, (values, draws) in replicates_by_set(metric, methods, n=n, seed=seed).items()
    }


def replicates_by_set(
    metric: Metric, methods: Mapping[str, tuple[Any, Any]], *, n: int = 1000, seed: int = 0
) -> dict[str, tuple[Floats, Floats]]:
    """`replicates` before the average: name -> (values (k,), draws (n, k)) of k OOD sets.

    The resamples of the ID images are shared by the sets. The first m of n resamples are those that
    ``n=m`` gives.

    Examples
    --------
    >>> from oodlib.metrics import auroc
    >>> found = replicates_by_set(auroc, {"msp": ([0.0, 1.0], [[1.0, 2.0], [3.0]])}, n=5)
    >>> [float(value) for value in found["msp"][0]], found["msp"][1].shape
    ([0.875, 1.0], (5, 2))
    """
    if n < 1:
        raise OodlibError(f"bootstrap: n must be at least 1, got {n}.")
    scores = {
        name: (
            clean(ids, "bootstrap", "id_scores"),
            [clean(o, "bootstrap", "ood_scores") for o in _sets(oods)],
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

    values = np.array([[metric(ids, ood) for ood in oods] for ids, oods in scores.values()])
    draws = np.empty((n, *values.shape))
    evaluators = [_evaluator(metric, ids, oods) for ids, oods in scores.values()]
    start = 0
    for indices in _resamples(size, n, seed):
        counts = [
            np.stack([np.bincount(i, minlength=m) for i in of_set], axis=1)
            for of_set, m in zip(zip(*indices, strict=True), size, strict=True)
        ]
        for method, evaluate in enumerate(evaluators):
            draws[start : start + len(indices), method] = evaluate(indices, counts)
        start += len(indices)
    return {name: (values[i], draws[:, i]) for i, name in enumerate(scores)}


def _resamples(size: Sequence[int], n: int, seed: int) -> Iterator[Indices]:
    """Blocks of resamples: for each resample the chosen images of each set, ID first."""
    rng = np.random.default_rng(seed)
    for start in range(0, n, BLOCK):
        yield [[rng.integers(0, m, m) for m in size] for _ in range(min(BLOCK, n - start))]


def _evaluator(metric: Metric, ids: NDArray[Any], oods: list[NDArray[Any]]) -> Evaluator:
    """The metric on a block of resamples, from the image indices or from their counts."""
    function, options = metric, {}
    if isinstance(metric, partial) and not metric.args:
        function, options = metric.func, metric.keywords
    if function is auroc and not options:
        return _auroc_by_counts(ids, oods)
    if function is fpr_at_tpr:
        return _fpr_by_counts(ids, oods, **options)
    if function is aupr:
        return _aupr_by_counts(ids, oods, **options)
    return lambda indices, _: np.array(
        [[metric(ids[i[0]], ood[j]) for ood, j in zip(oods, i[1:], strict=True)] for i in indices]
    )


# A resample changes only how often each image counts, so the scores are sorted once. Counts are
# whole numbers: every order of adding them gives the same value.


def _auroc_by_counts(ids: NDArray[Any], oods: list[NDArray[Any]]) -> Evaluator:
    order = np.argsort(ids, kind="stable")
    # how many of the sorted ID images lie below each OOD image, and how many not above it
    ends = [[np.searchsorted(ids[order], ood, side) for side in ("left", "right")] for ood in oods]

    def evaluate(_: Indices, counts: Counts) -> Floats:
        below = np.zeros((len(ids) + 1, counts[0].shape[1]), np.int64)
        np.cumsum(counts[0][order], axis=0, out=below[1:])
        pairs = [
            np.einsum("mb,mb->b", count, below[left] + below[right])
            for count, (left, right) in zip(counts[1:], ends, strict=True)
        ]
        return np.stack(
            [p / (2 * len(ids) * len(ood)) for p, ood in zip(pairs, oods, strict=True)], axis=1
        )

    return evaluate


def _fpr_by_counts(
    ids: NDArray[Any], oods: list[NDArray[Any]], *, positive: Positive, tpr: float = 0.95
) -> Evaluator:
    id_order = np.argsort(ids, kind="stable")
    ood_orders = [np.argsort(ood, kind="stable")[::-1] for ood in oods]

    def cut(scores: NDArray[Any], order: NDArray[np.int64], count: NDArray[np.int64]) -> Any:
        """The score at which the share of the positives reaches ``tpr``, for each resample."""
        needed = np.argmax(np.arange(len(scores) + 1) / len(scores) >= tpr)
        return scores[order][(np.cumsum(count[order], axis=0) < needed).sum(0)]

    def evaluate(_: Indices, counts: Counts) -> Floats:
        columns = []
        accepted = cut(ids, id_order, counts[0]) if positive == "id" else None
        for ood, order, count in zip(oods, ood_orders, counts[1:], strict=True):
            if positive == "id":
                wrong, negatives, of = ood[:, None] <= accepted, count, len(ood)
            else:
                wrong, negatives, of = ids[:, None] >= cut(ood, order, count), counts[0], len(ids)
            columns.append(np.einsum("mb,mb->b", negatives, wrong.astype(np.int64)) / of)
        return np.stack(columns, axis=1)

    return evaluate


def _aupr_by_counts(
    ids: NDArray[Any], oods: list[NDArray[Any]], *, positive: Positive
) -> Evaluator:
    ranks = [_ranks(ids, ood) for ood in oods]

    def evaluate(indices: Indices, _: Counts) -> Floats:
        return np.array(
            [
                [
                    _aupr(
                        np.bincount(id_rank[chosen[0]], minlength=levels),
                        np.bincount(ood_rank[i], minlength=levels),
                        positive=positive,
                    )
                    for (id_rank, ood_rank, levels), i in zip(ranks, chosen[1:], strict=True)
                ]
                for chosen in indices
            ]
        )

    return evaluate


def _sets(ood_scores: Any) -> Sequence[Any]:
    several = (
        isinstance(ood_scores, list | tuple) and len(ood_scores) > 0 and np.ndim(ood_scores[0]) > 0
    )
    return ood_scores if several else [ood_scores]


def _smallest(id_scores: Any, ood_scores: Any) -> int:
    return min(len(id_scores), *map(len, _sets(ood_scores)))
