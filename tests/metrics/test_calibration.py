"""Calibration: by hand, against scikit-learn and torch, and what it says of a network that is
calibrated.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from oodlib import OodlibError
from oodlib.metrics.calibration import (
    brier,
    confidence,
    ece,
    fit_temperature,
    nll,
    reliability,
    simulated_null,
)


@pytest.fixture
def calibrated():
    """Logits (4000, 5) and labels drawn from their softmax."""
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(4000, 5))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z, (p.cumsum(1) < rng.random((4000, 1))).sum(1)


def test_ece_by_hand():
    # two bins hold images: (0.61, 0.65) with 1 of 2 right, and 0.95 with 1 of 1 right: (2 |0.63 -
    # 0.5| + 0.05) / 3
    assert ece([0.61, 0.65, 0.95], [1, 0, 1], bins=10) == pytest.approx((2 * 0.13 + 0.05) / 3)
    # two bins of 2 and 1 images: the same grouping here
    assert ece([0.61, 0.65, 0.95], [1, 0, 1], bins=2, equal="mass") == pytest.approx(
        (2 * 0.13 + 0.05) / 3
    )


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    r = reliability([0.5, 1.0, 0.0], [1, 1, 0], bins=2)
    assert r.count.tolist() == [2, 1] and r.low.tolist() == [0, 0.5]


def test_bins_of_equal_mass_hold_equally_many():
    r = reliability(np.random.default_rng(0).random(30), np.ones(30), bins=6, equal="mass")
    assert r.count.tolist() == [5] * 6 and (r.low[1:] >= r.low[:-1]).all()
    ties = reliability(np.full(30, 0.7), np.arange(30) % 2, bins=6, equal="mass")
    assert ties.count.tolist() == [5] * 6


def test_confidence_is_the_largest_probability(calibrated):
    z, y = calibrated
    c, right = confidence(z, y, temperature=2.0)
    p = torch.softmax(torch.from_numpy(z) / 2, 1).numpy()
    np.testing.assert_allclose(c, p.max(1), rtol=1e-12)
    np.testing.assert_array_equal(right, p.argmax(1) == y)


def test_proper_scores_equal_other_implementations(calibrated):
    z, y = calibrated
    p = torch.softmax(torch.from_numpy(z), 1).numpy()
    assert nll(z, y) == pytest.approx(log_loss(y, p, labels=range(5)))
    assert brier(z, y) == pytest.approx(np.square(p - np.eye(5)[y]).sum(1).mean())
    assert np.isfinite(nll(1e5 * z, y))


def test_temperature_scaling_finds_the_factor_the_logits_were_multiplied_by(calibrated):
    z, y = calibrated
    t = fit_temperature(z, y)
    assert t == pytest.approx(1, abs=0.1) and fit_temperature(3 * z, y) == pytest.approx(
        3 * t, rel=1e-3
    )
    assert nll(3 * z, y, temperature=3 * t) < nll(3 * z, y)


def test_the_null_covers_a_calibrated_network_and_not_an_overconfident_one(calibrated):
    z, y = calibrated
    for factor, inside in [(1, True), (3, False)]:
        c, right = confidence(factor * z, y)
        assert (ece(c, right) <= np.quantile(simulated_null(c, seed=1), 0.999)) == inside


def test_the_null_shrinks_with_more_images(calibrated):
    c, _ = confidence(*calibrated)
    assert simulated_null(c[:200]).mean() > 2 * simulated_null(c).mean() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ece([], []), r"needs confidences in \[0, 1\]"),
        (lambda: ece([0.5], [1, 0]), "of the same images"),
        (lambda: ece([3.0], [1]), "Give probabilities, not logits"),
        (lambda: ece([0.5], [1], bins=0), "bins must be at least 1"),
        (lambda: ece([0.5], [1], equal="size"), 'equal "width" or "mass"'),
        (lambda: nll(np.ones((2, 3)), [0]), r"needs logits \(N, C\) and labels \(N,\)"),
        (lambda: nll(np.ones((2, 3)), [0, -1]), "labels must lie in 0 .. 2, got -1 .. 0"),
        (lambda: nll(np.ones((2, 3)), [0, 0.5]), "They are whole numbers"),
        (lambda: nll([[np.nan, 1.0]], [0]), "logits hold NaN"),
        (lambda: brier(np.ones((1, 3)), [0], temperature=0), "temperature must be positive"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(OodlibError, match=message):
        call()
