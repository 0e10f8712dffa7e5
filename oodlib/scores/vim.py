"""Virtual-logit matching: what of the feature the training data's principal space leaves over, beside the energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from oodlib.bank import FeatureBank
from oodlib.errors import OodlibError
from oodlib.scores.arrays import by_rows, tensor64
from oodlib.scores.base import Detector, Info, register


def vim(features: Any, logits: Any, *, origin: Any, residual: Any, alpha: float) -> Any:
    r"""Virtual logit minus log-sum-exp of the real ones; larger = more OOD.

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
    """
    o, r = tensor64(origin), tensor64(residual)
    return by_rows("vim", lambda h, z: alpha * ((h.cpu() - o) @ r).norm(dim=1).to(h.device) - z.logsumexp(1),
                   features, logits)


@register(Info("vim", "ViM: Out-Of-Distribution with Virtual-logit Matching", "Wang, Li, Feng, Zhang", 2022,
               "2203.10807", "ood", needs="features",
               deviations=("below 768 features half of them are principal (512 would leave little or nothing)",)))
@dataclass(kw_only=True, eq=False)
class ViM(Detector):
    """Detector of `vim`; ``dim``, the size of the principal space: None takes
    1000 from 2048 features on, 512 from 768 on, else D // 2.
    """

    dim: int | None = None

    def _fit(self, bank: FeatureBank) -> None:
        size = bank.features.shape[1]
        dim = self.dim if self.dim is not None else 1000 if size >= 2048 else 512 if size >= 768 else size // 2
        if not 0 < dim < size:
            raise OodlibError(f"vim.fit: dim must lie in 1 .. {size - 1} (D = {size} features), got {dim}. At least "
                              "one direction must be left over.")
        weight = np.asarray(bank.head.weight, dtype=np.float64)
        self.origin_ = -np.linalg.pinv(weight) @ np.asarray(bank.head.bias, dtype=np.float64)
        second = np.zeros((size, size))
        for i in range(0, len(bank), 8192):
            x = np.asarray(bank.features[i:i + 8192], dtype=np.float64) - self.origin_
            second += x.T @ x
        self.residual_ = np.ascontiguousarray(np.linalg.eigh(second)[1][:, :size - dim])   # ascending eigenvalues
        norms = by_rows("vim.fit", lambda h: ((h - tensor64(self.origin_)) @ tensor64(self.residual_)).norm(dim=1),
                        bank.features)
        if not norms.mean() > 0:
            raise OodlibError(f"vim.fit: the training features lie in {dim} dimensions, nothing is left over. "
                              "Give a smaller dim.")
        self.alpha_ = float(np.asarray(bank.logits, dtype=np.float64).max(1).mean() / norms.mean())

    def _score(self, bank: FeatureBank) -> Any:
        return vim(bank.features, bank.logits, origin=self.origin_, residual=self.residual_, alpha=self.alpha_)
