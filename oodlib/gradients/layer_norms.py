"""Squared norms of a layer's parameter gradients, from its inputs and the gradients at its outputs.

    convolution, linear: dW = G A^T          A (D, T) unfolded input, G (P, T) gradient at the output, T pixels
                         ||dW||^2 = <A^T A, G^T G>   (ghost norm), cheaper than G A^T where T is small
    layers of Glow:      written out
    any other layer:     its own backward pass for each group (vmap of vjp), over that layer alone

Inputs and gradients are (N, ...); N samples form groups of equal size, whose gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from oodlib.models.glow import ActNorm, InvertibleConv, LogScale

__all__ = ["layer_squares", "squared", "wide"]


def layer_squares(
    module: nn.Module,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    """||dW||^2 of each group (G,), by weight name.

    Parameters
    ----------
    weights : the layer's own parameters, detached
    inputs, gradients : what came in, and d objective / d output for each output; (N, ...) each
    groups : G, a divisor of N
    """
    return _RULES.get(type(module), _any_layer)(module, weights, inputs, gradients, groups)


def squared(gradients: Tensor) -> Tensor:
    """Squared L2 norms, (M, ...) -> (M,) in the widest type."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=wide(gradients)).square()


def wide(gradient: Tensor) -> torch.dtype:
    """The type that holds squares and sums of so many terms."""
    return torch.float32 if gradient.device.type == "mps" else torch.float64  # mps has no float64


def _any_layer(
    module: nn.Module,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    """The layer's own backward pass, group by group."""

    def squares(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        def run(weights: dict[str, Tensor]) -> list[Tensor]:
            output = functional_call(module, weights, tuple(inputs))
            return list(output) if isinstance(output, tuple) else [output]

        return {name: squared(g[None])[0] for name, g in vjp(run, weights)[1](gradients)[0].items()}

    return vmap(squares)(
        *([t.unflatten(0, (groups, -1)) for t in ts] for ts in (inputs, gradients))
    )


def _linear(
    module: nn.Linear,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    a, g = (t.reshape(groups, -1, t.shape[-1]) for t in (inputs[0], gradients[0]))
    return {"weight": _product(a, g)} | ({"bias": squared(g.sum(1))} if "bias" in weights else {})


def _conv(
    module: nn.Conv1d | nn.Conv2d,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return _any_layer(module, weights, inputs, gradients, groups)
    x, g, kernel, stride, spacing, pad, parts = (
        inputs[0],
        gradients[0],
        module.kernel_size,
        module.stride,
        module.dilation,
        module.padding,
        module.groups,
    )
    bias = (
        {"bias": squared(_packed(g.flatten(2).sum(2), groups).sum(1))} if "bias" in weights else {}
    )
    if x.ndim == 3:
        x, g, kernel, stride, spacing, pad = (
            x.unsqueeze(2),
            g.unsqueeze(2),
            (1, *kernel),
            (1, *stride),
            (1, *spacing),
            (0, *pad),
        )
    reach = [d * (k - 1) for d, k in zip(spacing, kernel, strict=True)]
    if (
        parts == 1
        and set(stride) == {1}
        and g.shape[1] < x.shape[1]
        and all(map(int.__le__, pad, reach))
    ):
        x, g, pad = (
            g,
            x,
            tuple(map(int.__sub__, reach, pad)),
        )  # same products, kernel turned round: less to unfold
    windows = F.pad(x, (pad[1], pad[1], pad[0], pad[0])).contiguous(
        memory_format=torch.channels_last
    )
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, reach[axis] + 1, stride[axis])
    windows = windows[..., :: spacing[0], :: spacing[1]].permute(
        0, 2, 3, 4, 5, 1
    )  # (N, H, W, kh, kw, C)
    a = windows.reshape(len(x), windows.shape[1] * windows.shape[2], -1, parts, x.shape[1] // parts)
    a = a.permute(0, 3, 1, 2, 4).flatten(3)  # (N, parts, T, D)
    g = g.flatten(2).unflatten(1, (parts, -1)).mT  # (N, parts, T, P)
    a, g = (
        _packed(t, groups).transpose(1, 2).flatten(2, 3).flatten(0, 1) for t in (a, g)
    )  # (G parts, B T, .)
    return {"weight": _product(a, g).unflatten(0, (groups, -1)).sum(1), **bias}


def _actnorm(
    module: ActNorm,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    x, (g, of_log_det), scale = inputs[0], gradients, weights["logs"].exp()
    bias = g.sum((2, 3)) * scale.flatten()
    logs = (g * (x + weights["bias"])).sum((2, 3)) * scale.flatten() + x[0, 0].numel() * of_log_det[
        :, None
    ]
    return {
        "bias": squared(_packed(bias, groups).sum(1)),
        "logs": squared(_packed(logs, groups).sum(1)),
    }


def _log_scale(
    module: LogScale,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    logs = (gradients[0] * inputs[0]).sum((2, 3)) * 3 * (3 * weights["logs"]).exp().flatten()
    return {"logs": squared(_packed(logs, groups).sum(1))}


def _invertible_conv(
    module: InvertibleConv,
    weights: dict[str, Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    groups: int,
) -> dict[str, Tensor]:
    x, (g, of_log_det), pixels = inputs[0], gradients, inputs[0][0, 0].numel()
    lower, upper = module.factors()
    of_both = module.permutation.T @ _packed(g.flatten(2) @ x.flatten(2).mT, groups).sum(
        1
    )  # d (L U), (G, C, C)
    of_upper = lower.T @ of_both
    log_s = (of_upper * upper).diagonal(dim1=1, dim2=2) + pixels * _packed(of_log_det, groups).sum(
        1, keepdim=True
    )
    return {
        "lower": squared((of_both @ upper.T).tril(-1)),
        "log_s": squared(log_s),
        "upper": squared(of_upper.triu(1)),
    }


def _packed(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(0, (groups, -1))


def _product(a: Tensor, g: Tensor) -> Tensor:
    """||A^T G||^2 of each pair: a (M, T, D), g (M, T, P) -> (M,)."""
    (t, d), p = a.shape[1:], g.shape[2]
    if t * (d + p) < d * p:
        squares = ((a @ a.mT) * (g @ g.mT)).sum((1, 2), dtype=wide(a))
    else:
        squares = torch.linalg.vector_norm(a.mT @ g, dim=2).to(wide(a)).square().sum(1)
    if squares.min() > 1e-30 and squares.max() < 1e30:  # where float32 loses nothing
        return squares
    return squared(a.to(wide(a)).mT @ g.to(wide(g)))


_RULES: dict[type, Callable[..., dict[str, Tensor]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    ActNorm: _actnorm,
    InvertibleConv: _invertible_conv,
    LogScale: _log_scale,
}
