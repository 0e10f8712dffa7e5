"""Streamed class means and covariances against their definition."""

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance

from oodlib import OodlibError
from oodlib.scores.moments import class_moments, stream_moments

CLASSES = 5


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(600) % CLASSES)
    return rng.normal(size=(600, 8)) @ rng.normal(size=(8, 8)) + 3 * rng.normal(size=(CLASSES, 8))[
        labels
    ], labels


def test_within_class_covariance_is_that_of_the_residuals(data):
    features, labels = data
    means = np.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    moments = class_moments(features, labels, CLASSES)
    oracle = EmpiricalCovariance(assume_centered=True).fit(features - means[labels]).covariance_
    np.testing.assert_allclose(moments.class_means, means, rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, oracle, rtol=1e-10)


def test_total_covariance_is_that_of_all_features(data):
    moments = class_moments(*data, CLASSES)
    np.testing.assert_allclose(
        moments.total_covariance, EmpiricalCovariance().fit(data[0]).covariance_, rtol=1e-10
    )


@pytest.mark.parametrize("size", [1, 7, 600])
def test_batches_do_not_matter(data, size):
    features, labels = data
    streamed = stream_moments(
        ((features[i : i + size], labels[i : i + size]) for i in range(0, 600, size)), CLASSES
    )
    np.testing.assert_allclose(
        streamed.covariance, class_moments(features, labels, CLASSES).covariance, rtol=1e-9
    )


def test_a_large_offset_costs_no_digits(data):
    features, labels = data
    moved = class_moments(features + 1e6, labels, CLASSES)
    np.testing.assert_allclose(
        moved.covariance, class_moments(features, labels, CLASSES).covariance, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(600, int), "class 1 has none"),
        (np.full(600, -1), "labels must lie in"),
        (np.zeros(3, int), "3 labels"),
    ],
)
def test_bad_labels_are_named(data, labels, message):
    with pytest.raises(OodlibError, match=message):
        class_moments(data[0], labels, CLASSES)


def test_an_empty_batch_is_an_error():
    with pytest.raises(OodlibError, match="0 features but 0 labels"):
        class_moments(np.empty((0, 4)), np.empty(0, int), 3)


def test_no_batch_is_an_error():
    with pytest.raises(OodlibError, match="no batch"):
        stream_moments([], CLASSES)
