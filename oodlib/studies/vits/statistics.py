"""Statistics over a table of models: correlations, ranks, win rates, soups.

``boot`` : ``n_boot`` and ``seed`` of `effects.clustered_estimate`, which resamples clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pandas import DataFrame, Series

from oodlib.errors import OodlibError
from oodlib.metrics import Estimate
from oodlib.metrics.statistics import spearman_along
from oodlib.studies.vits.effects import (
    Array,
    Rows,
    cluster_rows,
    clustered_estimate,
    model_column,
    require_equal_lengths,
    resampled_rows,
)


def spearman(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, **boot: Any
) -> Estimate:
    """Spearman correlation over models; 0 where one side is constant."""
    a, b = _columns("spearman", x, y)
    return clustered_estimate(lambda i: float(spearman_along(a[i], b[i])), len(a), clusters, **boot)


def spearman_difference(
    x: ArrayLike, y: ArrayLike, other: ArrayLike, clusters: ArrayLike | None = None, **boot: Any
) -> Estimate:
    """rho(x, other) - rho(x, y) over the same models, on the same resamples of clusters."""
    a, b, c = _columns("spearman_difference", x, y, other)

    def difference(i: Rows) -> float:
        return float(spearman_along(a[i], c[i]) - spearman_along(a[i], b[i]))

    return clustered_estimate(difference, len(a), clusters, **boot)


def wins(cells: DataFrame, columns: Sequence[str], *, larger_is_better: bool) -> DataFrame:
    """Per model, 1 at the best of the columns and 0 elsewhere, 1/k each where k tie.

    The mean over a group is the win rate there (with interval: `effects.clustered_mean`).

    >>> cells = DataFrame({"a": [1.0, 2.0], "b": [0.0, 2.0]})
    >>> wins(cells, ["a", "b"], larger_is_better=True)["a"].tolist()
    [1.0, 0.5]
    """
    values = cells[list(columns)].to_numpy(np.float64)
    best = values == (values.max(1) if larger_is_better else values.min(1))[:, None]
    return DataFrame(best / best.sum(1, keepdims=True), columns=list(columns), index=cells.index)


def eta_squared(cells: DataFrame, factors: Sequence[str], value: str) -> Series:
    """Share of the variance of ``value`` that lies between the levels of each factor, one by one.

    eta^2 = sum_l n_l (m_l - m)^2 / sum_i (v_i - m)^2; an empty level counts as one. No interval. On
    unbalanced grids the shares overlap and need not sum to at most 1; with l levels chance alone
    gives about (l - 1) / (n - 1).
    """
    v, mean = cells[value], cells[value].mean()
    total = float(np.square(v - mean).sum())

    def share(factor: str) -> float:
        of_levels = cells.groupby(factor, dropna=False)[value].transform("mean")
        return float(np.square(of_levels - mean).sum()) / total if total else 0.0

    return Series({factor: share(factor) for factor in factors}, dtype=np.float64)


def standing(value: float, others: ArrayLike, *, larger_is_better: bool) -> float:
    """Share of the others that a value beats, ties half: 1 is better than all.

    >>> standing(2.0, [1.0, 2.0, 3.0, 4.0], larger_is_better=True)
    0.375
    """
    x = np.asarray(others, dtype=np.float64)
    beaten = x < value if larger_is_better else x > value
    return float(beaten.mean() + (x == value).mean() / 2)


def soup_against_members(
    soup: Sequence[float], members: ArrayLike, *, larger_is_better: bool, **boot: Any
) -> dict[str, Estimate]:
    """A soup beside its members, over k measures (scores x suites, as many as the claim counts).

    Parameters
    ----------
    soup : (k,); members : (m, k), one row per finetune

    Returns
    -------
    "percentile" (mean of `standing`), "advantage" (mean of soup - member median, signed so that
    positive is better) and "share" (of the k measures on which the soup beats the member median,
    ties half). The intervals resample members, with all their measures; the soup stays as it is.

    Raises
    ------
    OodlibError : fewer than two members, or other measures
    """
    s, m = np.asarray(soup, dtype=np.float64), np.asarray(members, dtype=np.float64)
    if m.ndim != 2 or len(m) < 2 or s.shape != m.shape[1:]:
        raise OodlibError(
            "soup_against_members: needs a soup (k,) and at least two members (m, k), got "
            f"{s.shape} and {m.shape}."
        )
    if not larger_is_better:
        s, m = -s, -m

    def advantage(i: Rows) -> Array:
        return s - np.median(m[i], axis=0)

    statistics: dict[str, Callable[[Rows], float]] = {
        "percentile": lambda i: (m[i] < s).mean() + (m[i] == s).mean() / 2,
        "advantage": lambda i: advantage(i).mean(),
        "share": lambda i: (np.sign(advantage(i)).mean() + 1) / 2,
    }
    return {name: clustered_estimate(f, len(m), **boot) for name, f in statistics.items()}


def recipe_percentile(
    values: ArrayLike,
    chosen: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    larger_is_better: bool,
    n_boot: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean share of the other cells that a cell of the recipe beats (`standing`).

    The interval resamples clusters, the recipe's cells and the others apart, and holds Student's
    over the means of the recipe's clusters too, which are few: ``clusters`` of the estimate counts
    them alone. Arguments as in `group_difference`, but a cluster may have cells in both groups.

    Raises
    ------
    OodlibError : an empty group
    """
    x, inside = model_column("recipe_percentile", values), np.asarray(chosen, dtype=bool)
    if not inside.any() or inside.all():
        raise OodlibError("recipe_percentile: the recipe and the rest need a cell each.")
    names = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    a, b = x[inside], x[~inside]
    rows_a, rows_b = cluster_rows(names[inside]), cluster_rows(names[~inside])

    def standings(recipe: Array, others: Array) -> Array:
        return np.array([standing(v, others, larger_is_better=larger_is_better) for v in recipe])

    rng, draws = np.random.default_rng(seed), np.empty(n_boot)
    for i in range(n_boot):
        draws[i] = standings(a[resampled_rows(rows_a, rng)], b[resampled_rows(rows_b, rng)]).mean()
    shares, k = standings(a, b), len(rows_a)
    error = np.std([shares[rows].mean() for rows in rows_a]) / np.sqrt(max(k - 1, 1))
    options: dict[str, Any] = {"n": len(x), "clusters": k, "resampled": "checkpoints"}
    result = Estimate.of(float(shares.mean()), draws, **options)
    return result.widened(float(error), k - 1).within(0, 1)


def top_share(
    accuracy: ArrayLike,
    value: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    limit: float = 0.5,
    part: float = 0.25,
    **boot: Any,
) -> Estimate:
    """Share of the best ``part`` in accuracy (ties included) whose ``value`` exceeds ``limit``.

    The interval resamples clusters of all models; the best part is that of the resample.
    """
    a, v = _columns("top_share", accuracy, value)

    def share(i: Rows) -> float:
        return (v[i][a[i] >= np.quantile(a[i], 1 - part, method="higher")] > limit).mean()

    return clustered_estimate(share, len(a), clusters, **boot)


def spread_within(
    values: ArrayLike,
    groups: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    minus: ArrayLike | None = None,
    **boot: Any,
) -> Estimate:
    """Standard deviation of ``values`` (n,) within ``groups`` (n,), pooled; less that of ``minus``.

    sqrt(sum_g sum_i (v_i - m_g)^2 / sum_g (n_g - 1)); 0 where every model is alone. Groups are, for
    example, the ID accuracy in whole per cent, or the pretraining set. The interval resamples
    clusters; models drawn twice make a resample narrower, so it lies a little low.
    """
    v, codes = model_column("spread_within", values), _codes(groups)
    other = np.zeros(len(v)) if minus is None else model_column("spread_within", minus)
    require_equal_lengths("spread_within", v, codes, other)

    def spread(x: Array, code: Rows) -> float:
        count = np.bincount(code)
        centre = np.bincount(code, weights=x) / np.maximum(count, 1)
        freedom = int((count[count > 1] - 1).sum())
        return float(np.sqrt(np.square(x - centre[code]).sum() / freedom)) if freedom else 0.0

    def difference(i: Rows) -> float:
        return spread(v[i], codes[i]) - spread(other[i], codes[i])

    return clustered_estimate(difference, len(v), clusters, **boot)


def _columns(caller: str, *values: ArrayLike) -> list[Array]:
    columns = [model_column(caller, x) for x in values]
    require_equal_lengths(caller, *columns)
    return columns


def _codes(groups: ArrayLike) -> Rows:
    return np.unique(np.asarray(groups), return_inverse=True)[1]
