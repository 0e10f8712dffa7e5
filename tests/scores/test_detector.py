"""Detectors: every one separates blobs, survives save and load, ignores row order, and refuses bad
input clearly.
"""

import dataclasses
import importlib
import inspect
import re
import sys

import numpy as np
import pytest
import torch

import oodlib
from oodlib import FeatureBank, OodlibError, metrics, scores

NAMES = sorted(oodlib.names())
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("react", {"then": "gradnorm"}),
    ("dice", {"then": "max_logit"}),
    ("ash", {"variant": "b"}),
    ("ash", {"variant": "p", "percentile": 50, "then": "knn"}),
    ("gradnorm", {"target": "random"}),
]


def fitted(name, params, bank):
    return oodlib.create(name, **params).fit(bank)


def test_the_baselines_are_there():
    assert {
        "msp",
        "odin",
        "max_logit",
        "energy",
        "gradnorm",
        "mahalanobis",
        "relative_mahalanobis",
        "knn",
        "vim",
        "react",
        "ash",
        "dice",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_info(name):
    info = oodlib.names()[name]
    assert (
        info.key == name
        and re.fullmatch(r"\d{4}\.\d{5}", info.arxiv or "0000.00000")
        and 2015 < info.year < 2027
    )
    assert bool(info.arxiv) != bool(info.url) and info.link.startswith("https://")
    assert info.needs in ("none", "features", "labels")


@pytest.mark.parametrize("name", NAMES)
def test_name_is_the_function_even_after_importing_its_module(name):
    importlib.import_module(type(oodlib.create(name)).__module__)
    assert inspect.isfunction(getattr(scores, name))


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_separates_blobs(blobs, name, params):
    train, test, ood = blobs
    detector = fitted(name, params, train)
    ids, oods = detector.score(test), detector.score(ood)
    assert ids.dtype == np.float64 and ids.shape == (len(test),)
    floor = 0.4 if params.get("target") == "random" else 0.85
    assert metrics.auroc(ids, oods) > floor


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_save_and_load_round_trip(blobs, tmp_path, name, params):
    train, test, _ = blobs
    detector = fitted(name, params, train)
    detector.save(tmp_path / "detector.safetensors")
    again = oodlib.load_detector(tmp_path / "detector.safetensors")
    assert repr(again) == repr(detector)
    np.testing.assert_array_equal(again.score(test), detector.score(test))
    assert [p.name for p in tmp_path.iterdir()] == ["detector.safetensors"]


def test_save_keeps_parameters_of_a_nested_detector(blobs, tmp_path):
    train, test, _ = blobs
    detector = fitted(
        "react", {"then": oodlib.create("dice", sparsity=30, then=oodlib.create("knn", k=3))}, train
    )
    detector.save(tmp_path / "d")
    again = oodlib.load_detector(tmp_path / "d")
    assert again.then.then.k == 3 and again.then.sparsity == 30
    np.testing.assert_array_equal(again.score(test), detector.score(test))


@pytest.mark.parametrize(
    ("name", "params"), [v for v in VARIANTS if v[1].get("target") != "random"]
)
def test_row_order_and_batch_size_do_not_matter(blobs, name, params):
    train, test, _ = blobs
    detector = fitted(name, params, train)
    whole = detector.score(test)
    order = np.random.default_rng(0).permutation(len(test))
    np.testing.assert_allclose(
        detector.score(test.subset(order)), whole[order], rtol=1e-10, atol=1e-12
    )
    single = np.concatenate([detector.score(test.subset(slice(i, i + 1))) for i in range(5)])
    np.testing.assert_allclose(single, whole[:5], rtol=1e-10, atol=1e-12)


def test_chunked_equals_whole(blobs, monkeypatch):
    train, test, _ = blobs
    for name in NAMES:
        detector = fitted(name, {}, train)
        whole = detector.score(test)
        with monkeypatch.context() as patch:
            patch.setattr("oodlib.arrays.BLOCK", 16 * 7)
            np.testing.assert_allclose(
                detector.score(test), whole, rtol=1e-10, atol=1e-12, err_msg=name
            )


@pytest.mark.parametrize("name", ["msp", "odin", "max_logit", "energy"])
def test_function_returns_the_kind_it_was_given(batch, name):
    z = batch[3]
    function = getattr(scores, name)
    from_torch, from_numpy = function(z.float().requires_grad_()), function(z.float().numpy())
    assert (
        isinstance(from_torch, torch.Tensor)
        and from_torch.dtype == torch.float64
        and not from_torch.requires_grad
    )
    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == np.float64
    np.testing.assert_array_equal(from_torch.numpy(), from_numpy)


def test_msp_in_float64_tells_apart_what_float32_cannot():
    s = scores.msp(np.array([[20.0, 0], [25.0, 0]], dtype=np.float32))
    assert s[0] > s[1]


def test_mahalanobis_by_brute_force(blobs):
    train, test, _ = blobs
    detector = fitted("mahalanobis", {}, train)
    h, y = train.features.astype(np.float64), train.labels
    means = np.stack([h[y == c].mean(0) for c in range(4)])
    precision = np.linalg.inv(np.cov((h - means[y]).T, bias=True))
    d = test.features[:, None] - means
    np.testing.assert_allclose(
        detector.score(test), np.einsum("ncd,de,nce->nc", d, precision, d).min(1), rtol=1e-8
    )


def test_mahalanobis_survives_dead_units(blobs):
    train, test, _ = blobs

    def with_dead(bank):
        zeros = np.zeros((len(bank), 3), np.float32)
        return FeatureBank.from_arrays(
            np.hstack([bank.features, zeros]),
            labels=bank.labels,
            weight=np.hstack([bank.head.weight, np.ones((4, 3))]),
            bias=bank.head.bias,
        )

    for name in ("mahalanobis", "relative_mahalanobis"):
        np.testing.assert_allclose(
            fitted(name, {}, with_dead(train)).score(with_dead(test)),
            fitted(name, {}, train).score(test),
            rtol=1e-8,
        )


def brute_knn(x, bank, k):
    d = np.sqrt(((x[:, None].astype(np.float64) - bank[None]) ** 2).sum(-1))
    return np.sort(d, 1)[:, k - 1]


@pytest.mark.parametrize("faiss", [True, False])
@pytest.mark.parametrize("offset", [0, 1e5])
def test_knn_is_exact_despite_float32(monkeypatch, faiss, offset):
    if not faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)
    rng = np.random.default_rng(0)
    bank, x = rng.normal(size=(600, 12)), rng.normal(size=(80, 12))
    for part in (bank, x):  # two far clusters: centring alone cannot help
        part[::2] += offset
        part[1::2] -= offset
    for k in (1, 5, 600):
        np.testing.assert_allclose(
            scores.knn(x, bank, k=k, normalise=False), brute_knn(x, bank, k), rtol=1e-9
        )


def test_knn_of_a_bank_member_is_zero(blobs):
    train = blobs[0]
    np.testing.assert_array_equal(fitted("knn", {"k": 1}, train).score(train), 0)


def test_knn_normalises(blobs):
    train, test, _ = blobs
    unit = [
        b.features / np.linalg.norm(b.features.astype(np.float64), axis=1, keepdims=True)
        for b in (test, train)
    ]
    np.testing.assert_allclose(
        fitted("knn", {"k": 7}, train).score(test), brute_knn(*unit, 7), rtol=1e-9
    )


def test_shapers_that_do_nothing_give_the_energy(blobs):
    train, test, _ = blobs
    plain = scores.energy(test.logits)
    below = (
        test.features.max(1) <= train.features.max()
    )  # react clips at the largest training activation
    for name, params in (
        ("react", {"percentile": 100}),
        ("dice", {"sparsity": 0}),
        ("ash", {"percentile": 0, "variant": "p"}),
    ):
        detector = fitted(name, params, train)
        np.testing.assert_allclose(
            detector.score(test.subset(below)), plain[below], rtol=1e-10, err_msg=name
        )


def test_react_clips_before_gradnorm(blobs):
    train, test, _ = blobs
    detector = fitted("react", {"then": "gradnorm", "percentile": 80}, train)
    h = np.minimum(test.features, detector.threshold_)
    np.testing.assert_allclose(
        detector.score(test), scores.gradnorm(h.astype(np.float64), test.head(h)), rtol=1e-10
    )


def test_every_shaper_of_a_chain_learns_from_the_unshaped_bank(blobs):
    train, test, _ = blobs
    alone = fitted("dice", {"sparsity": 30}, train)
    chain = fitted("react", {"percentile": 60, "then": oodlib.create("dice", sparsity=30)}, train)
    np.testing.assert_array_equal(chain.then_.mask_, alone.mask_)
    h = np.minimum(test.features, chain.threshold_)
    np.testing.assert_allclose(
        chain.score(test), scores.energy(test.head.masked(alone.mask_)(h)), rtol=1e-10
    )


def test_masks_of_a_chain_multiply(blobs):
    train, test, _ = blobs
    first, second = oodlib.create("dice", sparsity=40), oodlib.create("dice", sparsity=20)
    chain = oodlib.create("dice", sparsity=40, then=second).fit(train)
    both = first.fit(train).mask_ & second.fit(train).mask_
    np.testing.assert_allclose(
        chain.score(test), scores.energy(test.head.masked(both)(test.features)), rtol=1e-10
    )


def test_ash_by_hand():
    h = np.array([[4.0, 1, 3, 2]])
    np.testing.assert_allclose(scores.ash(h, percentile=50, variant="p"), [[4, 0, 3, 0]])
    np.testing.assert_allclose(scores.ash(h, percentile=50, variant="b"), [[5, 0, 5, 0]])
    np.testing.assert_allclose(
        scores.ash(h, percentile=50, variant="s"), np.exp(10 / 7) * np.array([[4, 0, 3, 0]])
    )


def test_scoring_needs_no_fit_where_nothing_is_learned(blobs):
    test = blobs[1]
    for name in ("msp", "odin", "max_logit", "energy", "gradnorm", "ash"):
        assert oodlib.create(name).score(test).shape == (len(test),)


def test_overflow_becomes_infinity_and_is_counted():
    logits = np.array([[1.0, 0], [np.nan, 0], [0, np.inf]])
    bank = FeatureBank(
        np.ones((3, 2), np.float32), logits, None, oodlib.features.Head(np.eye(2), np.zeros(2))
    )
    detector = oodlib.create("energy")
    with pytest.warns(RuntimeWarning, match="2 of 3 scores overflowed"):
        s = detector.score(bank)
    assert np.isposinf(s[1:]).all() and np.isfinite(s[0])


def test_fit_leaves_the_bank_and_the_parameters_alone(blobs):
    train = blobs[0]
    before = train.features.copy()
    for name, params in VARIANTS:
        detector = oodlib.create(name, **params)
        stored = {f.name: getattr(detector, f.name) for f in dataclasses.fields(detector)}
        detector.fit(train)
        assert stored == {f.name: getattr(detector, f.name) for f in dataclasses.fields(detector)}
    np.testing.assert_array_equal(train.features, before)


@pytest.mark.parametrize("name", ["knn", "mahalanobis", "kl_matching", "react"])
def test_a_bank_of_another_network_of_the_same_size_is_refused(blobs, tmp_path, name):
    train, test, _ = blobs
    fitted(name, {}, train).save(tmp_path / "d")
    other = FeatureBank.from_arrays(
        test.features, weight=test.head.weight[::-1], bias=test.head.bias
    )
    with pytest.raises(OodlibError, match=f"{name}.score: fitted on a bank of another network"):
        oodlib.load_detector(tmp_path / "d").score(other)


def test_weights_behind_the_same_head_tell_networks_apart(blobs):
    def with_weights(bank, weights):
        return dataclasses.replace(bank, meta={"weights": weights})

    train, test, _ = blobs
    detector = fitted("knn", {}, with_weights(train, "3f9c"))
    with pytest.raises(OodlibError, match="another network"):
        detector.score(with_weights(test, "a1b2"))
    assert len(detector.score(test)) == len(test)  # this bank does not know its weights


def without_labels(bank):
    return FeatureBank.from_arrays(bank.features, weight=bank.head.weight, bias=bank.head.bias)


def one_class_short(bank):
    return bank.subset(bank.labels != 3)


def narrower(bank):
    return FeatureBank.from_arrays(bank.features[:, :9], weight=bank.head.weight[:, :9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: oodlib.create("msq"), "unknown detector 'msq'. Known: ash, dice"),
        (lambda b: oodlib.create("react", then="msq"), "unknown detector 'msq'"),
        (lambda b: oodlib.create("energy", t=2), "energy has no parameter 't'. Known: temperature"),
        (lambda b: oodlib.create("mahalanobis").score(b), "mahalanobis.score: not fitted"),
        (lambda b: oodlib.create("ash", then="knn").score(b), "ash.score: not fitted"),
        (
            lambda b: oodlib.create("mahalanobis").fit(without_labels(b)),
            "needs labels, this bank has none",
        ),
        (
            lambda b: oodlib.create("relative_mahalanobis").fit(one_class_short(b)),
            "class 3 has none",
        ),
        (
            lambda b: oodlib.create("knn").fit(b).score(narrower(b)),
            "fitted on 16 features and 4 classes, got a bank of 9",
        ),
        (lambda b: oodlib.create("knn", k=801).fit(b), r"k must lie in 1 .. 800 .*got 801"),
        (lambda b: oodlib.create("vim", dim=16).fit(b), "dim must lie in 1 .. 15"),
        (
            lambda b: oodlib.create("react", percentile=101).fit(b),
            r"percentile must lie in \[0, 100",
        ),
        (lambda b: oodlib.create("dice", sparsity=-1).fit(b), r"sparsity must lie in \[0, 100\]"),
        (
            lambda b: oodlib.create("ash", percentile=100).score(b),
            r"percentile must lie in \[0, 100",
        ),
        (lambda b: oodlib.create("ash", variant="x").score(b), "variant must be"),
        (lambda b: oodlib.create("energy", temperature=0).score(b), "temperature must be positive"),
        (lambda b: scores.knn(b.features, b.features[:, :3]), "need the same D"),
        (lambda b: scores.dice(np.ones((2, 3)), np.ones(2)), "need the same D"),
        (
            lambda b: scores.knn(b.features, b.features, k=1.5),
            "knn: k must lie in 1 .. 800 .*got 1.5",
        ),
        (lambda b: oodlib.create("knn", k="abc"), "knn's k must be of type int, got 'abc'"),
        (lambda b: oodlib.create("knn", k=1.5), "knn's k must be of type int, got 1.5"),
        (lambda b: oodlib.create("react", then=3), "then must be of type"),
        (lambda b: scores.energy(np.ones(3)), r"needs non-empty arrays \(N, .\)"),
        (lambda b: scores.energy(np.ones((0, 3))), "needs non-empty arrays"),
        (lambda b: oodlib.load_detector("nowhere"), "there is no file nowhere"),
    ],
)
def test_refusals(blobs, call, message):
    with pytest.raises(OodlibError, match=message):
        call(blobs[0])


@pytest.mark.parametrize("name", ["energy", "ash", "dice", "react", "opnp", "grood", "kl_matching"])
def test_a_bank_without_images_is_refused(blobs, name):
    train = blobs[0]
    with pytest.raises(OodlibError, match=f"{name}.fit: the bank holds no image"):
        oodlib.create(name).fit(train.subset([]))
    with pytest.raises(OodlibError, match=f"{name}.score: the bank holds no image"):
        oodlib.create(name).fit(train).score(train.subset([]))


def test_load_refuses_another_file(tmp_path):
    (tmp_path / "x").write_text("no detector")
    with pytest.raises(OodlibError, match="is not a saved detector"):
        oodlib.load_detector(tmp_path / "x")
