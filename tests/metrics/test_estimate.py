"""Estimates: percentile intervals, their combinations, and the tuples that they still are."""

import numpy as np
import pytest

from oodlib import OodlibError
from oodlib import metrics as m
from oodlib.metrics import Estimate

DRAWS = np.random.default_rng(0).normal(size=101)


def test_the_interval_is_the_percentile_interval() -> None:
    low, high = np.quantile(DRAWS, [0.025, 0.975])
    assert Estimate.of(0.1, DRAWS) == (0.1, low, high)
    assert m.percentile_interval(DRAWS) == tuple(np.percentile(DRAWS, [2.5, 97.5]))
    assert Estimate.of(0.0, DRAWS, level=0.01) == (0, *np.quantile(DRAWS, [0.005, 0.995]))
    assert Estimate.of(*m.magnitude(-0.2, [-0.3, -0.1]), level=0).low > 0.1


def test_networks_are_pooled_draw_by_draw() -> None:
    found = Estimate.pooled({"a": (0.2, DRAWS), "b": (0.4, DRAWS[::-1])}, n=7)
    mean = np.mean([DRAWS, DRAWS[::-1]], axis=0)
    assert found == (np.mean([0.2, 0.4]), *np.quantile(mean, [0.025, 0.975]))
    assert found.each["b"] == Estimate.of(0.4, DRAWS[::-1]) and found.n == found.each["a"].n == 7


def test_ends_of_networks_are_combined() -> None:
    a, b = (
        Estimate(value=v, low=v - w, high=v + w, n=n) for v, w, n in ((0.5, 0.3, 9), (0.6, 0.1, 4))
    )
    found = Estimate.combined({"a": a, "b": b})
    assert found == tuple(np.mean([tuple(a), tuple(b)], axis=0)) and found.n == 4
    assert found.smallest() == tuple(np.minimum(a, b)) and found.largest() == tuple(
        np.maximum(a, b)
    )
    assert list(found.smallest().each) == ["a", "b"]
    with pytest.raises(OodlibError, match="no estimate"):
        a.smallest()


def test_an_estimate_is_the_tuple_that_bootstrap_promises() -> None:
    found = m.bootstrap(m.auroc, [0.0, 1, 2], [[1.0, 3], [2.0, 5]], n=20)
    value, low, high = found
    assert (found[0], found[-1], len(found), found.n) == (value, high, 3, 2)
    assert found == (value, low, high) and found != (value, low, 2.0) and found != "x"
    np.testing.assert_array_equal(np.min([found, found], axis=0), [value, low, high])


def test_widened_and_within() -> None:
    found = Estimate(value=0.9, low=0.85, high=0.95, clusters=2).widened(0.1, 1)
    assert found.high == pytest.approx(0.9 + 12.706 * 0.1, abs=1e-3)
    assert found.within(0, 1).high == 1 and str(found).endswith("(2 clusters)")
    assert Estimate(value=1, low=0, high=2).widened(9.0, 0) == (1, 0, 2)
