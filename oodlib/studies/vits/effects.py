"""Effects over a table of models: pairs of cells that differ in one factor, and group differences.

Finetunes of one checkpoint are not independent, so every interval resamples whole clusters (by
default the pretrained checkpoints), never single models. ``boot`` : ``n_boot`` and ``seed`` of
`clustered_estimate`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pandas import DataFrame
from scipy.stats import binomtest, permutation_test

from oodlib.errors import OodlibError
from oodlib.metrics import Estimate
from oodlib.studies.vits.pool_table import PoolRow

FACTORS = tuple(f.name for f in fields(PoolRow) if f.name not in ("name", "weights"))
Array = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Effect(Estimate):
    """A difference, with the p value of an exact test and, for paired cells, one row per pair."""

    p: float = 1.0
    pairs: DataFrame = field(default_factory=DataFrame, repr=False)


def pool_frame(rows: Iterable[PoolRow], measures: Iterable[dict[str, float]]) -> DataFrame:
    """The table of models that this module reads: pool columns, ``checkpoint``, and measures."""
    pairs = zip(rows, measures, strict=True)
    return DataFrame([{**asdict(row), "checkpoint": row.checkpoint, **m} for row, m in pairs])


def clustered_mean(values: ArrayLike, clusters: ArrayLike | None = None, **boot: Any) -> Estimate:
    """Mean of values (n,), with an interval over clusters (n,), or over single values without them.

    The interval is the wider, at each end, of the percentile bootstrap over whole clusters and of
    Student's t over the k cluster means: value -+ t(k - 1, 97.5 %) s / sqrt(k). With many clusters
    the two agree; with few the first is too narrow.

    >>> print(clustered_mean([1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"]))
    2.500 [-10.206, 15.206] (2 clusters)
    """
    x = model_column("clustered_mean", values)
    result = clustered_estimate(lambda i: x[i].mean(), len(x), clusters, **boot)
    rows = cluster_rows(np.arange(len(x)) if clusters is None else clusters)
    means = np.array([x[of_cluster].mean() for of_cluster in rows])
    return result.widened(means.std() / np.sqrt(max(len(means) - 1, 1)), len(means) - 1)


def paired_effects(
    cells: DataFrame,
    factor: str,
    low: Any,
    high: Any,
    value: str,
    *,
    free: Sequence[str] = (),
    **boot: Any,
) -> Effect:
    """``value`` at ``factor`` = ``high`` minus ``low``: mean over clusters of the mean of pairs.

    A pair is equal in every column of `FACTORS` that the table has, but for ``factor`` and the
    columns in ``free`` (what changes with the factor, such as stochastic depth with dropout). A
    cluster is a pair of pretrained checkpoints (a factor of the finetuning has one at both ends)
    with all its cell pairs; seeds are checkpoints of their own. The interval is that of
    `clustered_mean` over the cluster means. p: exact two-sided sign test of them, ties dropped.

    Parameters
    ----------
    cells : one row per model, with ``checkpoint`` (see `pool_frame`), the factors and ``value``

    Raises
    ------
    OodlibError : a column is missing, there is no pair, or a cell has two partners
    """
    missing = [c for c in (factor, value, "checkpoint") if c not in cells]
    if missing:
        raise OodlibError(f"paired_effects: the table of models has no column {missing[0]!r}.")
    keys = [c for c in FACTORS if c in cells and c != factor and c not in free]
    if not keys:
        raise OodlibError(
            "paired_effects: the table of models has no other factor. Give it a column of the "
            "pool, for example seed."
        )
    sides = []
    for level in (low, high):
        side = cells.loc[cells[factor] == level, [*keys, value, "checkpoint"]]
        if side.duplicated(keys).any():
            raise OodlibError(
                f"paired_effects: two cells with {factor} = {level!r} agree in all other factors. "
                "Leave one out, or name fewer columns in free."
            )
        sides.append(side.rename(columns={value: "value"}))
    pairs = sides[0].merge(sides[1], on=keys, suffixes=("_low", "_high"))
    pairs = pairs.rename(columns={"value_low": "low", "value_high": "high"})
    pairs = pairs[pairs["low"].notna() & pairs["high"].notna()]
    if pairs.empty:
        raise OodlibError(
            f"paired_effects: no two cells differ in {factor} alone, {low!r} and {high!r}; the "
            f"table has {', '.join(map(repr, pd.unique(cells[factor])))}."
        )
    pairs = pairs.assign(
        difference=pairs["high"] - pairs["low"],
        cluster=pairs["checkpoint_low"] + " / " + pairs["checkpoint_high"],
    )
    means = pairs.groupby("cluster")["difference"].mean()
    mean = vars(clustered_mean(means, **boot)) | {"n": len(pairs), "resampled": "checkpoints"}
    return Effect(**mean, p=_sign_test(means), pairs=pairs)


def common_levels(
    cells: DataFrame, factor: str, *, free: Sequence[str] = ()
) -> tuple[Any, Any] | None:
    """The two levels of a factor that most pairs of cells have, lower first; in a tie, the higher.

    "none" is the lowest level. None where no two cells differ in the factor alone.
    """
    ordered = sorted(cells[factor].dropna().unique(), key=lambda level: (level != "none", level))
    counts: dict[tuple[Any, Any], int] = {}
    cells = cells.assign(_one=1.0)
    for levels in itertools.combinations(ordered, 2):
        with contextlib.suppress(OodlibError):
            effect = paired_effects(cells, factor, *levels, "_one", free=free, n_boot=1)
            counts[levels] = effect.n or 0
    return max(reversed(counts), key=counts.__getitem__) if counts else None


def interaction(
    cells: DataFrame, factor: str, low: Any, high: Any, first: str, second: str, **options: Any
) -> Effect:
    """`paired_effects` on ``first`` minus that on ``second``: does one score gain more?"""
    difference = cells.assign(interaction=cells[first] - cells[second])
    return paired_effects(difference, factor, low, high, "interaction", **options)


def group_difference(
    values: ArrayLike,
    chosen: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Effect:
    """Mean of the chosen models minus mean of the others, both over cluster means.

    The interval is the wider, at each end, of the percentile bootstrap over clusters within each
    group and of Student's t with the pooled variance of the cluster means. p: two-sided permutation
    test of the groups of the clusters, exact where there are at most 10,000 arrangements.

    Parameters
    ----------
    values : (n,); chosen : (n,) bool; clusters : (n,), each within one group

    Raises
    ------
    OodlibError : an empty group, or a cluster in both
    """
    x = model_column("group_difference", values)
    frame = DataFrame({"value": x, "chosen": np.asarray(chosen, dtype=bool)})
    frame["cluster"] = np.arange(len(frame)) if clusters is None else np.asarray(clusters)
    if frame.groupby("cluster")["chosen"].nunique().max() > 1 or frame["chosen"].nunique() < 2:
        raise OodlibError(
            "group_difference: both groups need a model, and no cluster may lie in both."
        )
    means = frame.groupby(["chosen", "cluster"])["value"].mean()
    a, b = means[True].to_numpy(), means[False].to_numpy()

    def difference(x: Array, y: Array, axis: int = -1) -> Array:
        return x.mean(axis) - y.mean(axis)

    p = 1.0
    if min(len(a), len(b)) > 1:  # the test needs two on either side
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {"n_resamples": 10_000, "vectorized": True, "rng": rng}
        p = float(permutation_test((a, b), difference, **options).pvalue)
    rng = np.random.default_rng(seed)
    draws = difference(*(x[rng.integers(0, len(x), (n_boot, len(x)))] for x in (a, b)))
    counts: dict[str, Any] = {"n": len(frame), "clusters": len(means), "resampled": "checkpoints"}
    result = Effect.of(float(difference(a, b)), draws, p=p, **counts)
    freedom = len(means) - 2
    pooled = (a.var() * len(a) + b.var() * len(b)) / max(freedom, 1)
    return result.widened(np.sqrt(pooled * (1 / len(a) + 1 / len(b))), freedom)


def clustered_estimate(
    statistic: Callable[[Rows], float],
    n: int,
    clusters: ArrayLike | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Estimate:
    """``statistic`` of all rows, with the interval of resampled clusters of rows."""
    if clusters is not None and np.shape(clusters) != (n,):
        raise OodlibError(
            f"Every model needs a cluster: got {n} models and {np.shape(clusters)} clusters."
        )
    rows = cluster_rows(np.arange(n) if clusters is None else clusters)
    rng = np.random.default_rng(seed)
    draws = [statistic(resampled_rows(rows, rng)) for _ in range(n_boot)]
    value, what = float(statistic(np.arange(n))), "models" if clusters is None else "checkpoints"
    return Estimate.of(value, draws, n=n, clusters=len(rows), resampled=what)


def cluster_rows(clusters: ArrayLike) -> list[Rows]:
    """Rows of each cluster.

    >>> [rows.tolist() for rows in cluster_rows(["b", "a", "b"])]
    [[1], [0, 2]]
    """
    return list(DataFrame({"c": np.asarray(clusters)}).groupby("c", sort=True).indices.values())


def resampled_rows(rows: list[Rows], rng: np.random.Generator) -> Rows:
    """Rows of as many clusters as there are, drawn with replacement."""
    return np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))])


def model_column(caller: str, values: ArrayLike) -> Array:
    """(n,) float64, or an OodlibError that names the caller."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or np.isnan(x).any():
        raise OodlibError(
            f"{caller}: needs one number per model, (n,), none missing; got {x.shape} with "
            f"{int(np.isnan(x).sum())} NaN. Leave out models that were not measured."
        )
    return x


def require_equal_lengths(caller: str, *columns: NDArray) -> None:
    """Raise OodlibError unless all columns are of one length."""
    lengths = [len(c) for c in columns]
    if len(set(lengths)) != 1:
        raise OodlibError(f"{caller}: needs columns of equal length, got {lengths}.")


def _sign_test(differences: ArrayLike) -> float:
    """Exact two-sided p; ties dropped, 1 where nothing is left."""
    signs = np.sign(np.asarray(differences))
    signs = signs[signs != 0]
    return float(binomtest(int((signs > 0).sum()), len(signs)).pvalue) if len(signs) else 1.0
