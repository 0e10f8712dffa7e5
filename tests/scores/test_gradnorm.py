"""GradNorm's closed form: equal to autograd for every norm, temperature and target; its invariances
and its limits.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import oodlib
from oodlib import FeatureBank, OodlibError
from oodlib.scores import gradnorm, gradnorm_factors, gradnorm_limit

NORMS = [0.3, 0.5, 1, 2, 3, 4, math.inf]
close = torch.testing.assert_close


def autograd(h, w, b, temperature, norm, target):
    """The official way, one backward pass per sample: L_q norm of d CE(target, softmax) / dW."""
    w = w.clone().requires_grad_()
    (-(target * ((w @ h + b) / temperature).log_softmax(0)).sum()).backward()
    return torch.linalg.vector_norm(w.grad.flatten(), norm)


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [0.5, 1, 2, 1000])
@pytest.mark.parametrize("norm", NORMS)
def test_closed_form_equals_autograd(batch, temperature, norm):
    h, w, b, z = batch
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    expected = torch.stack([autograd(x, w, b, temperature, norm, uniform) for x in h])
    close(-gradnorm(h, z, temperature=temperature, norm=norm), expected, rtol=1e-10, atol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("norm", NORMS)
def test_targets_equal_autograd(batch, norm):
    h, w, b, z = batch
    one_hot = torch.eye(5, dtype=torch.float64)
    each = torch.stack(
        [torch.stack([autograd(x, w, b, 2.0, norm, t) for t in one_hot]) for x in h]
    )  # (n, C)
    predicted = gradnorm(h, z, temperature=2.0, norm=norm, target="predicted")
    close(-predicted, each.gather(1, z.argmax(1, keepdim=True))[:, 0], rtol=1e-10, atol=0)
    close(
        -gradnorm(h, z, temperature=2.0, norm=norm, target="label_mean"),
        each.mean(1),
        rtol=1e-10,
        atol=0,
    )
    labels = torch.randint(5, (20, 1), generator=torch.Generator().manual_seed(3))
    random = gradnorm(
        h,
        z,
        temperature=2.0,
        norm=norm,
        target="random",
        generator=torch.Generator().manual_seed(3),
    )
    close(-random, each.gather(1, labels)[:, 0], rtol=1e-10, atol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("norm", [0.5, 1, 2])
def test_removed_weights_have_no_gradient(batch, norm):
    h, w, b, _ = batch
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = []
    for x in h:
        kept = w[mask].clone().requires_grad_()
        pruned = torch.zeros_like(w).masked_scatter(mask, kept)
        (-(pruned @ x + b).log_softmax(0).mean()).backward()
        expected.append(torch.linalg.vector_norm(kept.grad, norm))
    z = h @ (w * mask).T + b
    close(-gradnorm(h, z, norm=norm, mask=mask), torch.stack(expected), rtol=1e-10, atol=0)


def test_mask_of_another_shape_is_refused(batch):
    h, w, _, z = batch
    with pytest.raises(OodlibError, match=r"mask must be \(C, D\)"):
        gradnorm(h, z, mask=torch.ones(w.T.shape))


@pytest.mark.oracle
def test_a_column_of_ones_includes_the_bias(batch):
    h, w, b, z = batch
    with_one = gradnorm(torch.cat([h, torch.ones(20, 1)], 1), z)
    for i in range(20):
        w_i, b_i = w.clone().requires_grad_(), b.clone().requires_grad_()
        (-(w_i @ h[i] + b_i).log_softmax(0).mean()).backward()
        close(-with_one[i], w_i.grad.abs().sum() + b_i.grad.abs().sum())


def test_batch_equals_one_by_one_and_commutes_with_permutation(batch):
    h, _, _, z = batch
    s = gradnorm(h, z)
    close(
        torch.cat([gradnorm(h[i : i + 1], z[i : i + 1]) for i in range(20)]), s, rtol=1e-13, atol=0
    )
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    close(gradnorm(h[order], z[order]), s[order], rtol=0, atol=0)


def test_class_order_does_not_matter(batch):
    h, _, _, z = batch
    close(gradnorm(h, z[:, [3, 0, 4, 1, 2]]), gradnorm(h, z), rtol=1e-13, atol=0)


def test_zero_at_the_uniform_distribution(batch):
    h = batch[0]
    assert (gradnorm(h, torch.full((20, 5), 3.0)) == 0).all()


def test_scales_with_the_feature_and_ignores_its_signs_and_logit_shifts(batch):
    h, _, _, z = batch
    s = gradnorm(h, z)
    close(gradnorm(-3 * h, z), 3 * s)
    close(gradnorm(h.abs(), z), s)
    close(gradnorm(h, z + 7), s)


def test_factors_multiply_to_the_score(batch):
    h, _, _, z = batch
    for norm in NORMS:
        u, v = gradnorm_factors(h, z, temperature=3.0, norm=norm)
        close(-u * v / (5 * 3), gradnorm(h, z, temperature=3.0, norm=norm))
    u, v = gradnorm_factors(h, z)
    close(u, h.abs().sum(1))
    close(v, (1 - 5 * z.softmax(1)).abs().sum(1))


def test_v_is_bounded_and_reaches_the_bound_at_one_hot():
    z = 10 * torch.randn(500, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = torch.ones(500, 1)
    assert (gradnorm_factors(h, z)[1] <= 2 * 49 * (1 + 1e-12)).all()
    z[:, 0] = 1000
    close(gradnorm_factors(h, z)[1], torch.full((500,), 98.0, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_v_of_a_distribution_uniform_over_k_classes(k):
    z = torch.full((1, 10), -1e4)
    z[:, :k] = 0
    assert gradnorm_factors(torch.ones(1, 1), z)[1].item() == pytest.approx(2 * (10 - k))


def test_label_mean_is_the_feature_norm_alone(batch):
    h, _, _, z = batch
    close(
        -gradnorm(h, z, temperature=2.0, target="label_mean"), h.abs().sum(1) * 2 * (1 - 1 / 5) / 2
    )


def test_random_target_has_the_label_mean_as_expectation(batch):
    h, _, _, z = batch
    g = torch.Generator().manual_seed(0)
    mean = (
        gradnorm(h.repeat(4000, 1), z.repeat(4000, 1), target="random", generator=g)
        .reshape(4000, 20)
        .mean(0)
    )
    close(mean, gradnorm(h, z, target="label_mean"), rtol=0.05, atol=0)


def test_predicted_target_falls_with_confidence():
    z = torch.tensor([[1.0, 0], [5.0, 0], [50.0, 0], [60.0, 0]])
    size = -gradnorm(torch.ones(4, 1), z, target="predicted")
    assert (size.diff() < 0).all() and (size > 0).all()


def test_temperature_limit():
    g = torch.Generator().manual_seed(0)
    h, z = torch.rand(300, 7, generator=g), 3 * torch.randn(300, 100, generator=g)
    limit = gradnorm_limit(h, z)
    ranks = [spearmanr(gradnorm(h, z, temperature=t), limit).statistic for t in (1, 10, 1e4)]
    assert ranks[0] < ranks[1] < ranks[2] and ranks[2] > 0.99999
    close(1e12 * gradnorm(h, z, temperature=1e6), limit, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [10, 1e3, 1e6, 1e9])
def test_stable_at_high_temperature(temperature):
    """V in float64 against 50-digit decimals, where the plain difference C p - 1 cancels."""
    from decimal import Decimal, localcontext

    z = (5 * np.random.default_rng(0).normal(size=10)).tolist()
    with localcontext(prec=50):
        e = [(Decimal(x) / Decimal(temperature)).exp() for x in z]
        exact = float(sum(abs(10 * x / sum(e) - 1) for x in e))
    v = gradnorm_factors(np.ones((1, 1)), np.array([z]), temperature=temperature)[1][0]
    assert v == pytest.approx(exact, rel=1e-13)


def test_huge_logits_and_zero_features_stay_finite():
    z = torch.tensor([[1e5, 0, -1e5], [0.0, 1e300, 0]], dtype=torch.float64)
    s = gradnorm(torch.tensor([[1.0, 2], [0, 0]]), z)
    close(s, torch.tensor([-4.0, 0], dtype=torch.float64))


@pytest.mark.filterwarnings("error::UserWarning")
def test_kinds_and_dtypes(batch):
    h, _, _, z = batch
    s = gradnorm(h, z)
    from_numpy = gradnorm(h.numpy(), z.numpy())
    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == np.float64
    np.testing.assert_array_equal(from_numpy, s.numpy())
    single = gradnorm(h.float(), z.float())
    assert single.dtype == torch.float64
    close(single, s, rtol=1e-5, atol=0)
    frozen = h.numpy()
    frozen.setflags(write=False)  # as a memory-mapped bank is
    np.testing.assert_array_equal(gradnorm(frozen, z.numpy()), from_numpy)


def test_memory_is_bounded_by_the_block(batch, monkeypatch):
    h, _, _, z = batch
    whole = gradnorm(h, z)
    monkeypatch.setattr("oodlib.arrays.BLOCK", 1)
    close(gradnorm(h, z), whole, rtol=1e-13, atol=0)


def test_documented_example():
    close(
        gradnorm(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]).log()),
        torch.tensor([-1.5], dtype=torch.float64),
    )


def test_sign_and_fit_is_a_no_op(blobs):
    train, test, ood = blobs
    detector = oodlib.create("gradnorm")
    before = detector.score(test)
    assert (
        before.mean() < detector.score(ood).mean()
    )  # the paper's S is larger for ID; ours is negated
    np.testing.assert_array_equal(detector.fit(train).score(test), before)


def test_detector_options_reach_the_function(blobs):
    test = blobs[1]
    s = oodlib.create("gradnorm", temperature=2, norm=2, target="predicted").score(test)
    np.testing.assert_array_equal(
        s, gradnorm(test.features, test.logits, temperature=2, norm=2, target="predicted")
    )


def test_non_linear_head_is_refused(batch):
    h, w, b, z = batch
    with pytest.raises(
        OodlibError, match="not the input of this head, or something follows the head"
    ):
        FeatureBank.from_arrays(
            h, weight=w, bias=b, logits=z.relu()
        )  # SqueezeNet: ReLU after the classifier
    with pytest.raises(OodlibError, match="pooled to"):
        gradnorm(h.reshape(20, 2, 2, 2), z)  # feature maps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, z: gradnorm(h[:3], z), r"equal row count, got \(3, 8\) and \(20, 5\)"),
        (lambda h, z: gradnorm(h, z[:, 0]), "needs non-empty arrays"),
        (lambda h, z: gradnorm(h, z, norm=0), r"norm q must lie in \(0, inf\], got 0"),
        (lambda h, z: gradnorm_limit(h, z, norm=-1), r"norm q must lie in \(0, inf\]"),
        (lambda h, z: gradnorm(h, z, temperature=0), "temperature must be positive"),
        (
            lambda h, z: gradnorm_factors(h, z, temperature=math.inf),
            "temperature must be positive and finite",
        ),
        (
            lambda h, z: gradnorm(h, z, target="mean"),
            "target must be one of uniform, predicted, label_mean, random",
        ),
        (lambda h, z: gradnorm(h, z, target="random"), "needs generator="),
    ],
)
def test_refusals(batch, call, message):
    with pytest.raises(OodlibError, match=message):
        call(batch[0], batch[3])
