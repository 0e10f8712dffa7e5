"""Nearest neighbours: exact search of plain vectors, and search of vectors that are a log-norm and
a direction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from oodlib.errors import OodlibError

__all__ = ["SPARE", "EuclideanSearch", "Index", "PolarSearch"]

SPARE = 16  # candidates beyond k, against misordering by float32 distances
Index = Literal["flat", "ivf", "hnsw", "ivfpq"]
Array = NDArray[np.float64]
_KINDS = ("flat", "ivf", "hnsw", "ivfpq")
_PER_CENTROID = 39  # training points a k-means centroid needs; below it faiss warns
_LEAST = -1e300  # stands for the log of zero, so that differences stay defined
_RANGE = 40.0  # e^80 is the largest square, so float32 holds it


class EuclideanSearch:
    """Distance to the k-th nearest row of ``train`` (M, D), exact in float64 with or without faiss.

    faiss finds candidates in float32; their distances are computed again, and a query is searched
    again in float64 where a float32 error could have hidden a neighbour. Centre the values first:
    large ones lose digits in float32.

    Parameters
    ----------
    train : (M, D) float64
    candidates : rows to look at for each query, k .. M
    """

    def __init__(self, train: Array, candidates: int):
        self.train, self.candidates = train, candidates
        self.squares = np.square(train).sum(1)
        self.index = None
        try:
            import faiss  # late: beside torch it can crash on macOS (faiss-wheels issue 73)
        except ImportError:
            return
        self.index = faiss.IndexFlatL2(train.shape[1])
        for i in range(0, len(train), 65536):
            self.index.add(train[i : i + 65536].astype(np.float32))

    def __call__(self, x: Array, k: int) -> Array:
        """(n, D) -> (n,)."""
        if self.index is None:
            return self.exact(x, k)
        approximate, found = self.index.search(x.astype(np.float32), self.candidates)
        result = self.measure(x, found, k)
        if self.candidates < len(self.train):
            # a neighbour that was not returned lies at least as far as the last candidate, up to
            # the float32 error
            size = np.linalg.norm(x, axis=1) + np.sqrt(self.squares.max())
            slack = 2.0**-22 * np.sqrt(x.shape[1]) * size**2
            unsure = ~(approximate[:, -1] - slack >= result**2)
            if unsure.any():
                result[unsure] = self.exact(x[unsure], k)
        return result

    def exact(self, x: Array, k: int) -> Array:
        """Brute force in float64, blocks of the bank at a time."""
        result = np.empty(len(x))
        for i in range(0, len(x), 256):
            q = torch.from_numpy(x[i : i + 256])
            best, where = (
                torch.empty(len(q), 0, dtype=torch.float64),
                torch.empty(len(q), 0, dtype=torch.int64),
            )
            for j in range(0, len(self.train), 16384):
                block = torch.from_numpy(self.train[j : j + 16384])
                squared = (
                    torch.from_numpy(self.squares[j : j + 16384]) - 2 * q @ block.T
                )  # without ||q||^2
                best, where = _smallest(best, where, squared, j, self.candidates)
            result[i : i + 256] = self.measure(x[i : i + 256], where.numpy(), k)
        return result

    def measure(self, x: Array, found: NDArray[np.int64], k: int) -> Array:
        """The k-th smallest distance to the candidates, from differences, so that nothing cancels."""
        result = np.empty(len(x))
        rows = max(1, 2**21 // (found.shape[1] * x.shape[1]))
        for i in range(0, len(x), rows):
            difference = self.train[found[i : i + rows]] - x[i : i + rows, None]
            squared = np.einsum("nkd,nkd->nk", difference, difference)
            result[i : i + rows] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])
        return result


class PolarSearch:
    r"""Log of the distance to the k-th nearest of M vectors ``e^l u``; l may be far below or above
    what a float holds.

    With a = max(l, l') and t = e^(min(l, l') - a):   log ||e^l u - e^l' u'|| = a + log((1 - t)^2 + t ||u - u'||^2) / 2

    Parameters
    ----------
    log_norm : (M,) the l of every vector
    directions : row numbers (n,) or a slice -> (n, D) float64, the unit vectors u of these rows (or zero vectors)
    index : "flat" compares with every vector, exactly and without faiss: float32 cosines give lower bounds of all
        distances, the nearest are measured in float64, and a query that the bounds leave open is
        searched again with float64 cosines, then against everything. "ivf" (inverted lists), "hnsw"
        (graph, 32 links) and "ivfpq" (lists of compressed vectors) look at a part only, with faiss;
        the k + 16 candidates they find are measured in float64. They see norms within e^-40 .. e^40
        of the median, others at that edge: a warning says so
    nlist : number of inverted lists; by default 4 sqrt(M), or fewer where a list would have less
        than 39 vectors
    nprobe : lists that are searched; a query that meets too few vectors there is searched again in
        more of them
    seed : of k-means

    Raises
    ------
    OodlibError : unknown index, nlist or nprobe out of range, too few vectors for ivfpq, faiss not installed
    """

    def __init__(
        self,
        log_norm: Array,
        directions: Callable[[Any], Array],
        *,
        index: str = "flat",
        nlist: int | None = None,
        nprobe: int = 4,
        seed: int = 0,
    ):
        self.log_norm, self.directions = np.maximum(log_norm, _LEAST), directions
        self.shift = float(np.median(log_norm))  # common factor e^-shift, for float32
        self.nprobe, self.index, self.unit = nprobe, None, np.empty((0, 0), np.float32)
        if index not in _KINDS:
            raise OodlibError(
                f"PolarSearch: index must be one of {', '.join(_KINDS)}, got {index!r}."
            )
        beyond = int((np.abs(log_norm - self.shift) > _RANGE).sum())
        if index != "flat" and beyond:
            warnings.warn(
                f"PolarSearch: {beyond} of {len(log_norm)} norms lie more than {_RANGE:.0f} nats "
                "from the "
                f'median, where index="{index}" cannot tell them apart. Use index="flat".',
                RuntimeWarning,
                stacklevel=2,
            )
        vectors = np.concatenate(
            [
                self._part(slice(i, i + 16384), index != "flat")
                for i in range(0, len(log_norm), 16384)
            ]
        )
        if index == "flat":
            self.unit = vectors
        else:
            self.index = _build(index, vectors, nlist, nprobe, seed)

    def __call__(self, log_norm: Array, unit: Array, k: int = 1) -> Array:
        """(n,) and (n, D) -> (n,); -inf where a query is one of the vectors (k = 1)."""
        log_norm = np.maximum(log_norm, _LEAST)
        found = [
            self._some(l, u, k) if self.index is not None else self._all(l, u, k)
            for l, u in (
                (log_norm[i : i + 256], unit[i : i + 256]) for i in range(0, len(unit), 256)
            )
        ]
        return np.concatenate(found)

    def _part(self, rows: slice, scaled: bool) -> NDArray[np.float32]:
        u = self.directions(rows)
        return (_scale(self.log_norm[rows] - self.shift, u) if scaled else u).astype(np.float32)

    def _all(self, log_norm: Array, unit: Array, k: int) -> Array:
        result, sure = self._candidates(log_norm, unit, k, k + SPARE, torch.float32)
        for count in (
            k + 8 * SPARE,
            len(self.log_norm),
        ):  # near-duplicates that even float64 cosines cannot order
            if len(
                unsure := np.flatnonzero(~sure)
            ):  # are few: they are measured against every vector
                result[unsure], sure[unsure] = self._candidates(
                    log_norm[unsure], unit[unsure], k, count, torch.float64
                )
        return result

    def _candidates(
        self, log_norm: Array, unit: Array, k: int, count: int, kind: torch.dtype
    ) -> tuple[Array, NDArray[np.bool_]]:
        r"""Log distance to the k-th of ``count`` candidates, and whether no other vector can be
        nearer.

        With m = min(l, largest l'), r = e^(l' - m), w = e^(m - l) the distance rises with the key r
        (r w - 2 cos). Lower bounds of the keys (cosine and exponential off by their rounding
        errors) order the vectors.
        """
        single = kind == torch.float32
        error, shrink = (
            math.sqrt(unit.shape[1]) * 2.0 ** (-22 if single else -50),
            1 - 2.0 ** (-20 if single else -48),
        )
        m = torch.from_numpy(np.minimum(log_norm, self.log_norm.max()))[:, None]
        w = (m - torch.from_numpy(log_norm)[:, None]).exp().to(kind) * shrink
        q = torch.from_numpy(-2 * unit).to(kind)
        best, where = torch.empty(len(q), 0, dtype=kind), torch.empty(len(q), 0, dtype=torch.int64)
        for j in range(0, len(self.log_norm), 4096):
            rows = slice(j, j + 4096)
            block = torch.from_numpy(self.unit[rows] if single else self.directions(rows))
            r = (torch.from_numpy(self.log_norm[rows]) - m).clamp_(-1e30, _RANGE).to(kind).exp_()
            bound = (q @ block.T).sub_(2 * error).addcmul_(r, w).mul_(r)
            best, where = _smallest(best, where, bound, j, count)
        result, key = self._measure(log_norm, unit, where.numpy(), k)
        sure = best[:, -1].double().numpy() - np.finfo(np.float32).tiny >= key
        return result, sure | (count >= len(self.log_norm))

    def _some(self, log_norm: Array, unit: Array, k: int) -> Array:
        x = _scale(log_norm - self.shift, unit).astype(np.float32)
        index: Any = self.index
        nprobe = self.nprobe
        found = index.search(x, min(k + SPARE, index.ntotal))[1]
        while (few := (found >= 0).sum(1) < k).any():  # the lists it looked at hold fewer: label -1
            if not hasattr(index, "nlist") or nprobe >= index.nlist:
                raise OodlibError(
                    f"PolarSearch: {int(few.sum())} queries found fewer than k = {k} neighbours. "
                    "Give "
                    'index="flat".'
                )
            nprobe = min(2 * nprobe, index.nlist)
            found[few] = index.search(x[few], found.shape[1], params=_parameters(nprobe))[1]
        return self._measure(log_norm, unit, found, k)[0]

    def _measure(
        self, log_norm: Array, unit: Array, found: NDArray[np.int64], k: int
    ) -> tuple[Array, Array]:
        """Log distance to the k-th nearest of the rows found (-1: none), and its key (see
        `_candidates`).
        """
        result, keys, top = np.empty(len(unit)), np.empty(len(unit)), self.log_norm.max()
        rows = max(1, 2**21 // (found.shape[1] * unit.shape[1]))
        for i in range(0, len(unit), rows):
            where, l = found[i : i + rows], log_norm[i : i + rows, None]
            other = (
                self.directions(where.ravel()).reshape(*where.shape, -1) - unit[i : i + rows, None]
            )
            squared = np.einsum("nkd,nkd->nk", other, other)  # 2 (1 - cos), nothing cancels
            l2, m = self.log_norm[where], np.minimum(l, top)
            gap = -np.abs(l - l2)
            with np.errstate(divide="ignore"):
                distance = np.maximum(l, l2) + 0.5 * np.log(
                    np.expm1(gap) ** 2 + np.exp(gap) * squared
                )
            r = np.exp(np.minimum(l2 - m, _RANGE))
            key = r * (r * np.exp(m - l) - 2 + squared)
            missing = where < 0
            distance[missing] = key[missing] = np.inf
            result[i : i + rows] = np.partition(distance, k - 1, axis=1)[:, k - 1]
            keys[i : i + rows] = np.partition(key, k - 1, axis=1)[:, k - 1]
        return result, keys


def _smallest(
    best: torch.Tensor, where: torch.Tensor, values: torch.Tensor, start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` smallest of each row so far, ascending, and their columns; ``values`` begin at
    column ``start``.
    """
    found, columns = values.topk(min(count, values.shape[1]), largest=False)
    both, columns = torch.cat([best, found], 1), torch.cat([where, columns + start], 1)
    best, order = both.topk(min(count, both.shape[1]), largest=False)
    return best, columns.gather(1, order)


def _scale(log_norm: Array, unit: Array) -> Array:
    return np.exp(np.clip(log_norm, -_RANGE, _RANGE))[:, None] * unit


def _parameters(nprobe: int) -> Any:
    import faiss

    parameters: Any = faiss.SearchParametersIVF
    return parameters(nprobe=nprobe)


def _build(
    kind: str, vectors: NDArray[np.float32], nlist: int | None, nprobe: int, seed: int
) -> Any:
    """A trained faiss index (ivf, hnsw, ivfpq) that holds the vectors."""
    try:
        import faiss
    except ImportError as error:
        raise OodlibError(
            f'PolarSearch: index="{kind}" needs faiss, which is not installed. Install faiss-cpu, or use '
            'index="flat".'
        ) from error
    index: Any
    count, size = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, 32)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 128
        with _one_thread(faiss):  # several threads would add in a changing order
            index.add(vectors)
        return index
    lists = (
        nlist
        if nlist is not None
        else max(1, min(round(4 * math.sqrt(count)), count // _PER_CENTROID))
    )
    if not (1 <= lists <= count and 1 <= nprobe <= lists):
        raise OodlibError(
            f"PolarSearch: 1 <= nprobe <= nlist <= {count} (vectors in the bank) is needed, got "
            f"nprobe {nprobe} and nlist {lists}."
        )
    coarse = faiss.IndexFlatL2(size)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(coarse, size, lists)
    else:
        bits = min(8, int(math.log2(max(1, count // _PER_CENTROID))))
        if bits < 4:
            raise OodlibError(
                f'PolarSearch: index="ivfpq" needs at least {16 * _PER_CENTROID} vectors to train its '
                f'code, got {count}. Use index="flat" or "ivf".'
            )
        parts = max(m for m in range(1, min(64, size) + 1) if size % m == 0)
        index = faiss.IndexIVFPQ(coarse, size, lists, parts, bits)
        index.pq.cp.seed = seed
    index.cp.seed = seed
    index.train(vectors)
    index.add(vectors)
    index.nprobe = nprobe
    return index


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
