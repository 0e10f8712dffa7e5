"""ASH on pooled features: most activations of an image are removed, the rest rescaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oodlib.arrays import by_rows
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Info, register
from oodlib.scores.shaper import Shaper, shaped_bank

Variant = Literal["s", "p", "b"]


def ash(features: Any, *, percentile: float = 90.0, variant: Variant = "s") -> Any:
    r"""Activation shaping of **pooled** features: not a score, but the features for one.

    Of each row the smallest ``percentile`` per cent become 0. With s1 and s2 the sums of the row
    before and after: "p" leaves the others as they are, "b" sets each to s1 / (number kept), "s"
    multiplies them by exp(s1 / s2).

    Parameters
    ----------
    features : (N, D), meant for D non-negative activations
    percentile : 0 .. 100; D - round(D percentile / 100) are kept
    variant : "s", "p" or "b"

    Returns
    -------
    (N, D) float64

    References
    ----------
    Djurisic, Bozanic, Ashok, Liu, ICLR 2023, arXiv 2209.09858

    Notes
    -----
    The paper shapes the map before pooling; on pooled features this is another variant with other numbers.
    """
    if variant not in ("s", "p", "b"):
        raise OodlibError(f'ash: variant must be "s", "p" or "b", got {variant!r}.')
    if not 0 <= percentile < 100:
        raise OodlibError(
            f"ash: percentile must lie in 0 .. 100 (per cent), below 100, got {percentile}."
        )

    def shape(h: Tensor) -> Tensor:
        kept = max(1, h.shape[1] - round(h.shape[1] * percentile / 100))
        values, index = h.topk(kept, dim=1)
        before = h.sum(1, keepdim=True)
        if variant == "b":
            values = (before / kept).expand_as(values)
        elif variant == "s":  # a row of zeros stays zero
            after = values.sum(1, keepdim=True)
            values = values * torch.where(after == 0, 0, before / after).exp()
        return torch.zeros_like(h).scatter_(1, index, values)

    return by_rows("ash", shape, features)


@register(
    Info(
        key="ash",
        title="Extremely Simple Activation Shaping for Out-of-Distribution Detection",
        authors="Djurisic, Bozanic, Ashok, Liu",
        year=2023,
        arxiv="2209.09858",
        paper_larger_means="id",
        deviations=("shapes pooled features; the released code shapes the map before pooling",),
    )
)
@dataclass(kw_only=True, eq=False)
class ASH(Shaper):
    """Detector of ``then`` behind `ash`."""

    percentile: float = 90.0
    variant: Variant = "s"

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        return shaped_bank(
            bank, ash(bank.features, percentile=self.percentile, variant=self.variant)
        )
