"""What one pass over the training features leaves of a model: moments, and a balanced subsample."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank, Head
from oodlib.files import atomic_path
from oodlib.scores import whitening
from oodlib.scores.moments import Moments, MomentSums
from oodlib.scores.vim import vim_alpha, vim_origin, vim_residual

_ROWS = 16384
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """What fitting leaves of a model's training features, whatever their number.

    Attributes
    ----------
    moments, unit_moments : of all features and of all L2-normalised features, float64
    head : of the model
    features, labels : (M, D) float32 and (M,): the first rows of each class, in the order they came
    """

    moments: Moments
    unit_moments: Moments
    head: Head
    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    @cached_property
    def logits(self) -> Array:
        """(M, C), of the subsample."""
        return self.head(self.features)

    @property
    def neighbours(self) -> int:
        """k of the nearest-neighbour score: M / 1000, at least 10, at most 50, at most M."""
        return min(max(10, min(50, len(self.features) // 1000)), len(self.features))

    @cached_property
    def whitenings(self) -> dict[str, tuple[Array, Array]]:
        """`whitening` of (within-class, total) covariance; "" raw features, "++" unit features."""
        return {
            name: (whitening(m.covariance), whitening(m.total_covariance))
            for name, m in (("", self.moments), ("++", self.unit_moments))
        }

    @cached_property
    def virtual(self) -> dict[str, Any]:
        """Origin o and residual space of ViM (from all features), and alpha (from the subsample).

        About o, the second moment is the total covariance + (mean - o)(mean - o)^T.
        """
        origin = vim_origin(self.head)
        shift = self.moments.mean - origin
        residual = vim_residual(self.moments.total_covariance + np.outer(shift, shift))
        alpha = vim_alpha(self.features, self.logits, origin, residual)
        return {"origin": origin, "residual": residual, "alpha": alpha}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        arrays: dict[str, NDArray] = {
            "features": self.features,
            "labels": self.labels,
            "weight": self.head.weight,
            "bias": self.head.bias,
        }
        for prefix, moments in (("", self.moments), ("unit_", self.unit_moments)):
            arrays |= {f"{prefix}{f.name}": getattr(moments, f.name) for f in fields(Moments)}
        with atomic_path(path) as temporary:
            try:
                save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read what `save` wrote. OodlibError: no such file, or not a reference."""
        if not Path(path).is_file():
            raise OodlibError(
                f"Reference.load: there is no file {path}. Run the pass over the training images "
                "first."
            )
        try:
            arrays = load_file(path)
            moments, unit_moments = (
                Moments(**{f.name: arrays[prefix + f.name] for f in fields(Moments)})
                for prefix in ("", "unit_")
            )
            head = Head(arrays["weight"], arrays["bias"])
            return cls(moments, unit_moments, head, arrays["features"], arrays["labels"])
        except (SafetensorError, KeyError) as error:
            raise OodlibError(
                f"Reference.load: {path} is not a saved reference ({error}). Delete it and run the "
                "pass again."
            ) from error


def unit(features: Any) -> Array:
    """(N, D) -> (N, D) float64, each row of length 1; a zero row stays zero.

    >>> unit([[3.0, 4.0], [0.0, 0.0]]).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = np.asarray(features, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def reference(banks: Iterable[FeatureBank], num_classes: int, *, per_class: int = 50) -> Reference:
    """Fit every score of `SCORES` in one pass over labelled training features.

    Parameters
    ----------
    banks : parts of one pass, as `oodlib.features.extract.stream` yields them; or a list of one
    num_classes : C
    per_class : rows of each class in the subsample; a smaller class is taken whole

    Raises
    ------
    OodlibError : no bank, no labels, a label outside 0 .. C-1, a class without a sample, banks of
        two networks, ``per_class`` below 1
    """
    if per_class < 1:
        raise OodlibError(
            f"reference: per_class must be at least 1, got {per_class}. ViM and kNN need features."
        )
    sums, unit_sums = MomentSums(num_classes), MomentSums(num_classes)
    samples: list[tuple[NDArray, NDArray]] = []
    head: Head | None = None
    for bank in banks:
        if bank.labels is None:
            raise OodlibError(
                "reference: a bank has no labels. Mahalanobis distances need the class of every "
                "training image."
            )
        if head is not None and bank.head.digest != head.digest:
            raise OodlibError(
                "reference: two banks have different heads. Give the banks of one pass of one "
                "model."
            )
        head = bank.head
        for start in range(0, len(bank), _ROWS):
            rows = slice(start, start + _ROWS)
            x, y = np.asarray(bank.features[rows]), np.asarray(bank.labels[rows])
            before = sums.counts.copy()
            sums.add(x, y)
            unit_sums.add(unit(x), y)
            sampled = before[y] + _rank_in_class(y) < per_class
            samples.append((x[sampled].astype(np.float32), y[sampled]))
    moments, unit_moments = sums.moments(), unit_sums.moments()
    assert head is not None  # moments() refuses no bank
    features, labels = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    return Reference(moments, unit_moments, head, features, labels)


def _rank_in_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same class stand before each row."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank
