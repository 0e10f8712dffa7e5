"""GradNorm in closed form: the last layer's gradient has rank one, its norm is a product of two."""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from oodlib.arrays import Array, by_rows, check_rows, check_temperature, tensor64
from oodlib.errors import OodlibError, check_interval, one_of
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register

Target = Literal["uniform", "predicted", "label_mean", "random"]


def gradnorm(
    features: Array,
    logits: Any,
    *,
    temperature: float = 1.0,
    norm: float = 1,
    target: Target = "uniform",
    generator: torch.Generator | None = None,
    mask: Any = None,
) -> Array:
    r"""GradNorm from the last linear layer, without autograd; larger = more OOD.

    S = -||h||_q ||p - t||_q / T,   p = softmax(logits / T),   q = norm,   t = 1/C if uniform

    This is minus the L_q norm of d CE(t, p) / dW of each sample; for the uniform target CE is
    KL(u || p) + log C.

    Parameters
    ----------
    features : (N, D)  input h of the last linear layer
    logits : (N, C)    before division by the temperature
    temperature : T > 0
    norm : q in (0, inf]
    target : "uniform" (the paper), "predicted" (one-hot at the arg-max), "random" (one-hot at a
        random label), or "label_mean" (mean over all labels of the norms for each label)
    generator : of the random labels; only for target="random"
    mask : (C, D) bool, of a pruned head: a removed weight has no gradient. Then
        S = -(sum over unmasked (j, i) of |p_j - 1/C|^q |h_i|^q)^(1/q) / T, uniform target and
        finite q only

    Returns
    -------
    (N,) float64

    Raises
    ------
    OodlibError : row counts differ, features are maps instead of pooled vectors, unknown target,
        q or T out of range, a mask of another shape or with another target

    References
    ----------
    Huang, Geng, Li, NeurIPS 2021, arXiv 2110.00218, Eq. 9 (q = 1)

    Notes
    -----
    Paper: larger = ID, hence the minus sign. The official code sums over classes where the paper
    averages: C times larger, same ranking. The bias is left out, as in the paper; append a column
    of ones to the features to include it. Valid if logits = W h + b for one vector h per image.

    Examples
    --------
    >>> gradnorm(torch.tensor([[1., 2.]]), torch.tensor([[3., 1.]]).log())
    tensor([-1.5000], dtype=torch.float64)
    """
    check_temperature("gradnorm", temperature)
    check_rows("gradnorm", features, logits)
    if mask is not None:
        return _masked(features, logits, temperature, norm, target, mask)
    v = _deviation("gradnorm", logits, temperature, norm, target, generator)
    scale = temperature * np.shape(logits)[-1]
    return by_rows(
        "gradnorm", lambda h, v: -vector_norm(h, norm, dim=1) * v[:, 0] / scale, features, v
    )


def gradnorm_factors(
    features: Array,
    logits: Any,
    *,
    temperature: float = 1.0,
    norm: float = 1,
    target: Target = "uniform",
    generator: torch.Generator | None = None,
) -> tuple[Array, Array]:
    r"""The two factors of GradNorm, S = -U V / (C T): feature size, and distance to the target.

    U = ||h||_q,   V = C ||p - t||_q   (q = 1, uniform: V = sum_j |1 - C p_j| <= 2 (C - 1))

    Arguments as in `gradnorm`. Both factors are norms: **larger = more ID** if the paper is right.

    Returns
    -------
    U, V : (N,) float64 each

    Examples
    --------
    >>> gradnorm_factors(np.array([[1.0, 2.0]]), np.log([[3.0, 1.0]]))
    (array([3.]), array([1.]))
    """
    name = "gradnorm_factors"
    check_temperature(name, temperature)
    check_rows(name, features, logits)
    v = _deviation(name, logits, temperature, norm, target, generator)

    def both(h: Tensor, v: Tensor) -> Tensor:
        return torch.stack([vector_norm(h, norm, dim=1), v[:, 0]], 1)

    columns = by_rows(name, both, features, v)
    return columns[:, 0], columns[:, 1]


def gradnorm_limit(features: Array, logits: Any, *, norm: float = 1) -> Array:
    r"""Limit of T^2 times `gradnorm` (uniform target) as T grows; larger = more OOD.

    S = -||h||_q ||z - mean z||_q / C

    Parameters
    ----------
    features : (N, D); logits : (N, C); norm : q in (0, inf]

    Returns
    -------
    (N,) float64

    Examples
    --------
    >>> gradnorm_limit(np.array([[1.0, 2.0]]), np.array([[3.0, 1.0]]))
    array([-3.])
    """
    _check_norm("gradnorm_limit", norm)

    def limit(h: Tensor, z: Tensor) -> Tensor:
        size: Tensor = vector_norm(h, norm, dim=1)
        spread: Tensor = vector_norm(z - z.mean(1, keepdim=True), norm, dim=1)
        return -size * spread / z.shape[1]

    return by_rows("gradnorm_limit", limit, features, logits)


def _masked(
    features: Array, logits: Any, temperature: float, norm: float, target: str, mask: Any
) -> Array:
    left, size = tensor64(mask), (np.shape(logits)[-1], np.shape(features)[-1])
    _check_norm("gradnorm", norm)
    if tuple(left.shape) != size or target != "uniform" or math.isinf(norm):
        raise OodlibError(
            f'gradnorm: mask must be (C, D) = {size}, with target="uniform" and a finite norm, got '
            f"{tuple(left.shape)}, {target!r} and {norm}."
        )

    def function(h: Tensor, z: Tensor) -> Tensor:
        d = ((z / temperature).softmax(1) - 1 / size[0]).abs().pow(norm)
        products: Tensor = (d @ left.to(d.device)) * h.abs().pow(norm)
        return -products.sum(1).pow(1 / norm) / temperature

    return by_rows("gradnorm", function, features, logits)


def _check_norm(name: str, norm: float) -> None:
    check_interval(f"{name}: norm q", norm, "(0, inf]", "Use math.inf for the maximum norm.")


def _deviation(
    name: str,
    logits: Array,
    temperature: float,
    norm: float,
    target: str,
    generator: torch.Generator | None,
) -> Array:
    """(N, 1): C ||p - t||_q of every row."""
    _check_norm(name, norm)
    one_of(f"{name}: target", target, get_args(Target))
    if target == "random":
        if generator is None:
            raise OodlibError(
                f'{name}: target="random" needs generator=torch.Generator().manual_seed(...).'
            )
        count, classes = np.shape(logits)
        labels = torch.randint(classes, (count, 1), generator=generator, device=generator.device)

        def random(z: Tensor, y: Tensor) -> Tensor:
            return _one_hot(z / temperature, y.long().to(z.device), norm)

        return by_rows(name, random, logits, labels)
    function = {"uniform": _uniform, "label_mean": _label_mean, "predicted": _predicted}[target]
    return by_rows(name, lambda z: function(z / temperature, norm), logits)


def _uniform(a: Tensor, norm: float) -> Tensor:
    a = a - a.mean(1, keepdim=True)
    d = a.softmax(1).mul_(a.shape[1]).sub_(1)  # C p - 1
    # near the uniform distribution the difference cancels: high T, small logits
    flat = a.abs().amax(1) < 1
    if flat.any():
        a = a[flat]
        d[flat] = torch.expm1(a - torch.log1p(torch.expm1(a).mean(1, keepdim=True)))
    size: Tensor = vector_norm(d, norm, dim=1, keepdim=True)
    return size


def _predicted(a: Tensor, norm: float) -> Tensor:
    return _one_hot(a, a.argmax(1, keepdim=True), norm)


def _one_hot(a: Tensor, labels: Tensor, norm: float) -> Tensor:
    p = a.softmax(1).scatter_(1, labels, 0)
    # p_y - 1 from the others: exact for a saturated softmax
    p.scatter_(1, labels, -p.sum(1, keepdim=True))
    return torch.mul(vector_norm(p, norm, dim=1, keepdim=True), a.shape[1])


def _label_mean(a: Tensor, norm: float) -> Tensor:
    """Mean over labels k of ||p - e_k||_q = (sum_(j != k) p_j^q + (1 - p_k)^q)^(1/q), in O(C)."""
    p, top = a.softmax(1), a.argmax(1, keepdim=True)
    rest = p.scatter(1, top, 0)  # sums without the largest entry: nothing cancels below
    gap = (1 - p).scatter_(1, top, rest.sum(1, keepdim=True))  # 1 - p_k
    if math.isinf(norm):
        each = gap  # 1 - p_k >= p_j for every other j
    else:
        others = rest.pow(norm).sum(1, keepdim=True) - rest.pow(norm) + p.gather(1, top).pow(norm)
        others.scatter_(1, top, rest.pow(norm).sum(1, keepdim=True))
        each = (others + gap.pow(norm)).pow(1 / norm)
    return torch.mul(each.mean(1, keepdim=True), a.shape[1])


@register(
    key="gradnorm",
    title="On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
    authors="Huang, Geng, Li",
    year=2021,
    arxiv="2110.00218",
    deviations=(
        "closed form instead of a backward pass per image; equal to rounding",
        "the paper's scale; the released code is C times larger, same ranking",
    ),
)
class GradNorm(Detector):
    """Detector of `gradnorm`; ``seed`` draws the labels of target="random"."""

    temperature: float = 1.0
    norm: float = 1
    target: Target = "uniform"
    seed: int = 0

    def _score(self, bank: FeatureBank) -> Any:
        return gradnorm(
            bank.features,
            bank.logits,
            temperature=self.temperature,
            norm=self.norm,
            target=self.target,
            generator=torch.Generator().manual_seed(self.seed),
            mask=bank.head.mask,
        )
