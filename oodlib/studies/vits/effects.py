"""Effects over a table of models: pairs of cells that differ in one factor, and differences of
groups.

Finetunes of one checkpoint are not independent, so every interval resamples whole clusters (by
default the pretrained checkpoints), never single models.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pandas import DataFrame
from scipy.stats import binomtest, permutation_test
from scipy.stats import t as student

from oodlib.errors import OodlibError
from oodlib.metrics import percentile_interval
from oodlib.studies.vits.pool_table import PoolRow

__all__ = [
    "FACTORS",
    "Effect",
    "Estimate",
    "column",
    "common_levels",
    "draw",
    "estimate",
    "group_difference",
    "groups",
    "interaction",
    "mean",
    "paired_effects",
    "pool_frame",
    "same",
]

FACTORS = tuple(f.name for f in fields(PoolRow) if f.name not in ("name", "weights"))
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; n counts the models or pairs, clusters what was resampled.

    A percentile bootstrap interval of few clusters is too narrow; of one, any interval has no width
    and means nothing.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def widened(self, error: float, freedom: int) -> Self:
        """The same with an interval that holds value -+ t(freedom, 97.5 %) times the standard error
        too.
        """
        half = float(student.ppf(0.975, freedom) * error) if freedom else 0.0
        return replace(
            self, low=min(self.low, self.value - half), high=max(self.high, self.value + half)
        )

    def within(self, least: float, most: float) -> Self:
        """The same with an interval that ends where values do: a share lies in 0 .. 1, Student's
        interval need not.
        """
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def __str__(self) -> str:
        return (
            f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.clusters} cluster{'s' * (self.clusters != 1)})"
        )


@dataclass(frozen=True)
class Effect(Estimate):
    """A difference, with the p value of an exact test and, where pairs were made, one row for each
    of them.
    """

    p: float = 1.0
    pairs: DataFrame = field(default_factory=DataFrame, repr=False, compare=False)


def pool_frame(rows: Iterable[PoolRow], measures: Iterable[dict[str, float]]) -> DataFrame:
    """The table of models that this module reads: a pool's columns, ``checkpoint``, and what was
    measured.
    """
    return DataFrame(
        [
            {**asdict(row), "checkpoint": row.checkpoint, **found}
            for row, found in zip(rows, measures, strict=True)
        ]
    )


def mean(
    values: ArrayLike, clusters: ArrayLike | None = None, *, n_boot: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of values (n,), with an interval over clusters (n,), or over single values where there
    are none.

    The interval is the wider, at each end, of the percentile bootstrap over whole clusters and of
    Student's t over the k cluster means: value -+ t(k - 1, 97.5 %) s / sqrt(k). With many clusters
    the two agree; with few the first is too narrow.
    """
    x = column("mean", values)
    found = estimate(lambda i: x[i].mean(), len(x), clusters, n_boot, seed)
    means = np.array(
        [x[rows].mean() for rows in groups(np.arange(len(x)) if clusters is None else clusters)]
    )
    return found.widened(means.std() / np.sqrt(max(len(means) - 1, 1)), len(means) - 1)


def paired_effects(
    cells: DataFrame,
    factor: str,
    low: Any,
    high: Any,
    value: str,
    *,
    free: Sequence[str] = (),
    n_boot: int = 2000,
    seed: int = 0,
) -> Effect:
    """``value`` where ``factor`` is ``high`` minus where it is ``low``: mean over clusters of the
    mean of their pairs.

    A pair is equal in every column of `FACTORS` that the table has, but for ``factor`` and the
    columns in ``free`` (what changes with the factor, such as stochastic depth with dropout). A
    cluster is a pair of pretrained checkpoints (a factor of the finetuning has one at both ends)
    with all its cell pairs; seeds are checkpoints of their own. The interval is that of `mean` over
    the cluster means. p: exact two-sided sign test of them, ties dropped.

    Parameters
    ----------
    cells : one row per model, with ``checkpoint`` (see `pool_frame`), the factors and ``value``

    Raises
    ------
    OodlibError : a column is missing, there is no pair, or a cell has two partners
    """
    needed = [factor, value, "checkpoint"]
    missing = [c for c in needed if c not in cells]
    if missing:
        raise OodlibError(f"paired_effects: the table of models has no column {missing[0]!r}.")
    keys = [c for c in FACTORS if c in cells and c != factor and c not in free]
    if not keys:
        raise OodlibError(
            "paired_effects: the table of models has no other factor. Give it a column of the "
            "pool, for example seed."
        )
    sides = [
        cells.loc[cells[factor] == level, [*keys, value, "checkpoint"]] for level in (low, high)
    ]
    for side, level in zip(sides, (low, high), strict=True):
        if side.duplicated(keys).any():
            raise OodlibError(
                f"paired_effects: two cells with {factor} = {level!r} agree in all other factors. "
                "Leave one out, or name fewer columns in free."
            )
    pairs = (
        sides[0]
        .merge(sides[1], on=keys, suffixes=("_low", "_high"))
        .rename(columns={f"{value}_low": "low", f"{value}_high": "high"})
    )
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
    found = replace(mean(means, n_boot=n_boot, seed=seed), n=len(pairs))
    return Effect(**asdict(found), p=_sign_test(means), pairs=pairs)


def common_levels(
    cells: DataFrame, factor: str, *, free: Sequence[str] = ()
) -> tuple[Any, Any] | None:
    """The two levels of a factor that most pairs of cells have, lower first ("none" is the lowest);
    where equal, the higher levels.

    None where no two cells differ in the factor alone.
    """
    ordered = sorted(cells[factor].dropna().unique(), key=lambda level: (level != "none", level))
    found = []
    for low, high in itertools.combinations(ordered, 2):
        with contextlib.suppress(OodlibError):
            counted = cells.assign(_one=1.0)
            found.append(
                (
                    paired_effects(counted, factor, low, high, "_one", free=free, n_boot=1).n,
                    low,
                    high,
                )
            )
    return max(reversed(found), key=lambda pair: pair[0])[1:] if found else None


def interaction(
    cells: DataFrame, factor: str, low: Any, high: Any, first: str, second: str, **options: Any
) -> Effect:
    """`paired_effects` on ``first`` minus that on ``second``, pair by pair: does the factor help
    one score more?
    """
    return paired_effects(
        cells.assign(interaction=cells[first] - cells[second]),
        factor,
        low,
        high,
        "interaction",
        **options,
    )


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
    frame = DataFrame(
        {"value": column("group_difference", values), "chosen": np.asarray(chosen, dtype=bool)}
    )
    frame["cluster"] = np.arange(len(frame)) if clusters is None else np.asarray(clusters)
    if frame.groupby("cluster")["chosen"].nunique().max() > 1 or frame["chosen"].nunique() < 2:
        raise OodlibError(
            "group_difference: both groups need a model, and no cluster may lie in both."
        )
    means = frame.groupby(["chosen", "cluster"])["value"].mean()
    a, b = means[True].to_numpy(), means[False].to_numpy()

    def difference(x: Array, y: Array, axis: int = -1) -> Array:
        return x.mean(axis) - y.mean(axis)

    p = (
        permutation_test(
            (a, b),
            difference,
            n_resamples=10_000,
            vectorized=True,  # needs two on either side
            rng=np.random.default_rng(seed),
        ).pvalue
        if min(len(a), len(b)) > 1
        else 1.0
    )
    rng = np.random.default_rng(seed)
    draws = difference(*(x[rng.integers(0, len(x), (n_boot, len(x)))] for x in (a, b)))
    found = Effect(
        float(difference(a, b)), *percentile_interval(draws), len(frame), len(means), p=float(p)
    )
    freedom = len(means) - 2
    pooled = (a.var() * len(a) + b.var() * len(b)) / max(freedom, 1)
    return found.widened(np.sqrt(pooled * (1 / len(a) + 1 / len(b))), freedom)


def estimate(
    statistic: Callable[[NDArray], float],
    n: int,
    clusters: ArrayLike | None,
    n_boot: int,
    seed: int,
) -> Estimate:
    """``statistic`` of all rows, and of resampled clusters of rows."""
    if clusters is not None and np.shape(clusters) != (n,):
        raise OodlibError(
            f"Every model needs a cluster: got {n} models and {np.shape(clusters)} clusters."
        )
    rows = groups(np.arange(n) if clusters is None else np.asarray(clusters))
    rng = np.random.default_rng(seed)
    draws = [statistic(draw(rows, rng)) for _ in range(n_boot)]
    return Estimate(float(statistic(np.arange(n))), *percentile_interval(draws), n, len(rows))


def groups(clusters: ArrayLike) -> list[NDArray[np.int64]]:
    """Rows of each cluster."""
    return list(DataFrame({"c": np.asarray(clusters)}).groupby("c", sort=True).indices.values())


def draw(rows: list[NDArray[np.int64]], rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of as many clusters as there are, drawn with replacement."""
    return np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))])


def _sign_test(differences: ArrayLike) -> float:
    """Exact two-sided p; ties dropped, 1 where nothing is left."""
    signs = np.sign(np.asarray(differences))
    signs = signs[signs != 0]
    return float(binomtest(int((signs > 0).sum()), len(signs)).pvalue) if len(signs) else 1.0


def column(name: str, values: ArrayLike) -> Array:
    """(n,) float64, or an OodlibError that names the caller."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or np.isnan(x).any():
        raise OodlibError(
            f"{name}: needs one number a model, (n,), none missing; got {x.shape} with "
            f"{int(np.isnan(x).sum())} NaN. Leave out models that were not measured."
        )
    return x


def same(name: str, *columns: NDArray) -> None:
    """Raise OodlibError unless all columns are of one length."""
    if len({len(c) for c in columns}) != 1:
        raise OodlibError(
            f"{name}: needs columns of equal length, got {[len(c) for c in columns]}."
        )
