"""Nine scores of one streaming pass against the detectors fitted on a whole bank; geometry against
its definitions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oodlib import FeatureBank, OodlibError
from oodlib.scores import create
from oodlib.studies.vits.reference import reference
from oodlib.studies.vits.score_table import (
    SCORES,
    Reference,
    all_scores,
    geometry,
    norm_correlation,
    score_table,
)

CLASSES, SIZE = 6, 12


def make_bank(n: int, seed: int, *, spread: float = 1.0, labelled: bool = True) -> FeatureBank:
    """Gaussian classes of unequal sizes and scales behind one fixed head."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres, weight, bias = (
        fixed.normal(size=(CLASSES, SIZE)) * 2,
        fixed.normal(size=(CLASSES, SIZE)),
        np.arange(6.0),
    )
    labels = rng.permutation(np.minimum(np.arange(n) % (CLASSES + 2), CLASSES - 1))
    features = centres[labels] * spread + rng.normal(size=(n, SIZE)) * (1 + labels[:, None] / 3)
    return FeatureBank.from_arrays(
        features.astype(np.float32), weight=weight, bias=bias, labels=labels if labelled else None
    )


def unit_bank(bank: FeatureBank) -> FeatureBank:
    features = bank.features.astype(np.float64)
    return replace(bank, features=features / np.linalg.norm(features, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def train() -> FeatureBank:
    return make_bank(600, 1)


@pytest.fixture(scope="module")
def test() -> FeatureBank:
    return make_bank(80, 2, spread=0.4)


@pytest.fixture(scope="module")
def whole(train: FeatureBank) -> Reference:
    """A reference whose subsample is everything, from two parts of the pass."""
    return reference(
        [train.subset(slice(0, 250)), train.subset(slice(250, None))], CLASSES, per_class=600
    )


@pytest.mark.parametrize("name", SCORES)
def test_with_all_rows_kept_a_score_is_the_detectors(
    name: str, train: FeatureBank, test: FeatureBank, whole: Reference
) -> None:
    base, normalised = name.removesuffix("++"), name.endswith("++")
    options = {"k": whole.neighbours} if name == "knn" else {}
    fit_on, score_on = (unit_bank(train), unit_bank(test)) if normalised else (train, test)
    expected = create(base, **options).fit(fit_on).score(score_on)
    found = all_scores(whole, test)[name]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_only_vim_and_knn_read_the_subsample(
    train: FeatureBank, test: FeatureBank, whole: Reference
) -> None:
    few, all_rows = (
        all_scores(reference([train], CLASSES, per_class=20), test),
        all_scores(whole, test),
    )
    changed = {name for name in SCORES if not np.allclose(few[name], all_rows[name], rtol=1e-9)}
    assert changed == {"vim", "knn"}
    assert np.corrcoef(few["vim"], all_rows["vim"])[0, 1] > 0.99


def test_the_subsample_is_the_first_rows_of_each_class(train: FeatureBank) -> None:
    assert train.labels is not None
    kept = reference(
        [train.subset(slice(i, i + 7)) for i in range(0, 600, 7)], CLASSES, per_class=5
    )
    first = np.sort(np.concatenate([np.flatnonzero(train.labels == c)[:5] for c in range(CLASSES)]))
    np.testing.assert_array_equal(kept.features, train.features[first])
    np.testing.assert_array_equal(kept.labels, train.labels[first])


def test_a_small_class_is_kept_whole(train: FeatureBank, whole: Reference) -> None:
    assert len(whole.features) == len(train) and len(np.unique(whole.moments.counts)) > 1


@pytest.mark.parametrize(("rows", "k"), [(7, 7), (500, 10), (26_000, 26), (60_000, 50)])
def test_the_number_of_neighbours_follows_the_subsample(
    whole: Reference, rows: int, k: int
) -> None:
    assert replace(whole, features=np.zeros((rows, SIZE), np.float32)).neighbours == k


def test_a_saved_reference_scores_alike(whole: Reference, test: FeatureBank, tmp_path) -> None:
    whole.save(tmp_path / "a" / "model.safetensors")
    loaded = Reference.load(tmp_path / "a" / "model.safetensors")
    for name, values in all_scores(whole, test).items():
        np.testing.assert_array_equal(all_scores(loaded, test)[name], values)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.safetensors"]


def test_the_score_table_has_a_row_an_image(whole: Reference, test: FeatureBank) -> None:
    table = score_table(whole, {"id": test, "far": make_bank(30, 3, labelled=False)})
    assert list(table) == ["set", "index", "label", *SCORES] and len(table) == 110
    far = table[table["set"] == "far"]
    assert (far["label"] == -1).all() and list(far["index"]) == list(range(30))
    assert {str(table[name].dtype) for name in SCORES} == {"float32"}
    np.testing.assert_array_equal(
        table["knn"][:80], all_scores(whole, test)["knn"].astype(np.float32)
    )


def collapsed(scale: np.ndarray | None = None, noise: float = 0.0) -> Reference:
    """Class means at the corners of a regular simplex, the same residuals in each class (times
    ``scale``).
    """
    rng = np.random.default_rng(0)
    residuals = rng.normal(size=(40, SIZE))
    residuals -= residuals.mean(0)
    labels = np.repeat(np.arange(CLASSES), 40)
    scales = np.ones(CLASSES) if scale is None else scale
    features = 100 * np.eye(CLASSES, SIZE)[labels] + noise * scales[labels, None] * np.tile(
        residuals, (CLASSES, 1)
    )
    bank = FeatureBank.from_arrays(features, weight=np.ones((CLASSES, SIZE)), labels=labels)
    return reference([bank], CLASSES)


def test_a_regular_simplex_of_tight_classes_is_collapsed() -> None:
    found = geometry(collapsed(noise=0.01))
    assert found["nc1"] < 1e-5 and found["nc2_norm"] < 1e-4 and found["nc2_angle"] < 1e-4


def test_nc1_is_the_trace_of_its_definition(whole: Reference) -> None:
    means = whole.moments.class_means
    between = np.cov(means.T, bias=True)
    expected = np.trace(whole.moments.covariance @ np.linalg.pinv(between, rcond=1e-10)) / CLASSES
    assert geometry(whole)["nc1"] == pytest.approx(expected, rel=1e-6)


def test_nc2_sees_unequal_lengths_and_angles() -> None:
    labels = np.arange(90) % 3
    means = np.array([[3.0, 0], [-1, 1], [-2, -1]])  # centred
    noise = np.random.default_rng(0).normal(size=(90, 2)) * 1e-6
    bank = FeatureBank.from_arrays(means[labels] + noise, weight=np.ones((3, 2)), labels=labels)
    norms = np.array([3, 2**0.5, 5**0.5])
    cosines = np.array([-3 / (3 * 2**0.5), -6 / (3 * 5**0.5), 1 / 10**0.5])
    found = geometry(reference([bank], 3))
    assert found["nc2_norm"] == pytest.approx(norms.std() / norms.mean(), rel=1e-4)
    assert found["nc2_angle"] == pytest.approx(np.abs(cosines + 1 / 2).mean(), rel=1e-4)


def test_variance_deviation_is_zero_where_covariances_are_equal() -> None:
    assert geometry(collapsed(noise=1.0))["variance_deviation"] == pytest.approx(0, abs=1e-6)


def test_variance_deviation_is_that_of_the_scales() -> None:
    variances = np.array([0.5, 1.5, 0.5, 1.5, 0.5, 1.5])
    assert geometry(collapsed(np.sqrt(variances), noise=1.0))[
        "variance_deviation"
    ] == pytest.approx(0.5, rel=1e-5)


def test_unit_features_have_another_deviation_and_norms_are_measured(
    whole: Reference, train: FeatureBank
) -> None:
    found, norms = geometry(whole), np.linalg.norm(train.features, axis=1)
    assert found["norm_mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert found["norm_spread"] == pytest.approx(norms.std() / norms.mean(), rel=1e-5)
    assert found["variance_deviation++"] < found["variance_deviation"]


def test_norms_correlate_with_scores_that_are_norms(whole: Reference) -> None:
    far = make_bank(50, 4)
    scaled = FeatureBank.from_arrays(
        np.outer(np.linspace(20, 40, 50), far.features[0]).astype(np.float32),
        weight=far.head.weight,
        bias=far.head.bias,
    )
    found = norm_correlation(whole, scaled)  # one direction: the length alone varies
    assert found["mahalanobis"] == pytest.approx(1) and set(found) == set(SCORES)
    assert np.isnan(norm_correlation(whole, scaled.subset(slice(0, 1)))["mahalanobis"])


def test_bad_input_is_named(train: FeatureBank, whole: Reference, tmp_path) -> None:
    other = FeatureBank.from_arrays(
        train.features, weight=2 * train.head.weight, labels=train.labels
    )
    with pytest.raises(OodlibError, match="two banks have different heads"):
        reference([train, other], CLASSES)
    with pytest.raises(OodlibError, match="no batch"):
        reference([], CLASSES)
    with pytest.raises(OodlibError, match="has no labels"):
        reference([make_bank(9, 1, labelled=False)], CLASSES)
    with pytest.raises(OodlibError, match="class 6 has none"):
        reference([train], CLASSES + 1)
    with pytest.raises(OodlibError, match="per_class must be at least 1"):
        reference([train], CLASSES, per_class=0)
    with pytest.raises(OodlibError, match="of two networks"):
        all_scores(whole, other)
    with pytest.raises(OodlibError, match="no bank to score"):
        score_table(whole, {})
    with pytest.raises(OodlibError, match="there is no file"):
        Reference.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"not it")
    with pytest.raises(OodlibError, match="not a saved reference"):
        Reference.load(tmp_path / "broken")
