"""GradNorm in closed form: the gradient of the last layer has rank one, so its norm is a product of
two norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from oodlib.arrays import by_rows, check_rows, check_temperature, tensor64
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register

Target = Literal["uniform", "predicted", "label_mean", "random"]
_TARGETS = ("uniform", "predicted", "label_mean", "random")


def gradnorm(
    features: Any,
    logits: Any,
    *,
    temperature: float = 1.0,
    norm: float = 1,
    target: Target = "uniform",
    generator: torch.Generator | None = None,
    mask: Any = None,
) -> Any:
    r"""GradNorm from the last linear layer, without autograd; larger = more OOD.

    S = -||h||_q ||p - t||_q / T,   p = softmax(logits / T),   q = norm,   t = 1/C for the uniform target

    This is minus the L_q norm of d CE(t, p) / dW of each sample; for the uniform target CE is KL(u
    || p) + log C.

    Parameters
    ----------
    features : (N, D)  input h of the last linear layer
    logits : (N, C)    before division by the temperature
    temperature : T > 0
    norm : q in (0, inf]
    target : "uniform" (the paper), "predicted" (one-hot at the arg-max), "random" (one-hot at a random label), or
        "label_mean" (mean over all labels of the norms for each label)
    generator : of the random labels; only for target="random"
    mask : (C, D) bool, of a pruned head: a removed weight has no gradient. Then
        S = -(sum over kept (j, i) of |p_j - 1/C|^q |h_i|^q)^(1/q) / T, uniform target and finite q
        only

    Returns
    -------
    (N,) float64

    Raises
    ------
    OodlibError : row counts differ, features are maps instead of pooled vectors, unknown target, q or T out of range,
        a mask of another shape or with another target

    References
    ----------
    Huang, Geng, Li, NeurIPS 2021, arXiv 2110.00218, Eq. 9 (q = 1)

    Notes
    -----
    Paper: larger = ID, hence the minus sign. The official code sums over classes where the paper averages: C times
    larger, same ranking. The bias is left out, as in the paper; append a column of ones to the features to include it.
    Valid only if logits = W h + b for one vector h per image.

    Examples
    --------
    >>> gradnorm(torch.tensor([[1., 2.]]), torch.tensor([[3., 1.]]).log())
    tensor([-1.5000], dtype=torch.float64)
    """
    _check("gradnorm", norm, temperature)
    check_rows("gradnorm", features, logits)
    scale = temperature * np.shape(logits)[-1]
    if mask is not None:
        return _masked(features, logits, temperature, norm, target, mask)
    v = _deviation("gradnorm", logits, temperature, norm, target, generator)
    return by_rows(
        "gradnorm", lambda h, v: -vector_norm(h, norm, dim=1) * v[:, 0] / scale, features, v
    )


def gradnorm_factors(
    features: Any,
    logits: Any,
    *,
    temperature: float = 1.0,
    norm: float = 1,
    target: Target = "uniform",
    generator: torch.Generator | None = None,
) -> tuple[Any, Any]:
    r"""The two factors of GradNorm, S = -U V / (C T): how large the feature is, how far the softmax
    is from the target.

    U = ||h||_q,   V = C ||p - t||_q   (for q = 1 and the uniform target: V = sum_j |1 - C p_j| <= 2 (C - 1))

    Arguments as in `gradnorm`. Both factors are norms: **larger = more ID** if the paper is right.

    Returns
    -------
    U : (N,) float64
    V : (N,) float64
    """
    _check("gradnorm_factors", norm, temperature)
    check_rows("gradnorm_factors", features, logits)
    v = _deviation("gradnorm_factors", logits, temperature, norm, target, generator)
    u, v = (
        by_rows(
            "gradnorm_factors",
            lambda h, v: torch.stack([vector_norm(h, norm, dim=1), v[:, 0]], 1),
            features,
            v,
        )
    ).T
    return u, v


def gradnorm_limit(features: Any, logits: Any, *, norm: float = 1) -> Any:
    r"""Limit of T^2 times `gradnorm` (uniform target) as T grows; larger = more OOD.

    S = -||h||_q ||z - mean z||_q / C

    Parameters
    ----------
    features : (N, D); logits : (N, C); norm : q in (0, inf]

    Returns
    -------
    (N,) float64
    """
    _check("gradnorm_limit", norm)
    return by_rows(
        "gradnorm_limit",
        lambda h, z: (
            -vector_norm(h, norm, dim=1)
            * vector_norm(z - z.mean(1, keepdim=True), norm, dim=1)
            / z.shape[1]
        ),
        features,
        logits,
    )


def _masked(
    features: Any, logits: Any, temperature: float, norm: float, target: str, mask: Any
) -> Any:
    kept, size = tensor64(mask), (np.shape(logits)[-1], np.shape(features)[-1])
    if tuple(kept.shape) != size or target != "uniform" or math.isinf(norm):
        raise OodlibError(
            f'gradnorm: mask must be (C, D) = {size}, with target="uniform" and a finite norm, got '
            f"{tuple(kept.shape)}, {target!r} and {norm}."
        )

    def function(h: Tensor, z: Tensor) -> Tensor:
        d = ((z / temperature).softmax(1) - 1 / size[0]).abs().pow(norm)
        return -((d @ kept.to(d.device)) * h.abs().pow(norm)).sum(1).pow(1 / norm) / temperature

    return by_rows("gradnorm", function, features, logits)


def _check(name: str, norm: float, temperature: float = 1.0) -> None:
    check_temperature(name, temperature)
    if not norm > 0:
        raise OodlibError(
            f"{name}: norm q must lie in (0, inf], got {norm}. Use math.inf for the maximum norm."
        )


def _deviation(
    name: str,
    logits: Any,
    temperature: float,
    norm: float,
    target: str,
    generator: torch.Generator | None,
) -> Any:
    """(N, 1): C ||p - t||_q of every row."""
    if target not in _TARGETS:
        raise OodlibError(f"{name}: target must be one of {', '.join(_TARGETS)}, got {target!r}.")
    if target == "random":
        if generator is None:
            raise OodlibError(
                f'{name}: target="random" needs generator=torch.Generator().manual_seed(...).'
            )
        count, classes = np.shape(logits)
        labels = torch.randint(classes, (count, 1), generator=generator, device=generator.device)
        return by_rows(
            name,
            lambda z, y: _one_hot(z / temperature, y.long().to(z.device), norm),
            logits,
            labels,
        )
    function = {
        "uniform": _uniform,
        "label_mean": _label_mean,
        "predicted": lambda a, q: _one_hot(a, a.argmax(1, keepdim=True), q),
    }[target]
    return by_rows(name, lambda z: function(z / temperature, norm), logits)


def _uniform(a: Tensor, norm: float) -> Tensor:
    a = a - a.mean(1, keepdim=True)
    d = a.softmax(1).mul_(a.shape[1]).sub_(1)  # C p - 1
    flat = (
        a.abs().amax(1) < 1
    )  # near the uniform distribution the difference cancels: high T, small logits
    if flat.any():
        a = a[flat]
        d[flat] = torch.expm1(a - torch.log1p(torch.expm1(a).mean(1, keepdim=True)))
    return vector_norm(d, norm, dim=1, keepdim=True)


def _one_hot(a: Tensor, labels: Tensor, norm: float) -> Tensor:
    p = a.softmax(1).scatter_(1, labels, 0)
    p.scatter_(
        1, labels, -p.sum(1, keepdim=True)
    )  # p_y - 1 from the others: exact for a saturated softmax
    return a.shape[1] * vector_norm(p, norm, dim=1, keepdim=True)


def _label_mean(a: Tensor, norm: float) -> Tensor:
    """Mean over labels k of ||p - e_k||_q in O(C): the k-th is (sum_(j != k) p_j^q + (1 -
    p_k)^q)^(1/q).
    """
    p, top = a.softmax(1), a.argmax(1, keepdim=True)
    rest = p.scatter(1, top, 0)  # sums without the largest entry: nothing cancels below
    gap = (1 - p).scatter_(1, top, rest.sum(1, keepdim=True))  # 1 - p_k
    if math.isinf(norm):
        each = gap  # 1 - p_k >= p_j for every other j
    else:
        others = rest.pow(norm).sum(1, keepdim=True) - rest.pow(norm) + p.gather(1, top).pow(norm)
        others.scatter_(1, top, rest.pow(norm).sum(1, keepdim=True))
        each = (others + gap.pow(norm)).pow(1 / norm)
    return a.shape[1] * each.mean(1, keepdim=True)


@register(
    Info(
        key="gradnorm",
        title="On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
        authors="Huang, Geng, Li",
        year=2021,
        arxiv="2110.00218",
        paper_larger_means="id",
        deviations=(
            "closed form instead of a backward pass per image; equal to rounding",
            "the paper's scale; the released code is C times larger, same ranking",
        ),
    )
)
@dataclass(kw_only=True, eq=False)
class GradNorm(Detector):
    """Detector of `gradnorm`; ``seed`` draws the labels of target="random"."""

    temperature: float = 1.0
    norm: float = 1
    target: Target = "uniform"
    seed: int = 0

    def _score(self, bank: FeatureBank) -> Any:
        generator = torch.Generator().manual_seed(self.seed) if self.target == "random" else None
        return gradnorm(
            bank.features,
            bank.logits,
            temperature=self.temperature,
            norm=self.norm,
            target=self.target,
            generator=generator,
            mask=bank.head.mask,
        )
