"""DICE: the weights of the head that contribute least are removed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError, check_interval
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import register
from oodlib.scores.shaper import Shaper, shaped_bank


def dice(weight: Any, mean_features: Any, *, sparsity: float = 70.0) -> NDArray[np.float64]:
    r"""The head's weight without its least contributions: not a score, but the head for one.

    Contribution of a weight: ``W_ci mean(h_i)``, with its sign. The weights whose contribution is
    not above the ``sparsity`` percentile of all become 0; ``sparsity=0`` removes none.

    Parameters
    ----------
    weight : (C, D)
    mean_features : (D,), mean over ID training images
    sparsity : 0 .. 100, per cent

    Returns
    -------
    (C, D) float64

    References
    ----------
    Sun, Li, ECCV 2022, arXiv 2111.09805

    Examples
    --------
    >>> dice([[3.0, -1.0], [1.0, 2.0]], [1.0, 2.0], sparsity=50)
    array([[3., 0.],
           [0., 2.]])
    """
    weight, mean_features = (to_numpy(a).astype(np.float64) for a in (weight, mean_features))
    if weight.ndim != 2 or mean_features.shape != weight.shape[1:]:
        raise OodlibError(
            f"dice: weight (C, D) and mean_features (D,) need the same D, got {weight.shape} and "
            f"{mean_features.shape}."
        )
    check_interval("dice: sparsity", sparsity, "[0, 100]")
    if sparsity == 0:
        return np.asarray(weight)
    contribution = weight * mean_features
    return np.where(contribution > np.percentile(contribution, sparsity), weight, 0)


@register(
    key="dice",
    title="DICE: Leveraging Sparsification for Out-of-Distribution Detection",
    authors="Sun, Li",
    year=2022,
    arxiv="2111.09805",
    needs="features",
    deviations=("sparsity 0 removes nothing; the released code removes the smallest contribution",),
)
class DICE(Shaper):
    """Detector of ``then`` behind `dice`; ``sparsity``: per cent of the weights to remove."""

    sparsity: float = 70.0

    def _learn(self, bank: FeatureBank) -> None:
        mean = bank.features.mean(0, dtype=np.float64)
        self.mask_ = dice(bank.head.weight, mean, sparsity=self.sparsity) != 0

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        return shaped_bank(bank, bank.features, self.mask_)
