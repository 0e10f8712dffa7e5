"""Layer-wise density, typicality, complexity, naive norm: definitions, invariances, zeros,
overflow, bad input.
"""

import numpy as np
import pytest
import torch

from oodlib import OodlibError
from oodlib.metrics import auroc
from oodlib.scores.layerwise import LayerwiseDensity, input_complexity, naive_norm, typicality

RNG = np.random.default_rng(0)
SCALES = np.exp(RNG.normal(0, 4, 6))  # tensors differ by orders of magnitude
FIT = SCALES * np.exp(RNG.normal(0, 0.5, (40, 6)))
NEW = SCALES * np.exp(RNG.normal(0, 1, (15, 6)))


def fitted(norms=FIT, **options) -> LayerwiseDensity:
    return LayerwiseDensity(**options).fit(norms)


def with_column(values, norms=FIT):
    """Norms with one more tensor."""
    return np.column_stack([norms, np.broadcast_to(values, len(norms))])


def three_se(n: int, m: int) -> float:
    """Three standard errors of the AUROC of n and m rows of one distribution."""
    return 3 * np.sqrt((n + m + 1) / (12 * n * m))


# --- the density


@pytest.mark.oracle
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_density_is_minus_the_sum_of_normal_log_densities(epsilon):
    u = torch.from_numpy(FIT + epsilon).log()
    normal = torch.distributions.Normal(u.mean(0), (u.var(0) + epsilon).sqrt())
    expected = -normal.log_prob(torch.from_numpy(NEW + epsilon).log()).sum(1)
    np.testing.assert_allclose(fitted(epsilon=epsilon).score(NEW), expected, rtol=1e-10)


def test_density_accepts_tensors_and_gives_float64():
    score = fitted(torch.from_numpy(FIT).float()).score(torch.from_numpy(NEW).float())
    assert score.dtype == np.float64 and score.shape == (15,)
    np.testing.assert_allclose(score, fitted().score(NEW), rtol=1e-4)


def test_terms_add_up_to_the_score():
    density = fitted(with_column(0.0))
    terms = density.terms(with_column(1.0, NEW))
    np.testing.assert_allclose(terms.sum(1), density.score(with_column(2.0, NEW)), rtol=1e-12)
    assert terms.shape == (15, 7) and (terms[:, 6] == 0).all()


@pytest.mark.parametrize("tensor", range(6))
@pytest.mark.parametrize("direction", [-1, 1])
def test_score_rises_when_a_log_norm_moves_either_way(tensor, direction):
    density = fitted()
    rows = np.tile(np.exp(density.mean_), (6, 1))
    rows[:, tensor] *= np.exp(
        direction * np.array([0, 0.3, 1, 5, 30, 200])
    )  # far beyond the smallest fitted value
    assert (np.diff(density.score(rows)) > 0).all()


@pytest.mark.parametrize("factor", [1e-8, (3072 * np.log(2)) ** -2, 1e8])
def test_the_unit_of_the_objective_does_not_matter_without_epsilon(factor):
    np.testing.assert_allclose(
        fitted(factor * FIT).score(factor * NEW), fitted().score(NEW), rtol=1e-9
    )


def test_the_unit_of_the_objective_matters_with_epsilon():
    small = 1e-8 * FIT / SCALES, 1e-8 * NEW / SCALES
    score = fitted(small[0], epsilon=1e-10).score(small[1])
    assert np.abs(score - fitted(FIT / SCALES, epsilon=1e-10).score(NEW / SCALES)).max() > 0.1


@pytest.mark.parametrize(
    "column", [0.0, 3.0, np.r_[0.0, np.ones(39)]], ids=["zero", "constant", "zero for one row"]
)
def test_a_tensor_without_variation_or_with_a_zero_is_left_out(column):
    density = fitted(with_column(column))
    assert density.kept_.tolist() == [True] * 6 + [False]
    for value in (0.0, 1.0, 1e9):
        np.testing.assert_allclose(
            density.score(with_column(value, NEW)), fitted().score(NEW), rtol=1e-12
        )
    assert np.isnan(density.log_norms(with_column(1.0, NEW))[:, 6]).all()


def test_with_epsilon_every_tensor_counts():
    density = fitted(with_column(0.0), epsilon=1e-10)
    assert density.kept_.all()
    low, high = density.score(with_column(0.0, NEW[:1])), density.score(with_column(1.0, NEW[:1]))
    assert np.isfinite(low).all() and high > low + 1e6


def test_a_zero_met_later_counts_as_the_smallest_fitted_value():
    zero, smallest = NEW.copy(), NEW.copy()
    zero[:, 2], smallest[:, 2] = 0.0, FIT[:, 2].min()
    np.testing.assert_array_equal(fitted().score(zero), fitted().score(smallest))


def test_rows_that_overflow_are_left_out_of_the_fit_and_counted():
    rows = np.concatenate([FIT, FIT[:3]])
    rows[40:, 1] = np.inf
    density = fitted(rows)
    assert density.overflowed_ == 3 and fitted().overflowed_ == 0
    np.testing.assert_array_equal(density.score(NEW), fitted().score(NEW))


@pytest.mark.parametrize("epsilon", [0.0, 1e-10])
def test_rows_that_overflow_score_infinity(epsilon):
    rows = NEW.copy()
    rows[4], rows[9, 3] = np.inf, np.inf
    score = fitted(epsilon=epsilon).score(rows)
    assert np.flatnonzero(score == np.inf).tolist() == [4, 9] and not np.isnan(score).any()


def test_an_overflow_in_a_tensor_that_is_left_out_does_not_count():
    score = fitted(with_column(0.0)).score(with_column(np.inf, NEW))
    np.testing.assert_allclose(score, fitted().score(NEW), rtol=1e-12)


def halves(seed: int, n: int, tensors: int = 60):
    """Three sets of rows of one distribution: to fit on, and two to tell apart."""
    return np.exp(np.random.default_rng(seed).normal(0, 1, (3, n, tensors)))


@pytest.mark.parametrize("n", [16, 400])
def test_two_halves_of_the_id_set_cannot_be_told_apart(n):
    values = []
    for seed in range(20):
        fit, one, other = halves(seed, n)
        values.append(auroc(fitted(fit).score(one), fitted(fit).score(other)))
    assert abs(np.mean(values) - 0.5) < three_se(n, n) / np.sqrt(20)


def test_a_leaky_fit_on_few_groups_tells_them_apart():
    values = []
    for seed in range(20):
        fit, one, other = halves(seed, 16)
        leaky = fitted(np.concatenate([fit, one]))
        values.append(auroc(leaky.score(one), leaky.score(other)))
    assert np.mean(values) > 0.5 + three_se(16, 16) / np.sqrt(20)


@pytest.mark.parametrize(
    "norms",
    [FIT[0], FIT[:0], FIT[:, :0], np.where(FIT > 0, np.nan, 0), -FIT],
    ids=["one axis", "no row", "no tensor", "NaN", "negative"],
)
@pytest.mark.parametrize(
    "call",
    [fitted, lambda norms: fitted().score(norms), naive_norm],
    ids=["fit", "score", "naive_norm"],
)
def test_norms_that_are_none_are_refused(call, norms):
    with pytest.raises(OodlibError, match="needs squared norms"):
        call(norms)


@pytest.mark.parametrize(
    "norms",
    [FIT[:1], np.concatenate([FIT[:1], np.full((5, 6), np.inf)])],
    ids=["one row", "one finite row"],
)
def test_one_row_is_not_enough_to_fit(norms):
    with pytest.raises(
        OodlibError, match=rf"at least 2 rows of finite norms, got 1 \({len(norms) - 1} overflowed"
    ):
        fitted(norms)


@pytest.mark.parametrize("norms", [np.zeros((5, 3)), np.ones((5, 3))], ids=["zero", "constant"])
def test_nothing_to_fit_is_refused(norms):
    with pytest.raises(OodlibError, match="nothing to fit"):
        fitted(norms)


def test_norms_of_another_network_are_refused():
    with pytest.raises(OodlibError, match="fitted on 6 tensors, got norms of 5"):
        fitted().score(NEW[:, :5])


def test_score_before_fit_is_refused():
    with pytest.raises(OodlibError, match="call fit"):
        LayerwiseDensity().score(NEW)


@pytest.mark.parametrize("epsilon", [-1e-10, 1.0, np.nan])
def test_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(OodlibError, match="epsilon must lie in"):
        LayerwiseDensity(epsilon=epsilon)


# --- the baselines


def test_naive_norm_is_the_log_of_the_whole_squared_norm():
    np.testing.assert_allclose(naive_norm(NEW), [np.log(sum(row)) for row in NEW], rtol=1e-12)


def test_naive_norm_of_zeros_and_of_an_overflow():
    assert naive_norm([[0.0, 0.0], [np.inf, 1.0]]).tolist() == [-np.inf, np.inf]


def test_typicality_is_the_distance_from_the_mean_on_either_side():
    assert typicality([1.0, 4.0, 9.0, np.inf], [2.0, 6.0, np.inf]).tolist() == [
        3.0,
        0.0,
        5.0,
        np.inf,
    ]


def test_typicality_without_a_finite_likelihood_is_refused():
    with pytest.raises(OodlibError, match="no finite likelihood"):
        typicality([1.0], [np.inf])


def test_input_complexity_is_the_difference_of_code_lengths():
    assert input_complexity([100.0, 50.0, np.inf], [80, 90, 90]).tolist() == [20.0, -40.0, np.inf]


@pytest.mark.parametrize("code", [[1.0, 2.0, 3.0], [1.0, np.inf]])
def test_input_complexity_needs_a_code_length_of_each_image(code):
    with pytest.raises(OodlibError, match="finite code length for each of 2 images"):
        input_complexity([1.0, 2.0], code)


@pytest.mark.parametrize(
    "values",
    [[], [1.0, np.nan], [1.0, -np.inf], [[1.0]]],
    ids=["none", "NaN", "-infinity", "two axes"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda v: typicality(v, [1.0]),
        lambda v: typicality([1.0], v),
        lambda v: input_complexity(v, [1.0] * len(v)),
        lambda v: input_complexity([1.0] * len(v), v),
    ],
    ids=["typicality", "typicality fit", "complexity", "complexity code"],
)
def test_values_that_are_no_likelihoods_are_refused(call, values):
    with pytest.raises(OodlibError, match="none NaN or -inf"):
        call(values)
