"""Squared norms of a layer's parameter gradients, from its inputs and the gradients at its outputs.

    convolution, linear: dW = G A^T          A (D, T) unfolded input, G (P, T) gradient at the
                         output, T pixels; ||dW||^2 = <A^T A, G^T G>   (ghost norm), cheaper than
                         G A^T where T is small
    layers of Glow:      written out
    any other layer:     its own backward pass for each group (vmap of vjp), over that layer alone

Inputs and gradients are (N, ...); N samples form groups of equal size, whose gradients add up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from oodlib.models.glow import ActNorm, InvertibleConv, LogScale

Squares = dict[str, Tensor]


@dataclass
class Layer:
    """What a backward pass leaves at one layer.

    weights : the layer's own parameters, detached
    inputs, gradients : what came in, and d objective / d output for each output; (N, ...) each
    groups : G, a divisor of N
    """

    module: nn.Module
    weights: dict[str, Tensor]
    inputs: list[Tensor]
    gradients: list[Tensor]
    groups: int

    def grouped(self, tensor: Tensor) -> Tensor:
        """(N, ...) -> (G, N / G, ...)."""
        return tensor.reshape(self.groups, -1, *tensor.shape[1:])

    def squares_of_sums(self, tensor: Tensor) -> Tensor:
        """||sum over the group||^2 of gradients (N, ...) of single samples, (G,)."""
        return squared(self.grouped(tensor).sum(1))


def layer_squares(layer: Layer) -> Squares:
    """||dW||^2 of each group (G,), by weight name."""
    return _RULES.get(type(layer.module), _any_layer)(layer)


def squared(gradients: Tensor) -> Tensor:
    """Squared L2 norms, (M, ...) -> (M,) in the widest type."""
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=wide(gradients))
    return norms.square()


def wide(gradient: Tensor) -> torch.dtype:
    """The type that holds squares and sums of so many terms."""
    return torch.float32 if gradient.device.type == "mps" else torch.float64  # mps has no float64


def _any_layer(layer: Layer) -> Squares:
    """The layer's own backward pass, group by group."""

    def squares(inputs: list[Tensor], gradients: list[Tensor]) -> Squares:
        def run(weights: dict[str, Tensor]) -> list[Tensor]:
            output = functional_call(layer.module, weights, tuple(inputs))
            return list(output) if isinstance(output, tuple) else [output]

        of_weights = vjp(run, layer.weights)[1](gradients)[0]
        return {name: squared(g[None])[0] for name, g in of_weights.items()}

    both = ([layer.grouped(t) for t in ts] for ts in (layer.inputs, layer.gradients))
    found: Squares = vmap(squares)(*both)
    return found


def _linear(layer: Layer) -> Squares:
    a, g = (t.reshape(layer.groups, -1, t.shape[-1]) for t in (layer.inputs[0], layer.gradients[0]))
    bias = {"bias": squared(g.sum(1))} if "bias" in layer.weights else {}
    return {"weight": _product(a, g), **bias}


def _conv(layer: Layer) -> Squares:
    module = layer.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return _any_layer(layer)
    x, g, parts = layer.inputs[0], layer.gradients[0], module.groups
    kernel, stride, spacing = module.kernel_size, module.stride, module.dilation
    margin: tuple[int, ...] = module.padding
    bias = {"bias": layer.squares_of_sums(g.flatten(2).sum(2))} if "bias" in layer.weights else {}
    if x.ndim == 3:  # one dimension: a picture of one row
        x, g = x.unsqueeze(2), g.unsqueeze(2)
        kernel, stride, spacing = (1, *kernel), (1, *stride), (1, *spacing)
        margin = (0, *margin)
    reach = [d * (k - 1) for d, k in zip(spacing, kernel, strict=True)]
    # with the kernel turned round the products are the same, and there is less to unfold
    turns = parts == 1 and set(stride) == {1} and all(map(int.__le__, margin, reach))
    if turns and g.shape[1] < x.shape[1]:
        x, g, margin = g, x, tuple(map(int.__sub__, reach, margin))
    # unfolded inputs (N, parts, T, D) and gradients (N, parts, T, P)
    windows = F.pad(x, (margin[1], margin[1], margin[0], margin[0]))
    windows = windows.contiguous(memory_format=torch.channels_last)
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, reach[axis] + 1, stride[axis])
    windows = windows[..., :: spacing[0], :: spacing[1]]
    windows = windows.permute(0, 2, 3, 4, 5, 1)  # (N, H, W, kh, kw, C)
    a = windows.reshape(len(x), windows.shape[1] * windows.shape[2], -1, parts, x.shape[1] // parts)
    a = a.permute(0, 3, 1, 2, 4).flatten(3)
    g = g.flatten(2).reshape(len(g), parts, -1, g[0, 0].numel()).mT
    # (G parts, B T, .)
    a, g = (layer.grouped(t).transpose(1, 2).flatten(2, 3).flatten(0, 1) for t in (a, g))
    return {"weight": _product(a, g).reshape(layer.groups, -1).sum(1), **bias}


def _actnorm(layer: Layer) -> Squares:
    x, (g, of_log_det), scale = layer.inputs[0], layer.gradients, layer.weights["logs"].exp()
    bias = g.sum((2, 3)) * scale.flatten()
    logs = (g * (x + layer.weights["bias"])).sum((2, 3)) * scale.flatten()
    logs = logs + x[0, 0].numel() * of_log_det[:, None]
    return {"bias": layer.squares_of_sums(bias), "logs": layer.squares_of_sums(logs)}


def _log_scale(layer: Layer) -> Squares:
    scale = 3 * (3 * layer.weights["logs"]).exp().flatten()
    logs = (layer.gradients[0] * layer.inputs[0]).sum((2, 3)) * scale
    return {"logs": layer.squares_of_sums(logs)}


def _invertible_conv(layer: Layer) -> Squares:
    module, x, (g, of_log_det) = layer.module, layer.inputs[0], layer.gradients
    assert isinstance(module, InvertibleConv)
    lower, upper = module.factors()
    products = layer.grouped(g.flatten(2) @ x.flatten(2).mT).sum(1)
    of_both = module.permutation.T @ products  # d (L U), (G, C, C)
    of_upper = lower.T @ of_both
    log_s = (of_upper * upper).diagonal(dim1=1, dim2=2)
    log_s = log_s + x[0, 0].numel() * layer.grouped(of_log_det).sum(1, keepdim=True)
    return {
        "lower": squared((of_both @ upper.T).tril(-1)),
        "log_s": squared(log_s),
        "upper": squared(of_upper.triu(1)),
    }


def _product(a: Tensor, g: Tensor) -> Tensor:
    """||A^T G||^2 of each pair: a (M, T, D), g (M, T, P) -> (M,)."""
    (t, d), p = a.shape[1:], g.shape[2]
    squares: Tensor
    if t * (d + p) < d * p:
        squares = ((a @ a.mT) * (g @ g.mT)).sum((1, 2), dtype=wide(a))
    else:
        squares = torch.linalg.vector_norm(a.mT @ g, dim=2).to(wide(a)).square().sum(1)
    if squares.min() > 1e-30 and squares.max() < 1e30:  # where float32 loses nothing
        return squares
    return squared(a.to(wide(a)).mT @ g.to(wide(g)))


_RULES: dict[type, Callable[[Layer], Squares]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    ActNorm: _actnorm,
    InvertibleConv: _invertible_conv,
    LogScale: _log_scale,
}
