"""Squared gradient norms of every parameter tensor, by image or group, in micro-batches.

`layer_gradient_norms` never forms most of the gradients it measures. One backward pass over a chunk
yields the gradient at the output of every layer; the norms of that layer's parameter gradients
follow from it and from the layer's input (`oodlib.gradients.layer_norms`). `gradnorm_by_layer`
differs: any q-norm of any group of parameters, for classifiers.
"""

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
from oodlib.gradients.layer_norms import Layer, layer_squares, squared, wide
from oodlib.models.hooks import eval_mode

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
    r"""Squared L2 norm of the gradient of every parameter tensor, for each image or group.

    f_l = || d sum_b objective(x_b) / d theta_l ||^2

    Parameters
    ----------
    model : any module; run in eval mode, its own mode is restored. Frozen parameters count too
    x : (N, ...), on the model's device; consecutive images form a group
    group_size : B images per group; the norm of the sum of their gradients, not of their norms
    objective : "log_prob" (``model.log_prob(x)``, nats), "sum_z" (sum of the last latent,
        ``model(x)[0][-1]``, which the released code of the paper differentiates), or a function
        (model, x) -> (N,) or its sum
    chunk_size : groups of one pass; None chooses from the free memory

    Returns
    -------
    (N / B, tensors) float64 on the CPU, columns in the order of ``model.named_parameters()``. 0 for
    a tensor that the objective does not use; +inf where a gradient is infinite or NaN, and for all
    others where a group's objective is.

    Raises
    ------
    OodlibError : N is not a positive multiple of B, B or chunk_size below 1, unknown objective, or
        one of another shape

    Warns
    -----
    RuntimeWarning : only one backward pass per group was right for this model, which is slow

    References
    ----------
    Montazeran, Köthe 2025, arXiv 2502.00820; Dauncey et al., TMLR 2024, arXiv 2403.01485. Ghost
    norms: Goodfellow 2015, arXiv 1510.01799 (linear layers); Li et al. 2022, arXiv 2110.05679; Bu
    et al. 2022, arXiv 2205.10683 (convolutions)

    Notes
    -----
    One group is also done by an ordinary backward pass. Where the layer-wise way cannot follow a
    model (a layer used twice, shared or directly used weights) or differs there by more than 0.1 %,
    `vmap` of the whole model takes over, then a loop. What a way cannot do is a RuntimeError, of
    torch or of the model; any other error is raised as it is. The logger ``oodlib`` says (INFO)
    which way was taken, and why not those before it.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> layer_gradient_norms(model, x, objective=lambda model, x: model(x)[:, 0])
    tensor([[5., 1.],
            [9., 1.]], dtype=torch.float64)
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
        # the truth: one group whose objective does not overflow, by plain autograd
        for probe, group in enumerate(torch.split(x[: 8 * group_size], group_size)):  # noqa: B007
            truth, used, bytes_saved = _one_group(target, group)
            if truth.isfinite().all():  # an overflow proves nothing
                break
        finite = truth.isfinite()
        tolerance = 1e-9 * float(truth[finite].sum())
        # the first way that can follow the model and finds the truth
        reasons: list[str] = []
        ways = {
            "layer by layer": _by_layer,
            "vmap of the whole model": _by_vmap,
            "one backward pass per group": _by_loop,
        }
        for name, way in ways.items():
            held = sum(target.bytes) if way is _by_vmap else max(target.bytes, default=0)
            step = chunk_size or _chunk_size(x, bytes_saved + 2 * held, group_size)
            chunks = torch.split(x, step * group_size)
            try:
                first = _overflows(way(target, chunks[0], group_size), used)
                if probe < len(first):
                    row = first[probe]
                else:
                    row = _overflows(way(target, group, group_size), used)[0]
            except RuntimeError as error:  # of the way: the model itself has just run
                if way is _by_loop:
                    raise
                reasons.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                continue
            if torch.isclose(row, truth, rtol=1e-3, atol=tolerance)[finite].all():
                break
            reasons.append(f"{name}: differs from plain autograd by more than 0.1 %")
        title, not_others = type(model).__name__, "".join(f"; not {reason}" for reason in reasons)
        _LOG.info("layer_gradient_norms of %s: %s%s", title, name, not_others)
        if way is _by_loop:
            warnings.warn(
                f"layer_gradient_norms: {title} needs {name}, which is slow "
                f"({'; '.join(reasons)}).",
                RuntimeWarning,
                stacklevel=2,
            )
        # the other chunks
        rest = [_overflows(way(target, chunk, group_size), used) for chunk in chunks[1:]]
    return torch.cat([first, *rest])


_Found = tuple[Tensor, Tensor]  # objective (G,), squared norms (G, tensors)


class _Unknown(RuntimeError):
    """The layer-wise way does not know how to follow this model."""


class _Target(nn.Module):
    """The objective as a module above the model, for `functional_call` to swap the parameters."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        known: dict[Any, Callable[[Any, Tensor], Tensor]] = {
            "log_prob": lambda model, x: model.log_prob(x),
            "sum_z": lambda model, x: model(x)[0][-1].flatten(1).sum(1),
        }
        if not callable(objective) and objective not in known:
            raise OodlibError(
                'layer_gradient_norms: objective must be "log_prob", "sum_z" or a function (model, '
                f"x) -> (N,), got {objective!r}."
            )
        if objective == "log_prob" and not hasattr(model, "log_prob"):
            raise OodlibError(
                f"layer_gradient_norms: {type(model).__name__} has no log_prob(x). Give objective= "
                "a function (model, x) -> (N,)."
            )
        self.model = model
        self.objective = known[objective] if isinstance(objective, str) else objective
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
        value: Tensor = functional_call(self, weights or self.weights, (x,))
        return value


def _one_group(target: _Target, x: Tensor) -> tuple[Tensor, list[bool], int]:
    """By plain autograd: norms (tensors,), tensors that the objective uses, bytes saved for it."""
    known, saved = {p.untyped_storage().data_ptr() for p in target.weights.values()}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in known)
        return tensor.detach()

    weights = {name: p.detach().requires_grad_() for name, p in target.weights.items()}
    with saved_tensors_hooks(count, lambda tensor: tensor):
        value = target.at(x, weights).sum()
        gradients: Sequence[Tensor | None] = [None] * len(weights)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    zero = torch.zeros(1).double()
    norms = torch.cat([zero if g is None else squared(g[None]).cpu().double() for g in gradients])
    used = [g is not None for g in gradients]
    return _overflows((value.detach()[None], norms[None]), used)[0], used, saved


def _by_loop(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One backward pass per group."""
    rows = [_one_group(target, group)[0] for group in torch.split(x, group_size)]
    return torch.zeros(len(rows)), torch.stack(rows)


def _by_vmap(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One vectorised gradient per group; all of them are held at once."""

    def norms(group: Tensor) -> _Found:
        def value(weights: dict[str, Tensor]) -> _Found:
            total = target.at(group, weights).sum()
            return total, total

        gradients, total = grad(value, has_aux=True)(target.weights)
        return total, torch.stack([squared(g[None])[0] for g in gradients.values()])

    found: _Found = vmap(norms)(x.reshape(-1, group_size, *x.shape[1:]))
    return found


def _by_layer(target: _Target, x: Tensor, group_size: int) -> _Found:
    """One backward pass over the chunk, to outputs of layers only; norms layer by layer."""
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
                raise _Unknown(f"{type(module).__name__} takes or gives more than rows of images")
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
                layer = Layer(module, weights, inputs, g, len(norms))
                for local, squares in layer_squares(layer).items():
                    norms[:, column[names[local]]] = squares.to(norms)
                inputs.clear()  # the rest of the pass reuses the memory

            register_multi_grad_hook(tracked, measure)
            return tuple(tracked) if isinstance(output, tuple) else tracked[0]

        return hook

    handles = []
    try:
        for prefix, module in target.named_modules():
            own = [local for local, p in module._parameters.items() if p is not None]
            names = {local: f"{prefix}.{local}" for local in own}
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
    return value.detach().expand(len(x)).reshape(-1, group_size).sum(1), norms


def _overflows(found: _Found, used: list[bool]) -> Tensor:
    """Norms (G, tensors) on the CPU, with +inf where a gradient is not finite, or the whole
    objective of a group.
    """
    value, norms = (t.detach().double().cpu() for t in found)
    norms = norms.where(norms.isfinite(), torch.inf)
    return norms.where(value.isfinite()[:, None] | ~torch.tensor(used), torch.inf)


def _chunk_size(x: Tensor, bytes_needed: int, group_size: int) -> int:
    """Groups of one pass: a quarter of the free memory, at most what keeps the processor busy."""
    if x.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(x.device)[0], 512
    else:
        free, most = psutil.virtual_memory().available, 64
    return max(1, min(free // (4 * (bytes_needed + 1)), most // group_size))
