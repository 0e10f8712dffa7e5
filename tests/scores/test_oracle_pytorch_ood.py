"""Independent implementations: metrics and detectors against pytorch-ood."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import oodlib
from oodlib import metrics

pytestmark = pytest.mark.oracle
detectors = pytest.importorskip("pytorch_ood.detector")
theirs = pytest.importorskip("pytorch_ood.metrics")


@pytest.fixture(scope="module")
def parts(blobs):
    """Train, test and OOD banks; the head as a module; features and labels as tensors."""
    train, test, ood = blobs
    head = nn.Linear(16, 4)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(train.head.weight))
        head.bias.copy_(torch.from_numpy(train.head.bias))
    tensors = {
        k: torch.from_numpy(b.features) for k, b in (("train", train), ("test", test), ("ood", ood))
    }
    return blobs, head.eval(), tensors, torch.from_numpy(train.labels)


def ours(parts, name, **params):
    train, test, ood = parts[0]
    detector = oodlib.create(name, **params).fit(train)
    return np.concatenate([detector.score(test), detector.score(ood)])


def both(parts, predict):
    return np.concatenate([predict(parts[2][k]).detach().double().numpy() for k in ("test", "ood")])


@pytest.mark.parametrize("ties", [False, True])
def test_metrics(ties):
    rng = np.random.default_rng(0)
    ids, oods = rng.normal(0, 1, 300), rng.normal(1, 1.5, 500)
    if ties:
        ids, oods = ids.round(1), oods.round(1)
    s, labels = (
        torch.from_numpy(np.concatenate([ids, oods])),
        torch.cat([torch.ones(300), -torch.ones(500)]).int(),
    )

    def value(metric, scores, labels):
        return next(iter(metric.update(scores, labels).compute().values()))

    assert metrics.auroc(ids, oods) == pytest.approx(value(theirs.AUROC(), s, labels), abs=1e-6)
    for positive, sign in (
        ("ood", 1),
        ("id", -1),
    ):  # theirs knows OOD as positive: swap the roles for ID
        assert metrics.fpr_at_tpr(ids, oods, positive=positive) == pytest.approx(
            value(theirs.FPRAtTPR(), sign * s, sign * labels), abs=1e-6
        )
        assert metrics.aupr(
            ids, oods, positive=positive
        ) == pytest.approx(  # theirs is the trapezoidal area
            value(theirs.AUPR(positive), s, labels), abs=5e-3
        )


@pytest.mark.parametrize(
    ("name", "detector"),
    [
        ("msp", detectors.MaxSoftmax),
        ("max_logit", detectors.MaxLogit),
        ("energy", detectors.EnergyBased),
        ("odin", partial(detectors.ODIN, eps=0.0, temperature=1000)),
        ("gradnorm", partial(detectors.GradNorm, param_filter=lambda n: n == "weight")),
    ],
)
def test_detectors_of_logits(parts, name, detector):
    np.testing.assert_allclose(
        ours(parts, name), both(parts, detector(parts[1]).predict), rtol=2e-5, atol=2e-6
    )


def test_mahalanobis(parts):
    """Theirs is half of ours, with a scatter matrix that is not divided by N."""
    _, _, x, y = parts
    theirs = detectors.Mahalanobis(None).fit_features(x["train"], y)
    np.testing.assert_allclose(
        ours(parts, "mahalanobis"), 2 * len(y) * both(parts, theirs.predict_features), rtol=1e-3
    )


def test_relative_mahalanobis(parts):
    _, _, x, y = parts
    theirs = detectors.RMD(None).fit_features(x["train"], y)
    expected = len(y) * both(parts, theirs.predict_features)
    np.testing.assert_allclose(
        ours(parts, "relative_mahalanobis"), expected, atol=1e-3 * abs(expected).max()
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_knn(parts, normalise):
    _, _, x, y = parts
    theirs = detectors.KNN(None, k=10, normalize=normalise).fit_features(x["train"], y)
    np.testing.assert_allclose(
        ours(parts, "knn", k=10, normalise=normalise),
        both(parts, theirs.predict_features),
        rtol=1e-4,
    )


def test_vim(parts):
    _, head, x, y = parts
    theirs = detectors.ViM(None, d=4, w=head.weight, b=head.bias).fit_features(x["train"], y)
    np.testing.assert_allclose(
        ours(parts, "vim", dim=4), both(parts, theirs.predict_features), rtol=1e-4, atol=1e-4
    )


def test_react(parts):
    _, head, x, y = parts
    theirs = detectors.ReAct(nn.Identity(), head, percentile=0.8).fit_feature_maps(x["train"], y)
    np.testing.assert_allclose(
        ours(parts, "react", percentile=80), both(parts, theirs.predict_feature_maps), rtol=1e-5
    )


@pytest.mark.parametrize("variant", ["s", "p", "b"])
def test_ash_on_pooled_features(parts, variant):
    theirs = detectors.ASH(
        nn.Identity(), lambda m: parts[1](m.flatten(1)), variant=f"ash-{variant}", percentile=0.6
    )
    np.testing.assert_allclose(
        ours(parts, "ash", percentile=60, variant=variant),
        both(parts, lambda x: theirs.predict_feature_maps(x[:, :, None, None])),
        rtol=1e-4,
    )


def test_dice(parts):
    _, head, x, y = parts
    theirs = detectors.DICE(None, w=head.weight, b=head.bias, p=0.5).fit_features(x["train"], y)
    np.testing.assert_allclose(
        ours(parts, "dice", sparsity=50), both(parts, theirs.predict_features), rtol=1e-4
    )


def test_ranks_agree_too(parts):
    theirs = both(parts, detectors.GradNorm(parts[1], param_filter=lambda n: n == "weight").predict)
    assert spearmanr(ours(parts, "gradnorm"), theirs).statistic > 0.9999
