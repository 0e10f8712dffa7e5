"""Distance to the k-th nearest training feature, exact in float64 with or without faiss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodlib.arrays import by_rows, check_k, to_numpy
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register
from oodlib.scores.neighbours import SPARE, EuclideanSearch


def knn(features: Any, bank: Any, *, k: int = 50, normalise: bool = True) -> Any:
    r"""Euclidean distance to the k-th nearest training feature; larger = more OOD.

    S = ||x - x_(k)||_2,   x = h / ||h||_2 if ``normalise``

    Parameters
    ----------
    features : (N, D)
    bank : (M, D), ID training features
    k : 1 .. M
    normalise : features to unit length first, as the paper does (a zero feature stays zero)

    Returns
    -------
    (N,) float64

    Raises
    ------
    OodlibError : k outside 1 .. M, feature sizes differ

    References
    ----------
    Sun, Ming, Zhu, Li, ICML 2022, arXiv 2204.06507. The paper's score is -S, larger = ID.

    Notes
    -----
    faiss, where installed, finds k + 16 candidates in float32 (`IndexFlatL2`); their distances are computed again in
    float64, and a row is searched again in float64 where a float32 error could have hidden a neighbour. The result
    depends neither on faiss nor on the number of queries at a time.
    """
    train = to_numpy(bank)
    if train.ndim != 2 or np.shape(features)[1:] != train.shape[1:]:
        raise OodlibError(
            "knn: features (N, D) and bank (M, D) need the same D, got "
            f"{tuple(np.shape(features))} and {train.shape}."
        )
    check_k("knn", k, len(train))
    train = train.astype(np.float64)
    if normalise:
        train /= np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    centre = train.mean(0)  # distances ignore shifts; centred values lose less in float32
    train -= centre
    search = EuclideanSearch(train, min(k + SPARE, len(train)))

    def distance(h: Tensor) -> Tensor:
        x = h.cpu().numpy()
        if normalise:
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(search(x - centre, k)).to(h.device)

    return by_rows("knn", distance, features)


@register(
    Info(
        key="knn",
        title="Out-of-Distribution Detection with Deep Nearest Neighbors",
        authors="Sun, Ming, Zhu, Li",
        year=2022,
        arxiv="2204.06507",
        paper_larger_means="id",
        needs="features",
        deviations=("distances of the candidates are computed again in float64",),
    )
)
@dataclass(kw_only=True, eq=False)
class KNN(Detector):
    """Detector of `knn`; keeps the training features (a memory-mapped bank stays on disk)."""

    k: int = 50
    normalise: bool = True

    def _fit(self, bank: FeatureBank) -> None:
        check_k("knn.fit", self.k, len(bank))
        self.bank_ = np.asarray(bank.features)

    def _score(self, bank: FeatureBank) -> Any:
        return knn(bank.features, self.bank_, k=self.k, normalise=self.normalise)
