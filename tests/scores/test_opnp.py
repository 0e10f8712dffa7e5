"""OPNP: sensitivities equal to autograd, masks of exact counts, and how the detector prunes and
composes.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import oodlib
from oodlib import FeatureBank, OodlibError, scores
from oodlib.scores import opnp, opnp_neurons, opnp_sensitivity
from oodlib.scores.opnp import kept, ranks

close = torch.testing.assert_close
NOTHING = {"weight_low": 0.0, "weight_high": 0.0, "neuron_low": 0.0, "neuron_high": 0.0}


def energy_of(weight, h, b, temperature):
    return -temperature * torch.logsumexp((weight @ h + b) / temperature, 0)


def dead(bank, unit=3):
    """The bank with a unit that never fires, and the logits that follow."""
    h = np.array(bank.features)
    h[:, unit] = 0
    return FeatureBank.from_arrays(
        h, weight=bank.head.weight, bias=bank.head.bias, labels=bank.labels
    )


# --- sensitivities


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
def test_sensitivity_equals_the_mean_of_autograd_gradients(batch, relu, temperature):
    h, w, b, _ = batch
    h = h.relu() if relu else h
    each = vmap(grad(energy_of), (None, 0, None, None))(w, h, b, temperature)  # (n, C, D)
    m = opnp_sensitivity(h, h @ w.T + b, temperature=temperature)
    close(m, each.abs().mean(0), rtol=0, atol=1e-12)
    same = bool(torch.allclose(m, each.mean(0).abs(), rtol=0, atol=1e-12))
    assert same == relu  # |mean gradient| is mean |gradient| for ReLU features only


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_neurons_equal_autograd(batch, temperature):
    h, w, b, z = batch
    activation = (
        vmap(grad(energy_of, argnums=1), (None, 0, None, None))(w, h, b, temperature).abs().mean(0)
    )
    outgoing = vmap(grad(energy_of), (None, 0, None, None))(w, h, b, temperature).abs().mean((0, 1))
    options = {"temperature": temperature}
    close(opnp_neurons(h, z, w, definition="activation", **options), activation, rtol=0, atol=1e-12)
    close(opnp_neurons(h, z, w, definition="outgoing", **options), outgoing, rtol=0, atol=1e-12)


def test_column_and_row_sums(batch):
    h, _, _, z = batch
    m = opnp_sensitivity(h, z)
    close(m.sum(0), h.abs().mean(0))
    close(m.sum(1), (z.softmax(1) * h.abs().sum(1, keepdim=True)).mean(0))
    close(m.sum(), h.abs().sum(1).mean())


@pytest.mark.parametrize("block", [1, 3 * 8, 10**6])
def test_streaming_equals_one_product(batch, block, monkeypatch):
    h, _, _, z = batch
    monkeypatch.setattr("oodlib.arrays.BLOCK", block)
    close(opnp_sensitivity(h, z), z.softmax(1).T @ h.abs() / 20, rtol=1e-13, atol=0)


def test_shards_add_and_memory_mapped_banks_stream(batch, tmp_path):
    h, w, b, z = (t.numpy() for t in batch)
    whole = opnp_sensitivity(h, z)
    parts = (
        sum(
            len(h[i : i + 7]) * opnp_sensitivity(h[i : i + 7], z[i : i + 7])
            for i in range(0, 20, 7)
        )
        / 20
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-13)
    FeatureBank.from_arrays(h, weight=w, bias=b).save(tmp_path / "bank")
    bank = FeatureBank.load(tmp_path / "bank")
    assert isinstance(bank.features, np.memmap)
    np.testing.assert_allclose(opnp_sensitivity(bank.features, bank.logits), whole, rtol=1e-13)


def test_float64_keeps_what_underflows_in_float32():
    m = opnp_sensitivity(np.ones((1, 1), np.float32), np.array([[0.0, 200.0]], np.float32))
    assert m.dtype == np.float64 and m[0, 0] == pytest.approx(np.exp(-200.0))


def test_outgoing_ranks_as_mean_activation_and_a_dead_unit_has_no_outgoing_sensitivity(batch):
    h, w, _, _ = batch
    h[:, 2] = 0
    z = h @ w.T
    outgoing = opnp_neurons(h, z, w)
    assert (outgoing.argsort() == h.abs().mean(0).argsort()).all() and outgoing[2] == 0
    assert opnp_neurons(h, z, w, definition="activation")[2] > 0


# --- masks


def test_counts_are_exact_with_ties():
    values = np.r_[np.zeros(60), np.ones(40)].reshape(10, 10)
    mask = kept(
        values, low=0.29, high=0.07
    )  # floor(29), floor(7); 0.29 * 100 < 29 in floating point
    assert (~mask).sum() == 36 and (~mask & (values == 0)).sum() == 29
    np.testing.assert_array_equal(np.flatnonzero(~mask), np.r_[0:29, 93:100])


@pytest.mark.parametrize("scope", ["global", "class"])
def test_a_higher_ratio_never_brings_a_weight_back(scope):
    values = np.random.default_rng(0).integers(0, 6, (5, 40))  # many ties
    ratios = [(0, 0), (0.1, 0.05), (0.1, 0.3), (0.6, 0.3)]
    masks = [kept(values, low=low, high=high, scope=scope) for low, high in ratios]
    assert masks[0].all() and all((more <= less).all() for less, more in pairwise(masks))


def test_scope_class_removes_the_same_share_of_every_class():
    values = (1 + np.random.default_rng(0).random((4, 50))) * np.array([[1], [10], [100], [1000]])
    assert ((~kept(values, low=0.1, high=0.04, scope="class")).sum(1) == 7).all()
    assert (~kept(values, low=0.1, high=0.04)).sum(1).tolist() == [20, 0, 0, 8]


def test_ranks_keep_the_order_of_equal_values():
    rank, n = ranks(np.array([[3.0, 1.0, 1.0, 0.0], [5.0, 5.0, 4.0, 6.0]]), scope="class")
    assert rank.tolist() == [[3, 1, 2, 0], [1, 2, 0, 3]] and n == 4


def test_a_removed_neuron_is_a_zero_column(batch):
    h, w, _, z = batch
    neurons = opnp_neurons(h, z, w)
    pruned = opnp(w, opnp_sensitivity(h, z), neurons, neuron_low=0.25)
    gone = neurons.argsort()[:2]
    assert (pruned[:, gone] == 0).all() and (pruned != 0).sum() == 5 * 6


# --- the detector


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_no_pruning_is_energy(blobs, order):
    train, test, _ = blobs
    detector = oodlib.create("opnp", order=order, **NOTHING).fit(train)
    assert detector.mask_.all()
    np.testing.assert_array_equal(detector.score(test), scores.energy(test.head(test.features)))


def test_the_score_is_the_energy_of_the_pruned_network(blobs):
    train, test, _ = blobs
    ratios = {"weight_low": 0.3, "weight_high": 0.05, "neuron_low": 0.2, "neuron_high": 0.1}
    detector = oodlib.create("opnp", neurons="activation", scope="class", **ratios).fit(train)
    neurons = opnp_neurons(train.features, train.logits, train.head.weight, definition="activation")
    weight = opnp(
        train.head.weight,
        opnp_sensitivity(train.features, train.logits),
        neurons,
        scope="class",
        **ratios,
    )
    expected = scores.energy(test.features.astype(np.float64) @ weight.T + test.head.bias)
    np.testing.assert_allclose(detector.score(test), expected, rtol=1e-12)


def test_sequential_measures_the_weights_again_without_the_neurons(blobs):
    train = blobs[0]
    detector = oodlib.create(
        "opnp", order="sequential", weight_low=0.25, weight_high=0, neuron_low=0, neuron_high=0.25
    )
    detector.fit(train)
    h = train.features * detector.neurons_
    m = opnp_sensitivity(h, train.head(h))[:, detector.neurons_]  # 4 x 12
    np.testing.assert_array_equal(detector.mask_[:, detector.neurons_], kept(m, low=0.25))
    assert detector.mask_.sum() == 36


def test_the_callers_weights_stay_untouched(blobs):
    train, test, _ = blobs
    before = train.head.weight.copy(), test.head.weight.copy(), test.features.copy()
    detector = oodlib.create("opnp", weight_low=0.5).fit(train)
    detector.score(test)
    for array, old in zip(
        (train.head.weight, test.head.weight, test.features), before, strict=True
    ):
        np.testing.assert_array_equal(array, old)
    pruned = detector.shape(test).head.weight
    np.testing.assert_array_equal(
        pruned[detector.mask_], test.head.weight[detector.mask_]
    )  # bit by bit
    assert (pruned[~detector.mask_] == 0).all()


def test_pruning_a_dead_unit_changes_no_score(blobs):
    train = dead(blobs[0])
    detector = oodlib.create("opnp", **{**NOTHING, "neuron_low": 1 / 16}).fit(train)
    assert np.flatnonzero(~detector.neurons_).tolist() == [3]
    np.testing.assert_allclose(
        detector.score(train), oodlib.create("energy").score(train), rtol=1e-12
    )


def test_an_all_ones_dice_after_opp_is_opp(blobs):
    train, test, _ = blobs
    ratios = {**NOTHING, "weight_low": 0.4, "weight_high": 0.1}
    alone = oodlib.create("opnp", **ratios).fit(train).score(test)
    behind = (
        oodlib.create("opnp", **ratios, then=oodlib.create("dice", sparsity=0))
        .fit(train)
        .score(test)
    )
    np.testing.assert_array_equal(behind, alone)


def test_masks_of_dice_and_opnp_multiply_and_gradnorm_counts_what_is_left(blobs):
    train, test, _ = blobs
    pruner = oodlib.create(
        "opnp", weight_low=0.3, weight_high=0, neuron_low=0.1, neuron_high=0, then="gradnorm"
    )
    chain = oodlib.create("dice", sparsity=30, then=pruner).fit(train)
    mask, h = chain.mask_ & chain.then_.mask_, test.features * chain.then_.neurons_
    np.testing.assert_allclose(
        chain.score(test), scores.gradnorm(h, test.head.masked(mask)(h), mask=mask), rtol=1e-10
    )


def test_the_shaped_bank_of_a_chain_is_what_the_end_scores(blobs):
    train, test, _ = blobs
    chain = oodlib.create("react", percentile=80, then=oodlib.create("dice", then="opnp")).fit(
        train
    )
    shaped = chain.shape(test)
    np.testing.assert_allclose(chain.score(test), scores.energy(shaped.logits), rtol=1e-12)
    np.testing.assert_array_equal(shaped.head.mask, chain.then_.mask_ & chain.then_.then_.mask_)


def test_react_before_and_after_pruning_is_the_same_on_relu_features(blobs):
    train, test, _ = blobs
    before = oodlib.create("react", percentile=80, then="opnp").fit(train)
    after = oodlib.create("opnp", then=oodlib.create("react", percentile=80)).fit(train)
    np.testing.assert_array_equal(before.then_.mask_, after.mask_)  # M comes from unshaped features
    np.testing.assert_allclose(before.score(test), after.score(test), rtol=1e-12)


def test_knn_behind_pruning_searches_without_the_neurons(blobs):
    train, test, _ = blobs
    detector = oodlib.create("opnp", neuron_low=0.3, then=oodlib.create("knn", k=5)).fit(train)
    left = detector.neurons_
    np.testing.assert_allclose(
        detector.score(test),
        scores.knn(test.features[:, left], train.features[:, left], k=5),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "then", ["msp", "max_logit", "odin", "gradnorm", "react", "ash", "dice", "knn", "vim"]
)
def test_composes_with_every_score_and_comes_back_from_disk(blobs, tmp_path, then):
    train, test, _ = blobs
    detector = oodlib.create("opnp", then=then, neurons="activation", order="sequential").fit(train)
    detector.save(tmp_path / "d")
    np.testing.assert_array_equal(
        oodlib.load_detector(tmp_path / "d").score(test), detector.score(test)
    )


def test_signed_features_of_a_transformer(batch):
    h, w, b, z = batch
    bank = FeatureBank.from_arrays(h, weight=w, bias=b)
    detector = oodlib.create(
        "opnp", weight_low=0.2, weight_high=0.1, neuron_low=0, neuron_high=0
    ).fit(bank)
    np.testing.assert_array_equal(detector.mask_, kept(opnp_sensitivity(h, z), low=0.2, high=0.1))


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: kept(np.ones(4), low=1.0), r"low must lie in \[0, 1\), got 1.0"),
        (lambda b: kept(np.ones(4), high=-0.1), r"high must lie in \[0, 1\), got -0.1"),
        (lambda b: kept(np.ones(4), low=0.5, high=0.5), "nothing would be left"),
        (
            lambda b: kept(np.ones((2, 2)), scope="row"),
            "scope must be one of global, class, got 'row'",
        ),
        (lambda b: kept(np.array([1, np.nan])), "sensitivities hold NaN"),
        (
            lambda b: oodlib.create("opnp", weight_low=1.5).fit(b),
            r"low must lie in \[0, 1\), got 1.5",
        ),
        (
            lambda b: oodlib.create("opnp", neuron_low=0.6, neuron_high=0.4).fit(b),
            "nothing would be left",
        ),
        (
            lambda b: oodlib.create("opnp", neurons="mean").fit(b),
            "neurons must be one of outgoing, activation",
        ),
        (
            lambda b: oodlib.create("opnp", order="twice").fit(b),
            "order must be one of one-shot, sequential",
        ),
        (lambda b: oodlib.create("opnp", temperature=0).fit(b), "temperature must be positive"),
        (lambda b: oodlib.create("opnp").score(b), "opnp.score: not fitted"),
        (
            lambda b: (
                oodlib.create("opnp")
                .fit(b)
                .score(FeatureBank.from_arrays(b.features[:, :9], weight=b.head.weight[:, :9]))
            ),
            "fitted on 16 features and 4 classes, got a bank of 9",
        ),
        (lambda b: opnp_sensitivity(b.features[:3], b.logits), "equal row count"),
        (
            lambda b: opnp_neurons(b.features, b.logits, b.head.weight.T),
            r"weight must be \(C, D\) = \(4, 16\)",
        ),
        (lambda b: opnp_sensitivity(b.features * np.nan, b.logits), "features or logits hold NaN"),
        (lambda b: opnp(b.head.weight, np.ones((2, 2))), r"need the same shape \(C, D\)"),
        (
            lambda b: opnp(b.head.weight, b.head.weight, neuron_low=0.1),
            r"neurons must be \(D,\) = \(16,\)",
        ),
        (
            lambda b: opnp(
                np.eye(2), np.eye(2), [2.0, 1.0], weight_low=0.5, weight_high=0.25, neuron_high=0.5
            ),
            "no weight is left",
        ),
    ],
)
def test_refusals(blobs, call, message):
    with pytest.raises(OodlibError, match=message):
        call(blobs[0])
