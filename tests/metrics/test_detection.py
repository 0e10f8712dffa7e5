"""Metrics: scikit-learn's values on any input, both conventions, intervals, clear refusals."""

import time
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from oodlib import OodlibError
from oodlib import metrics as m

FPR_ID, AUPR_OOD = partial(m.fpr_at_tpr, positive="id"), partial(m.aupr, positive="ood")


def scores(seed, kind):
    rng = np.random.default_rng(seed)
    ids, oods = rng.normal(0, 1, 311), rng.normal(1, 2, 457)
    if kind == "ties":
        return ids.round(), oods.round()
    if kind == "constant":
        return np.zeros(50), np.zeros(70)
    if kind == "float32":
        return ids.astype(np.float32), oods.astype(np.float32)
    return ids, oods


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "float32"])
def test_equal_to_scikit_learn(kind):
    ids, oods = scores(0, kind)
    s, y = np.concatenate([ids, oods]), np.r_[np.zeros(len(ids)), np.ones(len(oods))]
    assert m.auroc(ids, oods) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    for positive, label, sign in (("ood", y, 1), ("id", 1 - y, -1)):
        expected = average_precision_score(label, sign * s)
        assert m.aupr(ids, oods, positive=positive) == pytest.approx(expected, abs=1e-12)
        for tpr in (0.5, 0.95, 1.0):
            fpr, hits, _ = roc_curve(label, sign * s, drop_intermediate=False)
            assert m.fpr_at_tpr(ids, oods, tpr=tpr, positive=positive) == pytest.approx(
                fpr[np.argmax(hits >= tpr)], abs=1e-12
            )


def test_fpr_differs_between_the_positive_classes():
    rng = np.random.default_rng(0)
    ids, oods = (
        -rng.normal(2, 1, 200_000),
        -rng.normal(0, 2, 200_000),
    )  # ID N(2, 1), OOD N(0, 2) in confidence
    assert m.fpr_at_tpr(ids, oods, positive="ood") == pytest.approx(0.9014, abs=0.005)
    assert m.fpr_at_tpr(ids, oods, positive="id") == pytest.approx(0.4295, abs=0.005)


def test_by_hand():
    ids, oods = [0.0, 1, 2, 3], [2.0, 4]
    assert m.auroc(ids, oods) == (2.5 + 4) / 8
    assert m.fpr_at_tpr(ids, oods, positive="ood") == 0.5  # 2 and 3 are flagged when both OOD are
    assert m.fpr_at_tpr(ids, oods, positive="id") == 0.5  # the 2 is accepted when all ID are


def test_infinite_scores_rank_last_and_first():
    assert m.auroc([0.0, 1], [np.inf, np.inf]) == 1
    assert m.auroc([-np.inf, 1], [0.0, np.inf]) == m.auroc([0, 2], [1, 3])
    assert m.bootstrap(m.auroc, [0.0, 1], [np.inf, np.inf], n=5) == (1, 1, 1)


def test_threshold_gives_the_fpr():
    ids, oods = scores(1, "ties")
    t = m.threshold(ids)
    assert (ids <= t).mean() >= 0.95 and (oods <= t).mean() == m.fpr_at_tpr(
        ids, oods, positive="id"
    )


@pytest.mark.parametrize("metric", [m.auroc, FPR_ID, AUPR_OOD])
def test_bootstrap_fast_path_equals_plain_loop(metric):
    ids, oods = scores(2, "ties")
    assert m.bootstrap(metric, ids, oods, n=50) == pytest.approx(
        m.bootstrap(lambda a, b: metric(a, b), ids, oods, n=50), abs=1e-12
    )


def test_bootstrap_interval_has_the_right_width():
    rng = np.random.default_rng(0)
    value, low, high = m.bootstrap(m.auroc, rng.normal(size=1000), rng.normal(1.5, 1, 1000), n=400)
    assert low < value < high
    assert (high - low) / 3.92 == pytest.approx(
        0.0084, rel=0.25
    )  # Hanley-McNeil at AUROC 0.86, n = 1000 a side


def test_bootstrap_repeats_with_its_seed():
    ids, oods = scores(3, "normal")
    assert m.bootstrap(m.auroc, ids, oods, n=20, seed=1) == m.bootstrap(
        m.auroc, ids, oods, n=20, seed=1
    )
    assert m.bootstrap(m.auroc, ids, oods, n=20, seed=1) != m.bootstrap(
        m.auroc, ids, oods, n=20, seed=2
    )


def test_paired_bootstrap_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    ids, oods = rng.normal(size=500), rng.normal(1, 1, 500)
    noisy = ids + 0.1 * rng.normal(size=500), oods + 0.1 * rng.normal(size=500)
    difference, low, high = m.paired_bootstrap(m.auroc, ids, oods, *noisy, n=200)
    assert difference == m.auroc(ids, oods) - m.auroc(*noisy)
    _, low_a, high_a = m.bootstrap(m.auroc, ids, oods, n=200)
    assert high - low < 0.5 * (high_a - low_a)


def test_a_method_against_itself_differs_by_zero():
    ids, oods = scores(4, "normal")
    assert m.paired_bootstrap(m.auroc, ids, [oods, oods[:9]], ids, [oods, oods[:9]], n=20) == (
        0,
        0,
        0,
    )


def test_macro_mean_over_ood_sets():
    ids, oods = scores(5, "normal")
    value, _, _ = m.bootstrap(m.auroc, ids, [oods, oods[:50] + 1], n=5)
    assert value == pytest.approx((m.auroc(ids, oods) + m.auroc(ids, oods[:50] + 1)) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("metric", [m.auroc, FPR_ID, AUPR_OOD])
def test_bootstrap_of_ten_thousand_is_fast(metric):
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    m.bootstrap(metric, rng.normal(size=10_000), rng.normal(1, 1, 10_000))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.auroc([0, np.nan], [1.0]), "1 NaN of 2"),
        (lambda: m.auroc([], [1.0]), "id_scores is empty"),
        (lambda: m.auroc([0.0], []), "ood_scores is empty"),
        (lambda: m.auroc([[0.0]], [1.0]), "one number per image"),
        (lambda: m.fpr_at_tpr([0.0], [1.0], positive=None), "positive must be"),
        (lambda: m.aupr([0.0], [1.0], positive="out"), "positive must be"),
        (lambda: m.fpr_at_tpr([0.0], [1.0], tpr=95, positive="id"), "not per cent"),
        (lambda: m.threshold([0.0], tpr=0), "tpr must lie in"),
        (lambda: m.bootstrap(m.auroc, [0.0], [1.0], n=0), "n must be at least 1"),
        (lambda: m.bootstrap(partial(m.aupr, positive="x"), [0.0], [1.0]), "positive must be"),
        (lambda: m.paired_bootstrap(m.auroc, [0.0], [1.0], [0.0, 1], [1.0]), "need equal sizes"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(OodlibError, match=message):
        call()


def test_positive_has_no_default():
    with pytest.raises(TypeError, match="positive"):
        m.fpr_at_tpr([0.0], [1.0])
