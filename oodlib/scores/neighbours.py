"""Nearest neighbours of plain vectors, exactly, and of vectors given as log-norm and direction."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from oodlib.errors import OodlibError, one_of

SPARE = 16  # candidates beyond k, against misordering by float32 distances
Index = Literal["flat", "ivf", "hnsw", "ivfpq"]
Floats = NDArray[np.float64]
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

    def __init__(self, train: Floats, candidates: int):
        self.train, self.candidates = train, candidates
        self.index: Any = None
        try:
            import faiss  # late: beside torch it can crash on macOS (faiss-wheels issue 73)
        except ImportError:
            return
        self.farthest = np.sqrt(np.square(train).sum(1).max())
        self.index = faiss.IndexFlatL2(train.shape[1])
        for i in range(0, len(train), 65536):
            self.index.add(train[i : i + 65536].astype(np.float32))

    def __call__(self, x: Floats, k: int) -> Floats:
        """(n, D) -> (n,)."""
        if self.index is None:
            return self.exact(x, k)
        approximate, found = self.index.search(x.astype(np.float32), self.candidates)
        result = self.measure(x, found, k)
        if self.candidates < len(self.train):
            # a neighbour that was not returned lies at least as far as the last candidate, up to
            # the float32 error
            size = np.linalg.norm(x, axis=1) + self.farthest
            slack = 2.0**-22 * np.sqrt(x.shape[1]) * size**2
            unsure = ~(approximate[:, -1] - slack >= result**2)
            if unsure.any():
                result[unsure] = self.exact(x[unsure], k)
        return result

    def exact(self, x: Floats, k: int) -> Floats:
        """Brute force in float64."""
        from sklearn.neighbors import NearestNeighbors

        brute = NearestNeighbors(n_neighbors=self.candidates, algorithm="brute").fit(self.train)
        return self.measure(x, brute.kneighbors(x, return_distance=False), k)

    def measure(self, x: Floats, found: NDArray[np.int64], k: int) -> Floats:
        """The k-th smallest distance to the candidates, from differences: nothing cancels."""
        result = np.empty(len(x))
        rows = max(1, 2**21 // (found.shape[1] * x.shape[1]))
        for i in range(0, len(x), rows):
            difference = self.train[found[i : i + rows]] - x[i : i + rows, None]
            squared = np.einsum("nkd,nkd->nk", difference, difference)
            result[i : i + rows] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])
        return result


class PolarSearch:
    r"""Log distance to the k-th nearest of M vectors ``e^l u``; no float need hold ``e^l``.

    With a = max(l, l') and t = e^(min(l, l') - a):

    log ||e^l u - e^l' u'|| = a + log((1 - t)^2 + t ||u - u'||^2) / 2

    Parameters
    ----------
    log_norm : (M,) the l of every vector
    directions : row numbers (n,) or a slice -> (n, D) float64, the unit vectors u of these rows (or
        zero vectors)
    index : "flat" compares with every vector, exactly and without faiss: float32 cosines give lower
        bounds of all distances, the nearest are measured in float64, and a query that the bounds
        leave open is searched again with float64 cosines, then against everything. "ivf" (inverted
        lists), "hnsw" (graph, 32 links) and "ivfpq" (lists of compressed vectors) look at a part
        only, with faiss; the k + 16 candidates they find are measured in float64. They see norms
        within e^-40 .. e^40 of the median, others at that edge: a warning says so
    nlist : number of inverted lists; by default 4 sqrt(M), or fewer where a list would have less
        than 39 vectors
    nprobe : lists that are searched; a query that meets too few vectors there is searched again in
        more of them
    seed : of k-means

    Raises
    ------
    OodlibError : unknown index, nlist or nprobe out of range, too few vectors for ivfpq, no faiss
    """

    def __init__(
        self,
        log_norm: Floats,
        directions: Callable[[Any], Floats],
        *,
        index: str = "flat",
        nlist: int | None = None,
        nprobe: int = 4,
        seed: int = 0,
    ):
        one_of("PolarSearch: index", index, get_args(Index))
        self.log_norm, self.directions = np.maximum(log_norm, _LEAST), directions
        self.shift = float(np.median(log_norm))  # common factor e^-shift, for float32
        self.nprobe = nprobe
        self.index: Any = None
        blocks = [slice(i, i + 16384) for i in range(0, len(log_norm), 16384)]
        if index == "flat":
            self.unit = np.concatenate([directions(b).astype(np.float32) for b in blocks])
            return
        beyond = int((np.abs(log_norm - self.shift) > _RANGE).sum())
        if beyond:
            warnings.warn(
                f"PolarSearch: {beyond} of {len(log_norm)} norms lie more than {_RANGE:.0f} nats "
                f'from the median, where index="{index}" cannot tell them apart. Use index="flat".',
                RuntimeWarning,
                stacklevel=2,
            )
        vectors = np.concatenate([self._scaled(self.log_norm[b], directions(b)) for b in blocks])
        self.index = _build(index, vectors, nlist, nprobe, seed)

    def __call__(self, log_norm: Floats, unit: Floats, k: int = 1) -> Floats:
        """(n,) and (n, D) -> (n,); -inf where a query is one of the vectors (k = 1)."""
        log_norm = np.maximum(log_norm, _LEAST)
        search = self._all if self.index is None else self._some
        blocks = [slice(i, i + 256) for i in range(0, len(unit), 256)]
        return np.concatenate([search(log_norm[b], unit[b], k) for b in blocks])

    def _scaled(self, log_norm: Floats, unit: Floats) -> NDArray[np.float32]:
        """The vectors without the common factor, as faiss sees them."""
        norm = np.exp(np.clip(log_norm - self.shift, -_RANGE, _RANGE))
        return np.asarray(norm[:, None] * unit, dtype=np.float32)

    def _all(self, log_norm: Floats, unit: Floats, k: int) -> Floats:
        result, sure = self._nearest(log_norm, unit, k, k + SPARE, torch.float32)
        # near-duplicates that even float64 cosines cannot order are measured against every vector
        for count in (k + 8 * SPARE, len(self.log_norm)):
            rows = np.flatnonzero(~sure)
            if len(rows):
                again = self._nearest(log_norm[rows], unit[rows], k, count, torch.float64)
                result[rows], sure[rows] = again
        return result

    def _nearest(
        self, log_norm: Floats, unit: Floats, k: int, count: int, kind: torch.dtype
    ) -> tuple[Floats, NDArray[np.bool_]]:
        r"""Log distance to the k-th of ``count`` candidates, and whether no other can be nearer.

        With m = min(l, largest l'), r = e^(l' - m), w = e^(m - l) the distance rises with the key r
        (r w - 2 cos). Lower bounds of the keys (cosine and exponential off by their rounding
        errors) order the vectors.
        """
        single = kind == torch.float32
        error = math.sqrt(unit.shape[1]) * 2.0 ** (-22 if single else -50)
        shrink = 1 - 2.0 ** (-20 if single else -48)
        m = torch.from_numpy(np.minimum(log_norm, self.log_norm.max()))[:, None]
        w = (m - torch.from_numpy(log_norm)[:, None]).exp().to(kind) * shrink
        q = torch.from_numpy(-2 * unit).to(kind)
        # the count smallest lower bounds so far, ascending, and their vectors
        best, where = torch.empty(len(q), 0, dtype=kind), torch.empty(len(q), 0, dtype=torch.int64)
        for j in range(0, len(self.log_norm), 4096):
            rows = slice(j, j + 4096)
            block = torch.from_numpy(self.unit[rows] if single else self.directions(rows))
            r = (torch.from_numpy(self.log_norm[rows]) - m).clamp_(-1e30, _RANGE).to(kind).exp_()
            bound = (q @ block.T).sub_(2 * error).addcmul_(r, w).mul_(r)
            values, columns = bound.topk(min(count, len(block)), largest=False)
            best, where = torch.cat([best, values], 1), torch.cat([where, columns + j], 1)
            best, order = best.topk(min(count, best.shape[1]), largest=False)
            where = where.gather(1, order)
        result, key = self._measure(log_norm, unit, where.numpy(), k)
        sure = best[:, -1].double().numpy() - np.finfo(np.float32).tiny >= key
        return result, sure | (count >= len(self.log_norm))

    def _some(self, log_norm: Floats, unit: Floats, k: int) -> Floats:
        x, index, nprobe = self._scaled(log_norm, unit), self.index, self.nprobe
        found = index.search(x, min(k + SPARE, index.ntotal))[1]
        while (few := (found >= 0).sum(1) < k).any():  # the lists it looked at hold fewer: label -1
            if not hasattr(index, "nlist") or nprobe >= index.nlist:
                raise OodlibError(
                    f"PolarSearch: {int(few.sum())} queries found fewer than k = {k} neighbours. "
                    'Give index="flat".'
                )
            import faiss

            nprobe = min(2 * nprobe, index.nlist)
            wider: Any = faiss.SearchParametersIVF
            found[few] = index.search(x[few], found.shape[1], params=wider(nprobe=nprobe))[1]
        return self._measure(log_norm, unit, found, k)[0]

    def _measure(
        self, log_norm: Floats, unit: Floats, found: NDArray[np.int64], k: int
    ) -> tuple[Floats, Floats]:
        """Log distance to the k-th nearest of the rows found (-1: none), and key of `_nearest`."""
        result, keys, top = np.empty(len(unit)), np.empty(len(unit)), self.log_norm.max()
        rows = max(1, 2**21 // (found.shape[1] * unit.shape[1]))
        for i in range(0, len(unit), rows):
            where, l, u = found[i : i + rows], log_norm[i : i + rows, None], unit[i : i + rows]
            difference = self.directions(where.ravel()).reshape(*where.shape, -1) - u[:, None]
            squared = np.einsum("nkd,nkd->nk", difference, difference)  # 2 (1 - cos), not cancelled
            l2, m = self.log_norm[where], np.minimum(l, top)
            gap = -np.abs(l - l2)
            with np.errstate(divide="ignore"):
                logarithm = np.log(np.expm1(gap) ** 2 + np.exp(gap) * squared)
            distance = np.maximum(l, l2) + 0.5 * logarithm
            r = np.exp(np.minimum(l2 - m, _RANGE))
            key = r * (r * np.exp(m - l) - 2 + squared)
            distance[where < 0] = key[where < 0] = np.inf
            result[i : i + rows] = np.partition(distance, k - 1, axis=1)[:, k - 1]
            keys[i : i + rows] = np.partition(key, k - 1, axis=1)[:, k - 1]
        return result, keys


def _build(
    kind: str, vectors: NDArray[np.float32], nlist: int | None, nprobe: int, seed: int
) -> Any:
    """A trained faiss index (ivf, hnsw, ivfpq) that holds the vectors."""
    try:
        import faiss
    except ImportError as error:
        raise OodlibError(
            f'PolarSearch: index="{kind}" needs faiss, which is not installed. Install faiss-cpu, '
            'or use index="flat".'
        ) from error
    index: Any
    count, size = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, 32)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 128
        with _one_thread(faiss):  # several threads would add in a changing order
            index.add(vectors)
        return index
    lists = nlist
    if lists is None:
        lists = max(1, min(round(4 * math.sqrt(count)), count // _PER_CENTROID))
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
                f'PolarSearch: index="ivfpq" needs at least {16 * _PER_CENTROID} vectors to train '
                f'its code, got {count}. Use index="flat" or "ivf".'
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
