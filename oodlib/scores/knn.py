"""Distance to the k-th nearest training feature, exact in float64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodlib.arrays import Array, by_rows, check_k, to_numpy
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register
from oodlib.scores.neighbours import SPARE, EuclideanSearch


def knn(features: Array, bank: Any, *, k: int = 50, normalise: bool = True) -> Array:
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
    (N,) float64; neither faiss nor the number of queries at a time changes it

    Raises
    ------
    OodlibError : k outside 1 .. M, feature sizes differ

    References
    ----------
    Sun, Ming, Zhu, Li, ICML 2022, arXiv 2204.06507. The paper's score is -S, larger = ID.

    Examples
    --------
    >>> bank = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> knn(np.array([[0.0, 1.0]]), bank, k=1, normalise=False)
    array([1.])
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
    key="knn",
    title="Out-of-Distribution Detection with Deep Nearest Neighbors",
    authors="Sun, Ming, Zhu, Li",
    year=2022,
    arxiv="2204.06507",
    needs="features",
    deviations=("distances of the candidates are computed again in float64",),
)
class KNN(Detector):
    """Detector of `knn`; holds the training features (a memory-mapped bank stays on disk)."""

    k: int = 50
    normalise: bool = True

    def _fit(self, bank: FeatureBank) -> None:
        check_k("knn.fit", self.k, len(bank))
        self.bank_ = np.asarray(bank.features)

    def _score(self, bank: FeatureBank) -> Any:
        return knn(bank.features, self.bank_, k=self.k, normalise=self.normalise)
