"""Virtual-logit matching: the feature outside the principal space, beside the energy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import Array, by_rows, tensor64
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank, Head
from oodlib.scores.detector import Detector, register


def vim(features: Array, logits: Any, *, origin: Any, residual: Any, alpha: float) -> Array:
    r"""Virtual logit minus log-sum-exp of the real ones; larger = more OOD, as in the paper.

    S = alpha ||R^T (h - o)||_2 - log sum_c exp z_c

    Parameters
    ----------
    features : (N, D); logits : (N, C)
    origin : (D,), o = -W^+ b
    residual : (D, D - dim), orthonormal basis R of the space without the principal one
    alpha : mean largest logit / mean residual norm, over training images

    Returns
    -------
    (N,) float64

    References
    ----------
    Wang, Li, Feng, Zhang, CVPR 2022, arXiv 2203.10807

    Examples
    --------
    >>> h, z = np.array([[5.0, 2.0]]), np.log([[3.0, 1.0]])
    >>> vim(h, z, origin=[0.0, 0.0], residual=[[0.0], [1.0]], alpha=0.5).round(4)
    array([-0.3863])
    """
    o, r = tensor64(origin), tensor64(residual)
    return by_rows(
        "vim",
        lambda h, z: alpha * ((h.cpu() - o) @ r).norm(dim=1).to(h.device) - z.logsumexp(1),
        features,
        logits,
    )


def vim_origin(head: Head) -> NDArray[np.float64]:
    """(D,): o = -W^+ b, the feature whose logits are nearest to zero."""
    weight, bias = (np.asarray(a, dtype=np.float64) for a in (head.weight, head.bias))
    return -np.linalg.pinv(weight) @ bias


def vim_residual(second: NDArray[np.float64], dim: int | None = None) -> NDArray[np.float64]:
    """Orthonormal basis (D, D - dim) of the space without the ``dim`` principal directions.

    second : (D, D), second moment of the training features about the origin, in any scale
    dim : see `ViM`
    """
    size = len(second)
    if dim is None:
        dim = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    if not 0 < dim < size:
        raise OodlibError(
            f"vim.fit: dim must lie in 1 .. {size - 1} (D = {size} features), got {dim}. At least "
            "one direction must be left over."
        )
    return np.ascontiguousarray(np.linalg.eigh(second)[1][:, : size - dim])  # ascending eigenvalues


def vim_alpha(features: Any, logits: Any, origin: Any, residual: Any) -> float:
    """Mean largest logit / mean residual norm of training features (N, D) with logits (N, C)."""
    o, r = tensor64(origin), tensor64(residual)
    norms = by_rows("vim.fit", lambda h: ((h - o) @ r).norm(dim=1), features)
    if not norms.mean() > 0:
        size, left = np.shape(residual)
        raise OodlibError(
            f"vim.fit: the training features lie in {size - left} dimensions, nothing is left "
            "over. Give a smaller dim."
        )
    return float(np.asarray(logits, dtype=np.float64).max(1).mean() / norms.mean())


@register(
    key="vim",
    title="ViM: Out-Of-Distribution with Virtual-logit Matching",
    authors="Wang, Li, Feng, Zhang",
    year=2022,
    arxiv="2203.10807",
    needs="features",
    deviations=(
        "below 768 features half of them are principal (512 would leave little or nothing)",
    ),
)
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
