"""Virtual-logit matching: the feature outside the principal space, beside the energy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oodlib.arrays import Array, by_rows, tensor64
from oodlib.errors import OodlibError, check_interval
from oodlib.features.feature_bank import FeatureBank, Head
from oodlib.scores.detector import Detector, register


def vim(features: Array, logits: Any, *, origin: Any, residual: Any, alpha: float) -> Array:
    r"""Virtual logit minus log-sum-exp of the real ones, (N,) float64; larger = more OOD.

    S = alpha ||R^T (h - o)||_2 - log sum_c exp z_c

    Wang, Li, Feng, Zhang, CVPR 2022, arXiv 2203.10807

    Parameters
    ----------
    features : (N, D); logits : (N, C)
    origin : (D,), o = -W^+ b
    residual : (D, D - dim), orthonormal basis R of the space without the principal one
    alpha : mean largest logit / mean residual norm, over training images

    Examples
    --------
    >>> h, z = np.array([[5.0, 2.0]]), np.log([[3.0, 1.0]])
    >>> vim(h, z, origin=[0.0, 0.0], residual=[[0.0], [1.0]], alpha=0.5).round(4)
    array([-0.3863])
    """
    o, r = tensor64(origin), tensor64(residual)

    def score(h: Tensor, z: Tensor) -> Tensor:
        outside: Tensor = ((h.cpu() - o) @ r).norm(dim=1)
        return alpha * outside.to(h.device) - z.logsumexp(1)

    return by_rows("vim", score, features, logits)


def vim_origin(head: Head) -> NDArray[np.float64]:
    """(D,): o = -W^+ b, the feature whose logits are nearest to zero."""
    weight, bias = (np.asarray(a, dtype=np.float64) for a in (head.weight, head.bias))
    return -np.linalg.pinv(weight) @ bias


def vim_residual(second: NDArray[np.float64], dim: int | None = None) -> NDArray[np.float64]:
    """Orthonormal basis (D, D - dim) of the space without the ``dim`` principal directions.

    second : (D, D), second moment of the training features about the origin, in any scale
    """
    size = len(second)
    if dim is None:
        dim = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    check_interval("vim.fit: dim", dim, f"[1, {size - 1}]", f"One of {size} directions must stay.")
    return np.ascontiguousarray(np.linalg.eigh(second)[1][:, : size - dim])  # ascending eigenvalues


def vim_alpha(features: Any, logits: Any, origin: Any, residual: Any) -> float:
    """Mean largest logit / mean residual norm of training features (N, D) with logits (N, C)."""
    o, r = tensor64(origin), tensor64(residual)
    norms = by_rows("vim.fit", lambda h: ((h - o) @ r).norm(dim=1), features)
    if not norms.mean() > 0:
        size, left = np.shape(residual)
        raise OodlibError(
            f"vim.fit: the training features lie in {size - left} dimensions. Give a smaller dim."
        )
    return float(np.asarray(logits, dtype=np.float64).max(1).mean() / norms.mean())


@register("vim")
class ViM(Detector):
    """Detector of `vim`.

    dim : of the principal space; None is 1000 for 2048 features or more, 512 for 768, else D // 2
    """

    dim: int | None = None

    def _fit(self, bank: FeatureBank) -> None:
        size = bank.features.shape[1]
        self.origin_ = vim_origin(bank.head)
        second = np.zeros((size, size))
        for i in range(0, len(bank), 8192):
            x = np.asarray(bank.features[i : i + 8192], dtype=np.float64) - self.origin_
            second += x.T @ x
        self.residual_ = vim_residual(second, self.dim)
        self.alpha_ = vim_alpha(bank.features, bank.logits, self.origin_, self.residual_)

    def _score(self, bank: FeatureBank) -> Any:
        learned: Any = {"origin": self.origin_, "residual": self.residual_, "alpha": self.alpha_}
        return vim(bank.features, bank.logits, **learned)
