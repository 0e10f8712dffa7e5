"""GROOD: closed forms against autograd, identities, bounds and invariances, the detector's
parameters, bad input.
"""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import oodlib
from oodlib import FeatureBank, OodlibError, metrics
from oodlib.scores import grood, grood_gradient, grood_polar


@pytest.fixture
def parts(batch):
    """Features (20, 8), prototypes (5, 8), OOD prototype (8,), predicted classes (20,); float64
    torch.
    """
    h, w, _, logits = batch
    return h, 2 * w, w.mean(0) + 0.3, logits.argmax(1)


def by_autograd(h, prototypes, ood, classes, wrt="ood", temperature=1.0, squared=False):
    """One backward pass per sample, as the released code does."""
    rows = []
    for x, y in zip(h, classes, strict=True):
        p = torch.cat([prototypes, ood[None]]).requires_grad_()
        distance = (x - p).square().sum(1)
        s = -(distance if squared else distance.sqrt()) / temperature
        nn.functional.cross_entropy(s[None], y[None]).backward()
        rows.append(p.grad[-1 if wrt == "ood" else y])
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("wrt", ["ood", "class"])
def test_closed_form_equals_autograd(parts, temperature, squared, wrt):
    h, p, o, y = parts
    closed = grood_gradient(
        h, p, o, temperature=temperature, squared=squared, classes=y if wrt == "class" else None
    )
    torch.testing.assert_close(
        closed, by_autograd(h, p, o, y, wrt, temperature, squared), rtol=1e-9, atol=1e-12
    )


def test_the_gradient_does_not_depend_on_the_label(parts):
    h, p, o, y = parts
    for label in range(5):
        torch.testing.assert_close(
            by_autograd(h, p, o, torch.full_like(y, label)), grood_gradient(h, p, o)
        )


def test_its_norm_is_the_probability_of_the_ood_prototype(parts):
    h, p, o, _ = parts
    pi = (-torch.cdist(h, torch.cat([p, o[None]]))).softmax(1)[:, -1]
    torch.testing.assert_close(grood_gradient(h, p, o).norm(dim=1), pi)
    torch.testing.assert_close(grood_polar(h, p, o)[0].exp(), pi)


def brute(h, bank, p, o, k=1):
    g, b = (np.asarray(grood_gradient(x, p, o)) for x in (h, bank))
    return np.log(np.sort(np.linalg.norm(g[:, None] - b[None], axis=-1), 1)[:, k - 1])


@pytest.mark.parametrize("k", [1, 3])
def test_score_by_brute_force(parts, k):
    h, p, o, _ = parts
    np.testing.assert_allclose(
        grood(h[:8], h[8:], p, o, k=k), brute(h[:8], h[8:], p, o, k), rtol=1e-10
    )


def test_score_lies_between_its_bounds(parts):
    h, p, o, _ = parts
    s = grood(h[:8], h[8:], p, o).exp()
    pi, other = grood_polar(h[:8], p, o)[0].exp(), grood_polar(h[8:], p, o)[0].exp()
    low = torch.maximum((pi[:, None] - other).abs().amin(1), pi - other.max())
    assert (s >= low - 1e-12).all() and (s <= pi + other.min() + 1e-12).all()


def test_a_member_of_the_bank_scores_zero(parts):
    h, p, o, _ = parts
    assert torch.isneginf(grood(h[:4], h, p, o)).all()


def test_invariances(parts):
    h, p, o, _ = parts
    s = grood(h[:8], h[8:], p, o)
    q = torch.linalg.qr(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    for move in (lambda x: x @ q, lambda x: x + 7.0):
        torch.testing.assert_close(
            grood(move(h[:8]), move(h[8:]), move(p), move(o[None])[0]), s, rtol=1e-9, atol=0
        )
    torch.testing.assert_close(grood(h[:8], h[8:], p.flip(0), o), s, rtol=1e-9, atol=0)


def test_scale_is_an_inverse_temperature(parts):
    h, p, o, _ = parts
    scaled = grood(3 * h[:8], 3 * h[8:], 3 * p, 3 * o)
    assert not torch.allclose(scaled, grood(h[:8], h[8:], p, o))
    torch.testing.assert_close(scaled, grood(h[:8], h[8:], p, o, temperature=1 / 3) + np.log(1 / 3))


def test_large_features_give_finite_scores(parts):
    h, p, o, _ = parts
    s = grood(3000 * h[:8], 3000 * h[8:], 3000 * p, 3000 * o)
    assert torch.isfinite(s).all() and s.min() < -800  # exp of it is zero in float64


def test_kind_and_precision(parts):
    h, p, o, _ = parts
    single = grood(h[:8].float(), h[8:].float(), p, o)
    assert single.dtype == torch.float64 and isinstance(
        grood(h[:8].numpy(), h[8:].numpy(), p, o), np.ndarray
    )


def test_at_the_ood_prototype_the_gradient_is_zero(parts):
    h, p, o, _ = parts
    g = grood_gradient(o[None], p, o)
    assert (g == 0).all()
    np.testing.assert_allclose(grood(o[None], h, p, o), grood_polar(h, p, o)[0].min(), rtol=1e-12)


def blobs_score(blobs, **params):
    train, test, ood = blobs
    detector = oodlib.create("grood", **params).fit(train)
    return detector, detector.score(test), detector.score(ood)


def test_detector_is_the_function(blobs):
    train, test, _ = blobs
    detector, ids, _ = blobs_score(blobs, bank_filter="all")
    means = np.stack(
        [train.features[train.labels == c].mean(0, dtype=np.float64) for c in range(4)]
    )
    np.testing.assert_allclose(detector.prototypes_, means)
    np.testing.assert_allclose(
        ids, grood(test.features, train.features, means, means.mean(0)), rtol=1e-9
    )


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_separates_blobs_with_any_index(blobs, index):
    if index != "flat":
        pytest.importorskip("faiss")
    _, ids, oods = blobs_score(blobs, index=index)
    assert metrics.auroc(ids, oods) > 0.99


def test_variants_by_hand(blobs):
    train, test, _ = blobs
    h, p = (
        x.astype(np.float64) for x in (test.features, oodlib.create("grood").fit(train).prototypes_)
    )
    o, bank = p.mean(0), train.features.astype(np.float64)
    d = np.linalg.norm(h[:, None] - np.vstack([p, o]), axis=-1)
    pi = np.exp(-d[:, -1]) / np.exp(-d).sum(1)
    u, ub = ((x - o) / np.linalg.norm(x - o, axis=1, keepdims=True) for x in (h, bank))
    nearest = np.linalg.norm(u[:, None] - ub, axis=-1).min(1)
    expected = {
        "magnitude": np.log(pi),
        "l1": np.log(pi * np.abs(u).sum(1)),
        "distance": -d[:, -1],
        "nearest": d[:, :-1].min(1),
        "direction": np.log(nearest),
    }
    for variant, squared, classes in (("class_gradient", False, True), ("squared", True, False)):
        g, b = (
            grood_gradient(
                x.features, p, o, squared=squared, classes=x.logits.argmax(1) if classes else None
            )
            for x in (test, train)
        )
        expected[variant] = np.log(np.linalg.norm(g[:, None] - b, axis=-1).min(1))
    for variant, value in expected.items():
        got = blobs_score(blobs, variant=variant, bank_filter="all")[1]
        np.testing.assert_allclose(got, value, rtol=1e-6, err_msg=variant)


def wrong_labels(bank, n):
    """The bank with the first n labels moved to the next class."""
    labels = bank.labels.copy()
    labels[:n] = (labels[:n] + 1) % 4
    return FeatureBank.from_arrays(
        bank.features, weight=bank.head.weight, bias=bank.head.bias, labels=labels
    )


def test_bank_holds_the_correct_training_predictions(blobs):
    train = wrong_labels(blobs[0], 80)
    correct = oodlib.create("grood").fit(train)
    assert (
        len(correct.bank_) == (train.logits.argmax(1) == train.labels).sum() == 720
        and correct.kept_ == 0.9
    )
    assert len(oodlib.create("grood", bank_filter="all").fit(train).bank_) == 800


def test_fraction_is_stratified_and_seeded(blobs):
    train = blobs[0]
    a, b, c = (oodlib.create("grood", fraction=0.1, seed=s).fit(train) for s in (0, 0, 1))
    np.testing.assert_array_equal(np.bincount(a.classes_), [20] * 4)
    np.testing.assert_array_equal(a.bank_, b.bank_)
    assert not np.array_equal(a.bank_, c.bank_)
    np.testing.assert_array_equal(a.prototypes_, oodlib.create("grood").fit(train).prototypes_)


def test_row_order_of_the_bank_does_not_matter(blobs):
    train, test, _ = blobs
    order = np.random.default_rng(0).permutation(len(train))
    shuffled = oodlib.create("grood").fit(train.subset(order)).score(test)
    np.testing.assert_allclose(shuffled, blobs_score(blobs)[1], rtol=1e-10)


def test_a_given_ood_prototype_survives_saving(blobs, tmp_path):
    _, test, ood = blobs
    detector, ids, _ = blobs_score(blobs, ood_source="val_ood", ood_prototype=ood.features)
    np.testing.assert_allclose(detector.ood_prototype_, ood.features.mean(0, dtype=np.float64))
    detector.save(tmp_path / "d")
    again = oodlib.load_detector(tmp_path / "d")
    np.testing.assert_array_equal(again.score(test), ids)
    assert again.ood_prototype == detector.ood_prototype


def test_filter_keeps_the_features_far_from_every_class(blobs):
    ood = blobs[2]
    detector, _, _ = blobs_score(blobs, ood_prototype=ood.features, filter=True)
    nearest = np.linalg.norm(ood.features[:, None] - detector.prototypes_, axis=-1).min(1)
    expected = ood.features[nearest > np.quantile(nearest, 0.8)].mean(0)
    np.testing.assert_allclose(detector.ood_prototype_, expected, rtol=1e-6)
    two, _, _ = blobs_score(blobs, ood_prototype=ood.features[:3], filter=True)
    far = np.argsort(nearest[:3])[-2:]
    np.testing.assert_allclose(two.ood_prototype_, ood.features[far].mean(0), rtol=1e-6)


def test_an_approximate_index_is_built_again_after_loading(blobs, tmp_path):
    pytest.importorskip("faiss")
    _, test, _ = blobs
    detector, ids, _ = blobs_score(blobs, index="ivf", nlist=10, nprobe=2)
    detector.save(tmp_path / "d")
    np.testing.assert_array_equal(oodlib.load_detector(tmp_path / "d").score(test), ids)


def without_labels(bank):
    return FeatureBank.from_arrays(bank.features, weight=bank.head.weight, bias=bank.head.bias)


def with_labels(bank, labels):
    return FeatureBank.from_arrays(
        bank.features, weight=bank.head.weight, bias=bank.head.bias, labels=labels
    )


def fit(bank, **params):
    return oodlib.create("grood", **params).fit(bank)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: fit(without_labels(b)), "grood.fit: needs labels, this bank has none"),
        (
            lambda b: fit(with_labels(b, np.where(b.labels == 3, -1, b.labels))),
            r"labels must lie in 0 .. 3, got -1 .. 2",
        ),
        (lambda b: fit(b.subset(b.labels != 3)), "every class needs a sample, class 3 has none"),
        (lambda b: fit(wrong_labels(b, 800)), "no training image is classified correctly"),
        (lambda b: fit(b, k=801), "k must lie in 1 .. 800 .*got 801"),
        (lambda b: fit(b, k=0), "k must lie in 1 .. 800"),
        (lambda b: fit(b, fraction=0), r"fraction must lie in \(0, 1\], got 0"),
        (lambda b: fit(b, seed=-1), r"seed must lie in \[0, inf\), got -1"),
        (lambda b: fit(b, temperature=0), "temperature must be positive"),
        (lambda b: fit(b, variant="l2"), "variant must be one of gradient, .*got 'l2'"),
        (lambda b: fit(b, bank_filter="wrong"), "bank_filter must be one of correct, all"),
        (lambda b: fit(b, ood_source="oracle"), "ood_source must be one of proto_mean"),
        (
            lambda b: fit(b, ood_source="synthetic"),
            "ood_source='synthetic', filter=False need ood_prototype=",
        ),
        (lambda b: fit(b, filter=True), "need ood_prototype="),
        (
            lambda b: fit(b, filter=True, ood_prototype=np.ones(16)),
            "filter=True chooses among features",
        ),
        (
            lambda b: fit(b, ood_prototype=np.ones(9)),
            r"ood_prototype must be \(16,\) or \(n, 16\), finite, got \(9,\)",
        ),
        (lambda b: fit(b, ood_prototype=np.full(16, np.nan)), "finite"),
        (lambda b: fit(b, index="ivf", nlist=801), "nprobe <= nlist <= 800"),
        (lambda b: fit(b, index="tree"), "index must be one of"),
        (lambda b: grood_gradient(b.features, np.ones((4, 9)), np.ones(9)), "need the same D"),
        (
            lambda b: grood_gradient(b.features[:, :2] * np.nan, np.ones((4, 2)), np.ones(2)),
            "features hold NaN",
        ),
        (
            lambda b: grood_gradient(b.features, np.ones((4, 16)), np.ones(16), classes=[4] * 800),
            "in 0 .. 3",
        ),
        (
            lambda b: grood_gradient(
                b.features, np.ones((4, 16)), np.ones(16), classes=[0.5] * 800
            ),
            "whole numbers",
        ),
        (
            lambda b: grood_gradient(
                b.features, np.ones((4, 16)), np.ones(16), classes=[np.nan] * 800
            ),
            "whole numbers",
        ),
        (
            lambda b: grood_gradient(b.features, np.ones((4, 16)), np.ones(16), classes=[]),
            r"got \(0,\) of \[\]",
        ),
        (lambda b: grood_gradient(b.features, np.ones((0, 16)), np.ones(16)), "need the same D"),
        (
            lambda b: grood(b.features, b.features[:3], np.ones((4, 16)), np.ones(16), k=4),
            "k must lie in 1 .. 3",
        ),
        (
            lambda b: grood(b.features, b.features[:3], np.ones((4, 16)), np.ones(16), k=1.5),
            "k must lie in 1 .. 3",
        ),
        (lambda b: oodlib.create("grood", ood_prototype="a"), "ood_prototype must be numbers"),
    ],
)
def test_refusals(blobs, call, message):
    with pytest.raises(OodlibError, match=message):
        call(blobs[0])


def test_an_approximate_index_without_faiss_is_refused(blobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    blobs_score(blobs)
    with pytest.raises(OodlibError, match="needs faiss, which is not installed"):
        blobs_score(blobs, index="ivf")
