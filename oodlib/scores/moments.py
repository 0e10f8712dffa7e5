"""Class means and covariances of features, streamed in one pass: float64, centred."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError

_ROWS = 16384


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of labelled features.

    mean : (D,); class_means : (C, D); counts : (C,)
    covariance : (D, D), within classes, divided by N (not N - C), as in the Mahalanobis papers
    total_covariance : (D, D), about the global mean, divided by N
    """

    mean: NDArray[np.float64]
    class_means: NDArray[np.float64]
    counts: NDArray[np.int64]
    covariance: NDArray[np.float64]
    total_covariance: NDArray[np.float64]


class MomentSums:
    r"""Moments of features that arrive in batches: `add` each, then `moments`; memory D^2 + C D.

    Sums are taken about the mean m of the first batch, which avoids the cancellation of raw
    moments: ``total = sum (h-m)(h-m)^T / N - (mean-m)(mean-m)^T`` and ``within = total - sum_c n_c
    (mu_c-mean)(mu_c-mean)^T / N``.

    Parameters
    ----------
    num_classes : C

    Raises
    ------
    OodlibError : no batch, a label outside 0 .. C-1, a class without a sample
    """

    def __init__(self, num_classes: int):
        self.counts = np.zeros(num_classes, dtype=np.int64)
        self.shift, self.scatter, self.sums = np.empty(0), np.empty((0, 0)), np.empty((0, 0))

    def add(self, features: Any, labels: Any) -> None:
        """One batch: features (n, D) and labels (n,) with values in 0 .. C-1."""
        features, labels = to_numpy(features), to_numpy(labels)
        classes = len(self.counts)
        _check_labels("stream_moments", features, labels, classes)
        if not self.counts.any():
            self.shift = features[:_ROWS].mean(0, dtype=np.float64)
            size = len(self.shift)
            self.scatter, self.sums = np.zeros((size, size)), np.zeros((classes, size))
        for start in range(0, len(features), _ROWS):
            x = features[start : start + _ROWS].astype(np.float64) - self.shift
            y = labels[start : start + _ROWS]
            self.scatter += x.T @ x
            np.add.at(self.sums, y, x)  # a one-hot product costs C / D times the scatter
            self.counts += np.bincount(y, minlength=classes)

    def moments(self) -> Moments:
        """The moments of all that was added."""
        _check_counts("stream_moments", self.counts)
        n = int(self.counts.sum())
        centred = self.sums.sum(0) / n  # mean - shift
        means = self.sums / self.counts[:, None]  # class means - shift
        total = self.scatter / n - np.outer(centred, centred)
        spread = means - centred
        within = total - (spread.T * (self.counts / n)) @ spread
        return Moments(
            mean=self.shift + centred,
            class_means=self.shift + means,
            counts=self.counts.copy(),
            covariance=(within + within.T) / 2,
            total_covariance=(total + total.T) / 2,
        )


def stream_moments(batches: Iterable[tuple[Any, Any]], num_classes: int) -> Moments:
    """`MomentSums` of batches of features (n, D) and labels (n,); errors as there."""
    sums = MomentSums(num_classes)
    for features, labels in batches:
        sums.add(features, labels)
    return sums.moments()


def stream_means(batches: Iterable[tuple[Any, Any]], num_classes: int) -> NDArray[np.float64]:
    """Class means (C, d) of batches of features (n, ...), flattened to d; memory C x d only.

    Arguments and errors as in `stream_moments`.
    """
    sums, counts = np.empty((0, 0)), np.zeros(num_classes, dtype=np.int64)
    for batch_features, batch_labels in batches:
        features, labels = to_numpy(batch_features), to_numpy(batch_labels)
        _check_labels("stream_means", features, labels, num_classes)
        if not counts.any():
            sums = np.zeros((num_classes, math.prod(features.shape[1:])))
        rows = max(1, 2**24 // sums.shape[1])
        for start in range(0, len(features), rows):
            x, y = features[start : start + rows], labels[start : start + rows]
            np.add.at(sums, y, x.reshape(len(x), -1).astype(np.float64))
        counts += np.bincount(labels, minlength=num_classes)
    _check_counts("stream_means", counts)
    return sums / counts[:, None]


def class_moments(features: Any, labels: Any, num_classes: int) -> Moments:
    """`stream_moments` of whole arrays or tensors (memory-mapped ones are read in pieces).

    Examples
    --------
    >>> moments = class_moments(np.array([[0.0], [2.0], [9.0]]), np.array([0, 0, 1]), 2)
    >>> moments.class_means.ravel(), moments.covariance.round(4)
    (array([1., 9.]), array([[0.6667]]))
    """
    return stream_moments([(features, labels)], num_classes)


def _check_labels(name: str, features: NDArray[Any], labels: NDArray[Any], classes: int) -> None:
    if len(features) != len(labels) or len(features) == 0:
        raise OodlibError(
            f"{name}: a batch has {len(features)} features but {len(labels)} labels; as many are "
            "needed, and at least one. Check the loader or the filter before it."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise OodlibError(
            f"{name}: labels must lie in 0 .. {classes - 1}, got {labels.min()} .. "
            f"{labels.max()}. Leave unlabelled images out."
        )


def _check_counts(name: str, counts: NDArray[np.int64]) -> None:
    if not counts.any():
        raise OodlibError(f"{name}: there was no batch. Check the loader.")
    if (counts == 0).any():
        empty = np.flatnonzero(counts == 0)
        raise OodlibError(
            f"{name}: every class needs a sample, class {empty[0]} has none ({len(empty)} of "
            f"{len(counts)} classes are empty). Check the split."
        )
