"""ASH on pooled features: most activations of an image are removed, the rest rescaled."""

from typing import Literal, get_args

import torch
from torch import Tensor

from oodlib.arrays import Array, by_rows
from oodlib.errors import check_interval, one_of
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import register
from oodlib.scores.shaper import Shaper, shaped_bank

Variant = Literal["s", "p", "b"]


def ash(features: Array, *, percentile: float = 90.0, variant: Variant = "s") -> Array:
    r"""Activation shaping of **pooled** features: not a score, but the features for one.

    Of each row the smallest ``percentile`` per cent become 0. With s1 and s2 the sums of the row
    before and after: "p" leaves the others as they are, "b" sets each to s1 / (number left), "s"
    multiplies them by exp(s1 / s2).

    Parameters
    ----------
    features : (N, D), meant for D non-negative activations
    percentile : in [0, 100); D - round(D percentile / 100) activations are left
    variant : "s", "p" or "b"

    Returns
    -------
    (N, D) float64

    References
    ----------
    Djurisic, Bozanic, Ashok, Liu, ICLR 2023, arXiv 2209.09858. The paper shapes the map before
    pooling; on pooled features this is another variant with other numbers.

    Examples
    --------
    >>> ash(np.array([[4.0, 1.0, 3.0, 2.0]]), percentile=50, variant="b")
    array([[5., 0., 5., 0.]])
    """
    one_of("ash: variant", variant, get_args(Variant))
    check_interval("ash: percentile", percentile, "[0, 100)")

    def shape(h: Tensor) -> Tensor:
        left = max(1, h.shape[1] - round(h.shape[1] * percentile / 100))
        values, index = h.topk(left, dim=1)
        before = h.sum(1, keepdim=True)
        if variant == "b":
            values = (before / left).expand_as(values)
        elif variant == "s":  # a row of zeros stays zero
            after = values.sum(1, keepdim=True)
            values = values * torch.where(after == 0, 0, before / after).exp()
        return torch.zeros_like(h).scatter_(1, index, values)

    return by_rows("ash", shape, features)


@register(
    key="ash",
    title="Extremely Simple Activation Shaping for Out-of-Distribution Detection",
    authors="Djurisic, Bozanic, Ashok, Liu",
    year=2023,
    arxiv="2209.09858",
    deviations=("shapes pooled features; the released code shapes the map before pooling",),
)
class ASH(Shaper):
    """Detector of ``then`` behind `ash`."""

    percentile: float = 90.0
    variant: Variant = "s"

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        h = ash(bank.features, percentile=self.percentile, variant=self.variant)
        return shaped_bank(bank, h)
