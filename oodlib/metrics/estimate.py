"""A measured value with its interval: what every statistic returns and every claim is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from oodlib.errors import OodlibError


def percentile_interval(draws: ArrayLike, *, level: float = 0.05) -> tuple[float, float]:
    """Quantiles ``level / 2`` and ``1 - level / 2`` of bootstrap draws (n,): 2.5 % and 97.5 %.

    >>> percentile_interval([0.0, 1.0, 2.0, 3.0, 4.0], level=0.5)
    (1.0, 3.0)
    """
    low, high = np.quantile(np.asarray(draws), [level / 2, 1 - level / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A value with its 95 % interval. Unpacks as ``value, low, high``, and equals such a tuple.

    A percentile bootstrap interval of few clusters is too narrow; of one, any interval has no width
    and means nothing.

    Attributes
    ----------
    value, low, high : in the unit of the metric (fractions, not per cent)
    n : what a claim counts: images of the smallest set, models, pairs ...; None where unknown
    each : network -> estimate of that network alone; empty where there is one
    resampled, clusters : what was resampled, and how many independent groups of it there were

    Examples
    --------
    >>> value, low, high = Estimate.of(0.5, [0.4, 0.5, 0.6], n=100)
    >>> print(Estimate(value=0.912, low=0.9, high=0.92))
    0.912 [0.900, 0.920]
    """

    value: float
    low: float
    high: float
    n: int | None = None
    each: Mapping[str, Estimate] = field(default_factory=dict, repr=False)
    resampled: str = "images"
    clusters: int | None = None

    @classmethod
    def of(cls, value: float, draws: ArrayLike, *, level: float = 0.05, **more: Any) -> Self:
        """A value with the percentile interval of its bootstrap draws (n_boot,).

        level : 1 - coverage; divide it by the number of comparisons where the extreme one is shown
        more : n, each, resampled, clusters
        """
        low, high = percentile_interval(draws, level=level)
        return cls(value=float(value), low=low, high=high, **more)

    @classmethod
    def pooled(cls, found: Mapping[str, tuple[float, ArrayLike]], **more: Any) -> Self:
        """Average over networks of their values and, draw by draw, of their bootstrap draws.

        >>> both = Estimate.pooled({"a": (0.2, [0.1, 0.3]), "b": (0.4, [0.3, 0.5])}, n=10)
        >>> print(both, "|", both.each["b"])
        0.300 [0.205, 0.395] | 0.400 [0.305, 0.495]
        """
        each = {name: cls.of(value, draws, **more) for name, (value, draws) in found.items()}
        mean = float(np.mean([value for value, _ in found.values()]))
        return cls.of(
            mean,
            np.mean([np.asarray(draws) for _, draws in found.values()], axis=0),
            each=each,
            **more,
        )

    @classmethod
    def combined(
        cls, each: Mapping[str, Estimate], how: Callable[..., Any] = np.mean, **more: Any
    ) -> Self:
        """``how`` (np.mean, np.min, np.max) of the values, of the lower and of the upper ends."""
        if not each:
            raise OodlibError("Estimate.combined: there is no estimate to combine.")
        value, low, high = how([tuple(one) for one in each.values()], axis=0)
        counts = [one.n for one in each.values() if one.n is not None]
        options = {"n": min(counts, default=None), "each": dict(each), **more}
        return cls(value=float(value), low=float(low), high=float(high), **options)

    def smallest(self) -> Estimate:
        """Smallest value, smallest lower and smallest upper end over the networks."""
        return Estimate.combined(self.each, np.min)

    def largest(self) -> Estimate:
        """Largest value, largest lower and largest upper end over the networks."""
        return Estimate.combined(self.each, np.max)

    def widened(self, error: float, freedom: int) -> Self:
        """The same with an interval that holds value -+ t(freedom, 97.5 %) standard errors too."""
        from scipy.stats import t as student

        half = float(student.ppf(0.975, freedom) * error) if freedom else 0.0
        return replace(
            self, low=min(self.low, self.value - half), high=max(self.high, self.value + half)
        )

    def within(self, least: float, most: float) -> Self:
        """The same with an interval that ends where values do: a share lies in 0 .. 1.

        >>> print(Estimate(value=0.9, low=0.7, high=1.1).within(0, 1))
        0.900 [0.700, 1.000]
        """
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.low, self.high))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        return (self.value, self.low, self.high)[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Estimate | tuple):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __str__(self) -> str:
        count = (
            ""
            if self.clusters is None
            else f" ({self.clusters} cluster{'s' * (self.clusters != 1)})"
        )
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{count}"
