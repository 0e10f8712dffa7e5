"""Gradients of every parameter tensor, sample by sample, in micro-batches: GradNorm of any layer, and squared norms.

`layer_gradient_norms` never forms most of the gradients it measures. One backward pass over a chunk yields the gradient
at the output of every layer; a layer's parameter gradient of one sample follows from that and the layer's input:

    convolution, linear: dW = G A^T          A (D, T) unfolded input, G (P, T) gradient at the output, T pixels
                         ||dW||^2 = <A^T A, G^T G>   (ghost norm), cheaper than G A^T where T is small
    any other layer:     its own backward pass for each sample (vmap of vjp), over that layer alone
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from oodlib.errors import OodlibError
from oodlib.models.glow import ActNorm, InvertibleConv, LogScale
from oodlib.scores.arrays import check_temperature

__all__ = ["Objective", "gradnorm_by_layer", "layer_gradient_norms", "parameter_groups"]

Objective = Literal["log_prob", "sum_z"] | Callable[[nn.Module, Tensor], Tensor]


def parameter_groups(model: nn.Module, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """Parameter names of each group.

    Parameters
    ----------
    groups : name -> shell patterns of parameter names, ``{"last": ["fc.weight"], "stage 4": ["layer4.*"]}``;
        None makes every parameter a group of its own

    Raises
    ------
    OodlibError : a pattern matches no parameter
    """
    known = [name for name, _ in model.named_parameters()]
    if groups is None:
        return {name: [name] for name in known}
    for group, patterns in groups.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise OodlibError(f"parameter_groups: {pattern!r} of group {group!r} matches no parameter. Known: "
                                  f"{', '.join(known)}.")
    return {group: [n for n in known if any(fnmatchcase(n, p) for p in patterns)] for group, patterns in groups.items()}


def gradnorm_by_layer(model: nn.Module, x: Tensor, *, groups: Mapping[str, Sequence[str]] | None = None,
                      temperature: float = 1.0, norm: float = 1, chunk_size: int = 16) -> dict[str, Tensor]:
    r"""GradNorm of each group of parameters, one gradient per sample; larger = more OOD.

    S_g = -||d KL(u || softmax(f(x) / T)) / d theta_g||_q

    Parameters
    ----------
    model : x (n, ...) -> logits (n, C); run in eval mode, its own mode is restored
    x : (N, ...), on the model's device
    groups : as in `parameter_groups`; groups may overlap
    temperature : T > 0
    norm : q in (0, inf]
    chunk_size : samples whose gradients are held at once; memory is chunk_size x (parameters + activations)

    Returns
    -------
    group name -> (N,) float64, on the CPU. For the weight of a linear head equal to `oodlib.scores.gradnorm`.

    Raises
    ------
    OodlibError : a pattern that matches nothing, T or q out of range, logits that are not (n, C)

    References
    ----------
    Huang, Geng, Li, NeurIPS 2021, arXiv 2110.00218 (the paper's sign is the opposite)
    """
    check_temperature("gradnorm_by_layer", temperature)
    if not norm > 0:
        raise OodlibError(f"gradnorm_by_layer: norm q must lie in (0, inf], got {norm}. Use math.inf for the maximum.")
    if chunk_size < 1 or len(x) == 0:
        raise OodlibError(f"gradnorm_by_layer: needs a sample and chunk_size >= 1, got {len(x)} and {chunk_size}.")
    members = parameter_groups(model, groups)
    used = {name for names in members.values() for name in names}
    fixed = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in used}
    chosen = {name: p.detach() for name, p in model.named_parameters() if name in used}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(model, {**parameters, **fixed}, (sample[None],))
        if logits.ndim != 2:
            raise OodlibError(f"gradnorm_by_layer: the model must return logits (n, C), got {tuple(logits.shape)} for "
                              "one sample.")
        return -(logits / temperature).log_softmax(1).mean()              # KL(u || p) + log C

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    parts: dict[str, list[Tensor]] = {group: [] for group in members}
    with _eval_mode(model):
        for chunk in x.split(chunk_size):
            norms = {name: torch.linalg.vector_norm(g.flatten(1), norm, dim=1, dtype=_wide(g)).double().cpu()
                     for name, g in per_sample(chosen, chunk).items()}
            for group, names in members.items():                          # the q-norm of q-norms is the whole q-norm
                parts[group].append(torch.linalg.vector_norm(torch.stack([norms[n] for n in names]), norm, dim=0))
    return {group: -torch.cat(values) for group, values in parts.items()}


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.float32 if gradient.device.type == "mps" else torch.float64      # mps has no float64


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def layer_gradient_norms(model: nn.Module, x: Tensor, *, group_size: int = 1, objective: Objective = "log_prob",
                         chunk_size: int | None = None) -> Tensor:
    r"""Squared L2 norm of the gradient of every parameter tensor, for each image or each group of images.

    f_l = || d sum_b objective(x_b) / d theta_l ||^2

    Parameters
    ----------
    model : any module; run in eval mode, its own mode is restored. Frozen parameters are measured like the others
    x : (N, ...), on the model's device; consecutive images form a group
    group_size : B images of one group; the norm of the sum of their gradients, not a function of their own norms
    objective : "log_prob" (``model.log_prob(x)``, nats), "sum_z" (sum of the last latent, ``model(x)[0][-1]``, which
        the released code of the paper differentiates), or a function (model, x) -> (N,) or its sum
    chunk_size : groups of one pass; None chooses from the free memory

    Returns
    -------
    (N / B, tensors) float64 on the CPU, columns in the order of ``model.named_parameters()``. 0 for a tensor that the
    objective does not use; +inf where a gradient is infinite or NaN, and for all others where a group's objective is.

    Raises
    ------
    OodlibError : N is no positive multiple of B, B or chunk_size below 1, unknown objective, or one of another shape

    References
    ----------
    Montazeran, Köthe 2025, arXiv 2502.00820; Dauncey et al., TMLR 2024, arXiv 2403.01485. Ghost norms: Goodfellow 2015,
    arXiv 1510.01799 (linear layers); Li et al. 2022, arXiv 2110.05679; Bu et al. 2022, arXiv 2205.10683 (convolutions)

    Notes
    -----
    One group is also done by an ordinary backward pass. Where the layer-wise way cannot follow a model (a layer used
    twice, shared or directly used weights) or disagrees there, `vmap` of the whole model takes over, then a loop.
    """
    if group_size < 1 or (chunk_size is not None and chunk_size < 1):
        raise OodlibError(f"layer_gradient_norms: group_size and chunk_size must be at least 1, got {group_size} and "
                          f"{chunk_size}.")
    if len(x) == 0 or len(x) % group_size:
        raise OodlibError(f"layer_gradient_norms: needs a positive multiple of group_size={group_size} images, got "
                          f"{len(x)}: {len(x) % group_size} left over. Drop or add some.")
    target, x = _Target(model, objective), x.detach()
    with _eval_mode(model), torch.enable_grad():
        for probe, group in enumerate(x[:8 * group_size].split(group_size)):  # noqa: B007
            truth, used, bytes_saved = _one_group(target, group)
            if truth.isfinite().all():                   # an overflow proves nothing
                break
        for way in (_by_layer, _by_vmap, _by_loop):
            gradients = sum(target.bytes) if way is _by_vmap else max(target.bytes, default=0)      # held at once
            step = chunk_size or _chunk_size(x, bytes_saved + 2 * gradients, group_size)
            chunks = x.split(step * group_size)
            try:
                first = _overflows(way(target, chunks[0], group_size), used)
                row = first[probe] if probe < len(first) else _overflows(way(target, group, group_size), used)[0]
            except Exception:                            # whatever a transform cannot do; the model itself has just run
                if way is _by_loop:
                    raise
                continue
            finite = truth.isfinite()
            if torch.isclose(row, truth, rtol=0.02, atol=1e-9 * float(truth[finite].sum()))[finite].all():
                break
        rest = [_overflows(way(target, chunk, group_size), used) for chunk in chunks[1:]]
    return torch.cat([first, *rest])


_Found = tuple[Tensor, Tensor]                                         # objective (G,), squared norms (G, tensors)


class _Unknown(Exception):
    """The layer-wise way does not know how to follow this model."""


class _Target(nn.Module):
    """The objective as a module above the model, so that `functional_call` can swap the parameters beneath it."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        known: dict[Any, Callable[[Any, Tensor], Tensor]] = {
            "log_prob": lambda model, x: model.log_prob(x), "sum_z": lambda model, x: model(x)[0][-1].flatten(1).sum(1)}
        if not callable(objective) and objective not in known:
            raise OodlibError(f'layer_gradient_norms: objective must be "log_prob", "sum_z" or a function (model, x) '
                              f"-> (N,), got {objective!r}.")
        if objective == "log_prob" and not hasattr(model, "log_prob"):
            raise OodlibError(f"layer_gradient_norms: {type(model).__name__} has no log_prob(x). Give objective= a "
                              "function (model, x) -> (N,).")
        self.model, self.objective = model, known[objective] if isinstance(objective, str) else objective
        self.weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        self.bytes = [p.nbytes for p in self.weights.values()]

    def forward(self, x: Tensor) -> Tensor:
        value = self.objective(self.model, x)
        if value.shape not in ((len(x),), ()):
            raise OodlibError("layer_gradient_norms: the objective must return (N,) or a sum, got "
                              f"{tuple(value.shape)} for {len(x)} images.")
        return value

    def at(self, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        return functional_call(self, self.weights if weights is None else weights, (x,))


def _one_group(target: _Target, x: Tensor) -> tuple[Tensor, list[bool], int]:
    """Norms of one group (tensors,) by plain autograd, which tensors the objective uses, bytes saved for backward."""
    known, saved = {p.untyped_storage().data_ptr() for p in target.weights.values()}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in known)
        return tensor.detach()

    weights = {name: p.detach().requires_grad_() for name, p in target.weights.items()}
    with saved_tensors_hooks(count, lambda tensor: tensor):
        value = target.at(x, weights).sum()
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True) if value.requires_grad else [
            None] * len(weights)
    norms = torch.cat([torch.zeros(1).double() if g is None else _squared(g[None]).cpu().double() for g in gradients])
    used = [g is not None for g in gradients]
    return _overflows((value.detach()[None], norms[None]), used)[0], used, saved


def _by_loop(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One backward pass per group."""
    rows = [_one_group(target, group)[0] for group in x.split(group_size)]
    return torch.zeros(len(rows)), torch.stack(rows)


def _by_vmap(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One vectorised gradient per group; all of them are held at once."""
    def norms(group: Tensor) -> _Found:
        def value(weights: dict[str, Tensor]) -> _Found:
            total = target.at(group, weights).sum()
            return total, total

        gradients, total = grad(value, has_aux=True)(target.weights)
        return total, torch.stack([_squared(g[None])[0] for g in gradients.values()])

    return vmap(norms)(x.unflatten(0, (-1, group_size)))


def _by_layer(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One backward pass over the chunk, to the outputs of layers only; norms layer by layer as it goes."""
    column = {name: i for i, name in enumerate(target.weights)}
    norms = torch.zeros(len(x) // group_size, len(column), dtype=_wide(x), device=x.device)
    leaves: list[Tensor] = []
    seen: set[nn.Module] = set()

    def batched(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and len(tensor) == len(x)

    def watch(module: nn.Module, names: dict[str, str]) -> Callable[..., Any]:
        weights = {local: target.weights[name] for local, name in names.items()}

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            outputs = output if isinstance(output, tuple) else (output,)
            if kwargs or module in seen or not all(map(batched, (*args, *outputs))):
                raise _Unknown
            seen.add(module)
            inputs, tracked = [a.detach() for a in args], []
            kinds = [(o.shape, o.dtype) for o in outputs]
            for o in outputs:
                if not o.requires_grad:                  # no layer before it: here the backward pass ends
                    leaves.append(o.detach().requires_grad_())
                    o = leaves[-1].clone()               # what comes next may write in place
                tracked.append(o)

            def measure(gradients: Sequence[Tensor | None]) -> None:
                g = [torch.zeros(shape, dtype=dtype, device=x.device) if g is None else g
                     for g, (shape, dtype) in zip(gradients, kinds, strict=True)]
                rule = _RULES.get(type(module), _any_layer)
                for local, squares in rule(module, weights, inputs, g, len(norms)).items():
                    norms[:, column[names[local]]] = squares.to(norms)
                inputs.clear()                           # the rest of the pass reuses the memory

            register_multi_grad_hook(tracked, measure)
            return tuple(tracked) if isinstance(output, tuple) else tracked[0]

        return hook

    handles = []
    try:
        for prefix, module in target.named_modules():
            names = {local: f"{prefix}.{local}" for local, p in module._parameters.items() if p is not None}
            if not column.keys() >= set(names.values()):                    # shared, and known by its first name
                raise _Unknown
            if names:
                handles.append(module.register_forward_hook(watch(module, names), with_kwargs=True))
        value = target.at(x)
    finally:
        for handle in handles:
            handle.remove()
    if leaves and value.requires_grad:
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    if value.ndim == 0 and not value.isfinite():                            # no telling which group overflowed
        return _by_vmap(target, x, group_size)
    return value.detach().expand(len(x)).unflatten(0, (-1, group_size)).sum(1), norms


# Rules: a layer's weights, its inputs and the gradients at its outputs, N each, to squared norms (G,) by weight name.

def _any_layer(module: nn.Module, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
               groups: int) -> dict[str, Tensor]:
    """The layer's own backward pass, group by group."""
    def squares(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        def run(weights: dict[str, Tensor]) -> list[Tensor]:
            output = functional_call(module, weights, tuple(inputs))
            return list(output) if isinstance(output, tuple) else [output]

        return {name: _squared(g[None])[0] for name, g in vjp(run, weights)[1](gradients)[0].items()}

    return vmap(squares)(*([t.unflatten(0, (groups, -1)) for t in ts] for ts in (inputs, gradients)))


def _linear(module: nn.Linear, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
            groups: int) -> dict[str, Tensor]:
    a, g = (t.reshape(groups, -1, t.shape[-1]) for t in (inputs[0], gradients[0]))
    return {"weight": _product(a, g)} | ({"bias": _squared(g.sum(1))} if "bias" in weights else {})


def _conv(module: nn.Conv1d | nn.Conv2d, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
          groups: int) -> dict[str, Tensor]:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return _any_layer(module, weights, inputs, gradients, groups)
    x, g, kernel, stride, spacing, pad, parts = (inputs[0], gradients[0], module.kernel_size, module.stride,
                                                 module.dilation, module.padding, module.groups)
    bias = {"bias": _squared(_packed(g.flatten(2).sum(2), groups).sum(1))} if "bias" in weights else {}
    if x.ndim == 3:
        x, g, kernel, stride, spacing, pad = (x.unsqueeze(2), g.unsqueeze(2), (1, *kernel), (1, *stride), (1, *spacing),
                                              (0, *pad))
    reach = [d * (k - 1) for d, k in zip(spacing, kernel, strict=True)]
    if parts == 1 and set(stride) == {1} and g.shape[1] < x.shape[1] and all(map(int.__le__, pad, reach)):
        x, g, pad = g, x, tuple(map(int.__sub__, reach, pad))     # same products, kernel turned round: less to unfold
    windows = F.pad(x, (pad[1], pad[1], pad[0], pad[0])).contiguous(memory_format=torch.channels_last)
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, reach[axis] + 1, stride[axis])
    windows = windows[..., ::spacing[0], ::spacing[1]].permute(0, 2, 3, 4, 5, 1)             # (N, H, W, kh, kw, C)
    a = windows.reshape(len(x), windows.shape[1] * windows.shape[2], -1, parts, x.shape[1] // parts)
    a = a.permute(0, 3, 1, 2, 4).flatten(3)                                                  # (N, parts, T, D)
    g = g.flatten(2).unflatten(1, (parts, -1)).mT                                            # (N, parts, T, P)
    a, g = (_packed(t, groups).transpose(1, 2).flatten(2, 3).flatten(0, 1) for t in (a, g))  # (G parts, B T, .)
    return {"weight": _product(a, g).unflatten(0, (groups, -1)).sum(1), **bias}


def _actnorm(module: ActNorm, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
             groups: int) -> dict[str, Tensor]:
    x, (g, of_log_det), scale = inputs[0], gradients, weights["logs"].exp()
    bias = g.sum((2, 3)) * scale.flatten()
    logs = (g * (x + weights["bias"])).sum((2, 3)) * scale.flatten() + x[0, 0].numel() * of_log_det[:, None]
    return {"bias": _squared(_packed(bias, groups).sum(1)), "logs": _squared(_packed(logs, groups).sum(1))}


def _log_scale(module: LogScale, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
               groups: int) -> dict[str, Tensor]:
    logs = (gradients[0] * inputs[0]).sum((2, 3)) * 3 * (3 * weights["logs"]).exp().flatten()
    return {"logs": _squared(_packed(logs, groups).sum(1))}


def _invertible_conv(module: InvertibleConv, weights: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor],
                     groups: int) -> dict[str, Tensor]:
    x, (g, of_log_det), pixels = inputs[0], gradients, inputs[0][0, 0].numel()
    lower, upper = module.factors()
    of_both = module.permutation.T @ _packed(g.flatten(2) @ x.flatten(2).mT, groups).sum(1)        # d (L U), (G, C, C)
    of_upper = lower.T @ of_both
    log_s = (of_upper * upper).diagonal(dim1=1, dim2=2) + pixels * _packed(of_log_det, groups).sum(1, keepdim=True)
    return {"lower": _squared((of_both @ upper.T).tril(-1)), "log_s": _squared(log_s),
            "upper": _squared(of_upper.triu(1))}


_RULES: dict[type, Callable[..., dict[str, Tensor]]] = {
    nn.Linear: _linear, nn.Conv1d: _conv, nn.Conv2d: _conv,
    ActNorm: _actnorm, InvertibleConv: _invertible_conv, LogScale: _log_scale}


def _packed(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(0, (groups, -1))


def _product(a: Tensor, g: Tensor) -> Tensor:
    """||A^T G||^2 of each pair: a (M, T, D), g (M, T, P) -> (M,)."""
    (t, d), p = a.shape[1:], g.shape[2]
    if t * (d + p) < d * p:
        squares = ((a @ a.mT) * (g @ g.mT)).sum((1, 2), dtype=_wide(a))
    else:
        squares = torch.linalg.vector_norm(a.mT @ g, dim=2).to(_wide(a)).square().sum(1)
    if squares.min() > 1e-30 and squares.max() < 1e30:                       # where float32 loses nothing
        return squares
    return _squared(a.to(_wide(a)).mT @ g.to(_wide(g)))


def _squared(gradients: Tensor) -> Tensor:
    """(M, ...) -> (M,) squared L2 norms."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=_wide(gradients)).square()


def _overflows(found: _Found, used: list[bool]) -> Tensor:
    """Norms (G, tensors) on the CPU, with +inf where a gradient is not finite, or the whole objective of a group."""
    value, norms = (t.detach().double().cpu() for t in found)
    norms = norms.where(norms.isfinite(), torch.inf)
    return norms.where(value.isfinite()[:, None] | ~torch.tensor(used), torch.inf)


def _chunk_size(x: Tensor, bytes_needed: int, group_size: int) -> int:
    """Groups of one pass: a quarter of the free memory, and no more than keep the processor busy."""
    if x.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(x.device)[0], 512
    else:
        free, most = psutil.virtual_memory().available, 64
    return max(1, min(free // (4 * (bytes_needed + 1)), most // group_size))
