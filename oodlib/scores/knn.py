"""Distance to the k-th nearest training feature, exact in float64 with or without faiss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodlib.bank import FeatureBank, to_numpy
from oodlib.errors import OodlibError
from oodlib.scores.arrays import by_rows
from oodlib.scores.base import Detector, Info, register

_SPARE = 16                                # candidates beyond k, against misordering by float32 distances


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
        raise OodlibError(f"knn: features (N, D) and bank (M, D) need the same D, got {tuple(np.shape(features))} and "
                          f"{train.shape}.")
    if not 1 <= k <= len(train):
        raise OodlibError(f"knn: k must lie in 1 .. {len(train)} (the size of the bank), got {k}. Give a smaller k.")
    train = train.astype(np.float64)
    if normalise:
        train /= np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    centre = train.mean(0)                 # distances ignore shifts; centred values lose less in float32
    train -= centre
    search = _Search(train, min(k + _SPARE, len(train)))

    def distance(h: Tensor) -> Tensor:
        x = h.cpu().numpy()
        if normalise:
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(search(x - centre, k)).to(h.device)

    return by_rows("knn", distance, features)


class _Search:
    def __init__(self, train: NDArray[np.float64], candidates: int):
        self.train, self.candidates = train, candidates
        self.squares = np.square(train).sum(1)
        self.index = None
        try:
            import faiss  # late: beside torch it can crash on macOS (faiss-wheels issue 73)
        except ImportError:
            return
        self.index = faiss.IndexFlatL2(train.shape[1])
        for i in range(0, len(train), 65536):
            self.index.add(train[i:i + 65536].astype(np.float32))

    def __call__(self, x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        if self.index is None:
            return self.exact(x, k)
        approximate, found = self.index.search(x.astype(np.float32), self.candidates)
        result = self.measure(x, found, k)
        if self.candidates < len(self.train):
            # a neighbour that was not returned lies at least as far as the last candidate, up to the float32 error
            size = np.linalg.norm(x, axis=1) + np.sqrt(self.squares.max())
            slack = 2.0**-22 * np.sqrt(x.shape[1]) * size**2
            unsure = ~(approximate[:, -1] - slack >= result**2)
            if unsure.any():
                result[unsure] = self.exact(x[unsure], k)
        return result

    def exact(self, x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        """Brute force in float64, blocks of the bank at a time."""
        result = np.empty(len(x))
        for i in range(0, len(x), 256):
            q = torch.from_numpy(x[i:i + 256])
            best, where = torch.empty(len(q), 0, dtype=torch.float64), torch.empty(len(q), 0, dtype=torch.int64)
            for j in range(0, len(self.train), 16384):
                block = torch.from_numpy(self.train[j:j + 16384])
                squared = torch.from_numpy(self.squares[j:j + 16384]) - 2 * q @ block.T    # without ||q||^2
                both = torch.cat([best, squared], 1)
                ids = torch.cat([where, torch.arange(j, j + len(block)).expand(len(q), -1)], 1)
                best, order = both.topk(min(self.candidates, both.shape[1]), largest=False)
                where = ids.gather(1, order)
            result[i:i + 256] = self.measure(x[i:i + 256], where.numpy(), k)
        return result

    def measure(self, x: NDArray[np.float64], found: NDArray[np.int64], k: int) -> NDArray[np.float64]:
        """The k-th smallest distance to the candidates, from differences, so that nothing cancels."""
        result = np.empty(len(x))
        rows = max(1, 2**21 // (found.shape[1] * x.shape[1]))
        for i in range(0, len(x), rows):
            difference = self.train[found[i:i + rows]] - x[i:i + rows, None]
            squared = np.einsum("nkd,nkd->nk", difference, difference)
            result[i:i + rows] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])
        return result


@register(Info("knn", "Out-of-Distribution Detection with Deep Nearest Neighbors", "Sun, Ming, Zhu, Li", 2022,
               "2204.06507", "id", needs="features",
               deviations=("distances of the candidates are computed again in float64",)))
@dataclass(kw_only=True, eq=False)
class KNN(Detector):
    """Detector of `knn`; keeps the training features (a memory-mapped bank stays on disk)."""

    k: int = 50
    normalise: bool = True

    def _fit(self, bank: FeatureBank) -> None:
        if not 1 <= self.k <= len(bank):
            raise OodlibError(f"knn.fit: k must lie in 1 .. {len(bank)} (the size of the bank), got {self.k}. "
                              "Give a smaller k or a larger bank.")
        self.bank_ = np.asarray(bank.features)

    def _score(self, bank: FeatureBank) -> Any:
        return knn(bank.features, self.bank_, k=self.k, normalise=self.normalise)
