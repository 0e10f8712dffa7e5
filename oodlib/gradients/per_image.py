"""Squared norms of the gradient of every parameter tensor, image by image or group by group, in
micro-batches.

`layer_gradient_norms` never forms most of the gradients it measures. One backward pass over a chunk
yields the gradient at the output of every layer; the norms of that layer's parameter gradients
follow from it and from the layer's input (`oodlib.gradients.layer_norms`). `gradnorm_by_layer`
differs: any q-norm of any group of parameters, for classifiers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.func import functional_call, grad, vmap

from oodlib.errors import OodlibError
from oodlib.gradients.gradnorm_by_layer import gradnorm_by_layer, parameter_groups
from oodlib.gradients.layer_norms import layer_squares, squared, wide
from oodlib.models.hooks import eval_mode

__all__ = ["Objective", "gradnorm_by_layer", "layer_gradient_norms", "parameter_groups"]

Objective = Literal["log_prob", "sum_z"] | Callable[[nn.Module, Tensor], Tensor]

_LOG = logging.getLogger("oodlib")


def layer_gradient_norms(
    model: nn.Module,
    x: Tensor,
    *,
    group_size: int = 1,
    objective: Objective = "log_prob",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Squared L2 norm of the gradient of every parameter tensor, for each image or each group of
    images.

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

    Warns
    -----
    RuntimeWarning : only one backward pass per group was right for this model, which is slow; with the reasons

    References
    ----------
    Montazeran, Köthe 2025, arXiv 2502.00820; Dauncey et al., TMLR 2024, arXiv 2403.01485. Ghost norms: Goodfellow 2015,
    arXiv 1510.01799 (linear layers); Li et al. 2022, arXiv 2110.05679; Bu et al. 2022, arXiv 2205.10683 (convolutions)

    Notes
    -----
    One group is also done by an ordinary backward pass. Where the layer-wise way cannot follow a model (a layer used
    twice, shared or directly used weights) or disagrees there by more than 0.1 %, `vmap` of the whole model takes over,
    then a loop. What a way cannot do is a RuntimeError, of torch or of the model; any other error is raised as it is.
    The logger ``oodlib`` says (INFO) which way was taken, and why not those before it.
    """
    if group_size < 1 or (chunk_size is not None and chunk_size < 1):
        raise OodlibError(
            f"layer_gradient_norms: group_size and chunk_size must be at least 1, got {group_size} "
            f"and {chunk_size}."
        )
    if len(x) == 0 or len(x) % group_size:
        raise OodlibError(
            f"layer_gradient_norms: needs a positive multiple of group_size={group_size} images, "
            f"got {len(x)}: {len(x) % group_size} left over. Drop or add some."
        )
    target, x = _Target(model, objective), x.detach()
    with eval_mode(model), torch.enable_grad():
        for probe, group in enumerate(x[: 8 * group_size].split(group_size)):  # noqa: B007
            truth, used, bytes_saved = _one_group(target, group)
            if truth.isfinite().all():  # an overflow proves nothing
                break
        passed_over: list[str] = []
        ways = {
            "layer by layer": _by_layer,
            "vmap of the whole model": _by_vmap,
            "one backward pass per group": _by_loop,
        }
        for name, way in ways.items():
            gradients = (
                sum(target.bytes) if way is _by_vmap else max(target.bytes, default=0)
            )  # held at once
            step = chunk_size or _chunk_size(x, bytes_saved + 2 * gradients, group_size)
            chunks = x.split(step * group_size)
            try:
                first = _overflows(way(target, chunks[0], group_size), used)
                row = (
                    first[probe]
                    if probe < len(first)
                    else _overflows(way(target, group, group_size), used)[0]
                )
            except RuntimeError as error:  # of the way: the model itself has just run
                if way is _by_loop:
                    raise
                passed_over.append(
                    f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
                )
                continue
            finite = truth.isfinite()
            if torch.isclose(row, truth, rtol=1e-3, atol=1e-9 * float(truth[finite].sum()))[
                finite
            ].all():
                break
            passed_over.append(f"{name}: differs from plain autograd by more than 0.1 %")
        _LOG.info(
            "layer_gradient_norms of %s: %s%s",
            type(model).__name__,
            name,
            "".join(f"; not {reason}" for reason in passed_over),
        )
        if way is _by_loop:
            warnings.warn(
                f"layer_gradient_norms: {type(model).__name__} needs {name}, which is slow "
                f"({'; '.join(passed_over)}).",
                RuntimeWarning,
                stacklevel=2,
            )
        rest = [_overflows(way(target, chunk, group_size), used) for chunk in chunks[1:]]
    return torch.cat([first, *rest])


_Found = tuple[Tensor, Tensor]  # objective (G,), squared norms (G, tensors)


class _Unknown(RuntimeError):
    """The layer-wise way does not know how to follow this model."""


class _Target(nn.Module):
    """The objective as a module above the model, so that `functional_call` can swap the parameters
    beneath it.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        known: dict[Any, Callable[[Any, Tensor], Tensor]] = {
            "log_prob": lambda model, x: model.log_prob(x),
            "sum_z": lambda model, x: model(x)[0][-1].flatten(1).sum(1),
        }
        if not callable(objective) and objective not in known:
            raise OodlibError(
                f'layer_gradient_norms: objective must be "log_prob", "sum_z" or a function (model, x) '
                f"-> (N,), got {objective!r}."
            )
        if objective == "log_prob" and not hasattr(model, "log_prob"):
            raise OodlibError(
                f"layer_gradient_norms: {type(model).__name__} has no log_prob(x). Give objective= "
                "a function (model, x) -> (N,)."
            )
        self.model, self.objective = (
            model,
            known[objective] if isinstance(objective, str) else objective,
        )
        self.weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        self.bytes = [p.nbytes for p in self.weights.values()]

    def forward(self, x: Tensor) -> Tensor:
        value = self.objective(self.model, x)
        if value.shape not in ((len(x),), ()):
            raise OodlibError(
                "layer_gradient_norms: the objective must return (N,) or a sum, got "
                f"{tuple(value.shape)} for {len(x)} images."
            )
        return value

    def at(self, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        return functional_call(self, self.weights if weights is None else weights, (x,))


def _one_group(target: _Target, x: Tensor) -> tuple[Tensor, list[bool], int]:
    """Norms of one group (tensors,) by plain autograd, which tensors the objective uses, bytes
    saved for backward.
    """
    known, saved = {p.untyped_storage().data_ptr() for p in target.weights.values()}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in known)
        return tensor.detach()

    weights = {name: p.detach().requires_grad_() for name, p in target.weights.items()}
    with saved_tensors_hooks(count, lambda tensor: tensor):
        value = target.at(x, weights).sum()
        gradients = (
            torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            if value.requires_grad
            else [None] * len(weights)
        )
    norms = torch.cat(
        [
            torch.zeros(1).double() if g is None else squared(g[None]).cpu().double()
            for g in gradients
        ]
    )
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
        return total, torch.stack([squared(g[None])[0] for g in gradients.values()])

    return vmap(norms)(x.unflatten(0, (-1, group_size)))


def _by_layer(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One backward pass over the chunk, to the outputs of layers only; norms layer by layer as it
    goes.
    """
    column = {name: i for i, name in enumerate(target.weights)}
    norms = torch.zeros(len(x) // group_size, len(column), dtype=wide(x), device=x.device)
    leaves: list[Tensor] = []
    seen: set[nn.Module] = set()

    def batched(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and len(tensor) == len(x)

    def watch(module: nn.Module, names: dict[str, str]) -> Callable[..., Any]:
        weights = {local: target.weights[name] for local, name in names.items()}

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            outputs = output if isinstance(output, tuple) else (output,)
            if module in seen:
                raise _Unknown(f"{type(module).__name__} is called twice")
            if kwargs or not all(map(batched, (*args, *outputs))):
                raise _Unknown(
                    f"{type(module).__name__} takes or gives more than tensors with one row per "
                    "image"
                )
            seen.add(module)
            inputs, tracked = [a.detach() for a in args], []
            kinds = [(o.shape, o.dtype) for o in outputs]
            for o in outputs:
                if not o.requires_grad:  # no layer before it: here the backward pass ends
                    leaves.append(o.detach().requires_grad_())
                    o = leaves[-1].clone()  # what comes next may write in place
                tracked.append(o)

            def measure(gradients: Sequence[Tensor | None]) -> None:
                g = [
                    torch.zeros(shape, dtype=dtype, device=x.device) if g is None else g
                    for g, (shape, dtype) in zip(gradients, kinds, strict=True)
                ]
                for local, squares in layer_squares(module, weights, inputs, g, len(norms)).items():
                    norms[:, column[names[local]]] = squares.to(norms)
                inputs.clear()  # the rest of the pass reuses the memory

            register_multi_grad_hook(tracked, measure)
            return tuple(tracked) if isinstance(output, tuple) else tracked[0]

        return hook

    handles = []
    try:
        for prefix, module in target.named_modules():
            names = {
                local: f"{prefix}.{local}"
                for local, p in module._parameters.items()
                if p is not None
            }
            if not column.keys() >= set(names.values()):  # known by its first name
                raise _Unknown(f"{type(module).__name__} shares a weight with another layer")
            if names:
                handles.append(module.register_forward_hook(watch(module, names), with_kwargs=True))
        value = target.at(x)
    finally:
        for handle in handles:
            handle.remove()
    if leaves and value.requires_grad:
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    if value.ndim == 0 and not value.isfinite():  # no telling which group overflowed
        return _by_vmap(target, x, group_size)
    return value.detach().expand(len(x)).unflatten(0, (-1, group_size)).sum(1), norms


def _overflows(found: _Found, used: list[bool]) -> Tensor:
    """Norms (G, tensors) on the CPU, with +inf where a gradient is not finite, or the whole
    objective of a group.
    """
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
